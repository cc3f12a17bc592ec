"""Estimates from gradients: derivatives of patches, parts of a difference."""

import dataclasses

import jax
import numpy as np
import pytest
from support.arrays import assert_close
from support.models import noisy_params, tiny_gpt2

from gpt2_jax.core.errors import UserError
from gpt2_jax.interpretation.linear import checked, estimate, integrated_gradients
from gpt2_jax.model.edits import Edit, run
from gpt2_jax.model.gpt2 import bind, init_params
from gpt2_jax.model.sites import SITES

B, T = 3, 7
CONFIG = tiny_gpt2()
CLEAN, CORRUPTED = np.random.default_rng(0).integers(0, 97, (2, B, T))
METRIC = jax.tree_util.Partial(lambda logits_BV: (logits_BV[:, 3] - logits_BV[:, 5]).mean())


@pytest.fixture(scope='module')
def model():
  return bind(CONFIG, noisy_params(CONFIG))


def test_an_estimate_is_the_slope_of_the_patch(model):
  values = {
    n: run(model, x, record=('z',))[1]['z'] for n, x in (('clean', CLEAN), ('own', CORRUPTED))
  }
  have = estimate(model, CLEAN, CORRUPTED, METRIC, over='z', by=('head', 'position'))
  assert have.shape == (CONFIG.n_layer, CONFIG.n_head, T)

  def after(share, **where):
    between = values['own'] + share * (values['clean'] - values['own'])
    return float(METRIC(run(model, CORRUPTED, Edit('z', value=between, **where))[0][:, -1]))

  for layer, head, position in [(0, 0, 0), (1, 2, 3), (2, 3, 6)]:
    where = dict(layer=layer, head=head, position=position)
    slope = (after(0.02, **where) - after(-0.02, **where)) / 0.04
    np.testing.assert_allclose(have[layer, head, position], slope, rtol=2e-2, atol=2e-3)
  by_head = estimate(model, CLEAN, CORRUPTED, METRIC, over='z')
  assert_close(have.sum(-1), by_head)


@pytest.mark.slow
@pytest.mark.parametrize('over', [name for name, site in SITES.items() if site.layered])
def test_an_estimate_of_each_site_is_the_forward_derivative_of_its_patch(model, over):
  own, clean = (run(model, x, record=(over,))[1][over] for x in (CORRUPTED, CLEAN))
  have = estimate(model, CLEAN, CORRUPTED, METRIC, over=over, by=('position',))

  @jax.jit
  def slope(layer, position):
    edit = lambda value: Edit(over, value=value, layer=layer, position=position)
    after = lambda value: METRIC(run(model, CORRUPTED, edit(value))[0][:, -1])
    return jax.jvp(after, (own,), (clean - own,))[1]

  want = [[slope(layer, position) for position in range(T)] for layer in range(CONFIG.n_layer)]
  assert_close(have, want)


@pytest.mark.slow
def test_an_estimate_of_a_linear_path_is_the_patch():
  """Norms that are all epsilon are linear, and so is the last block where its MLP writes nothing,
  but for the softmax."""
  config = dataclasses.replace(CONFIG, layer_norm_epsilon=1.0, tie_word_embeddings=False)
  params = init_params(config, 0)
  attn, mlp = params['h']['attn'], params['h']['mlp']
  small = lambda tree, scale: jax.tree.map(lambda x: scale * x, tree)  # to a variance below 1e-6
  params |= {name: small(params[name], 1e-4) for name in ('wte', 'wpe')}
  attn['c_proj'], mlp['c_proj'] = small(attn['c_proj'], 1e-4), small(mlp['c_proj'], 0)
  for norm in (params['h']['ln_1'], params['h']['ln_2'], params['ln_f']):
    norm['weight'] = 1e4 * norm['weight']
  model = bind(config, params)
  for over in ('v', 'pattern', 'q'):
    found = checked(model, CLEAN, CORRUPTED, METRIC, over=over)
    error = np.abs(found.estimate - found.exact)[-1].max() / np.abs(found.exact[-1]).max()
    assert error > 0.01 if over == 'q' else error < 1e-4


def test_estimates_beside_what_is_so(model):
  near = checked(model, CLEAN, CORRUPTED, METRIC, over='mlp_out', by=('position',))
  assert near.exact.shape == (CONFIG.n_layer, T)
  assert np.abs(near.exact[-1, :-1]).max() < 1e-4 and np.abs(near.estimate[-1, :-1]).max() == 0
  want = np.abs(near.estimate - near.exact).mean() / np.abs(near.exact).mean()
  assert near.error == pytest.approx(want) and near.error > 0
  base = METRIC(run(model, CORRUPTED)[0][:, -1])
  _, found = run(model, CLEAN, record=('mlp_out',))
  edit = Edit('mlp_out', value=found['mlp_out'], layer=1, position=2)
  after = METRIC(run(model, CORRUPTED, edit)[0][:, -1])
  np.testing.assert_allclose(near.exact[1, 2], after - base, rtol=1e-3, atol=1e-4)


def test_integrated_gradients_add_up_to_the_difference(model):
  of = lambda tokens: METRIC(run(model, tokens)[0][:, -1])
  parts_BT = integrated_gradients(model, CLEAN, CORRUPTED, METRIC, steps=400)
  assert parts_BT.shape == (B, T)
  np.testing.assert_allclose(parts_BT.sum(), of(CLEAN) - of(CORRUPTED), rtol=1e-4)
  same = CLEAN.copy()
  same[:, 2] = CORRUPTED[:, 2]
  assert (integrated_gradients(model, same, CORRUPTED, METRIC, steps=400)[:, 2] == 0).all()


def test_what_is_wrong_is_an_error(model):
  for says, options in {
    'no axis': dict(over='mlp_out', by=('head',)),
    'outside of the blocks': dict(over='embed'),
    'among 0 … 6': dict(read=7),
    'one for each of 3 rows': dict(read=[1, 2]),
    'names an axis twice': dict(by=('head', 'head')),
    'read = None': dict(read=None),
    'no count': dict(steps=-1),
  }.items():
    with pytest.raises(UserError, match=says):
      estimate(model, CLEAN, CORRUPTED, METRIC, **options)
  with pytest.raises(UserError, match='one number'):
    estimate(model, CLEAN, CORRUPTED, lambda logits_BV: logits_BV[:, 1])

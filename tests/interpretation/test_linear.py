"""Estimates from gradients: derivatives of patches, sums over edges, parts of a difference."""

import jax
import numpy as np
import pytest
from support.arrays import assert_close
from support.models import tiny_gpt2

from gpt2_jax.core.errors import UserError
from gpt2_jax.interpretation.edges import edges
from gpt2_jax.interpretation.linear import checked, estimate, integrated_gradients
from gpt2_jax.model.edits import Edit, run
from gpt2_jax.model.gpt2 import bind, init_params

B, T = 3, 7
CONFIG = tiny_gpt2()
CLEAN, CORRUPTED = np.random.default_rng(0).integers(0, 97, (2, B, T))
METRIC = jax.tree_util.Partial(lambda logits_BV: (logits_BV[:, 3] - logits_BV[:, 5]).mean())


@pytest.fixture(scope='module')
def model():
  noise = lambda x: x + 0.1 * jax.random.normal(jax.random.key(x.size), x.shape)
  return bind(CONFIG, jax.tree.map(noise, init_params(CONFIG, 0)))


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


@pytest.mark.parametrize('steps', [pytest.param(0, marks=pytest.mark.slow), 3])
def test_a_writer_is_the_sum_of_its_edges(model, steps):
  found = edges(model, CLEAN, CORRUPTED, METRIC, steps=steps)
  L, N = CONFIG.n_layer, CONFIG.n_head
  of_U = np.asarray(found.heads_ULCN.sum((1, 2, 3)) + found.mlps_UL.sum(1) + found.logits_U)
  assert found.writers()[1:3] == ['0.0', '0.1'] and len(found.writers()) == len(of_U)
  of_LN = of_U[1:].reshape(L, N + 1)
  nodes = lambda over, by: estimate(model, CLEAN, CORRUPTED, METRIC, over=over, by=by, steps=steps)
  assert_close(of_LN[:, :N], nodes('z', ('head',)))
  assert_close(of_LN[:, N], nodes('mlp_out', ()))
  if not steps:  # the embedding is all that the first block reads
    assert_close(of_U[0], nodes('resid_pre', ())[0])
  assert (found.heads_ULCN[1:, 0] == 0).all() and (found.mlps_UL[1 + N :, 0] == 0).all()


def test_integrated_gradients_add_up_to_the_difference(model):
  of = lambda tokens: METRIC(run(model, tokens)[0][:, -1])
  parts_BT = integrated_gradients(model, CLEAN, CORRUPTED, METRIC, steps=400)
  assert parts_BT.shape == (B, T)
  np.testing.assert_allclose(parts_BT.sum(), of(CLEAN) - of(CORRUPTED), rtol=1e-2, atol=1e-2)
  same = CLEAN.copy()
  same[:, 2] = CORRUPTED[:, 2]
  assert (integrated_gradients(model, same, CORRUPTED, METRIC, steps=400)[:, 2] == 0).all()


def test_what_is_wrong_is_an_error(model):
  for says, options in {
    'no axis': dict(over='mlp_out', by=('head',)),
    'outside of the blocks': dict(over='embed'),
    'among 0 … 6': dict(read=7),
    'no count': dict(steps=-1),
  }.items():
    with pytest.raises(UserError, match=says):
      estimate(model, CLEAN, CORRUPTED, METRIC, **options)
  with pytest.raises(UserError, match='one number'):
    estimate(model, CLEAN, CORRUPTED, lambda logits_BV: logits_BV[:, 1])

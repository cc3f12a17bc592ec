"""A sweep is the loop of its single runs; parts add up to the logits."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from support.arrays import assert_close
from support.models import noisy_params, tiny_gpt2

from gpt2_jax.core.errors import UserError
from gpt2_jax.interpretation import patching
from gpt2_jax.interpretation.packing import packs
from gpt2_jax.interpretation.patching import ablate, patch
from gpt2_jax.model.edits import Edit, run
from gpt2_jax.model.gpt2 import bind
from gpt2_jax.model.sites import SITES

B, T = 3, 7
CONFIG = tiny_gpt2()
CLEAN, CORRUPTED = np.random.default_rng(0).integers(0, 97, (2, B, T))
LAYERED = [name for name, site in SITES.items() if site.layered]
WHOLE = 2**40  # bytes: all patches of a layer in one chunk


@pytest.fixture(scope='module')
def model():
  return bind(CONFIG, noisy_params(CONFIG))


def metric(logits_BV):
  return logits_BV[:, 3] - logits_BV[:, 5]


def one_by_one(model, tokens, values, over, by, read=-1):
  """The sweep as a loop over `run`, each a whole forward pass."""
  sizes = dict(position=T, head=CONFIG.n_head, neuron=values.shape[-1])
  found = []
  for layer, *place in itertools.product(range(CONFIG.n_layer), *(range(sizes[p]) for p in by)):
    edit = Edit(over, value=values, layer=layer, **dict(zip(by, place)))
    logits_BTV, _ = run(model, tokens, edit)
    found.append(metric(logits_BTV[np.arange(B), np.broadcast_to(read, B)]))
  return np.reshape(found, (CONFIG.n_layer, *(sizes[p] for p in by), B))


@pytest.mark.parametrize(
  'over, by',
  [('resid_pre', ('position',)), ('v', ('head',)), ('z', ('head', 'position'))]
  + [('pattern', ('position', 'head')), ('mlp_out', ())]
  + [pytest.param(n, ('position',), marks=pytest.mark.slow) for n in LAYERED if n != 'resid_pre']
  + [pytest.param(n, ('head',), marks=pytest.mark.slow) for n in ('q', 'k', 'z', 'result')],
)
def test_a_sweep_is_its_single_runs(model, over, by):
  values = run(model, CLEAN, record=(over,))[1][over]
  have = patch(model, CLEAN, CORRUPTED, metric, over=over, by=by)
  assert_close(have, one_by_one(model, CORRUPTED, values, over, by))


def test_neurons_and_reading_elsewhere(model):
  values = run(model, CLEAN, record=('mlp_post',))[1]['mlp_post']
  read = np.array([2, -1, 4])
  have = patch(model, CLEAN, CORRUPTED, metric, over='mlp_post', by=('neuron',), read=read)
  assert_close(have, one_by_one(model, CORRUPTED, values, 'mlp_post', ('neuron',), read))
  have = patch(model, CLEAN, CORRUPTED, lambda logits: logits[:, :, 3], read=None)
  assert have.shape == (CONFIG.n_layer, T, B, T)
  plain = run(model, CORRUPTED)[0][..., 3]
  for position in range(T):  # what comes before a patch is as it was
    early = np.broadcast_to(plain[:, :position], (3, B, position))
    np.testing.assert_allclose(have[:, position, :, :position], early, rtol=1e-4, atol=1e-4)


def test_all_patched_is_the_clean_run_and_none_the_corrupted(model):
  have = patch(model, CLEAN, CORRUPTED, metric, over='resid_mid', by=())
  assert_close(have, np.broadcast_to(metric(run(model, CLEAN)[0][:, -1]), have.shape))
  have = patch(model, CORRUPTED, CORRUPTED, metric, over='z', by=('position', 'head'))
  assert_close(have, np.broadcast_to(metric(run(model, CORRUPTED)[0][:, -1]), have.shape))


@pytest.mark.parametrize('memory', [1, 200_000])
def test_chunks_change_nothing_and_are_one_program(model, memory):
  how = dict(over='z', by=('position', 'head'))
  before = patching._chunk._cache_size()
  have = patch(model, CLEAN, CORRUPTED, metric, **how, memory=memory)
  assert patching._chunk._cache_size() <= before + 1
  assert_close(have, patch(model, CLEAN, CORRUPTED, metric, **how, memory=WHOLE))


@pytest.mark.parametrize('how', ['zero', 'mean', 'resample'])
def test_ablation(model, how):
  values = np.asarray(run(model, CLEAN, record=('z',))[1]['z'])
  instead = {'zero': 0 * values, 'mean': values.mean(1, keepdims=True) + 0 * values}
  instead['resample'] = values[:, [1, 2, 0]]
  have = ablate(model, CLEAN, metric, how=how)
  assert_close(have, one_by_one(model, CLEAN, instead[how], 'z', ('head',)))


def test_packs_hold_each_patch_and_few_tokens():
  places = np.array([(t, n, -1) for t in range(16) for n in range(12)])
  found = list(packs(places, 8, 16, 40))
  assert len(found) == 5 and len({pack.slot_KBT.shape for _, pack in found}) == 1
  assert len({len(pack.row_M) for _, pack in found}) == 1
  assert set(np.concatenate([numbers for numbers, _ in found])) == set(range(len(places)))
  assert sum(len(pack.row_M) for _, pack in found) < 1.15 * 8 * 12 * sum(range(1, 17))


def test_what_does_not_exist_is_an_error(model):
  for says, options in {
    'no site': dict(over='resid'),
    'outside of the blocks': dict(over='embed'),
    'it has position, neuron': dict(by=('head',)),
    'read = 7': dict(read=7),
    'names an axis twice': dict(by=('position', 'position')),
  }.items():
    with pytest.raises(UserError, match=says):
      patch(model, CLEAN, CORRUPTED, metric, **options)
  with pytest.raises(UserError, match='both are to be'):
    patch(model, CLEAN[:, 1:], CORRUPTED, metric)
  with pytest.raises(UserError, match='zero, mean, resample'):
    ablate(model, jnp.asarray(CLEAN), metric, how='none')

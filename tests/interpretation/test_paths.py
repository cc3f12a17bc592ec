"""Path patching is two runs of a plain float64 model, a sender at a time."""

import jax
import numpy as np
import pytest
from support.arrays import assert_close
from support.models import noisy_params, tiny_gpt2
from support.plain_gpt2 import forward

from gpt2_jax.core.errors import UserError
from gpt2_jax.interpretation.paths import path_patch
from gpt2_jax.model.gpt2 import bind

CONFIG = tiny_gpt2()
CLEAN, CORRUPTED = np.random.default_rng(0).integers(0, 97, (2, 2, 6))
METRIC = jax.tree_util.Partial(lambda logits_BV: logits_BV[:, 3] - logits_BV[:, 5])


@pytest.fixture(scope='module')
def params():
  return noisy_params(CONFIG)


def plain_paths(params, receivers, into, hold_mlps):
  plain = jax.tree.map(lambda x: np.asarray(x, np.float64), params)

  def recorded(tokens, change=lambda name, layer, x: x):
    found = {}

    def at(name, layer, x):
      found[name, layer] = change(name, layer, x.copy())
      return found[name, layer]

    return METRIC(forward(CONFIG, plain, tokens, at)[:, -1]), found

  theirs, ours = recorded(CLEAN)[1], recorded(CORRUPTED)[1]

  def path(sender):
    def held(name, layer, x):
      if name == 'z':
        x = ours[name, layer].copy()
        if layer == sender[0]:
          x[:, :, sender[1]] = theirs[name, layer][:, :, sender[1]]
      return ours[name, layer] if name == 'mlp_out' and hold_mlps else x

    result, found = recorded(CORRUPTED, held)
    if receivers is None:
      return result

    def received(name, layer, x):
      for at, head in receivers:
        if (name, layer) == (into, at):
          x[:, :, head] = found[name, layer][:, :, head]
      return x

    return recorded(CORRUPTED, received)[0]

  L, N = CONFIG.n_layer, CONFIG.n_head
  return np.array([[path((layer, head)) for head in range(N)] for layer in range(L)])


@pytest.mark.parametrize(
  'receivers, into, hold_mlps',
  [([(2, 1), (1, 3)], 'k', False)]
  + [
    pytest.param(*how, marks=pytest.mark.slow) for how in [(None, 'q', True), ([(2, 0)], 'v', True)]
  ],
)
def test_paths_are_two_plain_runs(params, receivers, into, hold_mlps):
  how = dict(receivers=receivers, into=into, hold_mlps=hold_mlps)
  have = path_patch(bind(CONFIG, params), CLEAN, CORRUPTED, METRIC, **how)
  assert_close(have, plain_paths(params, **how))


@pytest.mark.slow
def test_chunks_change_nothing(params):
  of = lambda memory: path_patch(
    bind(CONFIG, params), CLEAN, CORRUPTED, METRIC, receivers=[(2, 1)], memory=memory
  )
  assert_close(of(1), of(2**40))


def test_what_does_not_exist_is_an_error(params):
  for says, options in {
    'below 3': dict(receivers=[(3, 0)]),
    'touches nothing': dict(receivers=np.zeros((0, 2), int)),
    'none of q, k, v': dict(into='z'),
    'among 0 … 5': dict(read=6),
  }.items():
    with pytest.raises(UserError, match=says):
      path_patch(bind(CONFIG, params), CLEAN, CORRUPTED, METRIC, **options)

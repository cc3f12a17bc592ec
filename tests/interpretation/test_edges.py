"""Edges are derivatives along them, and add up to the nodes that write to them."""

import jax
import numpy as np
import pytest
from support.arrays import assert_close
from support.models import noisy_params, tiny_gpt2
from support.plain_gpt2 import forward

from gpt2_jax.interpretation.edges import edges
from gpt2_jax.interpretation.linear import estimate
from gpt2_jax.model.gpt2 import bind
from gpt2_jax.model.pretrained_model import params_of

B, T = 3, 7
CONFIG = tiny_gpt2()
CLEAN, CORRUPTED = np.random.default_rng(0).integers(0, 97, (2, B, T))
METRIC = jax.tree_util.Partial(lambda logits_BV: (logits_BV[:, 3] - logits_BV[:, 5]).mean())


@pytest.fixture(scope='module')
def model():
  return bind(CONFIG, noisy_params(CONFIG))


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


def plain_edge(params, writer, reader, steps, size=1e-4):
  """The derivative of the metric along one edge, by central differences in a float64 model.

  Args:
    params: in float64.
    writer: ('embed', None, None), ('z', layer, head) or ('mlp_out', layer, None).
    reader: ('q', layer, head), also 'k', 'v'; ('mlp_pre', layer, None); or the logits, which read
      ('resid_post', the last layer, None).
    steps: as of `edges`.
    size: of the step, in shares of the change.
  """

  def recorded(tokens):
    found = {}
    forward(CONFIG, params, tokens, lambda name, i, x: found.setdefault((name, i), x))
    return found

  theirs, ours = recorded(CLEAN), recorded(CORRUPTED)
  name, layer, head = writer
  change = theirs[name, layer] - ours[name, layer]
  if name == 'z':
    change = change[:, :, head] @ params['h']['attn']['c_proj']['weight'][layer, head]
  into, at_layer, at_head = reader

  def normed(p, x):
    x = x - x.mean(-1, keepdims=True)
    scale = np.sqrt((x**2).mean(-1, keepdims=True) + CONFIG.layer_norm_epsilon)
    return x / scale * p['weight'][at_layer] + p['bias'][at_layer]

  def metric(share, moved):
    stream = {}

    def at(name, i, x):
      if name == 'embed':
        x = ours['embed', None] + share * (theirs['embed', None] - ours['embed', None])
      if name in ('resid_pre', 'resid_mid'):
        stream[name, i] = x + moved * change
      if (name, i) != (into, at_layer):
        return x
      if into == 'resid_post':
        return x + moved * change
      if into == 'mlp_pre':
        p = params['h']['mlp']['c_fc']
        return normed(params['h']['ln_2'], stream['resid_mid', i]) @ p['weight'][i] + p['bias'][i]
      p, (c, n) = params['h']['attn']['c_attn'], ('qkv'.index(into), at_head)
      x = x.copy()
      x[:, :, n] = normed(params['h']['ln_1'], stream['resid_pre', i]) @ p['weight'][i, :, c, n]
      x[:, :, n] += p['bias'][i, c, n]
      return x

    return METRIC(forward(CONFIG, params, CORRUPTED, at)[:, -1])

  slope = lambda share: (metric(share, size) - metric(share, -size)) / (2 * size)
  return np.mean([slope(i / steps) for i in range(1, steps + 1)] if steps else slope(0.0))


@pytest.mark.parametrize('steps', [0, 3])
def test_an_edge_is_a_derivative_along_it_alone(model, steps):
  found = edges(model, CLEAN, CORRUPTED, METRIC, steps=steps)
  params = jax.tree.map(lambda x: np.asarray(x, np.float64), params_of(model))
  names, last = found.writers(), CONFIG.n_layer - 1
  cases = [
    (('embed', None, None), ('q', 0, 3)),
    (('embed', None, None), ('mlp_pre', 2, None)),
    (('z', 0, 1), ('k', 1, 2)),
    (('z', 1, 2), ('q', 2, 1)),
    (('z', 1, 3), ('mlp_pre', 1, None)),
    (('z', 2, 0), ('resid_post', last, None)),
    (('mlp_out', 0, None), ('v', 2, 0)),
    (('mlp_out', 0, None), ('mlp_pre', 1, None)),
    (('mlp_out', 2, None), ('resid_post', last, None)),
  ]
  of = {name: found.heads_ULCN[:, :, c] for c, name in enumerate('qkv')}
  of |= {'mlp_pre': found.mlps_UL, 'resid_post': found.logits_U}
  have = []
  for (kind, layer, head), (into, to, at_head) in cases:
    u = names.index({'embed': 'embed', 'z': f'{layer}.{head}', 'mlp_out': f'mlp {layer}'}[kind])
    of_reader = of[into][u] if into == 'resid_post' else of[into][u, to]
    have.append(float(of_reader if at_head is None else of_reader[at_head]))
  want = [plain_edge(params, *case, steps) for case in cases]
  assert min(np.abs(want)) > 1e-3
  assert_close(have, want)

"""Reading and changing activations equals a plain float64 run in which they are read and changed."""

import dataclasses
import functools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict
from hypothesis import given, settings
from hypothesis import strategies as st
from support.arrays import assert_close, mesh_of
from support.models import tiny_gpt2
from support.plain_gpt2 import forward

from gpt2_jax.core.errors import UserError
from gpt2_jax.model import edits as edits_module
from gpt2_jax.model.decode_layout import for_decoding
from gpt2_jax.model.edits import AXES, Edit, Listening, run, sizes_of
from gpt2_jax.model.gpt2 import bind, init_params
from gpt2_jax.model.pretrained_model import params_of
from gpt2_jax.model.sites import SITES

B, T = 4, 7
CONFIG = tiny_gpt2()
X = np.random.default_rng(0).integers(0, 97, (B, T)).astype(np.int32)
SIZES = sizes_of(CONFIG, B, T) | {'1': 1}


@functools.cache
def model():
  params = init_params(CONFIG, 0)
  rng = np.random.default_rng(1)  # biases begin as zero
  noise = lambda x: (np.asarray(x) + 0.1 * rng.normal(size=x.shape)).astype(np.float32)
  params = jax.tree.map(noise, params)
  params['wte']['weight'][CONFIG.vocab_size :] = 0
  plain = jax.tree.map(lambda x: x.astype(np.float64), params)
  return bind(CONFIG, jax.tree.map(jnp.asarray, params)), plain


def plain(edits=(), record=()):
  """`run`, of the plain model; edits are (site, letter -> indices, function of the part)."""
  found = {name: [] for name in record}

  def at(name, layer, value):
    for site, where, change in edits:
      if site == name and (layer is None or layer in where['L']):
        value = value.copy()
        axes = [where.get(a, np.arange(n)) for a, n in zip(SITES[name].letters, value.shape)]
        value[np.ix_(*axes)] = change(value)[np.ix_(*axes)]
    if name in found:
      found[name].append(value)
    return value

  logits = forward(CONFIG, model()[1], X, at)
  return logits, {n: np.stack(v) if SITES[n].layered else v[0] for n, v in found.items()}


def where_of(edit):
  """letter -> indices, of an edit whose places are indices, slices, masks or None."""
  letters = SITES[edit.site].letters + 'L' * SITES[edit.site].layered
  pick = lambda place, n: np.arange(n) if place is None else np.atleast_1d(np.arange(n)[place])
  return {a: pick(getattr(edit, AXES[a]), SIZES[a]) for a in letters if a in AXES}


def value_for(name, seed=0):
  shape = [SIZES[a] for a in SITES[name].letters]
  noise = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
  return np.abs(noise) + 0.5 if 'scale' in name else noise


def test_every_site_is_that_of_the_plain_model():
  logits, found = run(model()[0], X, record=tuple(SITES))
  want_logits, want = plain(record=tuple(SITES))
  assert_close(logits, want_logits)
  assert list(want) == list(SITES) and set(found) == set(SITES)
  for name, value in want.items():
    L = 'L' * SITES[name].layered
    assert value.shape == tuple(SIZES[a] for a in L + SITES[name].letters)
    if name == 'attn_scores':  # what is not seen is the lowest number
      value, found[name] = np.tril(value), np.tril(found[name])
    assert_close(found[name], value)


@pytest.mark.parametrize('name', SITES)
def test_a_patch_is_a_run_with_that_activation(name):
  value = value_for(name)
  layers = (0, CONFIG.n_layer - 1) if SITES[name].layered else (None,)
  for layer in layers:
    for position in (0, T - 1):
      edit = Edit(name, value=value, layer=layer, position=position)
      have, found = run(model()[0], X, edit, record=('resid_post', name))
      want, want_found = plain([(name, where_of(edit), lambda _: value)], ('resid_post', name))
      assert_close(have, want)
      assert_close(found['resid_post'], want_found['resid_post'])


CHANGES = {
  'replace': lambda x, v: np.broadcast_to(v, x.shape),
  'add': lambda x, v: x + v,
  'scale': lambda x, v: x * v,
  'zero': lambda x, v: 0 * x,
  'mean': lambda x, v: np.broadcast_to(x.mean(0, keepdims=True), x.shape),
}


@st.composite
def some_edit(draw):
  name = draw(st.sampled_from([n for n in SITES if 'scale' not in n and n != 'attn_scores']))
  how = draw(st.sampled_from(list(CHANGES)))
  places = {}
  for letter in SITES[name].letters + 'L' * SITES[name].layered:
    n = SIZES[letter]
    index, bits = st.integers(-n, n - 1), st.lists(st.booleans(), min_size=n, max_size=n)
    mask = bits.filter(any).map(np.array)
    part = index.filter(lambda i: i >= 0).map(lambda i: slice(i, None))
    places[AXES[letter]] = draw(st.one_of(st.none(), index, mask, part))
  value = None if how in ('zero', 'mean') else value_for(name, draw(st.integers(0, 9)))
  return Edit(name, how, value, **places)


@settings(max_examples=40, deadline=None)
@given(st.lists(some_edit(), min_size=1, max_size=2))
def test_any_edits(edits):
  have, _ = run(model()[0], X, edits)
  change = lambda e: lambda x: CHANGES[e.how](x, e.value)
  want, _ = plain([(e.site, where_of(e), change(e)) for e in edits])
  assert_close(have + 1, want + 1, 3e-5)  # they may all be zero


def test_a_function_and_a_value_of_each_layer():
  _, found = run(model()[0], X, record=('z', 'resid_post'))
  twice = Edit('z', lambda x, value: x + value, found['z'], head=2, layer=1)
  have, _ = run(model()[0], X, twice)
  want, _ = run(model()[0], X, Edit('z', 'scale', 2.0, head=2, layer=1))
  assert_close(have, want)
  disturbed = [Edit('embed', 'scale', 0.5), Edit('resid_post', value=found['resid_post'])]
  assert_close(run(model()[0], X, disturbed)[0], run(model()[0], X)[0])


def test_another_place_compiles_nothing():
  patch = lambda **where: run(model()[0], X, Edit('z', 'scale', 0.5, **where))
  patch(layer=0, head=1)
  before = edits_module._run._cache_size()
  for where in ({}, dict(layer=2), dict(position=slice(2, 4)), dict(head=np.arange(4) < 2)):
    patch(**where)
  assert edits_module._run._cache_size() == before


def test_under_jit_vmap_and_grad():
  bare = model()[0]
  heads = lambda layer, head: run(bare, X, Edit('z', 'zero', layer=layer, head=head))[0]
  many = jax.jit(jax.vmap(heads))(jnp.array([0, 1, 2, -1]), jnp.array([3, 0, 1, 1]))
  for i, (layer, head) in enumerate([(0, 3), (1, 0), (2, 1), (2, 1)]):
    assert_close(many[i], heads(layer, head))
  assert np.isnan(jax.jit(heads)(0, 4)).all()  # nowhere

  def score(value):
    logits, _ = run(bare, X, Edit('resid_mid', 'add', value, layer=1, position=3))
    return jax.nn.log_softmax(logits[:, -1])[:, 5].mean()

  direction = jnp.asarray(value_for('resid_mid'))
  slope = jnp.vdot(jax.grad(score)(jnp.zeros_like(direction)), direction)
  step = 1e-2
  differences = (score(step * direction) - score(-step * direction)) / (2 * step)
  np.testing.assert_allclose(slope, differences, rtol=1e-2)


@pytest.mark.parametrize('sizes', [(2, 2, 2), (1, 1, 2, 1), (2, 1, 1, 1)])
def test_on_a_mesh(sizes):
  record = ('resid_pre', 'q', 'pattern', 'result', 'mlp_post', 'ln1.scale', 'logits')
  changes = [
    Edit('v', value=value_for('v'), layer=1, position=2, head=3),
    Edit('pattern', 'mean', layer=0, head=1, position=slice(2, None)),
    Edit('mlp_post', 'zero', layer=-1, neuron=slice(0, 40)),
    Edit('resid_post', 'add', np.ones(CONFIG.n_embd, np.float32), layer=0, row=1),
  ]
  want, want_found = run(model()[0], X, changes, record)
  with mesh_of(*sizes):
    params = jax.tree.map(
      lambda x, like: jax.device_put(np.asarray(x, np.float32), like.sharding),
      model()[1],
      init_params(CONFIG, 0),
    )
  have, found = run(bind(CONFIG, params), X, changes, record)
  assert_close(have, want)
  for name in record:
    assert_close(found[name], want_found[name])


def test_in_the_form_of_decoding():
  config, params = for_decoding(CONFIG, params_of(model()[0]))
  changes = [Edit('z', 'zero', layer=1, head=2), Edit('k', value=value_for('k'), layer=2)]
  have, found = run(bind(config, params), X, changes, ('pattern',))
  want, want_found = run(model()[0], X, changes, ('pattern',))
  assert_close(have, want)
  assert_close(found['pattern'], want_found['pattern'])
  with pytest.raises(UserError, match='train'):
    run(bind(config, params), X, record=('result',))


@pytest.mark.parametrize(
  'edit, says',
  [
    (Edit('resid_pst', 'zero'), 'near it: resid_post'),
    (Edit('z', 'zero', layer=3), 'z: layer = 3 is not among 0 … 2'),
    (Edit('z', 'zero', head=-5), 'head = -5'),
    (Edit('z', 'zero', position=slice(7, 9)), 'touches nothing'),
    (Edit('z', 'zero', row=[]), 'touches nothing'),
    (Edit('z', 'zero', row=np.ones(5, bool)), 'among 0 … 3'),
    (Edit('resid_mid', 'zero', head=0), 'no axis head: it has layer, row, position, neuron'),
    (Edit('embed', 'zero', layer=0), 'no axis layer'),
    (Edit('z', 'double'), 'replace, add'),
    (Edit('z', 'add'), 'wants a value'),
    (Edit('z', 'zero', 1.0), 'has no value'),
    (Edit('z', value=np.zeros((T, 5, 8))), 'BTNH'),
    ('z', 'no Edit'),
  ],
)
def test_what_touches_nothing_is_an_error(edit, says):
  with pytest.raises(UserError, match=says):
    run(model()[0], X, [edit])
  with pytest.raises(UserError, match='it has embed, .*resid_post'):
    run(model()[0], X, record=('residual',))


def test_nobody_costs_nothing():
  params = model()[0]
  hlo = lambda **how: jax.jit(lambda: params.transformer(X, **how)[::2]).lower().as_text()
  assert hlo() == hlo(listen=Listening())
  assert hlo() != hlo(listen=Listening(record=('q',)))
  scanned = dataclasses.replace(CONFIG, remat='full')
  recording = lambda p: run(bind(scanned, p), X, record=('z',))[0].sum()
  assert jax.tree.leaves(jax.grad(recording)(params_of(params)))[0].any()


def test_every_site_is_transformer_lens():
  with np.load(Path(__file__).parent.parent / 'golden' / 'transformer_lens.npz') as f:
    want = dict(f)
  params = {n.removeprefix('params/'): x for n, x in want.items() if n.startswith('params/')}
  sizes = dict(vocab_size=31, n_positions=8, n_embd=15, n_layer=2, n_head=3, n_inner=29)
  config = tiny_gpt2(**sizes, vocab_multiple=1)
  bare = bind(config, jax.tree.map(jnp.asarray, unflatten_dict(params, sep='.')))
  logits, found = run(bare, want['tokens'], record=tuple(SITES))
  assert_close(logits, want['logits'])
  for name, site in SITES.items():
    if not site.lens:
      continue
    have, layers = np.asarray(found[name]), range(config.n_layer)
    theirs = [want[site.lens.format(layer=i)] for i in layers] if site.layered else want[site.lens]
    if name == 'attn_scores':  # both have the lowest number where nothing is seen
      have, theirs = np.tril(have), np.tril(theirs)
    assert_close(have, theirs)
  hooks = {re.sub(r'blocks\.\d+', 'blocks.{layer}', n) for n in want if 'hook_' in n}
  assert hooks == {site.lens for site in SITES.values()} - {''}

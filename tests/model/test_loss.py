"""The loss in chunks: the plain form's, with its gradients, and no batch's logits in memory."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.arrays import assert_close

from gpt2_jax.model import cross_entropy as loss
from gpt2_jax.model import decode_layout
from gpt2_jax.model.config import GPTConfig
from gpt2_jax.model.cross_entropy import LOSS_TERMS, CrossEntropyOptions, cross_entropy, num_chunks
from gpt2_jax.model.gpt2 import bind, init_params
from gpt2_jax.model.parameters import ROWS
from gpt2_jax.parallel.sharding import RULES, factorizations, make_mesh
from gpt2_jax.planning import hlo_text
from gpt2_jax.training.step import init_state, make_train_step, nll


def fused(config, x_BTD, table_VD, targets_BT, weights_BT, z=0.0):
  """Total and each loss, by `cross_entropy`; `z` is the factor of the z-loss."""
  fields = config.vocab_size, config.width_ratio, config.precision, config.reduce_dtype
  options = CrossEntropyOptions(*fields, (('z_loss', z),) if z else ())
  return cross_entropy(options, x_BTD, table_VD, targets_BT, weights_BT)[:2]


def plain(config, x_BTD, table_VD, targets_BT, weights_BT, z=0.0):
  """The same, from all logits at once."""
  logits_BTV = (
    jnp.einsum(
      'BTD,VD->BTV',
      x_BTD,
      table_VD.astype(x_BTD.dtype),
      precision='highest',
      preferred_element_type=jnp.float32,
    )
    / config.width_ratio
  )
  logits_BTV = logits_BTV[..., : config.vocab_size]
  target_BT = jnp.take_along_axis(logits_BTV, targets_BT[..., None], 2)[..., 0]
  log_Z_BT = jax.nn.logsumexp(logits_BTV, -1)
  each_BT = log_Z_BT - target_BT
  return (weights_BT * (each_BT + z * log_Z_BT**2)).sum(), each_BT


def case(B: int, T: int, D: int, V: int, seed: int = 0, **fields):
  """A config and what its loss is made of; some of the weights are zero."""
  config = GPTConfig(vocab_size=V, n_embd=D, n_head=D, vocab_multiple=8, **fields)
  rng = np.random.default_rng(seed)
  table_VD = rng.normal(size=(config.padded_vocab_size, D)).astype(np.float32)
  weights_BT = rng.uniform(size=(B, T)) * (rng.uniform(size=(B, T)) < 0.8)
  return config, (
    jnp.asarray(rng.normal(size=(B, T, D)), config.dtype),
    jnp.asarray(table_VD),
    jnp.asarray(rng.integers(0, V, (B, T))),
    jnp.asarray(weights_BT + 0.01, jnp.float32),
  )


def chunks_of(monkeypatch, tokens: int, V: int):
  """From now on, chunks of at most so many tokens."""
  monkeypatch.setattr(loss, 'chunk_bytes', lambda: 4 * V * tokens)


def with_gradients(f, config, arguments, z=0.0):
  """Total, each and the gradients of 3 · total by hidden states, table and weights."""

  def scaled(x_BTD, table_VD, weights_BT):
    total, each_BT = f(config, x_BTD, table_VD, arguments[2], weights_BT, z)
    return 3 * total, (total, each_BT)

  gradients, values = jax.jit(jax.grad(scaled, (0, 1, 2), has_aux=True))(
    arguments[0], arguments[1], arguments[3]
  )
  return *values, *gradients


@settings(max_examples=6, deadline=None)
@given(
  st.integers(1, 3),
  st.integers(1, 9),
  st.integers(1, 6),
  st.integers(2, 40),
  st.integers(1, 12),
  st.booleans(),
  st.sampled_from([0.0, 0.3]),
)
@example(3, 7, 5, 33, 6, True, 0.0)
@example(3, 7, 5, 33, 6, True, 0.3)
def test_it_is_the_plain_loss(B, T, D, V, tokens, mup, z):
  config, arguments = case(B, T, D, V, **dict(parametrization='mup', mup_base_width=2) if mup else {})
  with pytest.MonkeyPatch.context() as patched:
    chunks_of(patched, tokens, config.padded_vocab_size)
    have = with_gradients(fused, config, arguments, z)
  for a, b in zip(have, with_gradients(plain, config, arguments, z), strict=True):
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-6 * max(1, np.abs(b).max()))


@given(st.integers(1, 10**6), st.integers(1, 10**6), st.integers(1, 2**32))
def test_chunks_are_as_small_as_they_may_be(tokens, V, most):
  with pytest.MonkeyPatch.context() as patched:
    patched.setattr(loss, 'chunk_bytes', lambda: most)
    chunks = num_chunks(tokens, V)
  bytes_of = lambda chunks: 4 * V * -(-tokens // chunks)
  assert chunks & (chunks - 1) == 0
  assert bytes_of(chunks) <= max(most, 4 * V)
  assert chunks == 1 or bytes_of(chunks // 2) > most


def test_bfloat16_is_near_float32(monkeypatch):
  config, (x, *others) = case(2, 16, 32, 97)
  x = x.astype(jnp.bfloat16)  # the same numbers in both
  want = with_gradients(plain, config, (x.astype(jnp.float32), *others))
  chunks_of(monkeypatch, 8, 104)
  have = with_gradients(fused, dataclasses.replace(config, dtype='bfloat16'), (x, *others))
  assert [a.dtype for a in have] == [jnp.float32, jnp.float32, jnp.bfloat16, jnp.float32, jnp.float32]
  for a, b in zip(have, want):
    assert_close(a, b, 2e-2)


@pytest.mark.parametrize('name', LOSS_TERMS)
def test_the_slopes_of_a_term_are_its_derivatives(name):
  term, rng = LOSS_TERMS[name], np.random.default_rng(0)
  log_Z, y_t = jnp.asarray(rng.normal(size=(2, 9)), jnp.float32) * 3
  want = jax.grad(lambda *args: term.value(*args).sum(), (0, 1))(log_Z, y_t)
  for have, slope in zip(term.slopes(log_Z, y_t), want, strict=True):
    np.testing.assert_allclose(jnp.broadcast_to(have, 9), slope, rtol=1e-6)


# --- On meshes -------------------------------------------------------------------------------------

QUICK = [(8, 1, 1, 1), (1, 2, 2, 2)]  # data, fsdp, seq, tensor
MESHES = [
  pytest.param(sizes, z, marks=[] if sizes in QUICK else pytest.mark.slow)
  for z, meshes in ((0.0, factorizations(8)), (0.3, [*QUICK, (2, 2, 1, 2), (1, 8, 1, 1)]))
  for sizes in meshes
]


@pytest.mark.parametrize('sizes,z', MESHES, ids=str)
def test_meshes_change_nothing(sizes, z, monkeypatch):
  config, arguments = case(8, 16, 16, 97)
  data, fsdp, seq, tensor = sizes
  chunks_of(monkeypatch, 5, 104 // tensor)
  with jax.set_mesh(make_mesh(data, fsdp, tensor, seq)):
    wte_vd = ROWS['wte.weight'].layout
    layouts = RULES.act_btd, wte_vd, RULES.rows_bt, RULES.rows_bt
    have = with_gradients(fused, config, [*map(jax.device_put, arguments, layouts)], z)
  assert [a.sharding.spec for a in have[1:4]] == [RULES.rows_bt, RULES.act_btd, wte_vd]
  for a, b in zip(have, with_gradients(plain, config, arguments, z), strict=True):
    assert_close(a, b, 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
  'sizes,tie,z',
  [
    ((2, 2, 1, 2), True, 0.0),
    ((2, 2, 1, 2), True, 0.1),
    ((2, 1, 2, 2), False, 0.0),
    ((1, 8, 1, 1), True, 0.0),
    ((8, 1, 1, 1), False, 0.0),
    ((8, 1, 1, 1), False, 0.1),
  ],
)
def test_a_step_of_micro_batches_takes_the_plain_gradient(tiny, sizes, tie, z, monkeypatch):
  """There each device's gradients stay apart until the last micro-batch, where `data` splits rows."""
  config = dataclasses.replace(tiny, tie_word_embeddings=tie)
  tokens = jnp.asarray(np.random.default_rng(0).integers(0, 97, (16, 17)))
  before, weights = init_params(config, 0), jnp.full((16, 16), 1 / 256)

  def plain_mean(params):
    x_BTD = bind(config, params).transformer(tokens[:, :-1]).x_BTD
    table_VD = params['wte' if tie else 'lm_head']['weight']
    total, each_BT = plain(config, x_BTD, table_VD, tokens[:, 1:], weights, z)
    return total, each_BT.mean()

  (total, mean), want = jax.jit(jax.value_and_grad(plain_mean, has_aux=True))(before)
  data, fsdp, seq, tensor = sizes
  chunks_of(monkeypatch, 5, 104 // tensor)
  with jax.set_mesh(make_mesh(data, fsdp, tensor, seq)):
    tx, rate = optax.sgd(1e3), optax.constant_schedule(0.0)
    state = init_state(config, tx, 0, ema=False)
    factors = (('z_loss', z),) if z else ()
    step = make_train_step(config, tx, rate, seed=0, ema_decay=0, factors=factors)
    state, metrics = jax.jit(step)(state, tokens.reshape(2, 8, 17))
  assert_close(metrics['train/loss'], mean, 1e-6)
  if z:
    assert_close(metrics['train/z_loss'], total - mean, 1e-5)
  for path, gradient in jax.tree.leaves_with_path(want):
    at = lambda tree: np.asarray(functools.reduce(lambda x, key: x[key.key], path, tree))
    np.testing.assert_allclose((at(before) - at(state.params)) / 1e3, gradient, rtol=0, atol=1e-6)


# --- What it costs ---------------------------------------------------------------------------------


def test_products_are_made_once_and_only_those_that_are_needed():
  config, (x, table, targets, weights) = case(2, 8, 16, 97)
  total = lambda x, table: fused(config, x, table, targets, weights)[0]
  products = lambda f: jax.jit(f).lower(x, table).as_text().count('stablehlo.dot_general')
  assert products(total) == 1  # evaluation
  assert products(jax.value_and_grad(total)) == 2  # under adapters the table isn't trained
  assert products(jax.value_and_grad(total, (0, 1))) == 3


def test_no_array_of_a_step_is_as_large_as_the_logits(monkeypatch):
  B, T, D, V = 8, 64, 32, 5000
  config = GPTConfig(vocab_size=V, n_positions=T, n_embd=D, n_layer=1, n_head=2)
  chunks_of(monkeypatch, B * T // 8, config.padded_vocab_size)

  def largest(f, *arguments):
    text = jax.jit(jax.grad(f)).lower(*arguments).compile().as_text()
    return max(
      math.prod(array.dims)
      for computation in hlo_text.parse(text).computations.values()
      for instruction in computation.values()
      for array in instruction.arrays
    )

  params = jax.eval_shape(lambda: init_params(config, 0))
  tokens = jax.ShapeDtypeStruct((B, T + 1), jnp.int32)
  assert largest(lambda p, tokens: nll(bind(config, p), tokens).total, params, tokens) < B * T * V / 2
  _, (x, table, targets, weights) = case(B, T, D, V)
  assert largest(lambda x: plain(config, x, table, targets, weights)[0], x) >= B * T * V


# --- Of a model ------------------------------------------------------------------------------------


def test_an_int8_table_has_a_loss(tiny):
  model = decode_layout.quantize(bind(tiny, init_params(tiny, 0)))
  _, (x, _, targets, weights) = case(2, 9, 32, 97)
  log_p_BTV = jax.nn.log_softmax(model.logits(x))
  want_BT = -jnp.take_along_axis(log_p_BTV, targets[..., None], 2)[..., 0]
  total, each_BT, _ = model.loss(x, targets, weights)
  assert_close(each_BT, want_BT, 1e-6)
  assert_close(total, (weights * want_BT).sum(), 1e-6)


def test_each_has_no_gradient():
  config, (x, table, targets, weights) = case(2, 3, 4, 9)
  gradient = jax.grad(lambda x: fused(config, x, table, targets, weights)[1].sum())(x)
  assert not np.asarray(gradient).any()

"""A platform's attention computes what XLA's does, within documents too, and lowers for GPU and TPU.

Splash runs as plain JAX here. What needs a GPU or TPU is in benchmarks/kernels.py.
"""

import dataclasses
from contextlib import nullcontext

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.arrays import assert_close, mesh_of
from support.models import tiny_gpt2

from gpt2_jax.model import attention_kernels
from gpt2_jax.model.attention import attention, causal_mask
from gpt2_jax.model.attention_kernels import Kernel, choose
from gpt2_jax.model.config import GPTConfig
from gpt2_jax.model.gpt2 import bind, init_params
from gpt2_jax.serving.cache_blocks import Blocks, BlocksMask
from gpt2_jax.training.step import nll

WIDE = tiny_gpt2(n_positions=256, n_embd=128, n_layer=2, n_head=2, n_inner=None)


@pytest.fixture
def interpreted(monkeypatch):
  monkeypatch.setattr(attention_kernels, 'INTERPRET', True)


def loss_and_grads(config: GPTConfig, tokens, document_start=None, mesh=None):
  with mesh_of(*mesh) if mesh else nullcontext():
    params = init_params(config, 0)
    f = jax.value_and_grad(lambda p: nll(bind(config, p), tokens, None, document_start).total)
    return jax.device_get(jax.jit(f)(params))


@pytest.mark.parametrize(
  'mesh,by_layer,document_start',
  [
    (None, True, 5),
    pytest.param((1, 2, 2, 2), False, 5, marks=pytest.mark.slow),
    pytest.param(None, False, None, marks=pytest.mark.slow),
  ],
)
def test_splash_is_xla(interpreted, mesh, by_layer, document_start):
  tokens = jnp.asarray(np.random.default_rng(0).integers(0, 97, (2, 257)))
  config = dataclasses.replace(WIDE, scale_attn_by_inverse_layer_idx=by_layer)
  plain = dataclasses.replace(config, attention='xla')
  (want, want_grads), (have, grads) = (
    loss_and_grads(c, tokens, document_start, mesh) for c in (plain, config)
  )
  assert_close(have, want)
  for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(want_grads), strict=True):
    assert_close(a, b, 2e-5)


def in_float64(q_BTNH, k_BTNH, v_BTNH, documents=None):
  """Causal attention, its sums and its gradient's in float64."""
  T, dtype = q_BTNH.shape[1], q_BTNH.dtype
  see_BTT = jnp.tril(jnp.ones((1, T, T), bool))
  if documents is not None:
    see_BTT &= documents[0][:, :, None] == documents[1][:, None]
  q, k, v = (x.astype(jnp.float64) for x in (q_BTNH, k_BTNH, v_BTNH))
  scores = jnp.where(see_BTT[:, None], jnp.einsum('BTNH,BSNH->BNTS', q, k), -1e300)
  return jnp.einsum('BNTS,BSNH->BTNH', jax.nn.softmax(scores, -1), v).astype(dtype)


@pytest.mark.parametrize(
  'T,mesh,by_layer,document_start',
  [
    (200, None, True, None),
    pytest.param(200, (2, 1, 2, 1), False, 5, marks=pytest.mark.slow),
    pytest.param(1500, None, False, 5, marks=pytest.mark.slow),
  ],
)
@jax.enable_x64(True)
def test_blocks_are_attention(T, mesh, by_layer, document_start, monkeypatch):
  """Also where the last block is shorter, and where there are more queries than eight times 128."""
  tokens = jnp.asarray(np.random.default_rng(0).integers(0, 97, (2, T + 1)))
  # with larger weights one rounding in float32 becomes 2e-5 of a gradient, in XLA's attention too
  config = dataclasses.replace(
    WIDE, n_positions=2000, scale_attn_by_inverse_layer_idx=by_layer, initializer_range=0.1
  )
  with mesh_of(*mesh) if mesh else nullcontext():
    assert choose(config, T, drops=True) == ('blocks', '')
  have, grads = loss_and_grads(config, tokens, document_start, mesh)
  plain, plain_grads = loss_and_grads(
    dataclasses.replace(config, attention='xla'), tokens, document_start, mesh
  )
  monkeypatch.setattr(attention_kernels, '_blocks', in_float64)
  want, want_grads = loss_and_grads(config, tokens, document_start, mesh)
  assert_close(have, want)
  assert_close(plain, want)
  for each in (grads, plain_grads):
    for a, b in zip(jax.tree.leaves(each), jax.tree.leaves(want_grads), strict=True):
      assert_close(a, b)


@pytest.mark.parametrize('T', [200, pytest.param(1100, marks=pytest.mark.slow)])
def test_blocks_in_bfloat16(T):
  """As close to float64 as XLA's attention is, from the same operands."""
  rng = np.random.default_rng(0)
  q, k, v, dout = (jnp.asarray(rng.normal(size=(2, T, 2, 16)), jnp.bfloat16) for _ in range(4))

  def gradients(f):
    @jax.jit
    def of():
      out, back = jax.vjp(f, q, k, v)
      return out, *back(dout)

    return jax.device_get(of())

  def plain(q, k, v):
    return attention(q, k, v, causal_mask(T, T), scale=1.0)

  with jax.enable_x64(True):
    want = gradients(in_float64)
  error = lambda a, b: np.abs(a.astype(np.float32) - b.astype(np.float32)).max() / np.abs(b).max()
  for blocks, xla, exact in zip(
    gradients(attention_kernels._blocks), gradients(plain), want, strict=True
  ):
    assert error(blocks, exact) < max(2**-7, 1.5 * error(xla, exact))


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_blocks_of_a_cache(dtype):
  """They give what the whole does; and of what is not read nothing matters, to the last bit."""
  B, N, S, H, X = 3, 2, 64, 16, 4
  keys = jax.random.split(jax.random.key(0), 3)
  q = jax.random.normal(keys[0], (B, 1, N, H)).astype(dtype)
  k, v = (jax.random.normal(key, (B, N, S, H)).astype(dtype) for key in keys[1:])
  at = jnp.asarray([3, 30, 17])
  heads_last = lambda x: x.swapaxes(1, 2)
  for upcast in (False, True):
    how = dict(scale=0.3, upcast=upcast)
    whole = jax.jit(lambda k, v, how=how: attention(q, k, v, causal_mask(1, S, at), **how))
    run = jax.jit(
      lambda used, k, v, how=how: BlocksMask(causal_mask(1, S, at)).attend(
        q, Blocks(k, used), Blocks(v, used), **how
      )
    )
    blocks = lambda x: tuple(jnp.split(x, X, axis=2))
    want = whole(heads_last(k), heads_last(v))
    two, four = run(2, blocks(k), blocks(v)), run(4, blocks(k), blocks(v))
    spoilt = [x.at[:, :, 32:].set(jnp.nan) for x in (k, v)]
    np.testing.assert_array_equal(two, four)
    np.testing.assert_array_equal(two, run(2, *map(blocks, spoilt)))
    assert two.dtype == dtype
    np.testing.assert_allclose(
      two.astype(np.float32),
      want.astype(np.float32),
      **(dict(rtol=1e-6, atol=1e-6) if dtype == jnp.float32 else dict(rtol=2**-7, atol=2**-9)),
    )


def test_a_document_does_not_see_the_ones_before(tiny):
  """Each document of a row has the loss that it has at its place with anything before it."""
  rng = np.random.default_rng(0)
  tokens = rng.integers(1, 97, (2, 21))
  tokens[:, [7, 15]] = 0  # a document begins
  other = tokens.copy()
  other[:, :7] = rng.integers(1, 97, (2, 7))
  params = init_params(tiny, 0)
  f = jax.jit(lambda tokens: nll(bind(tiny, params), tokens, None, 0).each)
  have, want = f(jnp.asarray(other)), f(jnp.asarray(tokens))
  np.testing.assert_array_equal(have[:, 7:], want[:, 7:])
  assert (np.asarray(have[:, :6]) != np.asarray(want[:, :6])).all()
  seen = jax.jit(lambda tokens: nll(bind(tiny, params), tokens).each)
  assert (np.asarray(seen(jnp.asarray(other)) != seen(jnp.asarray(tokens)))[:, 8:]).all()


@pytest.mark.parametrize(
  'fields,T,drops,says',
  [
    (dict(attention='cudnn'), 256, False, 'cudnn does not run on a cpu'),
    (dict(attention='splash', attn_pdrop=0.1), 256, True, 'no attention dropout'),
    (dict(attention='splash', reorder_and_upcast_attn=True), 256, False, 'reorder_and_upcast'),
    (dict(attention='splash'), 200, False, 'a multiple of 128 positions'),
    (dict(attention='xla'), 256, False, ''),
  ],
)
def test_what_a_kernel_cannot_do_falls_back_with_a_reason(interpreted, fields, T, drops, says):
  name, reason = choose(dataclasses.replace(WIDE, **fields), T, drops=drops)
  assert name == 'xla' and says in reason


def test_blocks_where_there_are_several():
  assert choose(WIDE, 128, drops=False) == ('xla', '')
  assert choose(WIDE, 129, drops=False) == ('blocks', '')
  with mesh_of(1, 1, 1, 2):
    assert choose(WIDE, 256, drops=False) == ('xla', 'blocks wants whole rows, mesh.seq = 1')
  drops = dataclasses.replace(WIDE, attn_pdrop=0.1)
  assert choose(drops, 256, drops=False) == ('blocks', '')
  assert choose(drops, 256, drops=True)[0] == 'xla'


def test_dropout_matters_in_training_alone(interpreted):
  config = dataclasses.replace(WIDE, attn_pdrop=0.1)
  assert choose(config, 256, drops=False) == ('splash', '')
  assert choose(config, 256, drops=True)[0] == 'xla'


def lowered(name: str, platform: str) -> str:
  """StableHLO of a kernel and its gradient for a platform that is not here."""
  q = jax.ShapeDtypeStruct((4, 256, 2, 64), jnp.bfloat16)
  documents = jax.ShapeDtypeStruct((4, 256), jnp.int32)

  def f(q, documents):
    return jax.grad(lambda q: Kernel(name, documents)(q, q, q, 0.125).astype(jnp.float32).sum())(q)

  return jax.jit(f).trace(q, documents).lower(lowering_platforms=(platform,)).as_text()


def test_splash_lowers_for_tpu():
  assert lowered('splash', 'tpu').count('tpu_custom_call') == 2  # one makes all three gradients


def test_cudnn_lowers_for_gpu(monkeypatch):
  from jax._src.cudnn import fused_attention_stablehlo

  monkeypatch.setattr(fused_attention_stablehlo, 'check_cudnn_version', lambda: 91000)
  text = lowered('cudnn', 'cuda')
  assert '__cudnn$fmha' in text and 'Backward' in text

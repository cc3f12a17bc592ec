"""Causal attention in a platform's own form.

    cudnn, splash  on GPUs and TPUs: kernels that never hold T x T weights
                   (FlashAttention: Dao et al. 2022, arXiv:2205.14135)
    blocks         on CPUs: a block of queries at a time with the keys up to its last one, so that
                   little above the diagonal is multiplied or passed over

All compute `attention.attention` with a causal mask, to the rounding of the dtype, and run in a
`shard_map`: called directly, cuDNN's fails on an explicit mesh.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from gpt2_jax.model.attention import causal_mask
from gpt2_jax.model.config import GPTConfig
from gpt2_jax.parallel.cpu_matmul import kept, row_major
from gpt2_jax.parallel.sharding import RULES, in_mesh, platform, reshard

INTERPRET = False  # run Splash as plain JAX: the tests do, on CPU
BLOCK = 512  # positions that Splash works on at a time
LANES = 128  # what it wants T to be a multiple of
QUERIES = 128  # of a block on a CPU, at least
BLOCKS = 8  # at most: each is a program of its own, which takes time to compile

OWN = {'gpu': 'cudnn', 'tpu': 'splash', 'cpu': 'blocks'}


def choose(config: GPTConfig, T: int, *, drops: bool) -> tuple[str, str]:
  """The implementation for T positions on the mesh that is set, and why it isn't the one asked for.

  Args:
    config: its `attention` 'auto' asks for the platform's own kernel, where there is one.
    T: positions.
    drops: whether attention dropout is wanted.

  Returns:
    A name of `OWN` or 'xla', and a reason, '' where none is needed.
  """
  own = 'splash' if INTERPRET else OWN.get(platform(), 'xla')
  name = own if config.attention == 'auto' else config.attention
  if name == 'xla' or (name == 'blocks' and T <= QUERIES):  # a single block: all of XLA's attention
    return 'xla', ''
  seq = jax.sharding.get_abstract_mesh().shape['seq'] if in_mesh() else 1
  odd_heads = config.dtype != 'bfloat16' or config.H % 8 != 0 or config.H > 128
  in_the_way = [
    (name != own, f'{name} does not run on a {platform()}'),
    (drops and config.attn_pdrop > 0, f'{name} has no attention dropout (model.attn_pdrop)'),
    (config.reorder_and_upcast_attn, f'{name} has no reorder_and_upcast_attn'),
    (name != 'splash' and seq > 1, f'{name} wants whole rows, mesh.seq = 1'),
    (name == 'cudnn' and odd_heads, 'cudnn wants bfloat16 and heads of at most 128, a multiple of 8'),
    (
      name == 'splash' and T % (LANES * seq),
      f'splash wants a multiple of {LANES} positions a device',
    ),
  ]
  for holds, reason in in_the_way:
    if holds:
      return 'xla', reason
  return name, ''


@dataclasses.dataclass(frozen=True)
class Kernel:
  """Causal attention, within documents where there are any."""

  name: str
  documents_BT: Any

  def attend(self, q_BTNH, k_BSNH, v_BSNH, *, scale, **how) -> jax.Array:
    """The attended values, [B, T, N, H]. What else `attention` can do, `choose` has looked at."""
    del how
    return self(q_BTNH, k_BSNH, v_BSNH, scale)

  def __call__(self, q_BTNH, k_BSNH, v_BSNH, scale) -> jax.Array:
    """The attended values, [B, T, N, H]."""
    q_BTNH = (q_BTNH * scale).astype(q_BTNH.dtype)
    d, r = self.documents_BT, RULES
    documents = [] if d is None else [(reshard(d, r.rows_bt), reshard(d, P(r.rows_bt[0], None)))]
    if self.name in ('cudnn', 'blocks'):
      run = _cudnn if self.name == 'cudnn' else _blocks
      return _by_shards(run, q_BTNH, k_BSNH, v_BSNH, *documents)
    return _by_shards(
      _run_splash, q_BTNH, k_BSNH, v_BSNH, *documents, kernel=_splash(*q_BTNH.shape[1:3])
    )


def _by_shards(run, q_BTNH, k_BSNH, v_BSNH, *documents, kernel=None):
  """`run(q, k, v, *documents)` by each device for its rows, heads and queries."""
  kernels = () if kernel is None else (kernel,)
  if not in_mesh():
    return run(q_BTNH, k_BSNH, v_BSNH, *documents, *kernels)
  mesh, r = jax.sharding.get_abstract_mesh(), RULES
  specs = (r.act_btnh, r.act_bsnh, r.act_bsnh, *[(r.rows_bt, P(r.rows_bt[0], None))] * len(documents))
  if kernel is not None:
    parts = kernel.manual_sharding_spec(jax.NamedSharding(mesh, P('tensor', 'seq')))
    specs, kernels = (*specs, parts), (jax.tree.map(jax.sharding.reshard, kernel, parts),)
  return jax.shard_map(run, in_specs=specs, out_specs=r.act_btnh, check_vma=False)(
    q_BTNH, k_BSNH, v_BSNH, *documents, *kernels
  )


def _cudnn(q_BTNH, k_BTNH, v_BTNH, documents=None):
  mask_B1TT = None
  if documents is not None:
    mask_B1TT = (documents[0][:, :, None] == documents[1][:, None])[:, None]
  return jax.nn.dot_product_attention(
    q_BTNH, k_BTNH, v_BTNH, mask=mask_B1TT, scale=1.0, is_causal=True, implementation='cudnn'
  )


@jax.custom_vjp
def _blocks(q_BTNH, k_BTNH, v_BTNH, documents=None):
  return _blocks_forward(q_BTNH, k_BTNH, v_BTNH, documents)[0]


def _blocks_forward(q_BTNH, k_BTNH, v_BTNH, documents):
  """The output, and the residuals: the operands heads first, the output, and for each query its
  largest score and the sum of exp(score - largest), from which its weights are made again.
  """
  q, k, v = heads_first = [kept(x.swapaxes(1, 2)) for x in (q_BTNH, k_BTNH, v_BTNH)]
  out, most, total = [], [], []
  for first, end in _bounds(q.shape[2]):
    scores = _scores(q, k, documents, first, end)
    most.append(scores.max(-1, keepdims=True))
    weights = jnp.exp(scores - most[-1])
    total.append(weights.sum(-1, keepdims=True))
    o = row_major('BNTS,BNSH->BNTH', weights.astype(v.dtype), v[:, :, :end]) / total[-1]
    out.append(o.astype(v.dtype))
  out, most, total = (jnp.concatenate(x, axis=2) for x in (out, most, total))
  out_BTNH = kept(out.swapaxes(1, 2))
  return out_BTNH, (*heads_first, out_BTNH, kept(most), kept(total), documents)


def _blocks_backward(residuals, dout_BTNH):
  """FlashAttention's backward pass by blocks of queries: weights are made again."""
  q, k, v, out_BTNH, most, total, documents = residuals
  wide = lambda x: x.astype(jnp.float32)
  inner = (wide(out_BTNH) * wide(dout_BTNH)).sum(-1, keepdims=True).swapaxes(1, 2)
  dout = dout_BTNH.swapaxes(1, 2)
  dq, dk, dv = [], jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
  for first, end in _bounds(q.shape[2]):
    q_i, dout_i, inner_i, most_i, total_i = (
      x[:, :, first:end] for x in (q, dout, inner, most, total)
    )
    weights = jnp.exp(_scores(q, k, documents, first, end) - most_i) / total_i
    dweights = row_major('BNTH,BNSH->BNTS', dout_i, v[:, :, :end])
    dscores = (weights * (dweights - inner_i)).astype(q.dtype)
    dq.append(row_major('BNTS,BNSH->BNTH', dscores, k[:, :, :end]).astype(q.dtype))
    dk = dk.at[:, :, :end].add(row_major('BNTS,BNTH->BNSH', dscores, q_i))
    dv = dv.at[:, :, :end].add(row_major('BNTS,BNTH->BNSH', weights.astype(v.dtype), dout_i))
  dq, dk, dv = (
    x.swapaxes(1, 2) for x in (jnp.concatenate(dq, axis=2), dk.astype(k.dtype), dv.astype(v.dtype))
  )
  return dq, dk, dv, None


_blocks.defvjp(_blocks_forward, _blocks_backward)


def block_size(T: int) -> int:
  """The number of queries in a block, of T; the last one may have fewer."""
  return max(QUERIES, -(-T // BLOCKS))


def _bounds(T: int) -> list[tuple[int, int]]:
  """The first query of each block, and the one behind its last."""
  size = block_size(T)
  return [(first, min(first + size, T)) for first in range(0, T, size)]


def _scores(q_BNTH, k_BNTH, documents, first: int, end: int):
  """Scores of a block's queries and the keys up to its last one; masked ones the lowest number."""
  see_BTS = causal_mask(end - first, end, first)
  if documents is not None:
    see_BTS &= documents[0][:, first:end, None] == documents[1][:, None, :end]
  scores = row_major('BNTH,BNSH->BNTS', q_BNTH[:, :, first:end], k_BNTH[:, :, :end])
  return jnp.where(see_BTS[:, None], scores, jnp.finfo(jnp.float32).min)


def _splash(T: int, N: int):
  """The kernel for T positions and N heads of a whole batch, with the masks of each device's part."""
  # imported here, since Pallas for TPUs takes a tenth of the start that other hardware can do without
  from jax.experimental.pallas.ops.tpu import splash_attention as splash

  shape = jax.sharding.get_abstract_mesh().shape if in_mesh() else {'seq': 1, 'tensor': 1}
  block = lambda most: dict(q=math.gcd(T // shape['seq'], most), kv=math.gcd(T, most))
  forward, backward = block(BLOCK), block(2 * BLOCK)
  lanes = splash.QKVLayout.SEQ_MINOR  # positions: a head's width fills half of them
  sizes = splash.BlockSizes(
    block_q=forward['q'],
    block_kv=forward['kv'],
    block_q_dkv=backward['q'],
    block_kv_dkv=backward['kv'],
    use_fused_bwd_kernel=True,  # makes the weights once for all three gradients
    q_layout=lanes,
    k_layout=lanes,
    v_layout=lanes,
  )
  return splash.make_splash_mha(
    splash.MultiHeadMask([splash.CausalMask((T, T))] * N),
    block_sizes=sizes,
    head_shards=shape['tensor'],
    q_seq_shards=shape['seq'],
    interpret=INTERPRET,
  )


def _run_splash(q_BTNH, k_BSNH, v_BSNH, *rest):
  from jax.experimental.pallas.ops.tpu import splash_attention as splash

  *documents, kernel = rest
  heads_first = (x.swapaxes(1, 2) for x in (q_BTNH, k_BSNH, v_BSNH))
  ids = splash.SegmentIds(*documents[0]) if documents else None
  return jax.vmap(kernel)(*heads_first, ids).swapaxes(1, 2)

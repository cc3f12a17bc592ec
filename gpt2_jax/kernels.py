"""Attention by a kernel that never holds T x T weights: cuDNN's on GPUs, Splash on TPUs.

    FlashAttention: Dao et al. 2022, arXiv:2205.14135

Both compute what `attention.attention` does with a causal mask, to the rounding of bfloat16. They run
in a `shard_map`: called directly, cuDNN's fails on an explicit mesh.
"""

import dataclasses
import math
from typing import Any

import jax
from jax.sharding import PartitionSpec as P

from gpt2_jax.config import GPTConfig
from gpt2_jax.sharding import RULES, in_mesh, platform, reshard

INTERPRET = False  # run Splash as plain JAX: the tests do, on CPU
BLOCK = 512  # positions that Splash works on at a time
LANES = 128  # what it wants T to be a multiple of


OWN = {'gpu': 'cudnn', 'tpu': 'splash'}


def choose(config: GPTConfig, T: int, *, drops: bool) -> tuple[str, str]:
  """The implementation for T positions on the mesh that is set, and why it's not what was asked for.

  Args:
    config: its `attention` 'auto' asks for the platform's own kernel, where there is one.
    T: positions.
    drops: whether attention dropout is wanted.

  Returns:
    'cudnn', 'splash' or 'xla', and a reason, '' where none is needed.
  """
  own = 'splash' if INTERPRET else OWN.get(platform(), 'xla')
  name = own if config.attention == 'auto' else config.attention
  seq = jax.sharding.get_abstract_mesh().shape['seq'] if in_mesh() else 1
  fits = config.dtype == 'bfloat16' and config.H % 8 == 0 and config.H <= 128
  reasons = {
      f'{name} does not run on a {platform()}': name not in (own, 'xla'),
      f'{name} has no attention dropout (model.attn_pdrop)': drops and config.attn_pdrop,
      f'{name} has no reorder_and_upcast_attn': config.reorder_and_upcast_attn,
      f'{name} wants whole rows, mesh.seq = 1': seq > 1,
      'cudnn wants bfloat16 and heads of at most 128, a multiple of 8': name == 'cudnn' and not fits,
      f'splash wants a multiple of {LANES} positions': name == 'splash' and T % LANES,
  }
  reason = next((reason for reason, holds in reasons.items() if holds), '')
  return ('xla', '') if name == 'xla' else ('xla' if reason else name, reason)


@dataclasses.dataclass(frozen=True)
class Kernel:
  """Causal attention, within documents where there are any."""

  name: str
  documents_BT: Any

  def __call__(self, q_BTNH, k_BTNH, v_BTNH, scale) -> jax.Array:
    """The attended values, [B, T, N, H]."""
    q_BTNH = (q_BTNH * scale).astype(q_BTNH.dtype)
    run = {'cudnn': _cudnn, 'splash': _splash}[self.name]
    documents = () if self.documents_BT is None else (reshard(self.documents_BT, RULES.rows_bt),)
    if not in_mesh():
      return run(q_BTNH, k_BTNH, v_BTNH, *documents)
    whole = P(RULES.act_btnh[0], None, 'tensor', None)
    q, k, v = (reshard(x, whole) for x in (q_BTNH, k_BTNH, v_BTNH))
    out_BTNH = jax.shard_map(
        run, in_specs=(whole,) * 3 + (P(RULES.rows_bt[0], None),) * len(documents), out_specs=whole,
        check_vma=False)(q, k, v, *(reshard(d, P(RULES.rows_bt[0], None)) for d in documents))
    return reshard(out_BTNH, RULES.act_btnh)


def _cudnn(q_BTNH, k_BTNH, v_BTNH, documents_BT=None):
  mask_B1TT = None
  if documents_BT is not None:
    mask_B1TT = (documents_BT[:, :, None] == documents_BT[:, None])[:, None]
  return jax.nn.dot_product_attention(
      q_BTNH, k_BTNH, v_BTNH, mask=mask_B1TT, scale=1.0, is_causal=True, implementation='cudnn')


def _splash(q_BTNH, k_BTNH, v_BTNH, documents_BT=None):
  from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel,
    splash_attention_mask,
  )
  T, N = q_BTNH.shape[1:3]
  names = ('block_q', 'block_kv', 'block_kv_compute', 'block_q_dkv', 'block_kv_dkv',
           'block_kv_dkv_compute', 'block_q_dq', 'block_kv_dq')
  sizes = splash_attention_kernel.BlockSizes(**dict.fromkeys(names, math.gcd(T, BLOCK)))
  causal = splash_attention_mask.MultiHeadMask([splash_attention_mask.CausalMask((T, T))] * N)
  run: Any = splash_attention_kernel.make_splash_mha_single_device(
      causal, block_sizes=sizes, interpret=INTERPRET)
  heads_first = (x.swapaxes(1, 2) for x in (q_BTNH, k_BTNH, v_BTNH))
  ids = None if documents_BT is None else splash_attention_kernel.SegmentIds(
      documents_BT, documents_BT)
  return jax.vmap(run)(*heads_first, ids).swapaxes(1, 2)

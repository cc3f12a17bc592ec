"""Scaled dot-product attention.

Letters: `B` batch, `T` query positions, `S` key positions, `N` heads, `H` head width.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from gpt2_jax.model.sites import SILENT, Listener
from gpt2_jax.parallel.cpu_matmul import kept, lies_whole, row_major

Drop = Callable[[jax.Array], jax.Array]


def causal_mask(T: int, S: int, offset: jax.Array | int = 0) -> jax.Array:
  """[1, T, S], true where key position s may be seen from query position `offset` + t.

  An `offset` for each row, [B], gives [B, T, S].
  """
  return jnp.arange(S) <= jnp.arange(T)[:, None] + jnp.reshape(offset, (-1, 1, 1))


@dataclasses.dataclass(frozen=True)
class Mask:
  """Attention to what a mask lets a query see; `attention_kernels.Kernel` has the same method."""

  mask_BTS: jax.Array

  def attend(self, q_BTNH: jax.Array, k_BSNH: Any, v_BSNH: Any, **how: Any) -> jax.Array:
    """The attended values [B, T, N, H].

    Args:
      q_BTNH, k_BSNH, v_BSNH: queries, keys and values, the latter as a cache gives them.
      **how: options of `attention`.
    """
    return attention(q_BTNH, k_BSNH, v_BSNH, self.mask_BTS, **how)


def attention(
  q_BTNH: jax.Array,
  k_BSNH: jax.Array,
  v_BSNH: jax.Array,
  mask_BTS: jax.Array,
  *,
  scale: jax.Array | float,
  upcast: bool = False,
  drop: Drop | None = None,
  precision: str | None = None,
  at: Listener = SILENT,
) -> jax.Array:
  """softmax(scale · q kᵀ) v, with the softmax in float32.

  Args:
    q_BTNH, k_BSNH, v_BSNH: queries, keys and values; the latter as a cache keeps them, perhaps in a
      wider dtype (`kv_cache.cache_dtype`), in which the products are then made.
    mask_BTS: true where a query sees a key; an axis of size 1 is broadcast. A query that sees
      nothing gets the mean of all values, as in Hugging Face's GPT-2.
    scale: factor of the scores.
    upcast: form the scores from float32 operands (Hugging Face's `reorder_and_upcast_attn`).
    drop: a function from the weights [B, N, T, S] to the weights after dropout.
    precision: of the two products, as `jax.lax.Precision` names it.
    at: asked at the sites `attn_scores`, after the mask, and `pattern`, before dropout.

  Returns:
    The attended values [B, T, N, H] in the dtype of `q_BTNH`.
  """
  # heads first, as a cache holds them: keys and values of one are then read where they lie
  dtype = q_BTNH.dtype
  q_BNTH, k_BNSH, v_BNSH = (x.swapaxes(1, 2) for x in (q_BTNH.astype(k_BSNH.dtype), k_BSNH, v_BSNH))
  scores_BNTS = scale * kept(scores(q_BNTH, k_BNSH, upcast, precision))
  weights_BNTS = weights(scores_BNTS, mask_BTS, v_BNSH.dtype, drop, at)
  # a split in one part: else XLA makes this product inside of the softmax's loop on CPUs
  (whole_BNTS,) = jnp.split(weights_BNTS, 1, axis=-1)
  out_BNTH = product('BNTS,BNSH->BNTH', whole_BNTS, v_BNSH, precision, v_BNSH.dtype)
  return out_BNTH.astype(dtype).swapaxes(1, 2)


def scores(q_BNTH: jax.Array, k_BNSH: jax.Array, upcast: bool, precision: str | None) -> jax.Array:
  """q kᵀ in float32, [B, N, T, S]; arguments as of `attention`."""
  if upcast:
    q_BNTH, k_BNSH, precision = q_BNTH.astype('float32'), k_BNSH.astype('float32'), 'highest'
  return product('BNTH,BNSH->BNTS', q_BNTH, k_BNSH, precision, jnp.float32)


def weights(
  scores_BNTS: jax.Array, mask_BTS: jax.Array, dtype: Any, drop: Drop | None, at: Listener = SILENT
) -> jax.Array:
  """The softmax of what is seen of the scores, in `dtype`, after dropout; see `attention`."""
  scores_BNTS = jnp.where(mask_BTS[:, None], scores_BNTS, jnp.finfo(jnp.float32).min)
  scores_BNTS = at('attn_scores', scores_BNTS)
  weights_BNTS = at('pattern', jax.nn.softmax(scores_BNTS, axis=-1).astype(dtype))
  return weights_BNTS if drop is None else drop(weights_BNTS)


def product(equation: str, x: jax.Array, y: jax.Array, precision: str | None, wide: Any) -> jax.Array:
  """An einsum in the dtype `wide`, in the order of operands that the platform wants."""
  if x.dtype == jnp.bfloat16 and lies_whole(x):
    return row_major(equation, x, y, None, precision, wide)
  return jnp.einsum(equation, x, y, precision=precision, preferred_element_type=wide)

"""Scaled dot-product attention.

Letters: `B` batch, `T` query positions, `S` key positions, `N` heads, `H` head width.
"""

import dataclasses
import functools
import operator
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from gpt2_jax.matmul import kept, lies_whole, row_major


def causal_mask(T: int, S: int, offset: jax.Array | int = 0) -> jax.Array:
  """[1, T, S], true where key position s may be seen from query position `offset` + t.

  An `offset` for each row, [B], gives [B, T, S].
  """
  return jnp.arange(S) <= jnp.arange(T)[:, None] + jnp.reshape(offset, (-1, 1, 1))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Blocks:
  """Keys or values whose S positions lie in X arrays, of which the first `used` alone are read.

  What is not read must be masked. A row's sums are then the same, to the last bit, however many
  blocks are read for the sake of others: each adds exact zeros.
  """

  parts: tuple[jax.Array, ...]  # X of [B, N, S/X, H]
  used: jax.Array | int

  def each(self, product: Callable[..., jax.Array], *others: Sequence[jax.Array]) -> list[jax.Array]:
    """`product` of each block, and of what belongs to it of `others`; zeros for those not used."""
    if len(self.parts) == 1:
      return [product(self.parts[0], *(other[0] for other in others))]
    nothing = lambda *args: jnp.zeros_like(jax.eval_shape(product, *args))
    return [
      jax.lax.cond(x < self.used, product, nothing, *args)
      for x, args in enumerate(zip(self.parts, *others))
    ]


def attention(
  q_BTNH: jax.Array,
  k_BSNH: jax.Array | Blocks,
  v_BSNH: jax.Array | Blocks,
  mask_BTS: jax.Array,
  *,
  scale: jax.Array | float,
  upcast: bool = False,
  drop: Callable[[jax.Array], jax.Array] | None = None,
  precision: str | None = None,
) -> tuple[jax.Array, jax.Array]:
  """softmax(scale · q kᵀ) v, with the softmax in float32.

  Args:
    q_BTNH, k_BSNH, v_BSNH: queries, keys and values.
    mask_BTS: true where a query sees a key; an axis of size 1 is broadcast. A query that sees
      nothing gets the mean of all values, as in Hugging Face's GPT-2.
    scale: factor of the scores.
    upcast: form the scores from float32 operands (Hugging Face's `reorder_and_upcast_attn`).
    drop: a function from the weights [B, N, T, S] to the weights after dropout.
    precision: of the two products, as `jax.lax.Precision` names it.

  Returns:
    The attended values [B, T, N, H] in the dtype of `v_BSNH`, and the weights [B, N, T, S],
    which the compiler drops where they are not used.
  """
  # heads first, as a cache holds them: keys and values of one are then read where they lie
  q_BNTH = q_BTNH.swapaxes(1, 2)
  k, v = (x if isinstance(x, Blocks) else Blocks((x.swapaxes(1, 2),), 1) for x in (k_BSNH, v_BSNH))
  dtype, X = v.parts[0].dtype, len(v.parts)
  wide = dtype if X == 1 else jnp.float32  # in which blocks are added up

  def score(k_BNSH):
    if upcast:
      return _product(
        'BNTH,BNSH->BNTS',
        q_BNTH.astype(jnp.float32),
        k_BNSH.astype(jnp.float32),
        'highest',
        jnp.float32,
      )
    return _product('BNTH,BNSH->BNTS', q_BNTH, k_BNSH, precision, jnp.float32)

  def attend(v_BNSH, weights_BNTS):
    return _product('BNTS,BNSH->BNTH', weights_BNTS, v_BNSH, precision, wide)

  scores_BNTS = scale * kept(jnp.concatenate(k.each(score), -1))
  scores_BNTS = jnp.where(mask_BTS[:, None], scores_BNTS, jnp.finfo(jnp.float32).min)
  weights_BNTS = jax.nn.softmax(scores_BNTS, axis=-1).astype(dtype)
  if drop is not None:
    weights_BNTS = drop(weights_BNTS)
  outs_BNTH = v.each(attend, jnp.split(weights_BNTS, X, axis=-1))
  return functools.reduce(operator.add, outs_BNTH).astype(dtype).swapaxes(1, 2), weights_BNTS


def _product(equation: str, x, y, precision, wide):
  if x.dtype == jnp.bfloat16 and lies_whole(x):
    return row_major(equation, x, y, None, precision, wide)
  return jnp.einsum(equation, x, y, precision=precision, preferred_element_type=wide)

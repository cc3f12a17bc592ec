"""A server's cache: the positions of its slots in blocks, of which those are read that are in use.

A CPU waits for memory, and most rows are shorter than the context.
"""

import dataclasses
import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from gpt2_jax.model import attention
from gpt2_jax.model.config import GPTConfig
from gpt2_jax.model.kv_cache import LayerCaches, cache_dtype, with_rows, without_one_row, write
from gpt2_jax.model.sites import SILENT, Listener

Arrays = tuple[jax.Array, ...]


@dataclasses.dataclass(frozen=True)
class Blocks:
  """Keys or values whose S positions lie in X arrays, of which the first `used` alone are read.

  What is not read must be masked. A row's sums are then the same, to the last bit, however many
  blocks are read for the sake of others: each adds exact zeros.
  """

  parts: Arrays  # X of [B, N, S/X, H]
  used: jax.Array | int

  def each(self, product: Callable[..., jax.Array], *others: Sequence[jax.Array]) -> list[jax.Array]:
    """`product` of each block, and of what belongs to it of `others`; zeros for those not used."""
    if len(self.parts) == 1:
      return [product(self.parts[0], *(other[0] for other in others))]

    def nothing(*args: jax.Array) -> jax.Array:
      return jnp.zeros_like(jax.eval_shape(product, *args))

    return [
      jax.lax.cond(x < self.used, product, nothing, *args)
      for x, args in enumerate(zip(self.parts, *others))
    ]


class BlocksMask(attention.Mask):
  """A mask over keys and values that are `Blocks`."""

  def attend(  # pyright: ignore[reportIncompatibleMethodOverride]  # of blocks alone
    self,
    q_BTNH: jax.Array,
    k_BSNH: Blocks,
    v_BSNH: Blocks,
    *,
    scale: jax.Array | float,
    upcast: bool = False,
    drop: attention.Drop | None = None,
    precision: str | None = None,
    at: Listener = SILENT,
  ) -> jax.Array:
    """As `attention.attention`; what blocks of values give is added up in float32."""
    k, v = k_BSNH, v_BSNH
    q_BNTH = q_BTNH.astype(k.parts[0].dtype).swapaxes(1, 2)
    dtype, X = v.parts[0].dtype, len(v.parts)
    wide = dtype if X == 1 else jnp.float32

    def score(k_BNSH: jax.Array) -> jax.Array:
      return attention.scores(q_BNTH, k_BNSH, upcast, precision)

    def attend(v_BNSH: jax.Array, weights_BNTS: jax.Array) -> jax.Array:
      return attention.product('BNTS,BNSH->BNTH', weights_BNTS, v_BNSH, precision, wide)

    scores_BNTS = scale * jnp.concatenate(k.each(score), -1)
    weights_BNTS = attention.weights(scores_BNTS, self.mask_BTS, dtype, drop, at)
    outs_BNTH = v.each(attend, jnp.split(weights_BNTS, X, axis=-1))
    out_BNTH = functools.reduce(operator.add, outs_BNTH).astype(q_BTNH.dtype)
    return out_BNTH.swapaxes(1, 2)


@dataclasses.dataclass(frozen=True)
class LayerBlocks:
  """One layer's keys and values of all slots, while a step is made."""

  k: Arrays
  v: Arrays
  used: jax.Array

  def update(self, layer, at_B, k_B1NH, v_B1NH) -> tuple['LayerBlocks', Blocks, Blocks]:
    """As `StackedCache.update`, of one position a row. One beyond the cache is that of an idle row,
    and goes where no running one ever reads: nowhere, or to the last place, which ends a text.
    """
    del layer
    k, v = _write(self.k, at_B, k_B1NH), _write(self.v, at_B, v_B1NH)
    return LayerBlocks(k, v, self.used), Blocks(k, self.used), Blocks(v, self.used)


def _write(blocks: Arrays, at_B: jax.Array, new_B1NH: jax.Array) -> Arrays:
  if len(blocks) == 1:
    return (write(blocks[0], new_B1NH.swapaxes(1, 2), at_B),)

  def put(block_BNSH: jax.Array, place_B: jax.Array) -> jax.Array:
    B, _, S, _ = block_BNSH.shape
    place_B = jnp.where(place_B < 0, S, place_B)  # S and beyond: nowhere
    return block_BNSH.at[jnp.arange(B), :, place_B].set(
      new_B1NH[:, 0].astype(block_BNSH.dtype), mode='drop'
    )

  return tuple(put(block, at_B - x * block.shape[2]) for x, block in enumerate(blocks))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SlotCache:
  """The keys and values of B slots, between the steps of a server."""

  layers: tuple[tuple[Arrays, Arrays], ...]  # kept as in `kv_cache.LayerCache`

  @classmethod
  def empty(cls, config: GPTConfig, B: int, S: int, X: int) -> 'SlotCache':
    """For B rows of S positions, in X blocks."""

    def zeros() -> Arrays:
      parts = jnp.split(jnp.zeros((B, config.n_head, S, config.H), cache_dtype(config)), X, axis=2)
      return tuple(map(without_one_row, parts))

    return cls(tuple((zeros(), zeros()) for _ in range(config.n_layer)))

  @property
  def block(self) -> int:
    """Positions of a block."""
    return self.layers[0][0][0].shape[-2]

  def using(self, used: jax.Array) -> LayerCaches:
    """For the model, which reads the first `used` blocks."""
    rows = jax.tree.map(with_rows, self.layers)
    return LayerCaches(tuple(LayerBlocks(k, v, used) for k, v in rows))

  @classmethod
  def of(cls, written: Any) -> 'SlotCache':
    """What the model has made of `using`."""
    layers = tuple((layer.k, layer.v) for layer in written.layers)
    return cls(jax.tree.map(without_one_row, layers))

  def put(self, slot: jax.Array, row: Any) -> 'SlotCache':
    """With the cache of one row, a `LayerCaches`, in one of the slots."""

    def put(blocks: Arrays, row_NSH: jax.Array) -> Arrays:
      parts = jnp.split(row_NSH, len(blocks), axis=1)
      return tuple(
        without_one_row(with_rows(block).at[slot].set(part)) for block, part in zip(blocks, parts)
      )

    return SlotCache(
      tuple((put(k, one.k), put(v, one.v)) for (k, v), one in zip(self.layers, row.layers))
    )

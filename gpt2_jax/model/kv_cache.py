"""Keys and values of the positions that a model has read, preallocated for S of them.

Heads come before positions, as the products of attention read them.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from gpt2_jax.model.config import GPTConfig
from gpt2_jax.parallel.sharding import RULES, P, in_mesh, layout, platform


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StackedCache:
  """The keys and values of all layers, for blocks that are stacked."""

  k_LBNSH: jax.Array
  v_LBNSH: jax.Array

  @property
  def positions(self) -> int:
    """For how many positions there is room."""
    return self.k_LBNSH.shape[-2]

  def update(self, layer, slot, k_BTNH, v_BTNH) -> tuple['StackedCache', jax.Array, jax.Array]:
    """Writes T positions of a layer at `slot`, one for all rows or one a row.

    Returns:
      The cache, and that layer's keys and values, [B, S, N, H].
    """

    def put(old_LBNSH, new_BTNH):
      new_BNTH = new_BTNH.swapaxes(1, 2).astype(old_LBNSH.dtype)
      if jnp.ndim(slot) == 0:
        new = jax.lax.dynamic_update_slice(old_LBNSH, new_BNTH[None], (layer, 0, 0, slot, 0))
        return new, jax.lax.dynamic_index_in_dim(new, layer, keepdims=False)
      old_BNSH = jax.lax.dynamic_index_in_dim(old_LBNSH, layer, keepdims=False)
      new_BNSH = write(old_BNSH, new_BNTH, slot)
      return jax.lax.dynamic_update_index_in_dim(old_LBNSH, new_BNSH, layer, 0), new_BNSH

    (k, k_BNSH), (v, v_BNSH) = put(self.k_LBNSH, k_BTNH), put(self.v_LBNSH, v_BTNH)
    return StackedCache(k, v), k_BNSH.swapaxes(1, 2), v_BNSH.swapaxes(1, 2)

  def map(self, f: Callable[[jax.Array], jax.Array]) -> 'StackedCache':
    """With `f` of keys and of values, [L, B, N, S, H], in their place."""
    return StackedCache(f(self.k_LBNSH), f(self.v_LBNSH))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerCache:
  """The keys and values of one layer.

  They are kept `without_one_row`: [N, S, H] where there is one row and no mesh, else [B, N, S, H].
  """

  k: jax.Array
  v: jax.Array

  def update(self, layer, slot, k_BTNH, v_BTNH) -> tuple['LayerCache', jax.Array, jax.Array]:
    """As `StackedCache.update`, in place."""
    del layer
    put = lambda old, new_BTNH: write(with_rows(old), new_BTNH.swapaxes(1, 2), slot)
    k_BNSH, v_BNSH = put(self.k, k_BTNH), put(self.v, v_BTNH)
    made = LayerCache(without_one_row(k_BNSH), without_one_row(v_BNSH))
    return made, k_BNSH.swapaxes(1, 2), v_BNSH.swapaxes(1, 2)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerCaches:
  """A cache for each layer, for blocks that run one after another.

  Each is written in place; a slice of a larger array would be copied.
  """

  layers: tuple[Any, ...]

  @property
  def positions(self) -> int:
    """For how many positions there is room."""
    return self.layers[0].k.shape[-2]

  def map(self, f: Callable[[jax.Array], jax.Array]) -> 'LayerCaches':
    """With `f` of each layer's keys and values, [B, N, S, H], in their place."""
    return jax.tree.map(lambda x: without_one_row(f(with_rows(x))), self)


Cache = StackedCache | LayerCaches


def cache_dtype(config: GPTConfig) -> Any:
  """The dtype of a model's caches: its own, but float32 on a CPU for one that is narrower.

  A CPU has no loops over bfloat16: to write one position XLA would make a float32 copy of the whole
  cache and round it again, every token. Nor is such a cache read any faster: what is read is made
  wide, too. The values in it are those of the narrow dtype.
  """
  dtype = jnp.dtype(config.dtype)
  return jnp.dtype('float32') if platform() == 'cpu' and dtype.itemsize < 4 else dtype


def empty_cache(config: GPTConfig, B: int, S: int, dtype: Any = None) -> Cache:
  """A cache of a model, for B rows of S positions; `dtype`: if not `cache_dtype`."""
  dtype = dtype or cache_dtype(config)

  def zeros(*layers: int) -> jax.Array:
    shape, spec = (*layers, B, config.n_head, S, config.H), RULES.cache_lbnsh[1 - len(layers) :]
    return jnp.zeros(shape, dtype, out_sharding=layout(P(*spec)))

  if config.form == 'train':
    return StackedCache(zeros(config.n_layer), zeros(config.n_layer))
  one = lambda: without_one_row(zeros())
  return LayerCaches(tuple(LayerCache(one(), one()) for _ in range(config.n_layer)))


def write(rows_BNSH: jax.Array, new_BNTH: jax.Array, slot: jax.Array | int) -> jax.Array:
  """Rows of a cache with T new positions from `slot` on, one for all or [B]."""
  new_BNTH = new_BNTH.astype(rows_BNSH.dtype)
  if rows_BNSH.shape[0] == 1 and not in_mesh():
    at = (0, jnp.reshape(slot, ()), 0)
    return jax.lax.dynamic_update_slice(rows_BNSH[0], new_BNTH[0], at)[None]
  if jnp.ndim(slot) == 0:
    return jax.lax.dynamic_update_slice(rows_BNSH, new_BNTH, (0, 0, slot, 0))
  put = lambda row_NSH, new_NTH, s: jax.lax.dynamic_update_slice(row_NSH, new_NTH, (0, s, 0))
  return jax.vmap(put)(rows_BNSH, new_BNTH, slot)


def without_one_row(x_BNSH: jax.Array) -> jax.Array:
  """Keys or values as they are kept: without the axis of rows where there is one and no mesh.

  XLA leaves such an axis out of products. Where what goes into a loop or a program, and comes out,
  has it, XLA writes a cache twice, once for the product, and copies it for that.
  """
  return x_BNSH[0] if x_BNSH.shape[0] == 1 and not in_mesh() else x_BNSH


def with_rows(x: jax.Array) -> jax.Array:
  """Keys or values that were kept `without_one_row`, [B, N, S, H]."""
  return x[None] if x.ndim == 3 else x

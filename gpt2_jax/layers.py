"""The parts that the model is put together from. Letters: see `model.py`."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from gpt2_jax import fsdp
from gpt2_jax.config import GPTConfig
from gpt2_jax.matmul import parse_einsum
from gpt2_jax.sharding import RULES, P, in_mesh, layout, spec_of, unshard


def normal(rngs: nnx.Rngs, shape: tuple[int, ...], std: float, spec: P) -> jax.Array:
  """Draws from N(0, std), laid out as `spec` says; the numbers don't depend on the layout."""
  return std * jax.random.normal(rngs.params(), shape, jnp.float32, out_sharding=layout(spec))


def fold_in(keys_B: jax.Array | None, i: jax.Array | int) -> jax.Array | None:
  """`jax.random.fold_in` for each of B keys; None (no dropout) stays None."""
  return None if keys_B is None else jax.vmap(jax.random.fold_in, (0, None))(keys_B, i)


def dropout(x: jax.Array, rate: float, keys_B: jax.Array | None) -> jax.Array:
  """Dropout with a key for each row of `x`, so that no mask depends on the batch, its split into
  micro-batches, or the mesh. Off where `keys_B` is None.
  """
  if keys_B is None or rate == 0:
    return x
  shape, spec = x.shape[1:], P(*spec_of(x)[1:]) if in_mesh() else None
  keep = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - rate, shape, out_sharding=spec))(keys_B)
  return jnp.where(keep, x / (1 - rate), 0).astype(x.dtype)


def pick(x_BS: jax.Array, indices_B: jax.Array) -> jax.Array:
  """`x[b, indices[b]]` for each row b, [B] or [B, D]: a masked sum, since a gather can't be split."""
  found_BS = indices_B[:, None] == jnp.arange(x_BS.shape[1])
  return jnp.where(found_BS.reshape(found_BS.shape + (1,) * (x_BS.ndim - 2)), x_BS, 0).sum(1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
  """Keys and values, preallocated for S positions: of L layers [L, B, N, S, H], or of one
  [B, N, S, H]. Heads come before positions, as the products of attention read them.
  """

  k: jax.Array
  v: jax.Array

  @classmethod
  def zeros(cls, config: GPTConfig, B: int, S: int) -> 'Cache':
    """An empty cache of a model: in the form 'train' one, else one for each layer, which is written
    in place (a slice of a larger array would be copied).
    """

    def empty(*layers):
      shape, spec = (*layers, B, config.n_head, S, config.H), RULES.cache_lbnsh[1 - len(layers) :]
      return cls(*(jnp.zeros(shape, config.dtype, out_sharding=layout(P(*spec))) for _ in 'kv'))

    return (
      empty(config.n_layer)
      if config.form == 'train'
      else (tuple(empty() for _ in range(config.n_layer)))
    )

  def update(self, layer, slot, k_BTNH, v_BTNH) -> tuple['KVCache', jax.Array, jax.Array]:
    """Writes T positions of a layer at `slot`, one for all rows or one a row; returns the cache and
    that layer's k and v, [B, S, N, H].
    """

    def put(old, new_BTNH):
      new_BNTH = new_BTNH.swapaxes(1, 2)
      if old.ndim == 4:
        old = write(old, new_BNTH, slot)
        return old, old
      if jnp.ndim(slot) == 0:
        old = jax.lax.dynamic_update_slice(old, new_BNTH[None], (layer, 0, 0, slot, 0))
        return old, jax.lax.dynamic_index_in_dim(old, layer, keepdims=False)
      rows_BNSH = write(jax.lax.dynamic_index_in_dim(old, layer, keepdims=False), new_BNTH, slot)
      return jax.lax.dynamic_update_index_in_dim(old, rows_BNSH, layer, 0), rows_BNSH

    (k, k_BNSH), (v, v_BNSH) = put(self.k, k_BTNH), put(self.v, v_BTNH)
    return KVCache(k, v), k_BNSH.swapaxes(1, 2), v_BNSH.swapaxes(1, 2)


def write(rows_BNSH, new_BNTH, slot):
  """Rows of a cache with T new positions from `slot` on, one for all or [B]."""
  if rows_BNSH.shape[0] == 1 and not in_mesh():  # see `squeezed`
    at = (0, jnp.reshape(slot, ()), 0)
    return jax.lax.dynamic_update_slice(rows_BNSH[0], new_BNTH[0], at)[None]
  if jnp.ndim(slot) == 0:
    return jax.lax.dynamic_update_slice(rows_BNSH, new_BNTH, (0, 0, slot, 0))
  write = lambda row_NSH, new_NTH, s: jax.lax.dynamic_update_slice(row_NSH, new_NTH, (0, s, 0))
  return jax.vmap(write)(rows_BNSH, new_BNTH, slot)


Cache = KVCache | tuple[KVCache, ...]


def squeezed(cache: Any) -> Any:
  """A cache of layers without an axis of one row; `unsqueezed` undoes it.

  To be carried through a loop or given up to a program: XLA leaves such an axis out of products, and
  where what comes in and goes out has it, writes a cache twice, once for the product, and copies it
  for that.
  """
  one = lambda x: x.ndim == 4 and x.shape[0] == 1 and not in_mesh()
  return jax.tree.map(lambda x: x[0] if one(x) else x, cache)


def unsqueezed(cache: Any) -> Any:
  return jax.tree.map(lambda x: x[None] if x.ndim == 3 else x, cache)


def room(cache: Cache) -> int:
  """For how many positions a cache has room."""
  return (cache if isinstance(cache, KVCache) else cache[0]).k.shape[-2]


class Embed(nnx.Module):
  """A table of vectors; rows from `rows` on are padding and zero. Of int8 it has a scale a row."""

  def __init__(
    self, shape, std, spec, config: GPTConfig, *, rows: int, rngs: nnx.Rngs, int8: bool = False
  ):
    self.config = config
    table = normal(rngs, shape, std, spec)
    self.weight = nnx.Param(jnp.where(jnp.arange(shape[0])[:, None] < rows, table, 0))
    self.scale = nnx.Param(jnp.ones(shape[0], out_sharding=layout(P(spec[0])))) if int8 else None

  def rows(self, indices: jax.Array, B: int) -> jax.Array:
    """The vectors at indices [B, T], or [1, T] for all of B rows; NaN for one beyond the table."""
    c, spec = self.config, RULES.act_btd
    if self.scale is None:
      return fsdp.take(self.weight[...], indices, c.dtype, spec, c.reduce_dtype, B)
    steps = unshard(self.weight[...]).at[indices].get(out_sharding=layout(spec))
    scale = (
      unshard(self.scale[...])
      .at[indices]
      .get(out_sharding=layout(P(*spec[:-1])), mode='fill', fill_value=jnp.nan)
    )
    return (steps * scale[..., None]).astype(c.dtype)

  def logits(self, x_BTD: jax.Array) -> jax.Array:
    """Products with all vectors, in float32, [B, T, V]."""
    c = self.config
    how = fsdp.Product('BTD,VD->BTV', RULES.logits_btv, c.precision, c.reduce_dtype, 'float32')
    y_BTV = fsdp.einsum(how, x_BTD, self.weight[...])
    return y_BTV if self.scale is None else y_BTV * unshard(self.scale[...])


class Classifier(nnx.Module):
  """Logits over K labels, in float32: [B, T, D] -> [B, T, K]."""

  def __init__(self, config: GPTConfig, *, bias: bool, rngs: nnx.Rngs):
    D, K, self.config = config.n_embd, config.num_labels, config
    self.weight = nnx.Param(normal(rngs, (D, K), config.initializer_range, RULES.head_dk))
    self.bias = nnx.Param(jnp.zeros(K, out_sharding=layout(RULES.head_k))) if bias else None

  def __call__(self, x_BTD: jax.Array) -> jax.Array:
    c = self.config
    how = fsdp.Product('BTD,DK->BTK', spec_of(x_BTD), c.precision, c.reduce_dtype, 'float32')
    return fsdp.einsum(how, x_BTD, self.weight[...], self.bias[...] if self.bias else None)


class LayerNorm(nnx.Module):
  """Layer normalisation over D, in float32."""

  def __init__(self, D: int, epsilon: float):
    self.epsilon = epsilon
    self.weight = nnx.Param(jnp.ones(D, out_sharding=layout(RULES.ln_d)))
    self.bias = nnx.Param(jnp.zeros(D, out_sharding=layout(RULES.ln_d)))

  def __call__(self, x_BTD: jax.Array) -> jax.Array:
    x = x_BTD.astype(jnp.float32)
    x = x - x.mean(-1, keepdims=True)
    x = x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + self.epsilon)
    return (x * self.weight[...] + self.bias[...]).astype(x_BTD.dtype)


class Linear(nnx.Module):
  """`x @ weight + bias` as an einsum. Hugging Face's Conv1D has the same [in, out] order, in the form
  'train'. In the others the order is [out, in], which a matrix times one vector reads fastest; of
  int8, each output channel has a scale (`forms.py`).

  With `lora`, alpha/r · x·A·B is added: A's first axes are those that are contracted, B's last ones
  the others. A begins as PEFT's, uniform within 1/sqrt(fan-in), B as zero.
  """

  def __init__(
    self,
    equation,
    shape,
    spec,
    bias_shape,
    bias_spec,
    out_spec,
    std,
    *,
    config: GPTConfig,
    name: str,
    rngs: nnx.Rngs,
  ):
    """`name` is the module's in a block, such as 'attn.c_attn'."""
    self.equation, self.out_spec, self.config = equation, out_spec, config
    self.weight = nnx.Param(normal(rngs, shape, std, spec))
    self.bias = nnx.Param(jnp.zeros(bias_shape, out_sharding=layout(bias_spec)))
    self.scale = nnx.Param(jnp.ones_like(self.bias[...])) if config.form == 'int8' else None
    self.lora = config.adapter(name)
    if self.lora:
      r, ins = self.lora.r, len(parse_einsum(equation).sums)
      fan_in, spec = math.prod(shape[:ins]), tuple(spec)
      self.lora_A = nnx.LoRAParam(
        jax.random.uniform(
          rngs.params(),
          (*shape[:ins], r),
          jnp.float32,
          -(fan_in**-0.5),
          fan_in**-0.5,
          out_sharding=layout(P(*spec[:ins], None)),
        )
      )
      self.lora_B = nnx.LoRAParam(
        jnp.zeros((r, *shape[ins:]), out_sharding=layout(P(None, *spec[ins:])))
      )

  def __call__(self, x: jax.Array, keys_B: jax.Array | None = None):
    c, e, dtype = self.config, parse_einsum(self.equation), x.dtype
    # a training step adds up in the activations' dtype, as its gradient does
    wide = dtype.name if c.form == 'train' else 'float32'
    product = lambda equation, x, w, spec, b=None: fsdp.einsum(
      fsdp.Product(equation, spec, c.precision, c.reduce_dtype, wide), x, w, b
    )
    if c.form == 'train':
      y = product(self.equation, x, self.weight[...], self.out_spec, self.bias[...]).astype(dtype)
    else:  # one axis K is summed over: XLA on CPU would copy a weight with two, N and H, every time
      flat = lambda z: z.reshape(*z.shape[: z.ndim - len(e.sums)], -1)
      y = product(f'{e.rows}K,{e.columns}K->{e.out}', flat(x), flat(self.weight[...]), self.out_spec)
      over_rows = lambda b: b[:, None, None] if b.ndim == 3 else b  # c_attn's are CNH
      if self.scale is not None:
        y = y * over_rows(unshard(self.scale[...]))
      y = (y + over_rows(unshard(self.bias[...].astype(wide)))).astype(dtype)
    if self.lora:
      x = dropout(x, self.lora.dropout, keys_B)
      x_BTR = product(f'{e.x},{e.sums}R->BTR', x, self.lora_A[...], RULES.act_btd).astype(dtype)
      y += (
        self.lora.alpha
        / self.lora.r
        * product(f'BTR,R{e.columns}->{e.out}', x_BTR, self.lora_B[...], self.out_spec)
      ).astype(dtype)
    return y

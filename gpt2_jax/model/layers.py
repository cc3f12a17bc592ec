"""The parts that the model is put together from. Letters: see `gpt2.py`.

A part is named as its row in the table of parameters begins, 'h.attn.c_attn': shapes and layouts are
found there.
"""

import enum

import jax
import jax.numpy as jnp
from flax import nnx

from gpt2_jax.model.config import GPTConfig
from gpt2_jax.model.parameters import ROWS
from gpt2_jax.model.sites import SILENT, Listener
from gpt2_jax.parallel import sharded_products
from gpt2_jax.parallel.cpu_matmul import parse_einsum
from gpt2_jax.parallel.sharding import RULES, P, activation, in_mesh, layout, spec_of


def normal(config: GPTConfig, name: str, std: float, rngs: nnx.Rngs) -> nnx.Param:
  """A parameter drawn from N(0, std); the numbers don't depend on how it lies."""
  row = ROWS[name]
  draws = jax.random.normal(
    rngs.params(), row.shape(config.sizes), jnp.float32, out_sharding=layout(row.layout)
  )
  return nnx.Param(std * draws)


def constant(config: GPTConfig, name: str, value: float = 0) -> nnx.Param:
  """A parameter that begins as one number everywhere."""
  row = ROWS[name]
  return nnx.Param(
    jnp.full(row.shape(config.sizes), value, jnp.float32, out_sharding=layout(row.layout))
  )


class DropoutSite(enum.IntEnum):
  """The places of dropout in a block: what its key is folded with, so that each has its own mask.

  A number never changes its meaning: it would change the masks of runs that go on.
  """

  ATTENTION = 0  # the weights of attention
  ATTN_OUT = 1
  MLP_OUT = 2
  ATTN_C_ATTN = 3  # adapters' inputs, by the names of their modules
  ATTN_C_PROJ = 4
  MLP_C_FC = 5
  MLP_C_PROJ = 6


class OuterSite(enum.IntEnum):
  """The places of dropout outside of blocks; their numbers go on from those of the layers."""

  EMBEDDINGS = 0
  CLASSIFIER = 1


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


class Embed(nnx.Module):
  """A table of vectors. Rows beyond the vocabulary are padding, and zero."""

  def __init__(self, config: GPTConfig, name: str, std: float, *, rngs: nnx.Rngs):
    self.config = config
    self.weight = normal(config, f'{name}.weight', std, rngs)
    if ROWS[f'{name}.weight'].padded:
      table_VD = self.weight[...]
      real_V1 = jnp.arange(len(table_VD))[:, None] < config.vocab_size
      self.weight = nnx.Param(jnp.where(real_V1, table_VD, 0))

  @property
  def scale_V(self) -> jax.Array | None:
    """A factor of each row, where the weights are in steps."""
    return None

  def rows(self, indices: jax.Array, B: int) -> jax.Array:
    """The vectors at indices [B, T], or [1, T] for all of B rows; NaN for one beyond the table."""
    c = self.config
    return sharded_products.take(self.weight[...], indices, c.dtype, RULES.act_btd, c.reduce_dtype, B)

  def logits(self, x_BTD: jax.Array) -> jax.Array:
    """Products with all vectors, in float32, [B, T, V]."""
    c = self.config
    how = sharded_products.Product(
      'BTD,VD->BTV', RULES.logits_btv, c.precision, c.reduce_dtype, 'float32'
    )
    return sharded_products.einsum(how, x_BTD, self.weight[...])


class Classifier(nnx.Module):
  """Logits over K labels, in float32: [B, T, D] -> [B, T, K]."""

  def __init__(self, config: GPTConfig, name: str, *, rngs: nnx.Rngs):
    self.config, bias = config, f'{name}.bias'
    self.weight = normal(config, f'{name}.weight', config.initializer_range, rngs)
    self.bias = constant(config, bias) if bias in ROWS else None

  def __call__(self, x_BTD: jax.Array) -> jax.Array:
    c = self.config
    how = sharded_products.Product(
      'BTD,DK->BTK', spec_of(x_BTD), c.precision, c.reduce_dtype, 'float32'
    )
    return sharded_products.einsum(
      how, x_BTD, self.weight[...], self.bias[...] if self.bias else None
    )


class LayerNorm(nnx.Module):
  """Layer normalisation over D, in float32."""

  def __init__(self, config: GPTConfig, name: str):
    self.epsilon = config.layer_norm_epsilon
    self.weight = constant(config, f'{name}.weight', 1)
    self.bias = constant(config, f'{name}.bias')

  @jax.named_scope('ln')
  def __call__(self, x_BTD: jax.Array, at: Listener = SILENT, name: str = '') -> jax.Array:
    """The norm; its sites are `name`.scale, which is divided by, and `name`.normalized,
    before its weight.
    """
    x = x_BTD.astype(jnp.float32)
    x = x - x.mean(-1, keepdims=True)
    inverse_BT1 = jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + self.epsilon)
    if at.hears(f'{name}.scale'):
      inverse_BT1 = 1 / at(f'{name}.scale', 1 / inverse_BT1)
    x = at(f'{name}.normalized', x * inverse_BT1)
    return (x * self.weight[...] + self.bias[...]).astype(x_BTD.dtype)


class Linear(nnx.Module):
  """`x @ weight + bias` as an einsum. Hugging Face's Conv1D has the same order, [in, out]."""

  def __init__(self, config: GPTConfig, name: str, equation: str, std: float, *, rngs: nnx.Rngs):
    self.config, self.name, self.equation = config, name, equation
    self.weight = normal(config, f'{name}.weight', std, rngs)
    self.bias = constant(config, f'{name}.bias')

  def __call__(self, x: jax.Array, keys_B: jax.Array | None = None) -> jax.Array:
    """The product; `keys_B`, a block's keys of dropout, are for an adapter's."""
    del keys_B
    return self.product(self.equation, x, self.weight[...], self.bias[...]).astype(x.dtype)

  def product(self, equation: str, x: jax.Array, w: jax.Array, b: jax.Array | None = None):
    """The einsum `equation` of `x` and `w`, in the dtype `wide`."""
    c, spec = self.config, activation(parse_einsum(equation).out)
    how = sharded_products.Product(equation, spec, c.precision, c.reduce_dtype, self.wide(x))
    return sharded_products.einsum(how, x, w, b)

  def wide(self, x: jax.Array) -> str:
    """The dtype of products: a training step adds up in the activations', as its gradient does."""
    return x.dtype.name

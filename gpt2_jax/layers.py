"""The parts that the model is put together from. Letters: see `model.py`."""

import jax
import jax.numpy as jnp
from flax import nnx

from gpt2_jax.sharding import RULES, P, layout, unshard


def normal(rngs: nnx.Rngs, shape: tuple[int, ...], std: float, spec: P) -> jax.Array:
  """Draws from N(0, std), laid out as `spec` says; the numbers don't depend on the layout."""
  return std * jax.random.normal(rngs.params(), shape, jnp.float32, out_sharding=layout(spec))


def fold_in(keys_B: jax.Array | None, i: jax.Array | int) -> jax.Array | None:
  """`jax.random.fold_in` for each of B keys; None (no dropout) stays None."""
  return None if keys_B is None else jax.vmap(jax.random.fold_in, (0, None))(keys_B, i)


def dropout(x: jax.Array, rate: float, keys_B: jax.Array | None, spec: P | None = None) -> jax.Array:
  """Dropout with a key for each row of `x`, so that no mask depends on the batch, its split into
  micro-batches, or the mesh. `spec` is the layout of a row. Off where `keys_B` is None.
  """
  if keys_B is None or rate == 0:
    return x
  shape, spec = x.shape[1:], None if spec is None else layout(spec)
  keep = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - rate, shape, out_sharding=spec))(keys_B)
  return jnp.where(keep, x / (1 - rate), 0).astype(x.dtype)


class Embed(nnx.Module):
  """A table of vectors; rows from `rows` on are padding and zero."""

  def __init__(self, shape, std, spec, *, rows: int, rngs: nnx.Rngs):
    table = normal(rngs, shape, std, spec)
    self.weight = nnx.Param(jnp.where(jnp.arange(shape[0])[:, None] < rows, table, 0))


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
  """`x @ weight + bias` as an einsum. Hugging Face's Conv1D has the same [in, out] order."""

  def __init__(self, equation, shape, spec, bias_shape, bias_spec, out_spec, std, *, rngs):
    self.equation, self.out_spec = equation, out_spec
    self.weight = nnx.Param(normal(rngs, shape, std, spec))
    self.bias = nnx.Param(jnp.zeros(bias_shape, out_sharding=layout(bias_spec)))

  def __call__(self, x: jax.Array, precision: str | None) -> jax.Array:
    weight, bias = (unshard(p[...].astype(x.dtype)) for p in (self.weight, self.bias))
    y = jnp.einsum(
        self.equation, x, weight, precision=precision, out_sharding=layout(self.out_spec))
    return y + (bias[:, None, None] if bias.ndim == 3 else bias)  # c_attn's bias is CNH

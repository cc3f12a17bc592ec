"""The parts that the model is put together from. Letters: see `model.py`."""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from gpt2_jax.config import LoRA
from gpt2_jax.sharding import RULES, P, in_mesh, layout, unshard


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


def pick(x_BS: jax.Array, indices_B: jax.Array) -> jax.Array:
  """`x[b, indices[b]]` for each row b, [B] or [B, D]: a masked sum, since a gather can't be split."""
  found_BS = indices_B[:, None] == jnp.arange(x_BS.shape[1])
  return jnp.where(found_BS.reshape(found_BS.shape + (1,) * (x_BS.ndim - 2)), x_BS, 0).sum(1)


class Embed(nnx.Module):
  """A table of vectors; rows from `rows` on are padding and zero."""

  def __init__(self, shape, std, spec, *, rows: int, rngs: nnx.Rngs):
    table = normal(rngs, shape, std, spec)
    self.weight = nnx.Param(jnp.where(jnp.arange(shape[0])[:, None] < rows, table, 0))


class Classifier(nnx.Module):
  """Logits over K labels, in float32: [B, T, D] -> [B, T, K]."""

  def __init__(self, D: int, K: int, std: float, *, bias: bool, rngs: nnx.Rngs):
    self.weight = nnx.Param(normal(rngs, (D, K), std, RULES.head_dk))
    self.bias = nnx.Param(jnp.zeros(K, out_sharding=layout(RULES.head_k))) if bias else None

  def __call__(self, x_BTD: jax.Array, precision: str | None) -> jax.Array:
    logits_BTK = jnp.einsum(
        'BTD,DK->BTK', x_BTD, unshard(self.weight[...].astype(x_BTD.dtype)), precision=precision,
        preferred_element_type=jnp.float32, out_sharding=layout(RULES.act_btd))
    return logits_BTK if self.bias is None else logits_BTK + self.bias[...]


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
  """`x @ weight + bias` as an einsum. Hugging Face's Conv1D has the same [in, out] order.

  With `lora`, alpha/r · x·A·B is added: A's first axes are those that are contracted, B's last ones
  the others. A begins as PEFT's, uniform within 1/sqrt(fan-in), B as zero.
  """

  def __init__(self, equation, shape, spec, bias_shape, bias_spec, out_spec, std, *, rngs,
               lora: LoRA | None = None):
    self.equation, self.out_spec, self.lora = equation, out_spec, lora
    self.weight = nnx.Param(normal(rngs, shape, std, spec))
    self.bias = nnx.Param(jnp.zeros(bias_shape, out_sharding=layout(bias_spec)))
    if lora:
      ins = len(_contracted(equation))
      fan_in, spec = math.prod(shape[:ins]), tuple(spec)
      self.lora_A = nnx.LoRAParam(jax.random.uniform(
          rngs.params(), (*shape[:ins], lora.r), jnp.float32, -fan_in**-0.5, fan_in**-0.5,
          out_sharding=layout(P(*spec[:ins], None))))
      self.lora_B = nnx.LoRAParam(jnp.zeros(
          (lora.r, *shape[ins:]), out_sharding=layout(P(None, *spec[ins:]))))

  def __call__(self, x: jax.Array, precision: str | None, keys_B: jax.Array | None = None):
    product = lambda equation, x, w, spec: jnp.einsum(
        equation, x, unshard(w[...].astype(x.dtype)), precision=precision, out_sharding=layout(spec))
    y = product(self.equation, x, self.weight, self.out_spec)
    bias = unshard(self.bias[...].astype(x.dtype))
    y = y + (bias[:, None, None] if bias.ndim == 3 else bias)  # c_attn's bias is CNH
    if self.lora:
      (x_axes, w_axes), out = self.equation.split('->')[0].split(','), self.equation.split('->')[1]
      ins = _contracted(self.equation)
      spec = P(*jax.typeof(x).sharding.spec[1:]) if in_mesh() else None
      x = dropout(x, self.lora.dropout, keys_B, spec)
      x_BTR = product(f'{x_axes},{ins}R->BTR', x, self.lora_A, RULES.act_btd)
      y += self.lora.alpha / self.lora.r * product(
          f'BTR,R{w_axes.removeprefix(ins)}->{out}', x_BTR, self.lora_B, self.out_spec)
    return y


def _contracted(equation: str) -> str:
  """Letters of the axes that `x` and `weight` share: the weight's first ones."""
  x_axes, w_axes = equation.split('->')[0].split(',')
  return ''.join(letter for letter in w_axes if letter in x_axes)

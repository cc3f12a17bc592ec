"""The model's parts in the forms that are fast or small to decode with: see `decode_layout.py`."""

import jax
import jax.numpy as jnp
from flax import nnx

from gpt2_jax.model.config import GPTConfig
from gpt2_jax.model.layers import Embed, Linear, constant
from gpt2_jax.parallel.cpu_matmul import parse_einsum
from gpt2_jax.parallel.sharding import RULES, P, layout, unshard


class DecodeLinear(Linear):
  """As `Linear`, of a weight [out, in], which a matrix times one vector reads fastest."""

  def __call__(self, x: jax.Array, keys_B: jax.Array | None = None) -> jax.Array:
    del keys_B
    # one axis K is summed over: XLA on CPU would copy a weight with two, N and H, every time
    e = parse_einsum(self.equation)
    flat = lambda z: z.reshape(*z.shape[: z.ndim - len(e.sums)], -1)
    equation = f'{e.rows}K,{e.columns}K->{e.out}'
    y = self.scaled(self.product(equation, flat(x), flat(self.weight[...])))
    return (y + over_rows(unshard(self.bias[...].astype(self.wide(x))))).astype(x.dtype)

  def scaled(self, y: jax.Array) -> jax.Array:
    """What a product is multiplied with, done."""
    return y

  def wide(self, x: jax.Array) -> str:
    del x
    return 'float32'


def over_rows(b: jax.Array) -> jax.Array:
  """A vector for each output channel, to go with rows: `CNH` with `CBTNH`."""
  return b[:, None, None] if b.ndim == 3 else b


class Int8Linear(DecodeLinear):
  """As `DecodeLinear`, of a weight in steps; each output channel has the size of its own."""

  def __init__(self, config: GPTConfig, name: str, equation: str, std: float, *, rngs: nnx.Rngs):
    super().__init__(config, name, equation, std, rngs=rngs)
    self.scale = constant(config, f'{name}.scale', 1)

  def scaled(self, y: jax.Array) -> jax.Array:
    return y * over_rows(unshard(self.scale[...]))


class Int8Embed(Embed):
  """A table in steps; each row has the size of its own."""

  def __init__(self, config: GPTConfig, name: str, std: float, *, rngs: nnx.Rngs):
    super().__init__(config, name, std, rngs=rngs)
    self.scale = constant(config, f'{name}.scale', 1)

  @property
  def scale_V(self) -> jax.Array:
    return self.scale[...]

  def rows(self, indices: jax.Array, B: int) -> jax.Array:
    del B
    spec = RULES.act_btd
    steps = unshard(self.weight[...]).at[indices].get(out_sharding=layout(spec))
    scale = (
      unshard(self.scale[...])
      .at[indices]
      .get(out_sharding=layout(P(*spec[:-1])), mode='fill', fill_value=jnp.nan)
    )
    return (steps * scale[..., None]).astype(self.config.dtype)

  def logits(self, x_BTD: jax.Array) -> jax.Array:
    return super().logits(x_BTD) * unshard(self.scale[...])

"""Low-rank adapters (Hu et al. 2021, arXiv:2106.09685) around a linear layer of any form."""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from gpt2_jax.model.config import GPTConfig
from gpt2_jax.model.decode_layers import DecodeLinear, Int8Linear
from gpt2_jax.model.layers import DropoutSite, Linear, constant, dropout, fold_in
from gpt2_jax.model.parameters import ROWS
from gpt2_jax.parallel.cpu_matmul import parse_einsum
from gpt2_jax.parallel.sharding import layout


class LoRALinear(Linear):
  """The layer that it is mixed into, and alpha/r · x·A·B added to that layer's output.

  A's first axes are those that are contracted, B's last ones the others. A begins as PEFT's, uniform
  within 1/sqrt(fan-in), B as zero. A class that inherits, and no layer around a layer, so that
  parameters keep their names.
  """

  def __init__(self, config: GPTConfig, name: str, equation: str, std: float, *, rngs: nnx.Rngs):
    super().__init__(config, name, equation, std, rngs=rngs)
    row = ROWS[f'{name}.lora_A']
    shape, spec = row.shape(config.sizes), layout(row.layout)
    most = math.prod(shape[:-1]) ** -0.5
    self.lora_A = nnx.LoRAParam(
      jax.random.uniform(rngs.params(), shape, jnp.float32, -most, most, out_sharding=spec)
    )
    self.lora_B = nnx.LoRAParam(constant(config, f'{name}.lora_B')[...])

  def __call__(self, x: jax.Array, keys_B: jax.Array | None = None) -> jax.Array:
    y, lora, dtype = super().__call__(x), self.config.lora, x.dtype
    assert lora is not None
    e, A, B = parse_einsum(self.equation), self.lora_A[...], self.lora_B[...]
    A_axes, B_axes = (ROWS[f'{self.name}.{name}'].letters for name in ('lora_A', 'lora_B'))
    site = DropoutSite[self.name.removeprefix('h.').replace('.', '_').upper()]
    x = dropout(x, lora.dropout, fold_in(keys_B, site))
    x_BTR = self.product(f'{e.x},{A_axes}->BTR', x, A).astype(dtype)
    change = self.product(f'BTR,{B_axes}->{e.out}', x_BTR, B)
    return y + (lora.alpha / lora.r * change).astype(dtype)


class LoRADecodeLinear(LoRALinear, DecodeLinear):
  """`DecodeLinear` with an adapter."""


class LoRAInt8Linear(LoRALinear, Int8Linear):
  """`Int8Linear` with an adapter."""

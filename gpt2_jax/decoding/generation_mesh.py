"""The mesh to generate on, which is not that of training."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh

from gpt2_jax.core.chips import chip_of
from gpt2_jax.model.config import GPTConfig
from gpt2_jax.model.sizes import num_params
from gpt2_jax.parallel.sharding import make_mesh

SHARE = 0.5  # of a device's memory that weights may take: the rest is for keys and values


def generation_mesh(config: GPTConfig, devices: Sequence[Any]) -> Mesh:
  """A mesh that gathers no weights for a token: each device has all of them, or where they take more
  than half of its memory, a part of each along `tensor`, as few parts as will do. Rows over the rest.

  `fsdp`, which training splits parameters by, would send all of them for every token.
  """
  chip = chip_of(devices[0].device_kind)
  weights = jnp.dtype(config.dtype).itemsize * num_params(config)
  sizes = [size for size, axis in config.divisible().values() if axis == 'tensor']
  possible = [
    n
    for n in range(1, len(devices) + 1)
    if len(devices) % n == 0 and not any(size % n for size in sizes)
  ]
  fits = [n for n in possible if chip is None or weights / n <= SHARE * chip.hbm]
  return make_mesh(data=-1, tensor=(fits or possible[-1:])[0], devices=devices)

"""The model's parts and its blocks by the form of the parameters (`config.FORMS`)."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from gpt2_jax.model.config import GPTConfig
from gpt2_jax.model.decode_layers import DecodeLinear, Int8Embed, Int8Linear
from gpt2_jax.model.layers import Embed, Linear
from gpt2_jax.model.lora import LoRADecodeLinear, LoRAInt8Linear, LoRALinear
from gpt2_jax.model.parameters import ROWS
from gpt2_jax.model.remat import REMAT_POLICIES

LINEAR = {'train': Linear, 'decode': DecodeLinear, 'int8': Int8Linear}
ADAPTED = {'train': LoRALinear, 'decode': LoRADecodeLinear, 'int8': LoRAInt8Linear}

Run = Callable[[Any, jax.Array, Any, Any], tuple[jax.Array, Any, Any]]


def linear(config: GPTConfig, name: str, equation: str, std: float, *, rngs: nnx.Rngs) -> Linear:
  """A linear layer of a block, with an adapter where the config wants one.

  Args:
    config: of the model.
    name: of the module: 'h.attn.c_attn'.
    equation: the product of inputs and weight, the weight's letters as in the table of parameters.
    std: of the initial weights.
    rngs: draws them.
  """
  kinds = ADAPTED if config.adapter(name.removeprefix('h.')) else LINEAR
  return kinds[config.form](config, name, equation, std, rngs=rngs)


def embedding(config: GPTConfig, name: str, std: float, *, rngs: nnx.Rngs) -> Embed:
  """A table of vectors; arguments as of `linear`."""
  kind = Int8Embed if config.form == 'int8' and f'{name}.scale' in ROWS else Embed
  return kind(config, name, std, rngs=rngs)


def make_blocks(make: Callable[[nnx.Rngs], nnx.Module], config: GPTConfig, rngs: nnx.Rngs) -> Any:
  """The L blocks: to train, one whose parameters have an axis L; to decode, a list of them."""
  if config.form != 'train':
    return nnx.List([make(rngs) for _ in range(config.n_layer)])
  made = nnx.vmap(make, in_axes=0, out_axes=0, transform_metadata={nnx.PARTITION_NAME: None})
  return made(rngs.split(config.n_layer))


def run_blocks(run: Run, blocks: Any, config: GPTConfig, x_BTD: jax.Array, cache: Any):
  """Runs the blocks, one on what another has made.

  Args:
    run: (block, x_BTD, number of the layer, cache) -> x_BTD, cache, and what is to be kept of it.
    blocks: as `make_blocks` makes them.
    config: of the model.
    x_BTD: what the first one reads.
    cache: a cache of all layers, as the form wants it, or None.

  Returns:
    x_BTD, the cache, and what was kept, with an axis of layers.
  """
  return (_scan if config.form == 'train' else _unroll)(run, blocks, config, x_BTD, cache)


def _scan(run: Run, blocks: Any, config: GPTConfig, x_BTD: jax.Array, cache: Any):
  """Over the axis L, by a loop where `config.scan_layers`; `config.remat` says what a block keeps for
  the backward pass.

  A loop is compiled once for all layers, but what they keep is copied into arrays of all layers, and
  out of them. Written out, they are compiled one by one.
  """
  block, layers = nnx.split(blocks)

  def body(carry, layer):
    (x_BTD, cache), (params, number) = carry, layer
    x_BTD, cache, kept = run(nnx.merge(block, params), x_BTD, number, cache)
    return (x_BTD, cache), kept

  # written out, what is to be computed again would be merged with what was computed
  apart = not config.scan_layers
  body = jax.checkpoint(body, policy=REMAT_POLICIES[config.remat], prevent_cse=apart)
  numbers = jnp.arange(config.n_layer)
  (x_BTD, cache), kept = jax.lax.scan(body, (x_BTD, cache), (layers, numbers), unroll=apart)
  return x_BTD, cache, kept


def _unroll(run: Run, blocks: Any, config: GPTConfig, x_BTD: jax.Array, cache: Any):
  """One after another, each with its own weights and cache: nothing is sliced or copied."""
  layers: list[Any] = [None] * config.n_layer if cache is None else [*cache.layers]
  kept = []
  for number, block in enumerate(blocks):
    x_BTD, layers[number], features = run(block, x_BTD, number, layers[number])
    kept.append(features)
  if cache is not None:
    cache = dataclasses.replace(cache, layers=tuple(layers))
  return x_BTD, cache, jax.tree.map(lambda *layers: jnp.stack(layers), *kept)

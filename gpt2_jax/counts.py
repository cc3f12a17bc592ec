"""How large a model is, what of it is trained, and what a token costs."""

import dataclasses
import functools
from typing import Any

import jax
from flax import nnx
from flax.traverse_util import flatten_dict

from gpt2_jax.config import GPTConfig
from gpt2_jax.model import GPT2, make_params
from gpt2_jax.sharding import without_mesh


@functools.cache
def trainable_paths(config: GPTConfig) -> frozenset[tuple[str, ...]]:
  """Paths of the parameters that are trained: all, or with adapters, them and a classifier's head."""
  with without_mesh():
    config = dataclasses.replace(config, vocab_multiple=1)
    model = nnx.eval_shape(lambda: GPT2(config, rngs=nnx.Rngs(0)))
  beside = nnx.Any(nnx.LoRAParam, nnx.PathContains('score'), nnx.PathContains('classifier'))
  state = nnx.to_pure_dict(nnx.state(model, beside if config.lora else nnx.Param))
  return frozenset(flatten_dict(state))


@functools.cache
def param_shapes(config: GPTConfig) -> dict[tuple[str, ...], Any]:
  """Path -> shape of each parameter, without the padding of the vocabulary."""
  config = dataclasses.replace(config, vocab_multiple=1)
  with without_mesh():
    return flatten_dict(jax.eval_shape(functools.partial(make_params, config, 0)))


def num_params(config: GPTConfig) -> int:
  """Number of parameters, without the padding of the vocabulary."""
  return sum(leaf.size for leaf in param_shapes(config).values())


def num_trained(config: GPTConfig) -> int:
  """Number of parameters that are trained: see `trainable_paths`."""
  shapes = param_shapes(config)
  return sum(shapes[path].size for path in trainable_paths(config))


def flops_per_token(config: GPTConfig, T: int) -> int:
  """FLOPs of a training step (forward and backward) per token: 6·P + 12·L·D·T.

  P counts the parameters that a token is multiplied with: all but the look-up tables, that is
  without wpe and with the head. The second term is attention over all T keys, the causal half not
  taken off (the formula of PaLM's appendix B and of nanoGPT).
  """
  c = config
  P = num_params(c) - c.n_positions * c.n_embd
  if not c.tie_word_embeddings:
    P -= c.vocab_size * c.n_embd
  return 6 * P + 12 * c.n_layer * c.n_embd * T

"""How large a model is, what of it is trained, and what a token costs."""

import math

from gpt2_jax.model.config import GPTConfig


def param_shapes(config: GPTConfig) -> dict[tuple[str, ...], tuple[int, ...]]:
  """Path -> shape of each parameter, without the padding of the vocabulary."""
  sizes = config.sizes | {'V': config.vocab_size}
  return {row.path: row.whole(sizes) for row in config.parameters()}


def trainable_paths(config: GPTConfig) -> frozenset[tuple[str, ...]]:
  """Paths of the parameters that are trained: all, or with adapters, them and a classifier's head."""
  beside = lambda row: row.kind == 'adapter' or row.head not in ('', 'lm')
  return frozenset(row.path for row in config.parameters() if not config.lora or beside(row))


def num_params(config: GPTConfig) -> int:
  """Number of parameters, without the padding of the vocabulary."""
  return sum(map(math.prod, param_shapes(config).values()))


def num_trained(config: GPTConfig) -> int:
  """Number of parameters that are trained: see `trainable_paths`."""
  shapes = param_shapes(config)
  return sum(math.prod(shapes[path]) for path in trainable_paths(config))


def flops_per_token(config: GPTConfig, T: int) -> int:
  """FLOPs of a training step (forward and backward) per token: 6·P + 12·L·D·T.

  P counts the parameters that a token is multiplied with: all but the look-up tables, that is
  without wpe and with the head. The second term is attention over all T keys, the causal half not
  taken off (the formula of PaLM's appendix B and of nanoGPT).
  """
  c = config
  P = num_params(c) - math.prod(param_shapes(c).get(('wpe', 'weight'), (0,)))
  if not c.tie_word_embeddings:
    P -= c.vocab_size * c.n_embd
  return 6 * P + 12 * c.n_layer * c.n_embd * T

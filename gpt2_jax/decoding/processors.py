"""What is done to the logits before a token is drawn from them.

A processor is a frozen dataclass that maps logits [B, V] to logits [B, V]. Its numbers are traced:
another temperature costs no compilation, another set of processors does. They are applied in the
order of Hugging Face's `generate`: temperature, top-k, top-p.
"""

import dataclasses
from typing import Protocol

import jax
import jax.numpy as jnp

from gpt2_jax.errors import UserError

NEVER = float('-inf')  # the logit of a token that can't be drawn


class Processor(Protocol):
  """The interface of a processor. Implementations are registered as JAX dataclasses."""

  def __call__(self, logits_BV: jax.Array) -> jax.Array: ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Temperature:
  """Divides the logits."""

  temperature: float

  def __call__(self, logits_BV: jax.Array) -> jax.Array:
    return logits_BV / self.temperature


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TopK:
  """Keeps the k likeliest tokens (Fan et al. 2018, arXiv:1805.04833), and what ties with the last."""

  k: int

  def __call__(self, logits_BV: jax.Array) -> jax.Array:
    V = logits_BV.shape[-1]
    sorted_BV = jnp.sort(logits_BV, axis=-1)
    least_B1 = jax.lax.dynamic_slice_in_dim(sorted_BV, V - jnp.minimum(self.k, V), 1, axis=-1)
    return jnp.where(logits_BV < least_B1, NEVER, logits_BV)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TopP:
  """Keeps the fewest tokens whose probability reaches p (Holtzman et al. 2019, arXiv:1904.09751).

  The token that crosses p is kept, as in Hugging Face's; OpenAI's released code drops it
  (openai/gpt-2#187).
  """

  p: float

  def __call__(self, logits_BV: jax.Array) -> jax.Array:
    ids_BV = jnp.zeros_like(logits_BV, jnp.int32) + jnp.arange(logits_BV.shape[-1])
    by_rank_BV, ids_BV = jax.lax.sort((-logits_BV, ids_BV), num_keys=1, is_stable=True)
    probs_BV = jax.nn.softmax(-by_rank_BV, axis=-1)
    before_BV = jnp.cumsum(probs_BV, axis=-1) - probs_BV  # what the likelier tokens sum to
    # sorted back by id: unlike a gather, a sort is fine on any mesh
    _, before_BV = jax.lax.sort((ids_BV, before_BV), num_keys=1)
    return jnp.where(before_BV < self.p, logits_BV, NEVER)


def make_processors(
    temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
) -> tuple[Processor, ...]:
  """The processors that options named as in Hugging Face's `generate` ask for.

  Raises:
    UserError: an option is out of range.
  """
  if not temperature > 0:
    raise UserError(f'temperature = {temperature} must be positive (greedy: do_sample=False).')
  if top_k is not None and top_k < 1:
    raise UserError(f'top_k = {top_k} must be at least 1.')
  if top_p is not None and not 0 < top_p <= 1:
    raise UserError(f'top_p = {top_p} must lie in (0, 1].')
  processors: list[Processor] = []
  if temperature != 1:
    processors.append(Temperature(temperature))
  if top_k is not None:
    processors.append(TopK(top_k))
  if top_p is not None and top_p < 1:
    processors.append(TopP(top_p))
  return tuple(processors)

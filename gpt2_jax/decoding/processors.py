"""What is done to the scores before a token is chosen: Hugging Face's "logits processors".

A processor is a frozen dataclass that maps scores [B, V] to scores [B, V], row by row, given what
has been written. Its numbers are traced, and its lists are padded to powers of two: other numbers
cost no compilation, another set of processors does.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from gpt2_jax.batching import bucket
from gpt2_jax.decoding.automaton import Automaton
from gpt2_jax.decoding.history import History
from gpt2_jax.decoding.pytree import register
from gpt2_jax.decoding.warpers import NEVER, log_probs

NOWHERE = np.iinfo(np.int32).max  # an id beyond any vocabulary: pads lists of ids
ANY = -1  # in a prefix: whatever stands there, or nothing


class Processor(Protocol):
  """The interface of a processor. Implementations are dataclasses, registered with JAX.

  Scores are float32: logits, or in beam search log-probabilities. A score of -inf forbids a token.
  """

  def __call__(self, scores_BV: jax.Array, history: History) -> jax.Array: ...


@register
@dataclasses.dataclass(frozen=True)
class Custom:
  """A user's processor. Its class is named for JAX's sake: see `register`."""

  processor: Processor
  kind: type = dataclasses.field(metadata=dict(static=True))

  def __call__(self, scores_BV: jax.Array, history: History) -> jax.Array:
    return self.processor(scores_BV, history)


def id_array(ids: Iterable[int]) -> np.ndarray:
  """Ids, padded to a bucket."""
  ids = [int(i) for i in ids if i >= 0]
  return np.array(ids + [NOWHERE] * (bucket(len(ids), NOWHERE, 4) - len(ids)), np.int32)


def _among(ids_K: ArrayLike, V: int) -> jax.Array:
  """Which ids of the vocabulary are listed, [V]."""
  return jnp.zeros(V, bool).at[jnp.asarray(ids_K)].set(True, mode='drop')


def _only(ids_K: ArrayLike, when_B: jax.Array, scores_BV: jax.Array) -> jax.Array:
  """Score 0 for some ids and -inf for all others, in some rows."""
  forced_V = jnp.where(_among(ids_K, scores_BV.shape[-1]), 0.0, NEVER)
  return jnp.where(when_B[:, None], forced_V, scores_BV)


def _never(ids_K: ArrayLike, when_B: jax.Array, scores_BV: jax.Array) -> jax.Array:
  """Score -inf for some ids, in some rows."""
  return jnp.where(when_B[:, None] & _among(ids_K, scores_BV.shape[-1]), NEVER, scores_BV)


@register
@dataclasses.dataclass(frozen=True)
class SequenceBias:
  """Adds to the score of a token that would complete a listed sequence; -inf outweighs all."""

  prefix_KP: ArrayLike  # the sequences but for their last ids, right-aligned, ANY before them
  last_K: ArrayLike  # their last ids
  bias_K: ArrayLike

  @classmethod
  def of(cls, biases: Mapping[tuple[int, ...], float]) -> 'SequenceBias':
    """From sequences of ids, none empty, and what is added to the score of the last id of each."""
    K, longest = bucket(len(biases), NOWHERE, 4), max(map(len, biases), default=1)
    prefix_KP = np.full((K, bucket(longest - 1, NOWHERE, 1) if longest > 1 else 0), ANY, np.int32)
    for prefix_P, ids in zip(prefix_KP, biases):
      prefix_P[prefix_P.size - len(ids) + 1 :] = ids[:-1]
    bias_K = np.array([*biases.values()] + [0.0] * (K - len(biases)), np.float32)
    last_K = np.array([ids[-1] for ids in biases] + [NOWHERE] * (K - len(biases)), np.int32)
    return cls(prefix_KP, last_K, bias_K)

  def __call__(self, scores_BV: jax.Array, history: History) -> jax.Array:
    recent_BP, there_BP = history.last(np.shape(self.prefix_KP)[1])
    same_BKP = (recent_BP[:, None] == self.prefix_KP) & there_BP[:, None]
    here_BK = (same_BKP | (jnp.asarray(self.prefix_KP) == ANY)).all(-1)
    add = lambda bias_K: jnp.zeros(scores_BV.shape[-1]).at[self.last_K].add(bias_K, mode='drop')
    bias_BV = jax.vmap(add)(jnp.where(here_BK, self.bias_K, 0.0))
    never_BV = (scores_BV == NEVER) | jnp.isnan(bias_BV)  # NaN: of -inf and inf
    return jnp.where(never_BV, NEVER, scores_BV + bias_BV)


@register
@dataclasses.dataclass(frozen=True)
class RepetitionPenalty:
  """Divides positive scores of tokens that the prompt or the text has, and multiplies negative ones
  (Keskar et al. 2019, arXiv:1909.05858).
  """

  penalty: ArrayLike

  def __call__(self, scores_BV: jax.Array, history: History) -> jax.Array:
    less_BV = jnp.where(scores_BV < 0, scores_BV * self.penalty, scores_BV / self.penalty)
    return jnp.where(history.counts(scores_BV.shape[-1]) > 0, less_BV, scores_BV)


@register
@dataclasses.dataclass(frozen=True)
class CountPenalty:
  """Subtracts from the scores of tokens that the new text has: once, and for each time (OpenAI's
  presence and frequency penalties).
  """

  presence: ArrayLike
  frequency: ArrayLike

  def __call__(self, scores_BV: jax.Array, history: History) -> jax.Array:
    counts_BV = history.counts(scores_BV.shape[-1], new=True)
    return scores_BV - self.frequency * counts_BV - self.presence * (counts_BV > 0)


@register
@dataclasses.dataclass(frozen=True)
class NoRepeatNGram:
  """Forbids tokens that would complete n tokens in a row a second time, the prompt's among them
  (Paulus et al. 2017, arXiv:1705.04304).
  """

  n: ArrayLike

  def __call__(self, scores_BV: jax.Array, history: History) -> jax.Array:
    tokens_BS, lengths_B1 = history.tokens_BS, history.lengths_B[:, None]
    S, V = tokens_BS.shape[1], scores_BV.shape[-1]
    n = jnp.minimum(self.n, S + 1)

    def compare(j, same_BS):  # the j-th id before each place with the j-th before the next one
      wanted_B1 = jnp.take_along_axis(tokens_BS, jnp.maximum(lengths_B1 - j, 0), axis=1)
      return same_BS & (jnp.roll(tokens_BS, j, axis=1) == wanted_B1)

    places = jnp.arange(S)
    same_BS = jax.lax.fori_loop(1, n, compare, (places >= n - 1) & (places < lengths_B1))
    return jnp.where(
      jax.vmap(_among, (0, None))(jnp.where(same_BS, tokens_BS, NOWHERE), V), NEVER, scores_BV
    )


@register
@dataclasses.dataclass(frozen=True)
class MinLength:
  """Forbids the end before so many tokens, and so many new ones."""

  ends_E: ArrayLike
  length: ArrayLike = 0
  new: ArrayLike = 0

  def __call__(self, scores_BV: jax.Array, history: History) -> jax.Array:
    short_B = (history.lengths_B < self.length) | (history.new_B < self.new)
    return _never(self.ends_E, short_B, scores_BV)


@register
@dataclasses.dataclass(frozen=True)
class Guided:
  """Allows only what an automaton can go on with, and the end exactly where it accepts."""

  automaton: Automaton
  ends_E: ArrayLike

  def __call__(self, scores_BV: jax.Array, history: History) -> jax.Array:
    accepts_B1 = self.automaton.accepts(history.guide_B)[:, None]
    allowed_BV = jnp.where(
      _among(self.ends_E, scores_BV.shape[-1]), accepts_B1, self.automaton.allowed(history.guide_B)
    )
    return jnp.where(allowed_BV, scores_BV, NEVER)


@register
@dataclasses.dataclass(frozen=True)
class ForcedBOS:
  """Leaves one token only after a prompt of one."""

  ids_K: ArrayLike

  def __call__(self, scores_BV: jax.Array, history: History) -> jax.Array:
    return _only(self.ids_K, history.lengths_B == 1, scores_BV)


@register
@dataclasses.dataclass(frozen=True)
class ForcedEOS:
  """Leaves some tokens only for the last place there is."""

  ids_K: ArrayLike

  def __call__(self, scores_BV: jax.Array, history: History) -> jax.Array:
    return _only(self.ids_K, history.new_B == history.limits_B - 1, scores_BV)


@register
@dataclasses.dataclass(frozen=True)
class InfNanRemove:
  """NaN becomes 0, an infinity the largest or the least finite number."""

  def __call__(self, scores_BV: jax.Array, history: History) -> jax.Array:
    return jnp.nan_to_num(scores_BV, nan=0.0)


@register
@dataclasses.dataclass(frozen=True)
class ExponentialDecay:
  """Raises the scores of ends by |score| · (factor ^ (new - start) - 1) after so many new tokens."""

  ends_E: ArrayLike
  start: ArrayLike
  factor: ArrayLike

  def __call__(self, scores_BV: jax.Array, history: History) -> jax.Array:
    late_B1 = (history.new_B - self.start)[:, None]
    most = jnp.finfo(jnp.float32).max  # an infinite power times a score of 0 would be NaN
    more_B1 = jnp.minimum(jnp.float32(self.factor) ** jnp.maximum(late_B1, 0), most) - 1
    raised_BV = (late_B1 > 0) & _among(self.ends_E, scores_BV.shape[-1]) & jnp.isfinite(scores_BV)
    return jnp.where(raised_BV, scores_BV + jnp.abs(scores_BV) * more_B1, scores_BV)


@register
@dataclasses.dataclass(frozen=True)
class SuppressTokens:
  """Forbids tokens."""

  ids_K: ArrayLike

  def __call__(self, scores_BV: jax.Array, history: History) -> jax.Array:
    return jnp.where(_among(self.ids_K, scores_BV.shape[-1]), NEVER, scores_BV)


@register
@dataclasses.dataclass(frozen=True)
class SuppressAtBegin:
  """Forbids tokens as the first new one; as the second, where the first is forced (`ForcedBOS`)."""

  ids_K: ArrayLike
  forced: ArrayLike = False

  def __call__(self, scores_BV: jax.Array, history: History) -> jax.Array:
    first_B = jnp.where((history.prompt_B == 1) & self.forced, 1, 0)
    return _never(self.ids_K, history.new_B == first_B, scores_BV)


@register
@dataclasses.dataclass(frozen=True)
class LogitNormalization:
  """Makes log-probabilities of the scores."""

  def __call__(self, scores_BV: jax.Array, history: History) -> jax.Array:
    return log_probs(scores_BV)

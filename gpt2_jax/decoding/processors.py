"""Rules that change the scores before a token is chosen: Hugging Face's "logits processors".

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

from gpt2_jax.decoding.pytree import register
from gpt2_jax.decoding.row_state import History
from gpt2_jax.decoding.warpers import NEVER, log_probs
from gpt2_jax.model.text_batches import bucket

NOWHERE = np.iinfo(np.int32).max  # an id beyond any vocabulary: pads lists of ids
ANY = -1  # in a prefix: whatever stands there, or nothing


class Processor(Protocol):
  """The interface of a processor. Implementations are dataclasses, registered with JAX.

  Scores are float32: logits, or in beam search log-probabilities. A score of -inf forbids a token.
  """

  def __call__(self, scores_BV: jax.Array, history: History) -> jax.Array: ...


@register
class Custom:
  """A user's processor. Its class is named for JAX's sake: see `register`."""

  processor: Processor
  kind: type = dataclasses.field(metadata=dict(static=True))

  def __call__(self, scores_BV: jax.Array, history: History) -> jax.Array:
    return self.processor(scores_BV, history)


def id_array(ids: Iterable[int]) -> np.ndarray:
  """Returns ids, padded to a bucket."""
  ids = [int(i) for i in ids if i >= 0]
  return np.array(ids + [NOWHERE] * (bucket(len(ids), NOWHERE, 4) - len(ids)), np.int32)


def among(ids_K: ArrayLike, V: int) -> jax.Array:
  """Returns which ids of the vocabulary are listed, [V]."""
  return jnp.zeros(V, bool).at[jnp.asarray(ids_K)].set(True, mode='drop')


def _only(ids_K: ArrayLike, when_B1: jax.Array, scores_BV: jax.Array) -> jax.Array:
  """Returns scores with 0 for some ids and -inf for all others, in some rows."""
  forced_V = jnp.where(among(ids_K, scores_BV.shape[-1]), 0.0, NEVER)
  return jnp.where(when_B1, forced_V, scores_BV)


def _never(ids_K: ArrayLike, when_B1: jax.Array, scores_BV: jax.Array) -> jax.Array:
  """Returns scores with -inf for some ids, in some rows."""
  return jnp.where(when_B1 & among(ids_K, scores_BV.shape[-1]), NEVER, scores_BV)


@register
class SequenceBias:
  """Adds to the score of an id, or of the last of several ids in a row: {ids: bias}.

  A bias of -inf outweighs all others.
  """

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
class RepetitionPenalty:
  """Divides the positive scores of tokens that the prompt or the text has, and multiplies negative
  ones: above 1 these tokens become less likely (Keskar et al. 2019, arXiv:1909.05858).
  """

  penalty: ArrayLike

  def __call__(self, scores_BV: jax.Array, history: History) -> jax.Array:
    less_BV = jnp.where(scores_BV < 0, scores_BV * self.penalty, scores_BV / self.penalty)
    return jnp.where(history.counts(scores_BV.shape[-1]) > 0, less_BV, scores_BV)


@register
class FrequencyPenalty:
  """Subtracts from the score of a token for each time that the new text has it (OpenAI's API)."""

  penalty: ArrayLike

  def __call__(self, scores_BV: jax.Array, history: History) -> jax.Array:
    return scores_BV - self.penalty * history.counts(scores_BV.shape[-1], new=True)


@register
class PresencePenalty:
  """Subtracts from the scores of tokens that the new text has (OpenAI's API)."""

  penalty: ArrayLike

  def __call__(self, scores_BV: jax.Array, history: History) -> jax.Array:
    return scores_BV - self.penalty * (history.counts(scores_BV.shape[-1], new=True) > 0)


@register
class NoRepeatNGram:
  """Forbids tokens that would complete n tokens in a row a second time, the prompt's among them
  (Paulus et al. 2017, arXiv:1705.04304).
  """

  n: ArrayLike

  def __call__(self, scores_BV: jax.Array, history: History) -> jax.Array:
    tokens_BS, lengths_B1 = history.tokens_BS, history.lengths_B[:, None]
    S, V = tokens_BS.shape[1], scores_BV.shape[-1]
    n_X1 = jnp.minimum(jnp.reshape(self.n, (-1, 1)), S + 1)  # X: 1, or B

    def compare(j, same_BS):  # the j-th id before each place with the j-th before the next one
      wanted_B1 = jnp.take_along_axis(tokens_BS, jnp.maximum(lengths_B1 - j, 0), axis=1)
      return same_BS & ((j >= n_X1) | (jnp.roll(tokens_BS, j, axis=1) == wanted_B1))

    places = jnp.arange(S)
    same_BS = (places >= n_X1 - 1) & (places < lengths_B1)
    same_BS = jax.lax.fori_loop(1, n_X1.max(), compare, same_BS)
    again_BV = jax.vmap(among, (0, None))(jnp.where(same_BS, tokens_BS, NOWHERE), V)
    return jnp.where(again_BV, NEVER, scores_BV)


@register
class MinLength:
  """Forbids the end before so many tokens, the prompt's among them."""

  length: ArrayLike
  ends_E: ArrayLike

  def __call__(self, scores_BV: jax.Array, history: History) -> jax.Array:
    return _never(self.ends_E, history.lengths_B[:, None] < self.length, scores_BV)


@register
class MinNewTokens:
  """Forbids the end before so many new tokens."""

  new: ArrayLike
  ends_E: ArrayLike

  def __call__(self, scores_BV: jax.Array, history: History) -> jax.Array:
    return _never(self.ends_E, history.new_B[:, None] < self.new, scores_BV)


@register
class ForcedBOS:
  """Allows this id only as the second one, after a prompt of one."""

  ids_K: ArrayLike

  def __call__(self, scores_BV: jax.Array, history: History) -> jax.Array:
    return _only(self.ids_K, history.lengths_B[:, None] == 1, scores_BV)


@register
class ForcedEOS:
  """Allows these ids only at the last place, where max_new_tokens ends a text."""

  ids_K: ArrayLike

  def __call__(self, scores_BV: jax.Array, history: History) -> jax.Array:
    return _only(self.ids_K, (history.new_B == history.limits_B - 1)[:, None], scores_BV)


@register
class InfNanRemove:
  """Makes 0 of NaN among the scores, and the largest or least number of an infinite one."""

  def __call__(self, scores_BV: jax.Array, history: History) -> jax.Array:
    return jnp.nan_to_num(scores_BV, nan=0.0)


@register
class ExponentialDecay:
  """Raises the scores of ends after `start` new tokens by |score| · (factor ^ (new - start) - 1)."""

  start: ArrayLike
  factor: ArrayLike
  eos_E: ArrayLike

  def __call__(self, scores_BV: jax.Array, history: History) -> jax.Array:
    late_B1 = (history.new_B - self.start)[:, None]
    most = jnp.finfo(jnp.float32).max  # an infinite power times a score of 0 would be NaN
    more_B1 = jnp.minimum(jnp.float32(self.factor) ** jnp.maximum(late_B1, 0), most) - 1
    raised_BV = (late_B1 > 0) & among(self.eos_E, scores_BV.shape[-1]) & jnp.isfinite(scores_BV)
    return jnp.where(raised_BV, scores_BV + jnp.abs(scores_BV) * more_B1, scores_BV)


@register
class SuppressTokens:
  """Forbids these ids."""

  ids_K: ArrayLike

  def __call__(self, scores_BV: jax.Array, history: History) -> jax.Array:
    return jnp.where(among(self.ids_K, scores_BV.shape[-1]), NEVER, scores_BV)


@register
class SuppressAtBegin:
  """Forbids these ids as the first new one; as the second, where the first is forced."""

  ids_K: ArrayLike
  bos_is_forced: ArrayLike

  def __call__(self, scores_BV: jax.Array, history: History) -> jax.Array:
    first_B = jnp.where((history.prompt_B == 1) & self.bos_is_forced, 1, 0)
    return _never(self.ids_K, (history.new_B == first_B)[:, None], scores_BV)


@register
class LogitNormalization:
  """Makes log-probabilities of the scores, after all else."""

  def __call__(self, scores_BV: jax.Array, history: History) -> jax.Array:
    return log_probs(scores_BV)

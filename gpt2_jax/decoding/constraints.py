"""Processors that allow a row some tokens alone: those of a regular expression, or of a function."""

import dataclasses
import itertools
import weakref
from collections.abc import Callable, Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from gpt2_jax.core.errors import UserError
from gpt2_jax.decoding.automaton import Automaton
from gpt2_jax.decoding.processors import among
from gpt2_jax.decoding.pytree import register
from gpt2_jax.decoding.row_state import History
from gpt2_jax.decoding.warpers import NEVER
from gpt2_jax.model.text_batches import id_list


@register
class Guided:
  """Allows only what an automaton can go on with, and the end exactly where it accepts."""

  automaton: Automaton
  ends_E: ArrayLike

  def __call__(self, scores_BV: jax.Array, history: History) -> jax.Array:
    accepts_B1 = self.automaton.accepts(history.guide_B)[:, None]
    allowed_BV = jnp.where(
      among(self.ends_E, scores_BV.shape[-1]), accepts_B1, self.automaton.allowed(history.guide_B)
    )
    return jnp.where(allowed_BV, scores_BV, NEVER)


class AllowedTokens:
  """A user's function that lists the tokens that may follow, and the first error that it raised.

  A compiled program can't hold the function, or another one would have to be compiled for. It holds
  a number, which is traced, and looks it up in `known` when it runs; there the function stays as long
  as its request.
  """

  known: ClassVar[weakref.WeakValueDictionary[int, 'AllowedTokens']] = weakref.WeakValueDictionary()
  numbers: ClassVar = itertools.count()

  def __init__(self, function: Callable[[int, np.ndarray], Sequence[int]]):
    self.function, self.number = function, next(self.numbers)
    self.error: Exception | None = None
    self.known[self.number] = self

  def mask(self, V: int, tokens_BS, lengths_B, which_B, running_B) -> np.ndarray:
    """Returns which tokens may follow, [B, V]: all in rows that have stopped, none after an error."""
    allowed_BV = np.repeat(~running_B[:, None], V, axis=1)
    try:
      for b in np.flatnonzero(running_B if self.error is None else []):
        which, ids = int(which_B[b]), tokens_BS[b, : lengths_B[b]]
        allowed = id_list('prefix_allowed_tokens_fn', self.function(which, ids), V)
        if not allowed:
          raise UserError(f'prefix_allowed_tokens_fn({which}, {ids.tolist()}) allows no token.')
        allowed_BV[b, allowed] = True
    except Exception as e:  # raised here it would leave other devices waiting
      self.error = e
    return allowed_BV


@register
class PrefixConstrained:
  """Allows only the tokens that a Python function lists (De Cao et al. 2020, arXiv:2010.00904).

  The function gets the index of a row's prompt and the ids so far, as a NumPy array. An error in it
  forbids all tokens from there on, and is kept as `error`.
  """

  number: ArrayLike
  beams: bool = dataclasses.field(default=False, metadata=dict(static=True))
  asked: AllowedTokens | None = dataclasses.field(default=None, metadata=dict(host=True))

  @classmethod
  def of(cls, function: Callable, *, beams: bool = False) -> 'PrefixConstrained':
    asked = AllowedTokens(function)
    return cls(np.int32(asked.number), beams, asked)

  @property
  def error(self) -> Exception | None:
    """The exception of the function, or a UserError: it allows nothing, or ids that don't exist."""
    return self.asked and self.asked.error

  def __call__(self, scores_BV: jax.Array, history: History) -> jax.Array:
    h, (B, V) = history, scores_BV.shape

    def ask(number, *rows) -> np.ndarray:
      asked = AllowedTokens.known.get(int(number))
      # where nobody waits for the text any more
      return np.zeros((B, V), bool) if asked is None else asked.mask(V, *map(np.asarray, rows))

    allowed_BV = jax.pure_callback(
      ask,
      jax.ShapeDtypeStruct((B, V), bool),
      self.number,
      h.tokens_BS,
      h.lengths_B,
      h.which_B,
      h.running_B,
    )
    # where all that is allowed is forbidden already, in all beams of a prompt, it's allowed again
    possible_B = (allowed_BV & (scores_BV != NEVER)).any(-1)
    if self.beams:
      possible_B = ((h.which_B[:, None] == h.which_B) & possible_B & h.running_B).any(-1)
    return jnp.where(allowed_BV, jnp.where(possible_B[:, None], scores_BV, 0.0), NEVER)

"""The processor that asks a Python function which tokens may come next."""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from gpt2_jax.decoding.history import History
from gpt2_jax.decoding.pytree import register
from gpt2_jax.decoding.values import id_list
from gpt2_jax.decoding.warpers import NEVER
from gpt2_jax.errors import UserError


class _Asked:
  """A function that says which tokens may follow, and the first error of it.

  To JAX all are equal: a number in the traced data tells which is meant, so that another function
  costs no compilation.
  """

  numbers: ClassVar = itertools.count()
  known: ClassVar[dict[int, '_Asked']] = {}

  def __init__(self, allowed: Callable[[int, np.ndarray], Sequence[int]]):
    self.allowed = allowed
    self.error: Exception | None = None

  def __eq__(self, other) -> bool:
    return isinstance(other, _Asked)

  def __hash__(self) -> int:
    return 0

  def mask(self, V: int, tokens_BS, lengths_B, which_B, running_B) -> np.ndarray:
    """Which tokens may follow, [B, V]; none after an error."""
    allowed_BV = np.repeat(~running_B[:, None], V, axis=1)
    try:
      for b in np.flatnonzero(running_B if self.error is None else []):
        which, ids = int(which_B[b]), tokens_BS[b, : lengths_B[b]]
        allowed = id_list('prefix_allowed_tokens_fn', self.allowed(which, ids), V)
        if not allowed:
          raise UserError(f'prefix_allowed_tokens_fn({which}, {ids.tolist()}) allows no token.')
        allowed_BV[b, allowed] = True
    except Exception as e:  # raised here it would leave other devices waiting
      self.error = e
    return allowed_BV


@register
@dataclasses.dataclass(frozen=True)
class PrefixConstrained:
  """Allows only the tokens that a Python function lists (De Cao et al. 2020, arXiv:2010.00904).

  The function gets the index of a row's prompt and the ids so far, as a NumPy array. An error in it
  forbids all tokens from there on, and is kept as `error`.
  """

  number: ArrayLike
  asked: _Asked = dataclasses.field(metadata=dict(static=True))
  beams: bool = dataclasses.field(default=False, metadata=dict(static=True))

  @classmethod
  def of(cls, allowed: Callable, *, beams: bool = False) -> 'PrefixConstrained':
    asked, number = _Asked(allowed), next(_Asked.numbers)
    _Asked.known[number] = asked
    _Asked.known.pop(number - 1000, None)  # its request is long gone
    return cls(np.int32(number), asked, beams)

  @property
  def error(self) -> Exception | None:
    """What the function raised, or a UserError: it allows nothing, or ids that don't exist."""
    return self.asked.error

  def __call__(self, scores_BV: jax.Array, history: History) -> jax.Array:
    h, (B, V) = history, scores_BV.shape
    ask = lambda number, *rows: _Asked.known[int(number)].mask(V, *map(np.asarray, rows))
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

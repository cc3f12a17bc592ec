"""Edits of activations while a text is written: by position, in the prompt and in each new token.

What is read into the cache stays there edited, so that a text is that of whole runs with the same
edits, as `model.edits.run` makes them.
"""

from typing import Any

import jax
import numpy as np

from gpt2_jax.core.errors import UserError, brief
from gpt2_jax.model.config import GPTConfig
from gpt2_jax.model.edits import Edit, Listening, Placed, edit_list, place, sizes_of
from gpt2_jax.model.sites import NOBODY, Listen, site


def placed(edits: Any, config: GPTConfig, reach: int) -> tuple[Placed, ...]:
  """Edits over all positions of the model.

  Args:
    edits: an `Edit`, or a tree of them.
    config: of the model, in the form 'decode'.
    reach: how many positions the longest text can come to be read at.

  Raises:
    UserError: an edit can't be honoured while writing, or touches nothing.
  """
  return tuple(_placed(edit, config, min(reach, config.n_positions)) for edit in edit_list(edits))


def _placed(edit: Edit, config: GPTConfig, reach: int) -> Placed:
  name, at = brief(edit.site).strip("'"), edit.position
  if 'S' in site(edit.site).letters:
    raise UserError(
      f'{name} while text is written lies over the slots of a cache, padding among them: edit q, k, '
      'v or z.'
    )
  if edit.row is not None:
    raise UserError(
      f'{name}: row = {brief(edit.row)} while text is written: an edit is of all texts, so that each '
      'depends on itself alone. Generate them apart.'
    )
  if edit.how == 'mean':
    raise UserError(f"{name}: how = 'mean', of other texts, while text is written: give the value.")
  if edit.site == 'logits':
    raise UserError('logits while text is written are a matter of logits_processor.')
  ends = (at.start, at.stop) if isinstance(at, slice) else at
  if any(end is not None and np.less(end, 0) for end in np.ravel(np.asarray(ends, object))):
    raise UserError(
      f'{name}: position = {brief(at)} while text is written: a text has no end yet, count from 0.'
    )
  sizes = sizes_of(config, 1, config.n_positions)
  made = place(edit, config, sizes, value_sizes=sizes | {'T': 1})
  if 'T' in made.masks and not made.masks['T'][:reach].any():
    raise UserError(
      f'{name}: position = {brief(at)} is beyond the {reach} positions that are read: the edit '
      'touches nothing.'
    )
  return made


def editing(edits: tuple[Placed, ...], positions_BT: jax.Array | None) -> Listen:
  """Who makes edits of tokens at these positions; where there is none, nobody is there."""
  if not edits or positions_BT is None:
    return NOBODY
  return Listening(tuple(edit.at_positions(positions_BT) for edit in edits))

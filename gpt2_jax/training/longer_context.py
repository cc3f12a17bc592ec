"""How many positions a model has, and where it has more than the one that it begins with."""

from typing import Any

import jax
import jax.numpy as jnp

from gpt2_jax.core.errors import UserError
from gpt2_jax.model.config import GPTConfig
from gpt2_jax.model.gpt2 import Params, make_params
from gpt2_jax.model.parameters import ROWS
from gpt2_jax.parallel.sharding import reshard

WAYS = ('interpolate', 'extend')


def context(asked: int, rows: int | None, given: int | None, held: int | None) -> int:
  """Returns the number of positions of a model, as a rule no more than its rows will train.

  Args:
    asked: model.n_positions, or those of where the parameters are from.
    rows: tokens of a row (data.sequence_length); None: as many as there are positions.
    given: positions where the parameters are from; None: they begin at random.
    held: those of the run that goes on, which stays the model that it is; None: a run begins.
  """
  if rows is None or not 1 <= rows <= asked:  # the latter is refused: `make_plan`
    return asked
  if held is not None and rows <= held <= asked:
    return held
  return max(rows, given or 0)


def note(asked: int | None, rows: int, given: int | None, have: int) -> str:
  """Says how a model's context differs from the config's; '' if it does not.

  Args:
    asked, rows, given: as of `context`; asked is None where the config leaves it open.
    have: what it gave.
  """
  if asked is not None and have < asked:
    of = 'of its rows' if have == rows else 'of its rows, or the longer one it begins with,'
    return (
      f'{have:,} positions, the context {of} (data.sequence_length = {rows}): nothing would '
      f'train the other {asked - have:,} of model.n_positions = {asked}'
    )
  if rows < have and have > (given or 0):
    return (
      f'{have:,} positions, as the run that goes on has: its rows of {rows:,} tokens train the '
      f'first {rows:,} alone, and what it makes of longer texts is not to be trusted'
    )
  return ''


def stretched(config: GPTConfig, params: Params, how: str, seed: int) -> Params:
  """Returns parameters with as many positions as `config` has.

  Args:
    config: of the model that is to be.
    params: of the model that is there. `wpe` has fewer rows, or as many.
    how: 'interpolate': the old positions are spread over the new context, linearly between them (Chen
      et al. 2023, arXiv:2306.15595, here of a learned table); 'extend': they keep their places, and
      those beyond them begin at random, as in a new model.
    seed: of those.
  """
  old = params['wpe']['weight'].shape[0]
  if old == config.n_positions:
    return params
  if how not in WAYS:
    raise UserError(f'init_positions = {how!r} is none of {", ".join(WAYS)}.')

  @jax.jit
  def make(table_TD):
    if how == 'extend':
      fresh: Any = make_params(config, seed)['wpe']['weight']
      padded_TD = jnp.pad(table_TD, ((0, config.n_positions - old), (0, 0)))
      return reshard(
        jnp.where(jnp.arange(config.n_positions)[:, None] < old, padded_TD, fresh),
        ROWS['wpe.weight'].layout,
      )
    at = jnp.linspace(0, old - 1, config.n_positions)
    below = jnp.minimum(at.astype(jnp.int32), max(old - 2, 0))
    share = (at - below)[:, None]
    rows = lambda i: table_TD.at[i].get(out_sharding=jax.typeof(table_TD).sharding)
    return reshard(
      (1 - share) * rows(below) + share * rows(jnp.minimum(below + 1, old - 1)),
      ROWS['wpe.weight'].layout,
    )

  return params | {'wpe': {'weight': make(params['wpe']['weight'])}}

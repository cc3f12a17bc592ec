"""A model with more positions than the one it begins with."""

from typing import Any

import jax
import jax.numpy as jnp

from gpt2_jax.config import GPTConfig
from gpt2_jax.errors import UserError
from gpt2_jax.model import Params, make_params
from gpt2_jax.sharding import RULES, reshard

WAYS = ('interpolate', 'extend')


def stretched(config: GPTConfig, params: Params, how: str, seed: int) -> Params:
  """Parameters whose positions are as many as `config` has; others as they are.

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
      return reshard(jnp.where(jnp.arange(config.n_positions)[:, None] < old, padded_TD, fresh),
                     RULES.wpe_td)
    at = jnp.linspace(0, old - 1, config.n_positions)
    below = jnp.minimum(at.astype(jnp.int32), max(old - 2, 0))
    share = (at - below)[:, None]
    rows = lambda i: table_TD.at[i].get(out_sharding=jax.typeof(table_TD).sharding)
    return reshard((1 - share) * rows(below) + share * rows(jnp.minimum(below + 1, old - 1)),
                   RULES.wpe_td)

  return params | {'wpe': {'weight': make(params['wpe']['weight'])}}

"""What optimizers share: which parameters decay and how, and the steps of matrices under muP."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from gpt2_jax.model.config import Config
from gpt2_jax.model.gpt2 import Params
from gpt2_jax.model.parameters import map_rows


def decay_mask(params: Params) -> Params:
  """True for what weight decay applies to, see `parameters.Row.decays`."""
  return map_rows(lambda row, _: row.decays, params)


def scale_matrices(factor: float) -> optax.GradientTransformation:
  """Multiplies the updates of the matrices within blocks."""
  scaled = lambda row, update: factor * update if row.hidden else update
  return optax.stateless(lambda updates, _: map_rows(scaled, updates))


def for_matrices(
  rule: optax.GradientTransformation,
  optim: Config,
  schedule: optax.Schedule,
  *more: optax.GradientTransformation,
) -> optax.GradientTransformation:
  """A rule for the matrices within blocks, AdamW for the rest, `decay` for both; then `more` of all
  updates, and the learning rate. The state of the two has their names in `optax.partition`.
  """
  rules: Any = {optim.name: rule, 'adamw': optax.scale_by_adam(optim.b1, optim.b2, optim.eps)}
  named = lambda row, _: optim.name if row.hidden else 'adamw'
  return optax.chain(
    optax.partition(rules, lambda params: map_rows(named, params)),
    decay(optim, schedule),
    *more,
    optax.scale_by_learning_rate(schedule),
  )


def _constant(optim: Config, schedule: optax.Schedule) -> Any:
  return optim.weight_decay


def _learning_rate(optim: Config, schedule: optax.Schedule) -> Any:
  peak = float(optim.peak_lr) or 1.0  # of a peak of 0 all rates are 0
  return lambda step: optim.weight_decay * schedule(step) / peak


# The factor of weight decay, a number or a function of the step, by `optim.decay_schedule`; the rate
# multiplies it. constant: AdamW's. learning_rate: as the rate to its peak, so that the two together
# fall as its square (Defazio 2025, arXiv:2506.02285).
DECAYS = {'constant': _constant, 'learning_rate': _learning_rate}


def decay(optim: Config, schedule: optax.Schedule) -> optax.GradientTransformation:
  """Decoupled weight decay (Loshchilov & Hutter 2017, arXiv:1711.05101) of what `decay_mask` says.

  With `cautious_decay` only of entries that the update moves towards 0, or not at all (Chen et al.
  2025, arXiv:2510.12402).
  """
  factor = DECAYS[optim.decay_schedule](optim, schedule)
  if not callable(factor) and not optim.cautious_decay:
    return optax.add_decayed_weights(factor, decay_mask)

  def init(params):
    del params
    return optax.ScaleByScheduleState(jnp.zeros((), jnp.int32))

  def update(updates, state, params):
    rate: Any = factor(state.count) if callable(factor) else factor

    def decayed(on, u, p):
      if not on:
        return u
      return u + jnp.where(u * p >= 0, rate, 0) * p if optim.cautious_decay else u + rate * p

    updates = jax.tree.map(decayed, decay_mask(params), updates, params)
    return updates, optax.ScaleByScheduleState(optax.safe_increment(state.count))

  return optax.GradientTransformation(init, update)  # pyright: ignore[reportArgumentType]

"""Loss spikes: a step whose gradient norm lies far beyond the usual one is not taken.

The usual one is the running mean and variance of the norm's logarithm, so that a bound means the same
at the start, when norms fall by orders of magnitude, and late. They are part of the optimizer's
state: a run that goes on judges as one that was never stopped.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gpt2_jax.core.errors import UserError
from gpt2_jax.parallel.sharding import on_devices

WINDOW = 100  # steps: mean and variance are plain averages up to here, then exponential ones
NOISE = 0.01  # least standard deviation of log norm: a change of 1 % is never a spike
LIMIT = 10  # skipped in a row: then it's no spike, and the run stops


class SpikeState(NamedTuple):
  """Scalars, and the state of the optimizer that is guarded."""

  count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]  # norms in the averages
  mean: jax.Array  # of log norm
  variance: jax.Array
  zscore: jax.Array  # of the last step
  in_a_row: jax.Array  # steps skipped up to the last one, without one between that was taken
  inner: Any


def _fresh(inner: Any = None) -> SpikeState:
  zero, none = jnp.zeros((), jnp.float32), jnp.zeros((), jnp.int32)
  return SpikeState(none, zero, zero, zero, none, inner)


def skip_spikes(
  inner: optax.GradientTransformation, zscore: float, warmup: int
) -> optax.GradientTransformation:
  """`inner`, except at steps whose gradient is a spike, or not finite.

  Such a step changes neither parameters nor moments, is not counted by Adam's bias correction, and
  leaves the averages alone. It is consumed all the same: its batch is gone and the learning rate's
  schedule moves on, so that the rate stays a function of the step.

  Args:
    zscore: the bound, in standard deviations of the norm's logarithm, upwards only.
    warmup: steps to be seen before any is judged. What is not finite is skipped from the first on.

  Raises:
    UserError: one of the two makes no sense.
  """
  if zscore <= 0 or warmup < 2:
    raise UserError(
      f'optim.skip_zscore = {zscore} must be positive (0: off) and optim.skip_warmup = '
      f'{warmup} at least 2 steps.'
    )

  def init(params):
    return _fresh(inner.init(params))

  def update(updates, state: SpikeState, params=None):
    norm = optax.tree.norm(updates)  # the step's metric and the clipping need it too: made once
    x = jnp.log(jnp.maximum(norm, 1e-30)).astype(jnp.float32)
    away = x - state.mean
    z = jnp.where(state.count >= warmup, away / jnp.maximum(jnp.sqrt(state.variance), NOISE), 0.0)
    skip = ~jnp.isfinite(norm) | (z > zscore)
    pick = lambda old, new: jnp.where(skip, old, new)

    # West 1979 (Comm. ACM 22:532): one pass, and it does not cancel
    share = jnp.maximum(1 / (state.count + 1), 1 / WINDOW)
    mean = state.mean + share * away
    variance = (1 - share) * (state.variance + share * away * away)

    updates, after = inner.update(updates, state.inner, params)
    is_schedule = lambda node: isinstance(node, optax.ScaleByScheduleState)
    kept = jax.tree.map(
      lambda old, new: new if is_schedule(new) else pick(old, new),
      state.inner,
      after,
      is_leaf=is_schedule,
    )
    # -0.0, since x + -0.0 has the bits of x for every x, -0.0 among them
    updates = jax.tree.map(lambda u: pick(jnp.full_like(u, -0.0), u), updates)
    return updates, SpikeState(
      state.count + ~skip,
      pick(state.mean, mean),
      pick(state.variance, variance),
      z,
      jnp.where(skip, state.in_a_row + 1, 0),
      kept,
    )

  return optax.GradientTransformation(init, update)  # pyright: ignore[reportArgumentType]


def restored(
  restore: Callable[[dict], dict], saved: Iterable[str], items: dict[str, Any]
) -> dict[str, Any]:
  """Returns `restore(items)`, also where the policy was off when they were saved and is on, or not.

  Args:
    restore: gives arrays for abstract items of a checkpoint.
    saved: the names of the checkpoint's arrays.
    items: abstract, as they are to be.
  """
  before, state = 'opt_state.in_a_row' in saved, items['opt_state']
  if before == isinstance(state, SpikeState):
    return restore(items)
  if before:
    wrapped = on_devices(jax.eval_shape(_fresh))._replace(inner=state)
    found = restore(items | {'opt_state': wrapped})
    return found | {'opt_state': found['opt_state'].inner}
  found = restore(items | {'opt_state': state.inner})
  return found | {'opt_state': jax.jit(_fresh)()._replace(inner=found['opt_state'])}


def metrics(opt_state: Any) -> dict[str, jax.Array]:
  """The metrics of the policy at a step; empty where it is off."""
  if not isinstance(opt_state, SpikeState):
    return {}
  return {
    'train/grad_norm_zscore': opt_state.zscore,
    'train/skipped': (opt_state.in_a_row > 0).astype(jnp.float32),
    'train/skipped_in_a_row': opt_state.in_a_row,
  }

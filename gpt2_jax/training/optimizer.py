"""AdamW, its learning-rate schedules, and which parameters decay."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from gpt2_jax.config import Config
from gpt2_jax.errors import UserError
from gpt2_jax.model import Params
from gpt2_jax.parameters import map_rows
from gpt2_jax.training.spikes import skip_spikes

SCHEDULES = ('cosine', 'linear', 'wsd', 'constant')


def make_schedule(optim: Config, steps: int, a_step: int = 1, offset: int = 0) -> optax.Schedule:
  """Step (from 0) -> learning rate: a linear warm-up to `peak_lr`, then one of

  - cosine, linear: down to `end_lr_fraction` of the peak at `decay_steps` (default: `steps`);
  - wsd: constant, then linear over the last `wsd_decay_fraction` of the steps (warm-up, stable,
    decay; Hu et al. 2024, arXiv:2404.06395);
  - constant.

  With `warmup_tokens` or `decay_tokens` it is a function of the tokens seen, whatever the batches
  that they came in; what is said in steps then stands where these are with today's batch.

  Args:
    optim: that section of the config.
    steps: of the run.
    a_step: tokens of a step.
    offset: tokens seen at a step, less those of so many steps: not 0 where the batch was another.
  """
  warmup, last = optim.warmup_steps, steps if optim.decay_steps is None else optim.decay_steps
  if optim.warmup_tokens is None and optim.decay_tokens is None:
    return _schedule(optim, warmup, last)
  if optim.decay_tokens is not None and optim.decay_steps is not None:
    raise UserError(
      'optim.decay_steps and optim.decay_tokens both say where the decay ends: leave '
      'one of them unset.'
    )
  shift = offset / a_step  # steps of today's batch that there were beside those counted
  in_steps = lambda tokens, step: step + shift if tokens is None else tokens / a_step
  schedule = _schedule(
    optim, in_steps(optim.warmup_tokens, warmup), in_steps(optim.decay_tokens, last)
  )
  return lambda step: schedule(step + shift)


def _schedule(optim: Config, warmup: Any, last: Any) -> optax.Schedule:
  """As `make_schedule`; the warm-up and the decay end at these steps, numbers that may be broken."""
  peak = float(optim.peak_lr)
  end = peak * optim.end_lr_fraction
  if optim.schedule not in SCHEDULES:
    raise UserError(f'optim.schedule = {optim.schedule!r} is not one of {SCHEDULES}.')
  rest = max(1, last - warmup)
  if optim.schedule == 'cosine':
    after = optax.cosine_decay_schedule(peak, rest, alpha=optim.end_lr_fraction)
  elif optim.schedule == 'linear':
    after = optax.linear_schedule(peak, end, rest)
  elif optim.schedule == 'wsd':
    decay = max(1, round(last * optim.wsd_decay_fraction))
    after = optax.linear_schedule(peak, end, decay, transition_begin=max(0, rest - decay))
  else:
    after = optax.constant_schedule(peak)
  if warmup < 1:
    return after
  # the first update already moves: step 0 has peak / warmup
  return optax.join_schedules(
    [optax.linear_schedule(peak / warmup, peak, max(1, warmup - 1)), after], [warmup]
  )


def decay_mask(params: Params) -> Params:
  """True for what weight decay applies to, see `parameters.Row.decays`."""
  return map_rows(lambda row, _: row.decays, params)


def scale_matrices(factor: float) -> optax.GradientTransformation:
  """Multiplies the updates of the matrices within blocks."""
  scaled = lambda row, update: factor * update if row.hidden else update
  return optax.stateless(lambda updates, _: map_rows(scaled, updates))


def clip_by_global_norm(most: float) -> optax.GradientTransformation:
  """`optax.clip_by_global_norm` by one factor for all gradients: to divide each by the norm is a pass
  over all of them.
  """

  def clipped(updates, _):
    factor = jnp.minimum(1, most / optax.tree.norm(updates))
    return jax.tree.map(lambda update: factor * update, updates)

  return optax.stateless(clipped)


def make_optimizer(
  optim: Config, schedule: optax.Schedule, width_ratio: float = 1.0
) -> optax.GradientTransformation:
  """Clipping by the global norm, then AdamW (Loshchilov & Hutter 2017, arXiv:1711.05101); without the
  steps that are spikes, where `skip_zscore` is set.

  Args:
    optim: that section of the config.
    schedule: step -> learning rate.
    width_ratio: of the model, see `GPTConfig`. Adam's step of matrices within blocks is divided by
      it; what decays is not, so that weights decay as fast at every width.
  """
  tx = optax.chain(
    optax.scale_by_adam(optim.b1, optim.b2, optim.eps),
    *([] if width_ratio == 1 else [scale_matrices(1 / width_ratio)]),
    optax.add_decayed_weights(optim.weight_decay, decay_mask),
    optax.scale_by_learning_rate(schedule),
  )
  if optim.clip_norm:
    tx = optax.chain(clip_by_global_norm(float(optim.clip_norm)), tx)
  return skip_spikes(tx, float(optim.skip_zscore), optim.skip_warmup) if optim.skip_zscore else tx

"""Optimizers by name, and schedules of the learning rate."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import unflatten_dict
from ml_collections import ConfigDict

from gpt2_jax.core.errors import UserError
from gpt2_jax.model.config import Config, GPTConfig
from gpt2_jax.model.parameters import Row
from gpt2_jax.model.sizes import num_trained, param_shapes, trainable_paths
from gpt2_jax.parallel.sharding import without_mesh
from gpt2_jax.training.optimizers.adafactor import adafactor
from gpt2_jax.training.optimizers.muon import muon
from gpt2_jax.training.optimizers.parts import decay, scale_matrices
from gpt2_jax.training.optimizers.schedule_free import schedule_free
from gpt2_jax.training.optimizers.soap import soap
from gpt2_jax.training.skip_spikes import skip_spikes


def _cosine(optim: Config, rest: Any, last: Any) -> optax.Schedule:
  return optax.cosine_decay_schedule(float(optim.peak_lr), rest, alpha=optim.end_lr_fraction)


def _linear(optim: Config, rest: Any, last: Any) -> optax.Schedule:
  peak = float(optim.peak_lr)
  return optax.linear_schedule(peak, peak * optim.end_lr_fraction, rest)


def _wsd(optim: Config, rest: Any, last: Any) -> optax.Schedule:
  peak, decay = float(optim.peak_lr), max(1, round(last * optim.wsd_decay_fraction))
  begin = max(0, rest - decay)
  return optax.linear_schedule(peak, peak * optim.end_lr_fraction, decay, transition_begin=begin)


def _constant(optim: Config, rest: Any, last: Any) -> optax.Schedule:
  return optax.constant_schedule(float(optim.peak_lr))


# How the learning rate goes on after the warm-up, by `optim.schedule`: a function of this section of
# the config, the steps from there to the end of the decay, and that end (numbers that may be broken).
SCHEDULES = {'cosine': _cosine, 'linear': _linear, 'wsd': _wsd, 'constant': _constant}


def make_schedule(optim: Config, steps: int, a_step: int = 1, offset: int = 0) -> optax.Schedule:
  """Returns step (from 0) -> learning rate: a linear warm-up to `peak_lr`, then one of `SCHEDULES`.

  - cosine, linear: down to `end_lr_fraction` of the peak at `decay_steps` (default: `steps`);
  - wsd: constant, then linear over the last `wsd_decay_fraction` of the steps (warm-up, stable,
    decay; Hu et al. 2024, arXiv:2404.06395);
  - constant.

  With `warmup_tokens` or `decay_tokens` it is a function of the tokens seen, whatever the batches
  that they came in; a knob that counts steps then means steps of today's batch.

  Args:
    optim: that section of the config.
    steps: of the run.
    a_step: tokens of a step.
    offset: tokens seen at a step, less step · a_step: not 0 where the batch had another size.
  """
  warmup, last = optim.warmup_steps, steps if optim.decay_steps is None else optim.decay_steps
  if optim.warmup_tokens is None and optim.decay_tokens is None:
    return _schedule(optim, warmup, last)
  if optim.decay_tokens is not None and optim.decay_steps is not None:
    raise UserError(
      'optim.decay_steps and optim.decay_tokens both say where the decay ends: leave '
      'one of them unset.'
    )
  shift = offset / a_step  # the tokens beyond those counted, in steps of today's batch

  def in_steps(tokens, step):
    return step + shift if tokens is None else tokens / a_step

  warmup, last = in_steps(optim.warmup_tokens, warmup), in_steps(optim.decay_tokens, last)
  schedule = _schedule(optim, warmup, last)
  return lambda step: schedule(step + shift)


def _schedule(optim: Config, warmup: Any, last: Any) -> optax.Schedule:
  """As `make_schedule`; the warm-up and the decay end at these steps, numbers that may be broken."""
  after = SCHEDULES[optim.schedule](optim, max(1, last - warmup), last)
  if warmup < 1:
    return after
  peak = float(optim.peak_lr)  # the first update already moves: step 0 has peak / warmup
  rising = optax.linear_schedule(peak / warmup, peak, max(1, warmup - 1))
  return optax.join_schedules([rising, after], [warmup])


def clip_by_global_norm(most: float) -> optax.GradientTransformation:
  """`optax.clip_by_global_norm` by one factor for all gradients: to divide each by the norm is a pass
  over all of them.
  """

  def clipped(updates, _):
    factor = jnp.minimum(1, most / optax.tree.norm(updates))
    return jax.tree.map(lambda update: factor * update, updates)

  return optax.stateless(clipped)


def adamw(
  optim: Config, schedule: optax.Schedule, width_ratio: float
) -> optax.GradientTransformation:
  """AdamW (Loshchilov & Hutter 2017, arXiv:1711.05101). Steps of matrices in blocks are divided by
  muP's `width_ratio`; their decay is not, so that weights decay as fast at every width.
  """
  return optax.chain(
    optax.scale_by_adam(optim.b1, optim.b2, optim.eps),
    *([] if width_ratio == 1 else [scale_matrices(1 / width_ratio)]),
    decay(optim, schedule),
    optax.scale_by_learning_rate(schedule),
  )


def lion(optim: Config, schedule: optax.Schedule, width_ratio: float) -> optax.GradientTransformation:
  """Lion (Chen et al. 2023, arXiv:2302.06675): the sign of a mean of gradients. All of a step has one
  size, so that its rate is a third to a tenth of AdamW's, its decay as many times larger, and muP
  divides steps as it does AdamW's.
  """
  return optax.chain(
    optax.scale_by_lion(optim.b1, optim.b2),
    *([] if width_ratio == 1 else [scale_matrices(1 / width_ratio)]),
    decay(optim, schedule),
    optax.scale_by_learning_rate(schedule),
  )


class Optimizer(NamedTuple):
  """An optimizer by its name, `optim.name`."""

  make: Callable[[Config, optax.Schedule, float], optax.GradientTransformation]
  rest: str = ''  # the one that updates all but the matrices within blocks; '': itself
  refuses: tuple[str, ...] = ()  # of 'lora' and 'mup': what it has no rule for
  averages: bool = False  # whether it has an average of the parameters, for evaluation and samples
  needs: tuple[tuple[str, Any], ...] = ()  # knobs of this section, and the values they must have


OPTIMIZERS = {
  'adamw': Optimizer(adamw),
  'adafactor': Optimizer(adafactor, refuses=('mup',)),
  'lion': Optimizer(lion),
  'muon': Optimizer(muon, rest='adamw', refuses=('lora',)),
  'schedule_free': Optimizer(
    schedule_free, averages=True, needs=(('schedule', 'constant'), ('ema_decay', 0.0))
  ),
  'soap': Optimizer(soap, rest='adamw', refuses=('lora', 'mup')),
}


def rule(name: str, row: Row) -> str:
  """The name of the optimizer that updates a parameter, in a run whose `optim.name` is `name`."""
  return name if row.hidden else OPTIMIZERS[name].rest or name


def averages(optim: Config) -> bool:
  """Whether a run keeps an average of its parameters."""
  return optim.ema_decay > 0 or OPTIMIZERS[optim.name].averages


def check(optim: Config, model: GPTConfig) -> None:
  """Raises a UserError if an optimizer has no rule for what a model is trained with, or how."""
  has = {'lora': model.lora is not None, 'mup': model.width_ratio != 1}
  knobs = {'lora': 'lora.r', 'mup': 'model.parametrization = mup'}
  for what in OPTIMIZERS[optim.name].refuses:
    if has[what]:
      raise UserError(f'optim.name = {optim.name} has no rule for {knobs[what]}: take adamw.')
  for knob, value in OPTIMIZERS[optim.name].needs:
    if optim[knob] != value:
      raise UserError(
        f'optim.{knob} = {optim[knob]} must be {value} where optim.name = {optim.name}.'
      )


def describe(optim: Config, model: GPTConfig) -> list[str]:
  """Lines that say which optimizer updates which parameters, those that decay and others."""
  rows = [row for row in model.parameters() if row.path in trainable_paths(model)]
  lines = []
  for name in dict.fromkeys([optim.name, OPTIMIZERS[optim.name].rest or optim.name]):
    own = [row for row in rows if rule(optim.name, row) == name]
    for decays, said in ((True, f'decay {optim.weight_decay:g}'), (False, 'no decay')):
      if names := ' '.join(row.name for row in own if row.decays == decays):
        lines.append(f'{name}, {said}: {names}')
  return lines


def moments(optim: Config, model: GPTConfig) -> float:
  """Numbers that an optimizer keeps, for each one that is trained."""
  settings = tuple(sorted(optim.items()))
  return _moments(OPTIMIZERS[optim.name], settings, dataclasses.replace(model, remat='none'))


@functools.lru_cache(maxsize=64)
def _moments(optimizer: Optimizer, settings: tuple, model: GPTConfig) -> float:
  paths, shapes = trainable_paths(model), param_shapes(model)
  params = unflatten_dict({path: jax.ShapeDtypeStruct(shapes[path], jnp.float32) for path in paths})
  tx = optimizer.make(ConfigDict(dict(settings)), optax.constant_schedule(0.0), 1.0)
  with without_mesh():
    state = jax.eval_shape(tx.init, params)
  return sum(x.size for x in jax.tree.leaves(state) if x.ndim) / num_trained(model)


def make_optimizer(
  optim: Config, schedule: optax.Schedule, width_ratio: float = 1.0
) -> optax.GradientTransformation:
  """Clipping by the global norm, then one of `OPTIMIZERS`; without the steps that are spikes, where
  `skip_zscore` is set.

  Args:
    optim: that section of the config.
    schedule: step -> learning rate.
    width_ratio: of the model, see `GPTConfig`.
  """
  tx = OPTIMIZERS[optim.name].make(optim, schedule, width_ratio)
  if optim.clip_norm:
    tx = optax.chain(clip_by_global_norm(float(optim.clip_norm)), tx)
  return skip_spikes(tx, float(optim.skip_zscore), optim.skip_warmup) if optim.skip_zscore else tx

"""The line of a step in the record: its metrics are fetched, checked, and measured speeds added."""

import math
from pathlib import Path
from typing import Any

import jax

from gpt2_jax.core.chips import peak_flops
from gpt2_jax.core.errors import UserError
from gpt2_jax.model.sizes import flops_per_token
from gpt2_jax.training import layer_values, skip_spikes
from gpt2_jax.training.run_plan import Plan
from gpt2_jax.training.watch import metrics_file
from gpt2_jax.training.watch.goodput import Clock
from gpt2_jax.training.watch.stragglers import Stragglers


class Recorder:
  """Makes the lines of a run, one a step, in order."""

  def __init__(self, plan: Plan, clock: Clock, workdir: Path, loader: Any, checkpoints: Any, say):
    """
    Args:
      plan: of the run.
      clock: whose time it reads; made just before the first step.
      workdir, loader, checkpoints: what a message about a bad step names.
      say: prints a line.
    """
    self.clock, self.workdir, self.loader = clock, workdir, loader
    self.checkpoints, self.say = checkpoints, say
    self.plan, self.tokens = plan, plan.G * plan.T
    self.flops = self.tokens * flops_per_token(plan.model, plan.T)
    peak = peak_flops(plan.mesh.devices.flat[0].device_kind)
    self.peak = peak and peak * plan.mesh.size
    self.stragglers = Stragglers(plan.config.log.straggler_every)
    self._last = clock.now()

  def line(self, step: int, values: dict) -> dict:
    """Returns the line of a step; waits until the step is done.

    Raises:
      UserError: its loss is not finite, or too many steps in a row were spikes.
    """
    with self.clock('device'):
      values = layer_values.flat(jax.device_get(values))
    self._check(step, values)
    now, last = self.clock.now(), self._last
    self._last = now
    waited = now['data'] - last['data']
    host = now['step'] - last['step'] + waited
    seconds = host + now['device'] - last['device']
    with self.clock('device'):  # who compares waits for the others
      compared, slow = self.stragglers.add(step, host, seconds)
    if slow:
      self.say(f'step {step:,}: {slow}')
    values |= {
      'train/tokens': self.plan.tokens(step),
      'perf/step_seconds': seconds,
      'perf/tokens_per_second': self.tokens / seconds,
      'perf/flops_per_second': self.flops / seconds,
      'perf/data_wait_seconds': waited,
      'perf/memory_gib': metrics_file.peak_memory_gib(),
    }
    if self.peak:
      values['perf/mfu'] = self.flops / (seconds * self.peak)
    return {'step': step, **values, **compared}

  def _check(self, step: int, values: dict) -> None:
    in_a_row = int(values.pop('train/skipped_in_a_row', 0))
    finite = math.isfinite(values['train/loss']) and math.isfinite(values['train/grad_norm'])
    if in_a_row >= skip_spikes.LIMIT or not (finite or in_a_row):
      self.checkpoints.wait()
      raise UserError(
        bad_step(step, values, in_a_row, self.loader, self.checkpoints.latest_step(), self.workdir)
      )
    if in_a_row:
      self.say(
        f'step {step:,}: skipped, with a gradient norm of {values["train/grad_norm"]:.4g} '
        f'(z-score {values["train/grad_norm_zscore"]:.1f}), loss {values["train/loss"]:.4f}'
      )


def note(line: dict) -> str:
  """Returns a line of the record in short."""
  mfu = f' mfu {line["perf/mfu"]:.1%}' if 'perf/mfu' in line else ''
  return (
    f'loss {line["train/loss"]:.4f} lr {line["train/learning_rate"]:.2e} '
    f'{line["perf/tokens_per_second"]:,.0f} tokens/s{mfu}'
  )


def bad_step(step, values, in_a_row, loader, last_good, workdir) -> str:
  """Returns the message on a step that can't be taken."""
  rows = [f'  row {r}: {", ".join(names[:6])}' for r, names in enumerate(loader.documents(step - 1))]
  if len(rows) > 8:
    rows[8:] = [f'  … and {len(rows) - 8} more rows']
  why = f', skipped as were the {in_a_row - 1} steps before: this is no spike' if in_a_row else ''
  loss, norm = values['train/loss'], values['train/grad_norm']
  return (
    f'step {step}: loss {loss}, gradient norm {norm}{why}. '
    'Nothing of it was saved. The documents of its batch (shard:number):\n'
    + '\n'.join(rows)
    + f'\nThe last good checkpoint in {workdir} is '
    + (f'that of step {last_good}' if last_good else 'none')
    + '. A lower optim.peak_lr, a longer optim.warmup_steps or model.dtype=float32 may help.'
  )

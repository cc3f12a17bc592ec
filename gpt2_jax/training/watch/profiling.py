"""A window of steps that the profiler traces."""

import shlex
from pathlib import Path
from typing import Any

import jax

from gpt2_jax.core.errors import UserError
from gpt2_jax.training.watch.goodput import Clock

FOLDER = 'profile'


class Profile:
  """A context around the loop. Each host writes its own files; a trace that began always ends."""

  def __init__(self, steps: tuple[int, int], workdir: Path, clock: Clock, say):
    """
    Args:
      steps: the first step to trace and the first not to, from 1 as in the record; (0, 0): none.
      workdir: the trace goes to `profile` in it.
      clock: of the run.
      say: prints a line.

    Raises:
      UserError: that is no window.
    """
    if (
      len(steps) != 2
      or not all(isinstance(s, int) and s >= 0 for s in steps)
      or (any(steps) and not 0 < steps[0] < steps[1])
    ):
      raise UserError(
        f'profile.steps = {tuple(steps)} is no window: (10, 13) traces the steps 10, '
        '11 and 12, (0, 0) none.'
      )
    self.first, self.stop = steps
    self.folder, self.clock, self.say = workdir / FOLDER, clock, say
    self._on = False

  def __enter__(self):
    return self

  def before(self, step: int, last: Any) -> None:
    """To be called before a step is handed over.

    Args:
      step: its number.
      last: what the step before gives: it is waited for, so that it is in the window or is not.
    """
    if self._on and step >= self.stop:
      with self.clock('device'):
        jax.block_until_ready(last)
      self._end()
    elif not self._on and self.first <= step < self.stop:
      with self.clock('profile'):
        jax.block_until_ready(last)
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # each call of a function: slow, and large
        jax.profiler.start_trace(self.folder, profiler_options=options)
      self._on = True

  def _end(self) -> None:
    self._on = False
    with self.clock('profile'):
      jax.profiler.stop_trace()
    self.say(
      f'profile  from step {self.first} on: `tensorboard --logdir '
      f'{shlex.quote(str(self.folder))}`, or `xprof` '
      'in its place, shows it (pip install tensorboard xprof)'
    )

  def __exit__(self, *_):
    if self._on:
      self._end()

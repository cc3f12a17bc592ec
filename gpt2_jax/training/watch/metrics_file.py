"""The record of a run: `metrics.jsonl`, a line a step.

A line is an object with `step` (number of updates done, from 1) and flat keys, null where a value
is not finite:

    train/loss            mean nll of the step's batch, in nats, before its update
    train/z_loss          what optim.z_loss added to it, in nats, where it is not 0
    train/grad_norm       before clipping; train/update_norm, train/param_norm after
    train/learning_rate   of the step
    train/tokens          tokens seen so far, over all starts, whatever the batches they came in
    train/skipped         1 where the step was a spike and not taken, else 0; only with
                          optim.skip_zscore, as is train/grad_norm_zscore: how far the norm's
                          logarithm lay above its running mean, in standard deviations
    layers/…              with log.layers_every, every so many steps: see layer_values
    eval/loss             at steps where the held-out split was evaluated; of a classifier also
                          eval/accuracy, the share of texts whose label is the likeliest one
    perf/step_seconds     from one step's end to the next, without evaluation and saving
    perf/data_wait_seconds  of them, waiting for the batch
    perf/host_seconds_max, perf/host_seconds_median  over the hosts: what each spends on its own, a
                          step; every log.straggler_every steps where there are several
    perf/tokens_per_second, perf/flops_per_second (6·P + 12·L·D·T a token, see counts.flops_per_token)
    perf/mfu              the latter by the devices' bfloat16 peak, where that is known
    perf/memory_gib       peak so far: of a device, or on CPU of the process
    perf/goodput          share of the time so far, over all starts, in steps that count
    time/KIND             seconds so far, over all starts, by kind: see goodput

With `config.deterministic` the last two families stand in `timing.jsonl`, a line a step as well, and
`metrics.jsonl` is the same to the last bit each time.
"""

import contextlib
import itertools
import json
import math
import os
import resource
import shutil
import sys
from pathlib import Path
from typing import IO, Any

import jax

from gpt2_jax.core.errors import saving
from gpt2_jax.core.files import misfit, read_lines, whole_number, write_whole

FILE, TIMING = 'metrics.jsonl', 'timing.jsonl'
MEASURED = ('perf/', 'time/')  # begin the keys that are never twice the same


def peak_memory_gib() -> float:
  """Returns the peak memory so far: of the fullest local device, or on CPU of the process."""
  stats = [device.memory_stats() for device in jax.local_devices() if device.platform != 'cpu']
  if peaks := [s['peak_bytes_in_use'] for s in stats if s and 'peak_bytes_in_use' in s]:
    return max(peaks) / 2**30
  unit = 1 if sys.platform == 'darwin' else 1024
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def _dumps(line: dict) -> str:
  """JSON has no NaN: what is not finite, the loss of a step that was skipped perhaps, is null."""
  return json.dumps(
    {
      key: None if isinstance(value, float) and not math.isfinite(value) else value
      for key, value in line.items()
    },
    allow_nan=False,
  )


def _is_line(value: Any) -> bool:
  return (
    misfit(value, {'step': whole_number}) is None
    and misfit(value, {str: (int, float, type(None))}) is None
  )


def _lines(path: Path) -> dict[int, dict]:
  """Returns the lines of a file by step, in order; the last one if several are of one step."""
  lines = {line['step']: line for line in read_lines(path, _is_line)[0]}
  return dict(sorted(lines.items()))


def read(workdir: Path) -> list[dict]:
  """Returns the lines of a run in order, one a step, without those that a kill has cut short."""
  timing = _lines(workdir / TIMING)
  return [line | timing.get(step, {}) for step, line in _lines(workdir / FILE).items()]


def flaws(workdir: Path, step: int) -> str:
  """Says in one line what is wrong with the record up to a step; '' if nothing is.

  A file with lines that can't be read, or are there twice, is copied: they would be lost when the
  record is written again.
  """
  said = []
  for name in (FILE, TIMING) if (workdir / TIMING).exists() else (FILE,):
    lines, bad = read_lines(workdir / name, _is_line)
    steps = [line['step'] for line in lines]
    there = sorted(s for s in set(steps) if 1 <= s <= step)
    edges = [0, *there, step + 1]
    gaps = [
      f'{a + 1:,} to {b - 1:,}' if b - a > 2 else f'{a + 1:,}'
      for a, b in itertools.pairwise(edges)
      if b - a > 1
    ]
    found = []
    if bad:
      found.append(f"{bad:,} lines can't be read")
    if twice := len(steps) - len(set(steps)):
      found.append(f'{twice:,} steps stand there twice, of which the last counts')
    if steps != sorted(steps):
      found.append('the steps are not in order')
    if found:
      numbers = (f'.damaged-{n}' for n in itertools.count(1))
      kept = next(p for n in numbers if not (p := workdir / f'{name}{n}').exists())
      with saving('the record', kept):
        shutil.copyfile(workdir / name, kept)
      found[-1] += f' (the file as it was: {kept.name})'
    if gaps:
      more = f', … ({len(gaps)} gaps)' if len(gaps) > 8 else ''
      found.insert(0, f'there is no line of step {", ".join(gaps[:8])}{more}')
    if found:
      said.append(f'{workdir / name}: {"; ".join(found)}')
  return '. '.join(said) + '. The run goes on.' if said else ''


def tokens_seen(lines: list[dict], step: int, a_step: int) -> int:
  """Returns the tokens that a run had seen at a step, by the record of an early version, in which
  `train/tokens` is the number of the step times the batch of that time.

  Args:
    lines: of the record.
    step: number of updates done.
    a_step: tokens of a step where no line tells.
  """
  seen, last = 0, 0
  for line in lines:
    if last < line['step'] <= step and 'train/tokens' in line:
      a_step = line['train/tokens'] // line['step']
      seen, last = seen + (line['step'] - last) * a_step, line['step']
  return seen + (step - last) * a_step


def plain(line: dict) -> dict:
  """Returns a line without what is measured: what is the same each time that a run is made."""
  return {key: value for key, value in line.items() if not key.startswith(MEASURED)}


class MetricsWriter:
  """Appends to the record of a workdir, on process 0 alone."""

  def __init__(self, workdir: Path, step: int, apart: bool = False):
    """Continues after `step`: what a killed run wrote beyond its last checkpoint is dropped.

    Args:
      workdir: of the run.
      step: number of updates done.
      apart: whether what is measured goes into a file of its own, `timing.jsonl`.
    """
    self.workdir, self.active, self._apart = workdir, jax.process_index() == 0, apart
    self._files: dict[str, IO[str]] = {}
    if self.active:
      self._begin([line for line in read(workdir) if line['step'] <= step])

  def __enter__(self) -> 'MetricsWriter':
    return self

  def __exit__(self, *_) -> None:
    self.close()

  def _split(self, line: dict) -> dict[str, dict]:
    """Splits a line by the file it goes to. FILE is written last: its steps have their TIMING."""
    if not self._apart:
      return {FILE: line}
    measured = {key: value for key, value in line.items() if key.startswith(MEASURED)}
    return {TIMING: {'step': line['step']} | measured, FILE: plain(line)}

  def _begin(self, lines: list[dict]) -> None:
    """Makes these lines the record, and opens it for more."""
    with saving('metrics', self.workdir / FILE):
      for name in self._split({'step': 0}):
        path = self.workdir / name
        text = ''.join(_dumps(self._split(line)[name]) + '\n' for line in lines)
        if not path.exists() or path.read_bytes() != text.encode():
          write_whole(path, text)
        self._files[name] = open(path, 'a')
      if not self._apart:
        (self.workdir / TIMING).unlink(missing_ok=True)

  def write(self, line: dict) -> None:
    """Appends a line; it is in the file when this returns."""
    if not self.active:
      return
    with saving('metrics', self.workdir / FILE):
      for name, part in self._split(line).items():
        self._files[name].write(_dumps(part) + '\n')
        self._files[name].flush()

  def sync(self) -> None:
    """Returns when what was written is on the disk, where it outlives the machine."""
    for name, file in self._files.items():
      with saving('metrics', self.workdir / name):
        os.fsync(file.fileno())

  def amend_last(self, values: dict) -> None:
    """Adds keys to the last line."""
    if not self.active:
      return
    for file in self._files.values():
      file.close()
    *lines, last = read(self.workdir)
    self._begin([*lines, last | values])

  def close(self) -> None:
    for file in self._files.values():
      with contextlib.suppress(OSError):  # a line that could not be flushed was said
        file.close()

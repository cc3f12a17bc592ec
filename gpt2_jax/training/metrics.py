"""The record of a run: `metrics.jsonl`, a line a step, and TensorBoard beside it.

A line is an object with `step` (number of updates done, from 1) and flat keys, null where a value
is not finite:

    train/loss            mean nll of the step's batch, in nats, before its update
    train/grad_norm       before clipping; train/update_norm, train/param_norm after
    train/learning_rate   of the step
    train/tokens          tokens seen so far
    train/skipped         1 where the step was a spike and not taken, else 0; only with
                          optim.skip_zscore, as is train/grad_norm_zscore: how far the norm's
                          logarithm lay above its running mean, in standard deviations
    eval/loss             at steps where the held-out split was evaluated
    perf/step_seconds     from one step's end to the next, without evaluation and saving
    perf/data_wait_seconds  of them, waiting for the batch
    perf/host_seconds_max, perf/host_seconds_median  over the hosts: what each spends on its own, a
                          step; every log.straggler_every steps where there are several
    perf/tokens_per_second, perf/flops_per_second (6·P + 12·L·D·T a token, see model.flops_per_token)
    perf/mfu              the latter by the devices' bfloat16 peak, where that is known
    perf/memory_gib       peak so far: of a device, or on CPU of the process
    perf/goodput          share of the time so far, over all starts, in steps that count
    time/KIND             seconds so far, over all starts, by kind: see goodput
"""

import json
import math
import os
import resource
import sys
from pathlib import Path

import jax

from gpt2_jax.errors import saving

FILE = 'metrics.jsonl'


def peak_memory_gib() -> float:
  """Peak memory so far: the fullest local device's, or on CPU the process's."""
  stats = [device.memory_stats() for device in jax.local_devices() if device.platform != 'cpu']
  if peaks := [s['peak_bytes_in_use'] for s in stats if s and 'peak_bytes_in_use' in s]:
    return max(peaks) / 2**30
  unit = 1 if sys.platform == 'darwin' else 1024
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def _dumps(line: dict) -> str:
  """JSON has no NaN: what is not finite, the loss of a step that was skipped perhaps, is null."""
  return json.dumps({key: None if isinstance(value, float) and not math.isfinite(value) else value
                     for key, value in line.items()}, allow_nan=False)


def read(workdir: Path) -> list[dict]:
  """The lines of a run, in order. A line cut short by a kill is left out."""
  path = workdir / FILE
  lines = []
  for line in path.read_text().splitlines() if path.exists() else ():
    try:
      lines.append(json.loads(line))
    except json.JSONDecodeError:
      break
  return lines


class MetricsWriter:
  """Appends to the record of a workdir, on process 0 alone."""

  def __init__(self, workdir: Path, step: int, tensorboard: bool):
    """Continues behind `step`: what a killed run wrote beyond its last checkpoint is dropped."""
    self.path, self.active = workdir / FILE, jax.process_index() == 0
    self._file = self._board = None
    if not self.active:
      return
    with saving('metrics', self.path):
      kept = [line for line in read(workdir) if line['step'] <= step]
      self._rewrite(kept)
      self._file = open(self.path, 'a')
    if tensorboard:
      import tensorboardX  # over a second
      self._board = tensorboardX.SummaryWriter(
          str(workdir / 'tensorboard'), purge_step=step + 1 if step else None)

  def _rewrite(self, lines: list[dict]) -> None:
    text = ''.join(_dumps(line) + '\n' for line in lines)
    if self.path.exists() and self.path.read_text() == text:
      return
    temporary = self.path.with_suffix('.tmp')
    temporary.write_text(text)
    os.replace(temporary, self.path)

  def write(self, line: dict) -> None:
    """Appends a line; it is in the file when this returns."""
    if self._file is None:
      return
    with saving('metrics', self.path):
      self._file.write(_dumps(line) + '\n')
      self._file.flush()
    if self._board is not None:
      for key, value in line.items():
        if key != 'step':
          self._board.add_scalar(key, value, line['step'])

  def sync(self) -> None:
    """Returns when what was written is on the disk, where it outlives the machine."""
    if self._file is not None:
      with saving('metrics', self.path):
        os.fsync(self._file.fileno())

  def amend_last(self, values: dict) -> None:
    """Adds keys to the last line."""
    if self._file is None:
      return
    self._file.close()
    lines = read(self.path.parent)
    lines[-1] |= values
    with saving('metrics', self.path):
      self._rewrite(lines)
      self._file = open(self.path, 'a')

  def close(self) -> None:
    for file in (self._file, self._board):
      if file is not None:
        file.close()

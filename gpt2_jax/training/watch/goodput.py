"""Where the time of a run goes, in seconds of the host's clock, over all its starts.

    step        training steps that count: computing, and the host's work between them
    data        waiting for a batch
    compile     the training step
    evaluate    held-out loss, its compilation among it, and the sample at the end
    checkpoint  saving, as far as the loop waits for it, and reading it again
    profile     collecting traces
    start       imports, data preparation, initial parameters
    lost        steps that were killed before they were saved, and had to be made again

Every second is of one kind, so that they add up to the run's time. Goodput is the share of `step`.

Dispatch is asynchronous: the host hands over a step and then waits for the one before. A step's end
is seen when its metrics arrive, and a wait for data may fall into a time when the device still
computes, so that `data` is an upper bound of what it costs. What a killed start did after its last
line in the record is unknown and not counted.
"""

import contextlib
import time
from collections.abc import Iterator

KINDS = ('step', 'data', 'compile', 'evaluate', 'checkpoint', 'profile', 'start', 'lost')
PREFIX = 'time/'  # of the keys in metrics.jsonl


class Clock:
  """Seconds by kind. At every moment one kind runs: `start`, until `with clock(KIND):` says other."""

  def __init__(self, began: float | None = None):
    """
    Args:
      began: when this start began, by `time.monotonic`; default: now.
    """
    self.before: dict[str, float] = dict.fromkeys(KINDS, 0.0)  # by earlier starts
    self.seconds: dict[str, float] = dict.fromkeys((*KINDS, 'device'), 0.0)  # by this one
    self._kind, self._since = 'start', time.monotonic() if began is None else began

  def _turn(self, kind: str) -> None:
    now = time.monotonic()
    self.seconds[self._kind] += now - self._since
    self._kind, self._since = kind, now

  @contextlib.contextmanager
  def __call__(self, kind: str) -> Iterator[None]:
    """Counts the time within a context as of one kind, without that of contexts inside it.

    `device` is the part of `step` in which the host hands over work or waits for it.
    """
    outer = self._kind
    self._turn(kind)
    try:
      yield
    finally:
      self._turn(outer)

  def now(self) -> dict[str, float]:
    """Returns the seconds of this start by kind, with `device` as a kind of its own."""
    self._turn(self._kind)
    return dict(self.seconds)

  def totals(self) -> dict[str, float]:
    """Returns the seconds of all starts by kind."""
    seconds = self.now()
    seconds['step'] += seconds.pop('device')
    return {kind: self.before[kind] + seconds[kind] for kind in KINDS}

  def line(self) -> dict[str, float]:
    """Returns keys for a line of the record: the goodput, and the totals to the millisecond."""
    totals = self.totals()
    return {'perf/goodput': goodput(totals)} | {
      PREFIX + kind: round(seconds, 3) for kind, seconds in totals.items() if seconds
    }


def goodput(totals: dict[str, float]) -> float:
  """Returns the share of the time in steps that count."""
  return totals['step'] / max(sum(totals.values()), 1e-9)


def seconds_before(lines: list[dict], starts: list[dict], step: int) -> dict[str, float]:
  """Returns the seconds by kind of the earlier starts of a run that goes on after `step`.

  Args:
    lines: its record, with what lies beyond `step`.
    starts: what each start, and each end that came in order, left in env.json: the `step` it was at
      and the `seconds` until then.
    step: what was done beyond it is lost.
  """

  def read(found: dict, prefix: str = '') -> dict[str, float]:
    return {kind: found.get(prefix + kind) or 0.0 for kind in KINDS}

  totals = read(lines[-1], PREFIX) if lines else read({})
  beyond = [line for line in lines if line['step'] > step]
  if starts and 'seconds' in starts[-1]:
    noted = read(starts[-1]['seconds'])
    if sum(noted.values()) > sum(totals.values()) - 0.1:  # later than any line (which are rounded)
      totals = noted
      beyond = [line for line in beyond if line['step'] <= starts[-1]['step']]  # not lost twice
  for line in beyond:
    seconds, waited = (line.get(f'perf/{key}_seconds') or 0.0 for key in ('step', 'data_wait'))
    totals['step'] -= seconds - waited
    totals['data'] -= waited
    totals['lost'] += seconds
  return {kind: max(0.0, seconds) for kind, seconds in totals.items()}


def table(totals: dict[str, float]) -> list[str]:
  """Returns a line for each kind that took any time."""
  whole = max(sum(totals.values()), 1e-9)
  return [
    f'{kind:10} {seconds:12,.1f} s {seconds / whole:7.1%}'
    for kind, seconds in totals.items()
    if seconds >= 0.05
  ]

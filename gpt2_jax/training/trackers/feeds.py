"""What the trackers of a run are told: lines of its record, each once, in a thread of their own.

A step hands its line over and goes on. Lines wait in a queue that holds the last QUEUE ones; what has
fallen out of it, or was not sent as the tracker failed, is read from the record again. So a tracker
that is slow, or away for an hour, lacks nothing in the end, and costs no more memory.

How far a tracker is stands in `trackers/NAME.json` of the workdir, with its own name of the run, so
that the next start goes on there: steps that a killed start had sent are not sent twice.
"""

import collections
import importlib.util
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from gpt2_jax.core.errors import UserError, brief
from gpt2_jax.core.files import read_json, whole_number, write_whole
from gpt2_jax.training.trackers.mlflow_run import MLflow
from gpt2_jax.training.trackers.protocol import Start, Tracker
from gpt2_jax.training.trackers.tensorboard import TensorBoard
from gpt2_jax.training.trackers.wandb_run import Wandb

Read = Callable[[], list[dict[str, Any]]]
TRACKERS: dict[str, Callable[[Start], Tracker]] = {
  'tensorboard': TensorBoard,
  'wandb': Wandb,
  'mlflow': MLflow,
}
FOLDER, RECORD = 'trackers', 'metrics.jsonl'  # of a workdir
QUEUE = 4096  # lines that wait, at most
A_CALL = 100  # lines at a time
GATHER_S = 1.0  # lines are gathered so long
RETRY_S = 60.0  # from a failure to the next try
PATIENCE_S = {'finished': 60.0, 'stopped': 10.0, 'failed': 10.0}  # for the rest, at the end


def names(to: str) -> list[str]:
  """Returns the trackers that `log.to` names, each once."""
  return list(dict.fromkeys(filter(None, map(str.strip, to.split(',')))))


def require(to: str) -> None:
  """Checks that what the trackers need is installed.

  Raises:
    UserError: names the extra that is missing.
  """
  for name in names(to):
    needs = getattr(TRACKERS[name], 'needs', '')
    if needs and importlib.util.find_spec(needs) is None:
      raise UserError(
        f'log.to = {brief(to)}: {needs} is not installed: pip install "gpt2_jax[{name}]", or leave '
        f'{name} out.'
      )


class Feed(threading.Thread):
  """Tells one tracker, in order, what it lacks."""

  def __init__(self, name: str, start: Start, read: Read, say: Callable[[str], None]):
    """
    Args:
      name: of TRACKERS.
      start: of the run; what was kept of earlier starts is read here.
      read: gives the lines of the record.
      say: prints a line.
    """
    super().__init__(name=f'tracker {name}', daemon=True)
    self.tracker_name, self._read, self._say = name, read, say
    self._file = start.workdir / FOLDER / f'{name}.json'
    self._start, self._tracker = replace(start, **self._kept()) if start.step else start, None
    self.sent, self._newest = 0, start.step
    self._queue: collections.deque[dict] = collections.deque(maxlen=QUEUE)
    self._more: list[dict] = []  # keys of a step that was sent without them
    self._wake = threading.Condition()
    self._hurried, self._last_words = False, None
    self._failed_at: float | None = None
    self.done = False

  def _kept(self) -> dict[str, Any]:
    try:
      kept = read_json(self._file, {'run': str, 'sent': whole_number})
    except (UserError, OSError):
      return {}
    return {'run': kept['run'], 'sent': kept['sent']}

  # --- by the run -------------------------------------------------------------------------------

  def put(self, line: dict) -> None:
    with self._wake:
      self._queue.append(line)
      self._newest = line['step']

  def amend(self, line: dict) -> None:
    with self._wake:
      self._more.append(line)

  def hurry(self) -> None:
    with self._wake:
      self._hurried = True
      self._wake.notify_all()

  def end(self, *words: Any) -> None:
    with self._wake:
      self._last_words = words
      self._wake.notify_all()

  # --- by the thread ----------------------------------------------------------------------------

  def run(self) -> None:
    words = None
    while words is None:
      with self._wake:
        self._wake.wait_for(lambda: self._hurried or self._last_words, GATHER_S)
        words, self._hurried = self._last_words, False
      waits = self._failed_at is not None and time.monotonic() - self._failed_at < RETRY_S
      if waits and not words:
        continue
      try:
        self._send()
        if words and self._tracker:
          self._tracker.close(*words)
          self.done = True
      except (Exception, SystemExit) as e:  # of any kind: it is another's program
        self._failed(e, words is not None)

  def _send(self) -> None:
    if self._tracker is None:
      self._tracker = TRACKERS[self.tracker_name](self._start)
      self.sent = self._tracker.sent
      self._keep()
      if where := self._tracker.where:
        self._say(f'{self.tracker_name:8} {where}')
    with self._wake:
      lines, more, newest = list(self._queue), list(self._more), self._newest
      self._queue.clear()
    lines = [line for line in lines if line['step'] > self.sent]
    begin = lines[0]['step'] if lines else newest + 1
    if begin > self.sent + 1:
      record = self._read()
      lines = [line for line in record if self.sent < line['step'] < begin] + lines
    elif more:
      self._tracker.log(more)  # else the record, to which they were added, has just been read
    del self._more[: len(more)]
    for first in range(0, len(lines), A_CALL):
      some = lines[first : first + A_CALL]
      self._tracker.log(some)
      self.sent = some[-1]['step']
      self._keep()
    self.sent = max(self.sent, newest)
    if self._failed_at is not None:
      self._failed_at = None
      self._say(f'tracker {self.tracker_name} is back, and has all steps up to {self.sent:,}')

  def _keep(self) -> None:
    assert self._tracker is not None
    self._file.parent.mkdir(exist_ok=True)
    write_whole(self._file, f'{{"run": "{self._tracker.run}", "sent": {self.sent}}}\n')

  def _failed(self, e: BaseException, at_end: bool) -> None:
    if self._failed_at is None:
      why = ' '.join(str(e).split())[:300] or type(e).__name__
      way = f'it is tried again every {RETRY_S:.0f} s, and gets from {RECORD} what it lacks'
      goes_on = '' if at_end else f'. The run goes on without it; {way}'
      self._say(f'tracker {self.tracker_name}: {why}{goes_on}')
    self._failed_at = time.monotonic()


class Trackers:
  """The trackers of a run, on process 0. A context: what ends without `end` has failed."""

  def __init__(self, to: str, start: Start, read: Read, say: Callable[[str], None]):
    """
    Args:
      to: `log.to`.
      start: of the run.
      read: gives the lines of its record.
      say: prints a line.
    """
    self._say, self._feeds = say, [Feed(name, start, read, say) for name in names(to)]
    for feed in self._feeds:
      feed.start()

  def put(self, line: dict) -> None:
    """Hands over the line of a step."""
    for feed in self._feeds:
      feed.put(line)

  def amend(self, line: dict) -> None:
    """Hands over more keys of a step that earlier starts have done; the record has them already."""
    for feed in self._feeds:
      feed.amend(line)

  def hurry(self) -> None:
    """Has all that waits sent now, and does not wait for it."""
    for feed in self._feeds:
      feed.hurry()

  def end(
    self, outcome: str, summary: dict[str, Any] | None = None, picture: Path | None = None
  ) -> None:
    """Has all that waits sent, and the trackers closed; args as `Tracker.close` has them."""
    for feed in self._feeds:
      feed.end(outcome, summary or {}, picture)
    last = time.monotonic() + PATIENCE_S[outcome]
    for feed in self._feeds:
      feed.join(max(0.0, last - time.monotonic()))
      if not feed.done:
        self._say(
          f'tracker {feed.tracker_name} has nothing after step {feed.sent:,}, as far as it says: '
          f'{RECORD} has it all'
        )
    self._feeds = []

  def __enter__(self) -> 'Trackers':
    return self

  def __exit__(self, *_) -> None:
    if self._feeds:
      self.end('failed')

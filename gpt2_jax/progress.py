"""Progress of long work: live bars on a terminal, a plain line now and then elsewhere."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

import rich.console
import rich.progress

PLAIN_EVERY_S = 10.0
_bars: rich.progress.Progress | None = None  # the live display, shared by what runs inside another


@contextlib.contextmanager
def track(what: str, total: float, unit: str = '', *, done: float = 0) -> Iterator[Callable]:
  """Yields `advance(amount, note='')`, to be called as `amount` more of `total` is done.

  On a terminal a bar is drawn, with `note` behind it. Elsewhere a line is printed at most every
  10 seconds, so that a log file stays readable.
  """
  with (_bar if sys.stderr.isatty() else _lines)(what, total, unit, done) as advance:
    yield advance


@contextlib.contextmanager
def _lines(what: str, total: float, unit: str, done: float) -> Iterator[Callable]:
  started = last = time.monotonic()

  def advance(amount: float, note: str = '') -> None:
    nonlocal done, last
    done += amount
    now = time.monotonic()
    if now - last >= PLAIN_EVERY_S:
      last = now
      share = f'{done / total:4.0%}' if total else ''
      print(
        f'{what} {share} {done:,.0f}/{total:,.0f} {unit} after {now - started:.0f} s {note}',
        file=sys.stderr,
        flush=True,
      )

  yield advance


@contextlib.contextmanager
def _bar(what: str, total: float, unit: str, done: float) -> Iterator[Callable]:
  global _bars
  if _bars is None:
    columns = (
      '{task.description}',
      rich.progress.BarColumn(),
      rich.progress.TaskProgressColumn(),
      rich.progress.TimeElapsedColumn(),
      rich.progress.TimeRemainingColumn(),
      '{task.fields[note]}',
    )
    with rich.progress.Progress(*columns, console=rich.console.Console(stderr=True)) as _bars:
      try:
        with _bar(what, total, unit, done) as advance:
          yield advance
      finally:
        _bars = None
    return
  bars, task = _bars, _bars.add_task(what, total=total, completed=int(done), note='')
  yield lambda amount, note='': bars.update(task, advance=amount, note=note)
  if len(bars.tasks) > 1:  # what ran inside another leaves no bar behind
    bars.remove_task(task)

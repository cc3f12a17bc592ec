"""Progress of long work: live bars on a terminal or in a notebook, elsewhere a line now and then."""

import contextlib
import html
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import rich.console
import rich.progress

PLAIN_EVERY_S, DRAWN_EVERY_S = 10.0, 0.25


def in_notebook() -> bool:
  """Whether this is a kernel of Jupyter, or Colab, which shows HTML."""
  shell = getattr(sys.modules.get('IPython'), 'get_ipython', lambda: None)()
  return hasattr(shell, 'kernel')


@contextlib.contextmanager
def track(what: str, total: float, unit: str = '', *, done: float = 0) -> Iterator[Callable]:
  """Yields `advance(amount, note='')`, to be called as `amount` more of `total` is done.

  On a terminal or in a notebook a bar is drawn, with `note` after it. Elsewhere a line is printed at
  most every 10 seconds, so that a log file stays readable.
  """
  if in_notebook():
    with _notebook_bar(what, total, unit, done) as advance:
      yield advance
    return
  if sys.stderr.isatty():
    with _BARS.bar(what, total, done) as advance:
      yield advance
    return
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
def _notebook_bar(what: str, total: float, unit: str, done: float) -> Iterator[Callable]:
  """A bar of HTML. (Rich's needs ipywidgets, without which it is not redrawn.)"""
  from IPython.display import HTML, display  # pyright: ignore[reportMissingImports]

  started = last = time.monotonic()

  def drawn(note: str) -> Any:
    words = f'{what} {done:,.0f}/{total:,.0f} {unit} after {time.monotonic() - started:.0f} s {note}'
    return HTML(f'<progress value="{done}" max="{total or 1}"></progress> {html.escape(words)}')

  shown: Any = display(drawn(''), display_id=True)

  def advance(amount: float, note: str = '') -> None:
    nonlocal done, last
    done += amount
    now = time.monotonic()
    if now - last >= DRAWN_EVERY_S or done >= total:
      last = now
      shown.update(drawn(note))

  yield advance


class _Bars:
  """The bars of this process, in one live display: rich can't draw two at a time."""

  def __init__(self):
    self._display: rich.progress.Progress | None = None  # while there is any bar

  @contextlib.contextmanager
  def bar(self, what: str, total: float, done: float) -> Iterator[Callable]:
    with contextlib.ExitStack() as at_end:
      outermost = self._display is None
      if self._display is None:
        columns = (
          '{task.description}',
          rich.progress.BarColumn(),
          rich.progress.TaskProgressColumn(),
          rich.progress.TimeElapsedColumn(),
          rich.progress.TimeRemainingColumn(),
          '{task.fields[note]}',
        )
        console = rich.console.Console(stderr=True)
        self._display = at_end.enter_context(rich.progress.Progress(*columns, console=console))
        at_end.callback(setattr, self, '_display', None)
      display = self._display
      task = display.add_task(what, total=total, completed=int(done), note='')
      yield lambda amount, note='': display.update(task, advance=amount, note=note)
      if not outermost:  # the bar of an inner work goes when it ends
        display.remove_task(task)


_BARS = _Bars()

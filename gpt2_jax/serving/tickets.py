"""A request between its event loop and the engine: texts that are asked for, and news of them."""

import asyncio
import dataclasses
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from gpt2_jax.decoding.pieces import Pieces

BUFFER = 256  # pieces of a text that its reader may be behind


class Full(Exception):
  """The queue has no room."""


class Closing(Exception):
  """No more texts are taken."""


class Failed(Exception):
  """A text can't be written; `kind` is 'timeout', 'slow', or 'server'."""

  def __init__(self, message: str, kind: str = 'server'):
    super().__init__(message)
    self.kind = kind


@dataclasses.dataclass(frozen=True)
class Scored:
  """A token and what the model says of its place."""

  token: int
  logprob: float | None  # None: of the first, which nothing is before
  top: dict[int, float] | None


@dataclasses.dataclass(eq=False)
class Prompt:
  """What a text begins with, or several texts; it is read once."""

  ids: list[int]
  rows: int  # that are yet to begin with it
  scored: bool = False  # whether its log-probabilities are asked for
  told: list[Scored] = dataclasses.field(default_factory=list)
  read: int = 0  # ids that are in the cache
  cache: Any = None

  @property
  def unread(self) -> int:
    """Ids that are to be read before the first step, which reads the last one."""
    return len(self.ids) - 1 - self.read

  def forget(self) -> None:
    """What was read of it."""
    self.told, self.read, self.cache = [], 0, None

  def leave(self) -> None:
    """One row less will begin with it."""
    self.rows -= 1
    if not self.rows:
      self.cache = None


@dataclasses.dataclass(eq=False)
class Row:
  """A text that is asked for, and what has been written of it."""

  prompt: Prompt
  limit: int  # the most new ids
  seed: int
  sample: int  # which of its prompt
  options: dict[str, Any]  # of `slots.chosen_of`
  pieces: Pieces
  index: int = 0  # in its request
  new: list[Scored] = dataclasses.field(default_factory=list)
  made: int = 0  # steps that were begun for it
  admitted: bool = False
  done: bool = False
  reason: str = ''


@dataclasses.dataclass(frozen=True)
class Event:
  """News of a row: text that can be shown. The last one has `reason`."""

  row: Row
  text: str
  reason: str = ''
  tokens: int = 0  # how many new ones there are
  shown: int = 0  # bytes of the text that have been shown


class Ticket:
  """A request: rows, and what is heard of them."""

  def __init__(self, rows: Sequence[Row], stream: bool, timeout: float, look: Callable[[], None]):
    """`look` makes the engine look at its tickets."""
    self.rows, self.stream, self.look = rows, stream, look
    self.began = time.monotonic()
    self.deadline = self.began + timeout
    self.loop = asyncio.get_running_loop()
    self.heard: asyncio.Queue[Event | Failed] = asyncio.Queue()
    self.cancelled = False

  def deliver(self, event: Event | Failed) -> None:
    if self.heard.qsize() >= BUFFER * len(self.rows) and not self.cancelled:
      self.cancel()
      event = Failed('the reader is too far behind', 'slow')
    elif self.cancelled and not isinstance(event, Failed):
      return
    self.heard.put_nowait(event)

  def cancel(self) -> None:
    """Nobody waits for it any more."""
    self.cancelled = True
    self.look()

  async def events(self) -> AsyncIterator[Event]:
    """News, until all rows have ended. Left early, the rows are given up.

    Raises:
      Failed: they can't be written.
    """
    left = len(self.rows)
    try:
      while left:
        event = await self.heard.get()
        if isinstance(event, Failed):
          raise event
        left -= bool(event.reason)
        yield event
    finally:
      if left:
        self.cancel()


def deliver(news: list[tuple[Ticket, Event | Failed]]) -> None:
  """In the event loop."""
  for ticket, event in news:
    ticket.deliver(event)

"""A request between its event loop and the engine: the texts it asks for, and events of them."""

import asyncio
import dataclasses
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from gpt2_jax.decoding.text_stream import Pieces
from gpt2_jax.serving.slot_state import Choice

BUFFER = 256  # pieces of a text that its reader may be behind


class Full(Exception):
  """The queue has no room."""


class Closing(Exception):
  """No more texts are taken."""


class Failed(Exception):
  """A text can't be written; `kind` is 'timeout', 'slow' or 'server'."""

  def __init__(self, message: str, kind: str = 'server'):
    super().__init__(message)
    self.kind = kind


@dataclasses.dataclass(frozen=True)
class Scored:
  """A token, and how likely the model finds it and others in its place."""

  token: int
  logprob: float | None  # in nats; None: of the first token, or not asked for
  top: dict[int, float] | None  # id -> log-probability of the likeliest


@dataclasses.dataclass(eq=False)
class Prompt:
  """The beginning of one row or several; the model reads it once."""

  ids: list[int]
  rows: int  # how many rows have not begun yet
  scored: bool = False  # whether its log-probabilities are asked for
  told: list[Scored] = dataclasses.field(default_factory=list)
  read: int = 0  # how many ids are in the cache
  cache: Any = None  # of one row, on the device

  @property
  def unread(self) -> int:
    """How many ids are still to be read before the first step, which reads the last one."""
    return len(self.ids) - 1 - self.read

  def forget(self) -> None:
    """Drops what was read."""
    self.told, self.read, self.cache = [], 0, None

  def leave(self) -> None:
    """Notes that one row fewer needs the cache."""
    self.rows -= 1
    if not self.rows:
      self.cache = None


@dataclasses.dataclass(eq=False)
class Row:
  """A text that is asked for, and what has been written of it."""

  prompt: Prompt
  limit: int  # the most new ids
  seed: int
  sample: int  # its number among the texts of its prompt
  choice: Choice  # how it chooses its tokens
  pieces: Pieces
  index: int = 0  # its number in the request
  new: list[Scored] = dataclasses.field(default_factory=list)
  slot: int | None = None  # None: it waits, or has ended
  steps: int = 0  # that were begun for it
  admitted: bool = False  # whether its prompt is read
  done: bool = False
  reason: str = ''  # why it ended

  def event(self, text: str) -> 'Event':
    return Event(self, text, self.reason, len(self.new), self.pieces.shown)


@dataclasses.dataclass(frozen=True)
class Event:
  """More text of a row, that can be shown."""

  row: Row
  text: str
  reason: str  # why the row ended; '': it has not
  tokens: int  # how many new ones the row has
  shown: int  # bytes of the row's text that have been shown, this one included


class Ticket:
  """A request: its rows, and the events that its event loop has yet to take."""

  def __init__(self, rows: Sequence[Row], stream: bool, timeout: float):
    """`stream`: whether text is told as it is written; `timeout`: seconds from now."""
    self.rows, self.stream = rows, stream
    self.began = time.monotonic()
    self.deadline = self.began + timeout
    self.loop = asyncio.get_running_loop()
    self.heard: asyncio.Queue[Event | Failed] = asyncio.Queue()
    self.cancelled = False

  def deliver(self, event: Event | Failed) -> None:
    """Adds an event; a reader that is too far behind loses the request."""
    if self.heard.qsize() >= BUFFER * len(self.rows) and not self.cancelled:
      self.cancel()
      event = Failed('the reader is too far behind', 'slow')
    elif self.cancelled and not isinstance(event, Failed):
      return
    self.heard.put_nowait(event)

  def cancel(self) -> None:
    """Gives the rows up: the engine looks at this between two steps."""
    self.cancelled = True

  async def events(self) -> AsyncIterator[Event]:
    """Yields events until all rows have ended. Left early, it gives the rows up.

    Raises:
      Failed: a row can't be written.
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


def deliver(events: list[tuple[Ticket, Event | Failed]]) -> None:
  """Hands events to their requests; runs in the event loop of these."""
  for ticket, event in events:
    ticket.deliver(event)

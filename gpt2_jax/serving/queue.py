"""The rows that a model is asked for and has not finished, and whether more may come.

Its lock is the only one of an engine: event loops put rows in, the engine's thread takes them out.
"""

import collections
import threading
from collections.abc import Sequence

from prometheus_client import Gauge

from gpt2_jax.serving.requests import Closing, Full, Row, Ticket


class Queue:
  """Rows that wait for a slot, and those that have one.

  Attributes:
    tickets: row -> its request, for all rows that have not ended.
  """

  def __init__(self, *, slots: int, capacity: int, length: Gauge):
    """At most `capacity` rows wait while all `slots` are taken; the gauge shows how many wait."""
    self.tickets: dict[Row, Ticket] = {}
    self._most, self._length = slots + capacity, length
    self._waiting: collections.deque[Row] = collections.deque()
    self._changed = threading.Condition()
    self._closing = False

  @property
  def idle(self) -> bool:
    """Whether all rows have ended."""
    return not self.tickets

  def submit(self, rows: Sequence[Row], *, stream: bool = False, timeout: float = 600) -> Ticket:
    """Asks for rows, in the event loop that hears of them.

    Raises:
      Full: more rows wait than may. Where none waits, a request may have any number of rows.
      Closing: the server is being stopped.
    """
    ticket = Ticket(rows, stream, timeout)
    with self._changed:
      if self._closing:
        raise Closing
      if self._waiting and len(self.tickets) + len(rows) > self._most:
        raise Full
      self._waiting.extend(rows)
      self.tickets |= dict.fromkeys(rows, ticket)
      self._length.set(len(self._waiting))
      self._changed.notify()
    return ticket

  def close(self) -> None:
    """Takes no more rows."""
    with self._changed:
      self._closing = True
      self._changed.notify()

  def wait(self, *, busy: bool) -> bool:
    """Waits for a row, unless one is there or the thread is `busy`; returns whether the thread goes
    on: not if the queue is closed and its last row has ended.
    """
    with self._changed:
      self._changed.wait_for(lambda: self.tickets or busy or self._closing)
      return bool(self.tickets) or not self._closing

  def take(self, most: int) -> list[Row]:
    """The rows that have waited longest, at most so many. They wait no longer."""
    with self._changed:
      taken = [self._waiting.popleft() for _ in range(min(most, len(self._waiting)))]
      self._length.set(len(self._waiting))
    return taken

  def remove(self, row: Row) -> Ticket:
    """Forgets a row that has ended; returns its request."""
    with self._changed:
      if row.slot is None:
        self._waiting.remove(row)
      return self.tickets.pop(row)

"""Continuous batching: texts share the steps of one compiled program, and come and go between them.

One thread a model does all of its work. While the device makes a step, the host looks at what the
last one has made.
"""

import asyncio
import collections
import logging
import threading
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gpt2_jax import seeds, sharding
from gpt2_jax.decoding import history as h
from gpt2_jax.decoding.driver import REFUSED
from gpt2_jax.decoding.generate import own_ends, prepare
from gpt2_jax.decoding.pieces import Pieces
from gpt2_jax.errors import UserError
from gpt2_jax.pretrained_model import Pretrained
from gpt2_jax.serving import steps, tickets
from gpt2_jax.serving.metrics import Metrics
from gpt2_jax.serving.slots import CHUNK, blank, check_room, chosen_of, chunk_sizes, empty
from gpt2_jax.serving.tickets import Closing, Event, Failed, Full, Prompt, Row, Scored, Ticket

BUDGET = 2 * CHUNK  # ids of prompts that are read between two steps

DEFAULTS = dict(
  temperature=1.0, top_k=None, top_p=1.0, presence=0.0, frequency=0.0, bias={}, logprobs=False
)  # of `chosen_of`

log = logging.getLogger('gpt2_jax.serving')


class Engine:
  """Writes texts with one model."""

  def __init__(
    self, name: str, model: Pretrained, metrics: Metrics, *, slots: int = 8, queue: int = 64
  ):
    """`slots` texts are written at a time, `queue` may wait.

    Raises:
      UserError: the model has no tokenizer, another head, lies on several devices, or on one that has
        no room for the slots.
    """
    if model.tokenizer is None:
      raise UserError(f'{name} has no tokenizer.')
    self.name, self.model, self.config, self.tokenizer = name, model, model.config, model.tokenizer
    self.form, self.params = prepare(model)
    self.chunks = chunk_sizes(self.form)
    if len(sharding.devices_of(self.params)) > 1:
      raise UserError(f"{name} lies on several devices: a server's model lies on one.")
    check_room(self.form, slots, *sharding.devices_of(self.params))
    ends = own_ends(model)
    self.eos = jnp.asarray([model.tokenizer.eot] if ends is None else ends, jnp.int32)
    self.size, self.room = slots, queue
    self.rows: list[Row | None] = [None] * slots
    self.tickets: dict[Row, Ticket] = {}  # of rows that wait or are written
    self.waiting: collections.deque[Row] = collections.deque()
    self.stale = np.zeros(slots, bool)  # slots that the device doesn't know to be idle
    self.reading: list[tuple[Prompt, int, Any]] = []  # prompts' scores that are computed
    self.outbox: list[tuple[Ticket, Event | Failed]] = []
    self.wake = threading.Condition()
    self.closing = False
    of = lambda metric: metric.labels(name)
    self.prompt_tokens, self.new_tokens = of(metrics.prompt_tokens), of(metrics.new_tokens)
    self.used, self.queued = of(metrics.used), of(metrics.queued)
    self.first, self.step_time, self.finished = of(metrics.first), of(metrics.step), metrics.finished
    of(metrics.slots).set(slots)
    self.slots: Any = None
    self.thread = threading.Thread(target=self._run, name=f'engine {name}', daemon=True)
    self.thread.start()

  # --- other threads ------------------------------------------------------------------------------

  def submit(self, rows: Sequence[Row], *, stream: bool = False, timeout: float = 600) -> Ticket:
    """Asks for texts, in the event loop that hears of them.

    Raises:
      Full: more wait than may.
      Closing: the server is being stopped.
    """
    ticket = Ticket(rows, stream, timeout, self.look)
    with self.wake:
      if self.closing:
        raise Closing
      free = sum(row is None for row in self.rows)
      if self.waiting and len(self.waiting) + len(rows) > self.room + free:
        raise Full
      self.waiting.extend(rows)
      self.tickets |= dict.fromkeys(rows, ticket)
      self.queued.set(len(self.waiting))
      self.wake.notify()
    return ticket

  def look(self) -> None:
    with self.wake:
      self.wake.notify()

  def close(self) -> None:
    """Takes no more texts. Those that are asked for are written; then the thread ends."""
    with self.wake:
      self.closing = True
      self.wake.notify()

  def warm(self) -> None:
    """Compiles all that requests will need."""
    slots, cache = empty(self.form, B=self.size), blank(self.form)
    for T in self.chunks:
      ids_2T = np.zeros((2, T), np.int32)
      cache, _ = steps.prefill(self.form, self.params, cache, 0, *ids_2T, False)
    prompt = Prompt([0], 1, cache=cache)
    slots = self._admit(slots, 0, Row(prompt, 1, 0, 0, DEFAULTS, Pieces(self.tokenizer)))
    slots, _ = steps.step(self.form, self.params, self.eos, slots)
    jax.block_until_ready(steps.stop(slots, np.ones(self.size, bool)))

  @property
  def idle(self) -> bool:
    """Whether nothing is asked for."""
    return not self.tickets

  # --- the engine's thread --------------------------------------------------------------------------

  def _run(self) -> None:
    with sharding.mesh_of(self.params):
      made = None  # by the device, meanwhile
      while True:
        with self.wake:
          while not (self.tickets or made or self.closing):
            self.wake.wait()
          if self.closing and not self.tickets:
            return
        try:
          made = self._turn(made)
        except Exception:
          log.exception('%s: a step failed', self.name)
          made, self.slots, self.reading = None, None, []
          for row in list(self.tickets):
            if row in self.rows:
              self._fail(row, Failed('the server could not compute this text'))
            else:
              row.prompt.forget()  # another row may have begun to read it
        self._send()

  def _turn(self, made):
    """Between two steps. `made` is what the device is at; returns what it is at then."""
    if self.slots is None:
      self.slots = empty(self.form, B=self.size)
    self._drop()
    self._fill()
    began = self._step()
    if made is not None:
      self._collect(*made)
    self._collect_prompts()
    self.used.set(sum(row is not None for row in self.rows))
    return began

  def _drop(self) -> None:
    """Frees the slots of what nobody waits for, or for too long."""
    now = time.monotonic()
    for row, ticket in list(self.tickets.items()):
      if ticket.cancelled:
        self._end(row, 'cancelled')
      elif now > ticket.deadline:
        self._fail(row, Failed('the request took longer than this server allows', 'timeout'))
    if self.stale.any():
      self.slots = steps.stop(self.slots, self.stale)
      self.stale = np.zeros(self.size, bool)

  def _fill(self) -> None:
    """Gives slots to what waits, and reads prompts, but not so much that others wait for long."""
    with self.wake:
      for b in [b for b, row in enumerate(self.rows) if row is None][: len(self.waiting)]:
        self.rows[b] = self.waiting.popleft()
      self.queued.set(len(self.waiting))
    budget = BUDGET
    for b, row in enumerate(self.rows):
      while row is not None and not row.admitted and budget > 0:
        budget -= self._read(b, row)

  def _read(self, b: int, row: Row) -> int:
    """Reads a chunk of a prompt, or lets the row run; returns how many ids were read."""
    prompt = row.prompt
    if prompt.cache is None:
      prompt.cache = blank(self.form)
    if prompt.unread and (row.limit or prompt.scored):
      n, start = min(prompt.unread, CHUNK), prompt.read
      T = next(size for size in self.chunks if n <= size)
      ids_2T = np.zeros((2, T), np.int32)
      ids_2T[0, :n], ids_2T[1, :n] = (prompt.ids[start + i : start + i + n] for i in (0, 1))
      prompt.cache, scores = steps.prefill(
        self.form, self.params, prompt.cache, start, *ids_2T, prompt.scored
      )
      prompt.read += n
      self.prompt_tokens.inc(n)
      if prompt.scored:
        self.reading.append((prompt, n, scores))
      return T
    if row.limit:
      self.slots = self._admit(self.slots, b, row)
      self.prompt_tokens.inc()  # the first step reads the last one
    row.admitted = True
    prompt.leave()
    return 0

  def _admit(self, slots, b: int, row: Row):
    ids, chosen = row.prompt.ids, chosen_of(self.form.vocab_size, **row.options)
    tokens_S = np.zeros(self.form.n_positions, np.int32)
    tokens_S[: len(ids)] = ids
    return steps.admit(
      slots,
      b,
      row.prompt.cache,
      tokens_S,
      len(ids),
      row.limit,
      seeds.key_data(row.seed),
      row.sample,
      chosen,
    )

  def _step(self):
    """Begins a step, if any row wants one; returns what it will have made, and of whom."""
    rows = [row if row and row.admitted and row.made < row.limit else None for row in self.rows]
    if not any(rows):
      return None
    for row in filter(None, rows):
      row.made += 1
    began = time.perf_counter()
    self.slots, made = steps.step(self.form, self.params, self.eos, self.slots)
    return rows, made, began

  def _collect(self, rows: list[Row | None], made, began: float) -> None:
    """Looks at what a step has made."""
    tokens_B, reason_B = (x.tolist() for x in jax.device_get((made.tokens_B, made.reason_B)))
    self.step_time.observe(time.perf_counter() - began)
    asked = any(row is not None and row.options['logprobs'] for row in rows)
    all_scores = jax.device_get(made.scores) if asked else None
    for b, row in enumerate(rows):
      if row is None or row.done:
        continue
      if not row.new:
        self.first.observe(time.monotonic() - self.tickets[row].began)
      if reason_B[b] in REFUSED:
        self._fail(row, Failed(REFUSED[reason_B[b]]))
      else:
        scores = None
        if row.options['logprobs']:
          scores = jax.tree.map(lambda x, b=b: x[b], all_scores)
        self._news(row, tokens_B[b], reason_B[b], scores)
      if reason_B[b] != h.RUNNING:
        self.stale[b] = False  # the device has ended it itself

  def _news(self, row: Row, token: int, reason: int, scores) -> None:
    """A row's next token."""
    if reason != h.END_ID:
      row.new.append(_scored(token, scores))
      self.new_tokens.inc()
      try:
        row.pieces.push(token)
      except UserError as e:  # an id that the tokenizer has not
        return self._fail(row, Failed(str(e)))
      if row.pieces.stopped:
        reason = h.STOP_STRING
    ticket = self.tickets[row]
    if reason != h.RUNNING:
      why = h.REASONS[reason]
      return self._end(row, 'length' if why == 'context' else why)
    if ticket.stream and (text := row.pieces.take()):
      self.outbox.append((ticket, Event(row, text, '', len(row.new), row.pieces.shown)))

  def _collect_prompts(self) -> None:
    """Looks at what the model says of prompts; ends rows of which no more is asked."""
    for prompt, n, scores in self.reading:
      scores = jax.device_get(scores)
      start = len(prompt.told) or 1
      prompt.told = prompt.told or [Scored(prompt.ids[0], None, None)]
      prompt.told += [
        _scored(token, jax.tree.map(lambda x, t=t: x[t], scores))
        for t, token in enumerate(prompt.ids[start : start + n])
      ]
    self.reading = []
    for row in self.rows:
      if row is not None and row.admitted and not row.limit:
        self._end(row, 'length')

  def _end(self, row: Row, reason: str) -> None:
    row.reason = reason
    text = row.pieces.take(final=True)
    self._leave(row, Event(row, text, reason, len(row.new), row.pieces.shown))

  def _fail(self, row: Row, why: Failed) -> None:
    row.reason = why.kind
    self._leave(row, why)

  def _leave(self, row: Row, event: Event | Failed) -> None:
    """Frees a row's slot."""
    row.done = True
    if not row.admitted:
      row.prompt.leave()
    self.finished.labels(self.name, row.reason).inc()
    with self.wake:
      self.outbox.append((self.tickets.pop(row), event))
      if row in self.rows:
        b = self.rows.index(row)
        self.rows[b], self.stale[b] = None, True
      else:
        self.waiting.remove(row)

  def _send(self) -> None:
    """Tells the event loops what has come."""
    by_loop: dict[asyncio.AbstractEventLoop, list] = {}
    for ticket, event in self.outbox:
      by_loop.setdefault(ticket.loop, []).append((ticket, event))
    self.outbox = []
    for loop, news in by_loop.items():
      try:
        loop.call_soon_threadsafe(tickets.deliver, news)
      except RuntimeError:  # the loop has been closed: nobody waits
        pass


def _scored(token: int, scores) -> Scored:
  if scores is None:
    return Scored(token, None, None)
  top = dict(zip(scores.top_ids.tolist(), scores.top_logprobs.tolist()))
  return Scored(token, float(scores.logprobs), top)

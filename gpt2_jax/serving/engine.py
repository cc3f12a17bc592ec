"""Continuous batching: texts share the steps of one compiled program, and come and go between them.

One thread a model does all of its work. While the device makes a step, the host looks at what the
last one has made.
"""

import asyncio
import logging
import threading
import time
from collections.abc import Sequence

import jax
import numpy as np

from gpt2_jax.core.errors import UserError
from gpt2_jax.decoding import row_state as h
from gpt2_jax.decoding.host_loop import REFUSED
from gpt2_jax.decoding.text_stream import Pieces
from gpt2_jax.model.edits import Edit
from gpt2_jax.model.pretrained_model import Pretrained
from gpt2_jax.parallel import sharding
from gpt2_jax.serving import requests
from gpt2_jax.serving.device_batch import DeviceBatch, PendingStep
from gpt2_jax.serving.metrics import Metrics
from gpt2_jax.serving.programs import Scores
from gpt2_jax.serving.queue import Queue
from gpt2_jax.serving.requests import Event, Failed, Prompt, Row, Scored, Ticket
from gpt2_jax.serving.slot_state import CHUNK

BUDGET = 2 * CHUNK  # ids of prompts that are read between two steps

log = logging.getLogger('gpt2_jax.serving')


class Engine:
  """Writes texts with one model: takes rows from its queue, puts them into slots of its batch, and
  tells the requests what has been written.
  """

  def __init__(
    self,
    name: str,
    model: Pretrained,
    metrics: Metrics,
    *,
    slots: int = 8,
    queue: int = 64,
    edits: Sequence[Edit] = (),
  ):
    """`slots` texts are written at a time, `queue` more may wait; `edits` are as of `generate`.

    Raises:
      UserError: the model has no tokenizer, or can't be served (see `DeviceBatch`).
    """
    if model.tokenizer is None:
      raise UserError(f'{name} has no tokenizer.')
    self.name, self.model, self.metrics = name, model, metrics.of(name)
    self._finished = metrics.finished
    self.batch = DeviceBatch(name, model, slots, edits)
    self.queue = Queue(slots=slots, capacity=queue, length=self.metrics.queued)
    self.metrics.slots.set(slots)
    self._prompt_scores: list[tuple[Prompt, int, Scores]] = []  # the device computes them
    self._undelivered: list[tuple[Ticket, Event | Failed]] = []
    self.thread = threading.Thread(target=self._run, name=f'engine {name}', daemon=True)
    self.thread.start()

  def warm(self) -> None:
    """Compiles all that requests will need."""
    self.batch.warm(Pieces(self.model.tokenizer))

  def _run(self) -> None:
    """What the thread does, until the queue is closed and empty."""
    with sharding.mesh_of(self.batch.params):
      pending = None
      while self.queue.wait(busy=pending is not None):
        try:
          pending = self._turn(pending)
        except Exception:
          log.exception('%s: a step failed', self.name)
          pending = None
          self._begin_anew()
        self._deliver()

  def _turn(self, pending: PendingStep | None) -> PendingStep | None:
    """Begins a step, and meanwhile looks at the last one, `pending`; returns the one it began."""
    self._drop_abandoned()
    self.batch.stop_ended()
    self._fill_slots()
    begun = self.batch.step()
    if pending is not None:
      self._collect(pending)
    self._collect_prompt_scores()
    self.metrics.used.set(sum(row is not None for row in self.batch.rows))
    return begun

  def _begin_anew(self) -> None:
    """Fails the rows that have slots, after a program has failed; the others lose nothing."""
    self._prompt_scores = []
    self.batch.forget()
    for row in list(self.queue.tickets):
      if row.slot is not None:
        self._fail(row, Failed('the server could not compute this text'))
      else:
        row.prompt.forget()  # another row may have begun to read it

  def _drop_abandoned(self) -> None:
    """Ends rows that nobody waits for, or that took too long."""
    now = time.monotonic()
    for row, ticket in list(self.queue.tickets.items()):
      if ticket.cancelled:
        self._end(row, 'cancelled')
      elif now > ticket.deadline:
        self._fail(row, Failed('the request took longer than this server allows', 'timeout'))

  def _fill_slots(self) -> None:
    """Gives free slots to rows that wait, and reads prompts, but lets no one wait long for it."""
    self.batch.place(self.queue.take(len(self.batch.free)))
    budget = BUDGET
    for row in filter(None, self.batch.rows):
      while not row.admitted and budget > 0:
        budget -= self._read(row)

  def _read(self, row: Row) -> int:
    """Reads a chunk of a prompt, or lets the row run; returns how many ids the device reads."""
    prompt = row.prompt
    if prompt.unread and (row.limit or prompt.scored):
      n, padded, scores = self.batch.read_chunk(row)
      self.metrics.prompt_tokens.inc(n)
      if prompt.scored:
        self._prompt_scores.append((prompt, n, scores))
      return padded
    if row.limit:
      self.batch.admit(row)
      self.metrics.prompt_tokens.inc()  # the first step reads the last one
    row.admitted = True
    prompt.leave()
    return 0

  def _collect(self, pending: PendingStep) -> None:
    """Looks at what a step has made."""
    made = pending.result
    tokens_B, reason_B = (x.tolist() for x in jax.device_get((made.tokens_B, made.reason_B)))
    self.metrics.step.observe(time.perf_counter() - pending.began)
    asked = any(row is not None and row.choice.logprobs_B for row in pending.rows)
    scores = jax.device_get(made.scores) if asked else None
    for b, row in enumerate(pending.rows):
      if row is None or row.done:
        continue
      if not row.new:
        self.metrics.first.observe(time.monotonic() - self.queue.tickets[row].began)
      if reason_B[b] in REFUSED:
        self._fail(row, Failed(REFUSED[reason_B[b]]))
      else:
        told = scores if row.choice.logprobs_B else None
        self._add_token(row, _scored(tokens_B[b], told, b), reason_B[b])
      if reason_B[b] != h.RUNNING:
        self.batch.ended_B[b] = False  # the device knows

  def _add_token(self, row: Row, scored: Scored, reason: int) -> None:
    """Adds a row's next token, and sees whether it ends the row; `reason` is that of `History`."""
    if reason != h.END_ID:
      row.new.append(scored)
      self.metrics.new_tokens.inc()
      try:
        row.pieces.push(scored.token)
      except UserError as e:  # an id that the tokenizer has not
        return self._fail(row, Failed(str(e)))
      if row.pieces.stopped:
        reason = h.STOP_STRING
    if reason != h.RUNNING:
      why = h.REASONS[reason]
      return self._end(row, 'length' if why == 'context' else why)
    ticket = self.queue.tickets[row]
    if ticket.stream and (text := row.pieces.take()):
      self._undelivered.append((ticket, row.event(text)))

  def _collect_prompt_scores(self) -> None:
    """Looks at what the model says of prompts; ends rows that ask for no new id."""
    for prompt, n, scores in self._prompt_scores:
      scores = jax.device_get(scores)
      start = len(prompt.told) or 1
      prompt.told = prompt.told or [Scored(prompt.ids[0], None, None)]
      ids = prompt.ids[start : start + n]
      prompt.told += [_scored(token, scores, t) for t, token in enumerate(ids)]
    self._prompt_scores = []
    for row in filter(None, self.batch.rows):
      if row.admitted and not row.limit:
        self._end(row, 'length')

  def _end(self, row: Row, reason: str) -> None:
    row.reason = reason
    self._leave(row, row.event(row.pieces.take(final=True)))

  def _fail(self, row: Row, why: Failed) -> None:
    row.reason = why.kind
    self._leave(row, why)

  def _leave(self, row: Row, event: Event | Failed) -> None:
    """Frees a row's slot, or its place in the queue."""
    row.done = True
    if not row.admitted:
      row.prompt.leave()
    self._finished.labels(self.name, row.reason).inc()
    self._undelivered.append((self.queue.remove(row), event))
    self.batch.release(row)

  def _deliver(self) -> None:
    """Tells the event loops what has come."""
    by_loop: dict[asyncio.AbstractEventLoop, list] = {}
    for ticket, event in self._undelivered:
      by_loop.setdefault(ticket.loop, []).append((ticket, event))
    self._undelivered = []
    for loop, events in by_loop.items():
      try:
        loop.call_soon_threadsafe(requests.deliver, events)
      except RuntimeError:  # the loop has been closed: nobody waits
        pass


def _scored(token: int, scores: Scores | None, i: int) -> Scored:
  """A token, and what the i-th of some scores says of its place."""
  if scores is None or np.isnan(scores.logprobs[i]):
    return Scored(token, None, None)
  top = dict(zip(scores.top_ids[i].tolist(), scores.top_logprobs[i].tolist()))
  return Scored(token, float(scores.logprobs[i]), top)

"""Ends before the last step: by a signal, or as the held-out loss no longer falls."""

import math
import os
import signal
import sys
import threading

import jax
from jax.experimental import multihost_utils


class StopSignal:
  """Within this context the first SIGTERM or Ctrl-C asks the loop to stop, a second one kills; at a
  prompt or in a notebook (its stop button is a Ctrl-C) a second one is a KeyboardInterrupt.

  Of several processes one that is told to stop stops all, at the same step: JAX's preemption service
  has its own handler for SIGTERM, tells the others, and finds the next `due` that none has come to
  yet. A second Ctrl-C kills there too, a second SIGTERM does not.
  """

  def __init__(self):
    self.received: int | None = None
    self._several, self._asked, self._calls = jax.process_count() > 1, False, 0

  def due(self) -> bool:
    """Whether to stop. Every process must ask at the same points of its work: it counts them."""
    if self._several and self.received is None:
      self._calls += 1
      if multihost_utils.reached_preemption_sync_point(self._calls):
        self.received = signal.SIGTERM
        print(
          f'\nprocess {jax.process_index()}: one of the processes was told to stop: saving and '
          'leaving after this step',
          file=sys.stderr,
          flush=True,
        )
    return self.received is not None

  def _handle(self, number, _):
    if self._asked:
      if hasattr(sys, 'ps1'):  # somebody's session
        raise KeyboardInterrupt
      os._exit(128 + number)
    self._asked = True
    print(
      f'\n{signal.Signals(number).name}: saving and leaving after this step (once more to leave '
      'at once)',
      file=sys.stderr,
      flush=True,
    )
    if self._several:
      signal.raise_signal(signal.SIGTERM)  # for JAX's handler
    else:
      self.received = number

  def __enter__(self):
    self._before = {}
    if threading.current_thread() is threading.main_thread():
      for number in (signal.SIGINT,) if self._several else (signal.SIGTERM, signal.SIGINT):
        self._before[number] = signal.signal(number, self._handle)
    return self

  def __exit__(self, *_):
    for number, handler in self._before.items():
      signal.signal(number, handler)


class Patience:
  """Early stopping: watches the held-out loss."""

  def __init__(self, limit: int, lines: list[dict], step: int):
    """
    Args:
      limit: how many evaluations in a row may pass without a lower loss; 0: any number.
      lines: the record of the run so far.
      step: where it goes on; what was recorded beyond does not count.
    """
    self.limit, self._lowest, self._since = limit, math.inf, 0
    self.best: int | None = None
    self.losses: dict[int, float] = {}  # held-out, by step
    for line in lines:
      if 'eval/loss' in line and line['step'] <= step:
        loss = line['eval/loss']  # null where it was not finite
        self.add(line['step'], math.nan if loss is None else loss)

  def add(self, step: int, loss: float) -> None:
    self._since += 1
    self.losses[step] = loss
    if self.limit and loss < self._lowest:
      self.best, self._lowest, self._since = step, loss, 0

  @property
  def over(self) -> bool:
    """Whether it is time to stop."""
    return bool(self.limit) and self._since >= self.limit

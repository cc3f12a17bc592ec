"""Which host keeps the others waiting.

A step's time says nothing: the collectives end at the same moment for all. Nor does long waiting,
for those who wait are the others. What differs is the time that a host spends on its own, from the
moment it learns that a step is done until it hands over the next one, its wait for data among it. A
chip that is slow itself is not seen from there; a profile of all hosts shows it.
"""

import socket

import jax
import numpy as np
from jax.experimental import multihost_utils

BEYOND = 0.1  # of the median host's time: from here on it is said
MATTERS = 0.01  # of a step's time: what a host spends below that hides behind the device's work
NAME_BYTES = 64


class Stragglers:
  """Compares the hosts now and then. All processes call `add` at the same steps."""

  def __init__(self, every: int):
    """
    Args:
      every: steps between comparisons; 0: never. A process alone never compares.
    """
    self.every = every if jax.process_count() > 1 else 0
    self._host = self._step = 0.0
    self._count = 0
    if self.every:
      name = np.zeros(NAME_BYTES, np.uint8)
      text = np.frombuffer(socket.gethostname().encode()[:NAME_BYTES], np.uint8)
      name[: len(text)] = text
      self.names = [
        bytes(row).rstrip(b'\0').decode(errors='replace')
        for row in np.asarray(multihost_utils.process_allgather(name))
      ]

  def add(self, step: int, host_seconds: float, step_seconds: float) -> tuple[dict, str]:
    """Adds a step. Returns keys for its line and a message, at each `every`-th step; else nothing."""
    if not self.every:
      return {}, ''
    self._host += host_seconds
    self._step += step_seconds
    self._count += 1
    if step % self.every:
      return {}, ''
    mine = np.float32(self._host / self._count)
    hosts, whole = np.asarray(multihost_utils.process_allgather(mine)), self._step / self._count
    self._host = self._step = 0.0
    self._count = 0
    keys = {
      'perf/host_seconds_max': float(hosts.max()),
      'perf/host_seconds_median': float(np.median(hosts)),
    }
    return keys, judge(hosts, self.names, whole)


def judge(hosts: np.ndarray, names: list[str], step_seconds: float) -> str:
  """Names the slowest host, if it is slow.

  Args:
    hosts: seconds that each spends on its own, a step.
    names: of the hosts.
    step_seconds: of a whole step.
  """
  slowest, median = int(hosts.argmax()), float(np.median(hosts))
  excess = float(hosts[slowest]) - median
  if excess <= BEYOND * median or excess <= MATTERS * step_seconds:
    return ''
  return (
    f'slowest host {slowest} ({names[slowest]}): {hosts[slowest]:.3g} s a step on its own, '
    f'median {median:.3g} s'
  )

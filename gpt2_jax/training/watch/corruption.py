"""Silent data corruption: a chip that computes wrong, or forgets, without a word.

A step is made twice from the same state and batch, by the same program, and both results are compared
by their checksums (`checksums`), on each device; so are copies of the same data on several devices.
Who wants neither has the step itself. Making it twice needs bitwise repeatability, which CPU and TPU
have, and a GPU with `config.deterministic`. That computing again finds such errors, and that they
happen: Dixit et al. 2021, arXiv:2102.11245.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gpt2_jax.core.errors import UserError
from gpt2_jax.parallel.checksums import checksums

FOLDER = 'corruption'
Found = Sequence[tuple[str, Sequence[Any]]]


class VerifiedStep:
  """A training step of which some are made twice, and after some of which replicas are compared."""

  def __init__(
    self,
    step: Callable,
    *,
    start: int,
    every: int,
    replicas_every: int,
    workdir: Path,
    last_good: Callable[[], int | None],
  ):
    """
    Args:
      step: `(state, batch) -> state, metrics`; may donate the state.
      start: updates done already.
      every: steps from one that is made twice to the next; 0: none is.
      replicas_every: steps from one comparison of replicas to the next; 0: they aren't compared.
      workdir: where what differs is left, in `corruption`.
      last_good: returns the step of the newest checkpoint.
    """
    self._step, self.number = step, start
    self._every, self._replicas_every = every, replicas_every
    self._workdir, self._last_good = workdir, last_good

  def __call__(self, state: Any, batch: Any) -> tuple[Any, dict]:
    """Makes the next step.

    Raises:
      UserError: two results of it, or two replicas, differ; names step, arrays and devices.
    """
    self.number += 1
    due = lambda every: every > 0 and self.number % every == 0
    if due(self._every):
      before = jax.tree.map(jnp.copy, state)
      first = self._step(state, batch)
      second = self._step(before, batch)
      sums = [checksums(_named(*result)) for result in (first, second)]
      if found := sums[0].differing(sums[1]):
        self._stop('was made twice, and differs', found, first, second)
    else:
      first = self._step(state, batch)
    if due(self._replicas_every):
      if found := checksums(_named(*first)).torn():
        self._stop('has replicas that differ', found, first)
    return first

  def _stop(self, why: str, found: Found, *results: tuple[Any, dict]) -> None:
    file = _left(self._workdir, self.number, found, results)
    lines = [f'  {name} on {_devices(on)}' for name, on in found]
    if len(lines) > 12:
      lines[12:] = [f'  … and {len(lines) - 12} more']
    good = self._last_good()
    raise UserError(
      f'step {self.number} {why}:\n' + '\n'.join(lines) + '\nA device computes or stores wrong. '
      f'Nothing of the step is saved but what differs, in {file}. The same command goes on from '
      + (f'the checkpoint of step {good}' if good else 'the beginning')
      + '; leave out a device that is named twice.'
    )


def _named(state: Any, metrics: dict) -> dict:
  return {**state.items(), 'step': state.step, 'metrics': metrics}


def _devices(devices: Sequence[Any]) -> str:
  names = [
    f'{device.device_kind} {device.id} of process {device.process_index}' for device in devices
  ]
  return ', '.join(names[:4]) + (f' and {len(names) - 4} more' if len(names) > 4 else '')


def _left(workdir: Path, step: int, found: Found, results: Sequence[tuple[Any, dict]]) -> Path:
  """Writes what this process holds of the arrays that differ, of each result, to look at."""
  file = workdir / FOLDER / f'step-{step}-process-{jax.process_index()}.npz'
  file.parent.mkdir(parents=True, exist_ok=True)
  arrays = {}
  for number, result in enumerate(results, 1):
    leaves = jax.tree.leaves_with_path(_named(*result))
    for path, leaf in leaves:
      name = jax.tree_util.keystr(path, simple=True, separator='.')
      for shard in leaf.addressable_shards if name in dict(found) else ():
        x = np.asarray(shard.data)
        bits = x.view(f'uint{8 * x.dtype.itemsize}') if x.dtype.kind == 'V' else x  # bfloat16
        arrays[f'{name} of device {shard.device.id}, result {number}'] = bits
  np.savez(file, **arrays)
  return file

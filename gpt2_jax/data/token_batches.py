"""Batches from a token store.

Training: the split's tokens are cut into windows of T + 1 at stride T (a window's last token is the
next one's first, so that each token is predicted once). Grain shuffles the windows anew in each
epoch. A batch is the next G rows of that endless order: a function of the seed and of the rows seen
before it, whatever the number of processes. With batches of one size, s·G rows were seen at step s; a
run that goes on with another size neither repeats a row of the epoch nor leaves one out.

Evaluation: all windows of the held-out split in order, each token counted once.
"""

from collections.abc import Iterator, Sequence

import grain
import jax
import numpy as np
from jax.sharding import NamedSharding

from gpt2_jax.core import seeds
from gpt2_jax.core.errors import UserError
from gpt2_jax.data.shards import Split, bad_token
from gpt2_jax.parallel import sharding as sharding_lib

AHEAD_BYTES = 2**28  # of rows from a bucket that are read ahead of their use


class Order:
  """An endless order of rows, shuffled anew in each epoch, and where the batches lie in it."""

  def __init__(self, rows: int, G: int, seed: int):
    self.G, self._first = G, 0
    self._order = grain.MapDataset.range(rows).seed(seeds.check('seed', seed)).shuffle().repeat()

  def go_on(self, step: int, seen: int) -> None:
    """Lets the batch of `step`, and those after it, follow on `seen` rows."""
    self._first = seen - step * self.G

  def number(self, step: int, row: int) -> int:
    """Returns which row of the split stands at `row` of the batch of `step`."""
    return int(self._order[self._first + step * self.G + row])  # pyright: ignore[reportArgumentType]


class TokenBatches(Order):
  """Batches of G rows of T + 1 tokens, as a function of (seed, step, rows seen before)."""

  def __init__(self, split: Split, T: int, G: int, seed: int, vocab_size: int):
    """
    Args:
      split: of a token store.
      T: tokens a row, without its last target.
      G: rows of a global batch.
      seed: of the order.
      vocab_size: all ids must lie below it, which is checked as they are read.

    Raises:
      UserError: the split is shorter than one window.
    """
    self.split, self.T, self.vocab_size = split, T, vocab_size
    self.windows = (len(split) - 1) // T
    if self.windows < 1:
      raise UserError(
        f'the split {split.name!r} has {len(split):,} tokens, too few for a window of '
        f'{T} + 1: shorten config.data.sequence_length, or add text.'
      )
    super().__init__(self.windows, G, seed)

  @property
  def steps_per_epoch(self) -> float:
    return self.windows / self.G

  def _start(self, step: int, row: int) -> int:
    return self.number(step, row) * self.T

  def rows(self, step: int, rows: Sequence[int]) -> np.ndarray:
    """Returns some rows of the batch of `step`, T + 1 tokens each."""
    starts = [self._start(step, row) for row in rows]
    tokens = self.split.rows(starts, self.T + 1)
    if tokens.max() >= self.vocab_size:
      start, largest = next(
        (start, row.max()) for start, row in zip(starts, tokens) if row.max() >= self.vocab_size
      )
      raise bad_token(
        int(largest),
        f'the split {self.split.name!r} of the data (tokens {start} to {start + self.T})',
        self.vocab_size,
      )
    return tokens

  def row(self, step: int, row: int) -> np.ndarray:
    """Returns row `row` of the batch of `step`: T + 1 tokens."""
    return self.rows(step, [row])[0]

  def documents(self, step: int) -> list[list[str]]:
    """Returns the names of the documents in each row of a batch."""
    starts = [self._start(step, row) for row in range(self.G)]
    return [self.split.documents_in(start, start + self.T + 1) for start in starts]

  def batches(self, start: int, stop: int, A: int, sharding: NamedSharding) -> Iterator[jax.Array]:
    """Yields the batches of steps [start, stop) as global arrays [A, G/A, T + 1].

    Threads read rows ahead; this process reads the rows of its own devices only.

    Args:
      start, stop: steps.
      A: number of micro-batches.
      sharding: of the arrays; splits axis 1.
    """
    shape = (A, self.G // A, self.T + 1)
    rows = sharding_lib.local_rows(shape[:2], sharding)
    if stop <= start:
      return
    steps = grain.MapDataset.range(stop - start).map(lambda step: self.rows(start + step, rows))
    ahead = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)
    if self.split.is_far:  # so that a request may be slow, or be made again and again
      buffered = min(max(AHEAD_BYTES // (4 * len(rows) * (self.T + 1)), 4), 64)
      ahead = grain.ReadOptions(num_threads=min(16, buffered), prefetch_buffer_size=buffered)
    self.split.at_random.expect((stop - start) * len(rows), 2 * (self.T + 1))
    try:
      for local in steps.to_iter_dataset(ahead):
        yield sharding_lib.place(dict(zip(rows, local)), shape, sharding)
    finally:
      self.split.at_random.stop()

  @staticmethod
  def eval_batches(
    split: Split, T: int, R: int, sharding: NamedSharding
  ) -> Iterator[tuple[jax.Array, jax.Array]]:
    """Yields all of a split: tokens [1, R, T + 1], weights [1, R, T], 1 for targets, else 0."""
    rows = sharding_lib.local_rows((1, R), sharding)
    windows = -(-(len(split) - 1) // T)
    for first in range(0, windows, R):
      tokens = {row: np.zeros(T + 1, np.int32) for row in rows}
      weights = {row: np.zeros(T, np.float32) for row in rows}
      for row in rows:
        start = (first + row) * T
        if start < len(split) - 1:
          window = split.read(start, min(start + T + 1, len(split)))
          tokens[row][: len(window)] = window
          weights[row][: len(window) - 1] = 1
      yield (
        sharding_lib.place(tokens, (1, R, T + 1), sharding),
        sharding_lib.place(weights, (1, R, T), sharding),
      )

  @staticmethod
  def eval_size(split: Split, T: int, R: int) -> int:
    """Returns the number of batches of `eval_batches`."""
    return -(-(len(split) - 1) // (T * R))

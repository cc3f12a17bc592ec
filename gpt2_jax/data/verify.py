"""The shards of a token store against the SHA-256 in its manifest.

`open_store` compares sizes alone: a store may have 100 GB. The content is read once, beside the first
steps of a training (`Background`) or before something is evaluated on it (`verify`), and remembered
(see `verified`). nanoGPT's and llm.c's files have no hash: they are taken as they are. Shards in a
bucket are checked as they are copied from there (`bucket_shards.py`); beside that only if all is read
again.
"""

import contextlib
import threading
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from gpt2_jax.core.buckets import is_bucket
from gpt2_jax.core.errors import UserError
from gpt2_jax.core.progress import track
from gpt2_jax.core.verified import Verified
from gpt2_jax.data import bucket_shards, shard_files
from gpt2_jax.data.shards import Shard

SHOWN_BYTES = 2**30  # the reading of less is over before one wonders


def _shards(data: Any, splits: Collection[str] | None = None) -> list[Shard]:
  """Returns the shards of a store that have a hash; none of labelled texts, which are no store."""
  return [
    shard
    for name, split in data.splits.items()
    if splits is None or name in splits
    for shard in getattr(split, 'shards', ())
    if shard.sha256
  ]


def _check(shards: Iterable[Shard], advance=lambda amount: None, again: bool = False) -> None:
  for shard in shards:
    assert shard.sha256 and shard.index
    if is_bucket(shard.path):
      if again:
        bucket_shards.check(shard, advance)
      continue
    try:
      whole = Verified(Path(shard.path.parent)).check(
        (shard.path.name, shard.index.name), shard.sha256, advance, again
      )
      why = 'has other content than was written (SHA-256)'
    except OSError as e:
      whole, why = False, f"can't be read ({e})"
    if not whole:
      raise shard_files.damaged(shard.path, f'(with {shard.index.name}) {why}')


def verify(data: Any, splits: Collection[str] | None = None, again: bool = False) -> int:
  """Checks the content of a store's shards. Returns the number of those that have a hash.

  Args:
    data: an open store.
    splits: their names; default: all.
    again: whether what was found whole before is read once more.

  Raises:
    UserError: names the file that is damaged.
  """
  shards = _shards(data, splits)
  size = sum(
    shard.size + 8 * shard.documents for shard in shards if again or not is_bucket(shard.path)
  )
  with (
    track(f'checking {data.path}', size, 'bytes')
    if size > SHOWN_BYTES
    else contextlib.nullcontext(lambda amount: None)
  ) as advance:
    _check(shards, advance, again)
  return len(shards)


class Background:
  """Checks the content of a store in a thread, beside the training on it.

  A run asks with each step (`check`), and waits before it saves anything (`wait`): no checkpoint is
  made of steps on data that are not known to be whole. Of several processes each begins with another
  shard and passes over what the others have remembered meanwhile.
  """

  def __init__(self, data: Any, process: int = 0, processes: int = 1):
    """
    Args:
      data: an open store, or labelled texts, of which nothing is to be checked.
      process, processes: which of how many this is.
    """
    shards = _shards(data)
    first = len(shards) * process // processes
    self._shards = shards[first:] + shards[:first]
    self._error: Exception | None = None
    self._thread = threading.Thread(target=self._run, name='verify', daemon=True)
    self._thread.start()

  def _run(self) -> None:
    try:
      _check(self._shards)
    except Exception as e:  # raised again where the run asks
      self._error = e

  def check(self) -> None:
    """Raises a UserError if a file was found to be damaged."""
    if self._error is not None:
      raise UserError(f'{self._error} Of this start nothing was saved.') from self._error

  def wait(self) -> None:
    """Waits until all is checked; raises as `check` does."""
    self._thread.join()
    self.check()

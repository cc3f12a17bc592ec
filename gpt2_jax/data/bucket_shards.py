"""Shards that lie in a bucket: rows by ranges of bytes, and whole shards where those are worth it.

A row that is needed before its shard is here is fetched by itself, many at a time and ahead of use.
Shards are copied to this disk beside the training (`core/bucket_copies.py` says how many there is
room for), each compared with its SHA-256 before it is read. How a row came changes no byte of it.
"""

import concurrent.futures
import functools
import hashlib
import os
import sys
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path

from gpt2_jax.core import bucket_copies, buckets, verified
from gpt2_jax.core.errors import UserError
from gpt2_jax.data import shard_files

REQUEST_BYTES = 2**18  # that come in one piece in the time that a request of its own takes
FETCHERS = 4  # shards that are copied at a time, beside rows
SMALL_BYTES = 2**30  # a split that is read in order is copied at once up to this size


class BucketShards:
  """The files of a split; see `shard_files.Files` for those of a disk."""

  def __init__(self, shards: Sequence, random: bool = True):
    """
    Args:
      shards: `shards.Shard`s, in a bucket.
      random: whether they are read at random; if not, whole shards are copied before they are read.
    """
    self._shards, self._random = shards, random
    self._files = shard_files.Files(random)
    self._copies: dict[object, Path] = {}  # by the path of the shard
    self._keys = frozenset(shard.key for shard in shards)
    self._error: Exception | None = None
    self._stopped = threading.Event()

  def __reduce__(self):
    return BucketShards, (self._shards, self._random)

  def read(self, extents: Iterable[tuple]) -> None:
    """Fills extents: (shard, offset in its file, where the bytes go).

    Raises:
      UserError: the bucket can't be reached, or holds something else than it should.
    """
    extents = list(extents)
    if self._error is not None:
      raise self._error
    if not self._random:
      self._copy_whole([shard for shard, *_ in extents])
    here = [extent for extent in extents if extent[0].path in self._copies]
    far = [extent for extent in extents if extent[0].path not in self._copies]
    try:
      self._files.read((self._copies[shard.path], offset, out) for shard, offset, out in here)
    except (OSError, KeyError):  # a copy went, to make room for another run's
      self._copies = {path: copy for path, copy in self._copies.copy().items() if copy.exists()}
      far = extents
    self._fetch_ranges(far)

  @functools.cached_property
  def _there(self):
    return buckets.filesystem(self._shards[0].path)  # one for all threads, and so its connections

  def _fetch_ranges(self, extents: Sequence[tuple]) -> None:
    if not extents:
      return
    paths = [os.fspath(shard.path) for shard, *_ in extents]
    starts = [offset for _, offset, _ in extents]
    stops = [offset + len(out) for _, offset, out in extents]
    with buckets.reading(self._shards[0].path.parent):
      contents = self._there.cat_ranges(paths, starts, stops, on_error='raise')
    for (shard, offset, out), content in zip(extents, contents):
      if len(content) != len(out):
        raise shard_files.damaged(shard.path, f'has fewer than {offset + len(out):,} bytes')
      out[:] = content

  def expect(self, rows: int, size: int) -> None:
    """Begins to copy the shards, where that is cheaper than so many rows of `size` bytes each."""
    whole = sum(shard.size for shard in self._shards)
    copy = self._copy if rows * (size + REQUEST_BYTES) > whole else self._find
    todo, lock, stopped = iter(self._shards), threading.Lock(), threading.Event()

    def work() -> None:
      while not stopped.is_set():
        with lock:
          shard = next(todo, None)
        if shard is None:
          return
        if not copy(shard):
          stopped.set()

    self._stopped = stopped
    for _ in range(FETCHERS):
      threading.Thread(target=work, name='shards', daemon=True).start()

  def stop(self) -> None:
    """Lets `expect` begin no further copy."""
    self._stopped.set()

  def _find(self, shard) -> bool:
    copy = bucket_copies.find(shard.key, shard.path.name, shard.size)
    if copy is not None:
      self._copies[shard.path] = copy
    return True

  def _copy_whole(self, shards: Sequence) -> None:
    if sum(shard.size for shard in self._shards) <= SMALL_BYTES:
      shards = self._shards
    missing = [shard for shard in dict.fromkeys(shards) if shard.path not in self._copies]
    if missing and not self._stopped.is_set():
      with concurrent.futures.ThreadPoolExecutor(buckets.THREADS) as pool:
        if not all(pool.map(self._copy, missing)):
          self._stopped.set()  # there is no room: what is not here is read by ranges
    if self._error is not None:
      raise self._error

  def _copy(self, shard) -> bool:
    """Copies a shard, unless it is here; False if there is no room, or an error."""
    try:
      copy = bucket_copies.fetch(
        shard.path, shard.key, shard.size, lambda path: self._check(shard, path), self._keys
      )
    except OSError as e:  # the bucket's, or this disk's
      print(f'{shard.path} is not copied to this disk: {e}', file=sys.stderr, flush=True)
      return False
    except UserError as e:  # it is not what was written
      self._error = e
      return False
    if copy is not None:
      self._copies[shard.path] = copy
    return copy is not None

  def _check(self, shard, copy: Path) -> None:
    if shard.sha256 is not None and verified.digest([copy, self.index(shard)]) != shard.sha256:
      raise not_as_written(shard)

  @staticmethod
  def index(shard) -> Path:
    """Returns a local copy of the file that says where a shard's documents begin."""
    copy = bucket_copies.fetch(shard.index, shard.key, 8 * shard.documents, must=True)
    assert copy is not None
    return copy


def not_as_written(shard) -> UserError:
  """Returns the error for a shard with another content than its manifest says."""
  return shard_files.damaged(
    shard.path, f'(with {shard.index.name}) has other content than was written (SHA-256)'
  )


def check(shard, advance=lambda amount: None) -> None:
  """Reads a shard in its bucket through, and raises a UserError if it is not as it was written."""
  found = hashlib.sha256()
  with buckets.reading(shard.path):
    for path, size in ((shard.path, shard.size), (shard.index, 8 * shard.documents)):
      for start in range(0, size, buckets.BLOCK_BYTES):
        stop = min(start + buckets.BLOCK_BYTES, size)
        block = buckets.filesystem(path).cat_file(os.fspath(path), start=start, end=stop)
        found.update(block)
        advance(len(block))
  if found.hexdigest() != shard.sha256:
    raise not_as_written(shard)

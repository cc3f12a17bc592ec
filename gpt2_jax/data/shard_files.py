"""Many large files that are read in pieces, at random or in order.

A memmap is read ahead by the system, at random a hundred times what a row needs, and a file that is
cut short under it ends the process. Here the system is told which pieces are wanted; it reads them at
the same time, and nothing else.
"""

import functools
import io
import os
from collections.abc import Iterable
from pathlib import Path

from gpt2_jax.core.errors import UserError

OPEN_FILES = 256  # at a time; a store of 10^12 tokens has thousands
AT_A_TIME = 32  # pieces that the disk is asked for before the first one is waited for
NO_WAIT = getattr(os, 'RWF_NOWAIT', 0)

Extent = tuple[Path, int, memoryview]  # of a file: the bytes from an offset on, and where they go


class CutShort(OSError):
  """A file ends before it should."""


class _Open(io.FileIO):
  """A file that is closed when nobody holds it any more, and not before."""

  def __del__(self):
    self.close()


def _open(advise: bool, path: Path) -> _Open:
  file = _Open(path)
  if advise:
    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
  return file


class Files:
  """Files that are opened when they are first read; the least recently read are closed.

  Threads may share it, and processes that are forked: nothing is locked, and no place in a file kept.
  """

  def __init__(self, random: bool):
    """
    Args:
      random: whether they are read at random; if not, the system reads ahead.
    """
    self._random = random
    self._advise = random and hasattr(os, 'posix_fadvise')  # macOS has none
    self._opened = functools.lru_cache(OPEN_FILES)(functools.partial(_open, self._advise))

  def __reduce__(self):
    return Files, (self._random,)

  def read(self, extents: Iterable[Extent]) -> None:
    """Fills all extents.

    Raises:
      OSError: a file can't be read; `CutShort`: or has fewer bytes.
    """
    cold = []
    for path, offset, out in extents:
      file = self._opened(path)
      if self._advise and _at_hand(file.fileno(), offset, out):
        continue
      cold.append((file, offset, out))
      if len(cold) == AT_A_TIME:
        self._fetch(cold)
        cold = []
    self._fetch(cold)

  def _fetch(self, extents: list[tuple[_Open, int, memoryview]]) -> None:
    """Fills extents from the disk."""
    if self._advise:
      for file, offset, out in extents:
        os.posix_fadvise(file.fileno(), offset, len(out), os.POSIX_FADV_WILLNEED)
    for file, offset, out in extents:
      done = 0
      while done < len(out):
        got = os.preadv(file.fileno(), [out[done:]], offset + done)
        if not got:
          size = os.fstat(file.fileno()).st_size
          raise CutShort(0, f'has {size:,} bytes, too few', os.fspath(file.name))
        done += got


def _at_hand(fd: int, offset: int, out: memoryview) -> bool:
  """Whether the system had all bytes in memory, which are filled in then."""
  try:
    return os.preadv(fd, [out], offset, NO_WAIT) == len(out)
  except OSError:  # it would have to wait, or can't say
    return False


def damaged(path: os.PathLike, why: str) -> UserError:
  """Returns the error for a file of a token store that is not as it was written."""
  folder = os.fspath(path).rpartition('/')[0]
  return UserError(
    f'{path} {why}: the token store is damaged. Remove the folder {folder} and prepare it again '
    '(or restore the file).'
  )


def unreadable(path: os.PathLike, e: OSError) -> UserError:
  """Returns `damaged`, for what the system said."""
  missing, short = isinstance(e, FileNotFoundError), isinstance(e, CutShort)
  return damaged(
    path, 'is missing' if missing else str(e.strerror) if short else f"can't be read ({e})"
  )

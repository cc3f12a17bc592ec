"""Files with a SHA-256 that is known: each is read through and compared once, which is remembered.

What is remembered is size and time of change, in `verified.json` beside the files or, where that
can't be written, in ~/.cache/gpt2_jax/verified ($XDG_CACHE_HOME for ~/.cache).
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from gpt2_jax.core.errors import UserError
from gpt2_jax.core.files import read_json, write_whole

FILE = 'verified.json'
CHUNK = 2**20


def cache() -> Path:
  """Returns the folder in which this program keeps files for a user."""
  return Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache') / 'gpt2_jax'


def digest(
  paths: Sequence[Path],
  advance: Callable[[int], None] = lambda amount: None,
  begin: bytes = b'',
  kind: str = 'sha256',
) -> str:
  """Returns the hash, in hex, of the content of some files, one after the other.

  Args:
    paths: of them.
    advance: is told of bytes as they are read.
    begin: bytes before the first file's.
    kind: of the hash, as hashlib names it.
  """
  found = hashlib.new(kind, begin, usedforsecurity=False)
  for path in paths:
    with open(path, 'rb', buffering=0) as file:
      while part := file.read(CHUNK):
        found.update(part)
        advance(len(part))
  return found.hexdigest()


class Verified:
  """The groups of files in a folder that were found whole."""

  def __init__(self, folder: Path, beside: bool = True):
    """
    Args:
      folder: of the files.
      beside: whether it may be remembered there, if it can.
    """
    named = hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:32]
    elsewhere = cache() / 'verified' / f'{named}.json'
    self._folder = folder
    self._places = [folder / FILE, elsewhere] if beside else [elsewhere]

  def _read(self) -> dict[str, list]:
    found = {}
    for place in self._places:
      with contextlib.suppress(UserError):  # there is none, or a broken one: all is checked anew
        found |= read_json(place, {str: list})
    return found

  def _state(self, paths: Sequence[Path], sha256: str) -> list:
    stats = [path.stat() for path in paths]
    return [sha256, *([stat.st_size, stat.st_mtime_ns] for stat in stats)]

  def check(
    self, names: Sequence[str], sha256: str, advance=lambda amount: None, again: bool = False
  ) -> bool:
    """Whether files have the content that they should have, as remembered or by reading them.

    Args:
      names: of the files in the folder, whose bytes in a row have this SHA-256.
      sha256: in hex.
      advance: is told of bytes as they are read.
      again: whether they are read even if it is known.

    Raises:
      OSError: they can't be read.
    """
    key, paths = ' '.join(names), [self._folder / name for name in names]
    state = self._state(paths, sha256)  # before they are read: what changes meanwhile is read again
    if not again and self._read().get(key) == state:
      advance(sum(size for size, _ in state[1:]))
      return True
    if digest(paths, advance) != sha256:
      return False
    for place in self._places:
      with contextlib.suppress(OSError):
        place.parent.mkdir(parents=True, exist_ok=True)
        write_whole(place, json.dumps(self._read() | {key: state}, indent=1) + '\n')
        break
    return True

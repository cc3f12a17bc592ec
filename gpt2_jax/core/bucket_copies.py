"""Copies of single files of buckets on this disk, up to a limit: the least recently used go.

They lie in ~/.cache/gpt2_jax/buckets/files ($XDG_CACHE_HOME for ~/.cache). Processes share them.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

import filelock

from gpt2_jax.core import buckets
from gpt2_jax.core.buckets import AnyPath
from gpt2_jax.core.errors import UserError, brief

LIMIT = 'GPT2_JAX_CACHE_GB'
PARTIAL_S = 86_400  # after which what was being fetched belongs to a process that is gone


def home() -> Path:
  return buckets.cache() / 'files'


def limit(used: int) -> int:
  """Returns how many bytes may lie there: $GPT2_JAX_CACHE_GB, or half of what the disk can hold.

  Args:
    used: bytes that lie there.
  """
  said = os.environ.get(LIMIT)
  if said is None:
    return (shutil.disk_usage(home()).free + used) // 2
  with contextlib.suppress(ValueError):
    if 0 <= float(said) < 1e9:
      return int(float(said) * 1e9)
  raise UserError(f'{LIMIT}={brief(said)} must be how many GB of copies may lie in {home()}.')


def _place(key: str, name: str) -> Path:
  return home() / key[:32] / name


def find(key: str, name: str, size: int) -> Path | None:
  """Returns the copy of a file, which is used thereby; None if there is none.

  Args:
    key: a hash that names the content.
    name: of the file.
    size: in bytes.
  """
  path = _place(key, name)
  with contextlib.suppress(OSError):
    status = path.stat()
    if status.st_size == size:
      os.utime(path, (time.time(), status.st_mtime))
      return path
  return None


def fetch(
  path: AnyPath,
  key: str,
  size: int,
  check: Callable[[Path], None] = lambda copy: None,
  keep: Collection[str] = (),
  must: bool = False,
) -> Path | None:
  """Returns the copy of a file, which is fetched if it is not there.

  Args:
    path: in a bucket.
    key: a hash that names the content.
    size: in bytes.
    check: raises where the copy is not what it should be.
    keep: keys of the files that do not go for it.
    must: whether it is fetched where there is no room within the limit.

  Returns:
    None if there is no room.

  Raises:
    OSError: it can't be fetched, or the disk is full.
  """
  target = _place(key, path.name)
  target.parent.mkdir(parents=True, exist_ok=True)
  named = hashlib.sha256(path.name.encode()).hexdigest()[:16]
  with filelock.FileLock(target.parent / f'.{named}.lock'):
    if found := find(key, path.name, size):
      return found
    if not _make_room(size, {k[:32] for k in keep}) and not must:
      return None
    new = target.with_name(f'{target.name}.new')
    try:
      buckets.fetch_file(path, new)
      check(new)
      new.replace(target)
    finally:
      new.unlink(missing_ok=True)
  return target


def _make_room(size: int, keep: Collection[str]) -> bool:
  """Lets copies go, the least recently used first; whether `size` more bytes fit then."""
  files = []
  for path in (entry.path for folder in os.scandir(home()) for entry in os.scandir(folder)):
    with contextlib.suppress(FileNotFoundError):
      status = os.stat(path)
      files.append((status.st_atime, Path(path), status.st_size))
  used = sum(bytes_ for *_, bytes_ in files)
  most = limit(used)
  for used_at, path, bytes_ in sorted(files):
    if used + size <= most:
      break
    young = path.suffix in ('.part', '.new') and time.time() - used_at < PARTIAL_S
    if bytes_ and path.parent.name not in keep and not young and _drop(path):
      used -= bytes_
  return used + size <= most


def _drop(path: Path) -> bool:
  """Removes a copy; False if somebody holds it (see `held`)."""
  try:
    with open(path, 'rb') as file:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
      path.unlink()
  except OSError:
    return not path.exists()
  return True


@contextlib.contextmanager
def held(path: AnyPath) -> Iterator[Path]:
  """Yields a copy of a file in a bucket, which stays there as long.

  Raises:
    OSError: it can't be fetched.
  """
  about = buckets.filesystem(path).info(os.fspath(path))
  named = json.dumps([os.fspath(path), *buckets.content(about)])
  key = hashlib.sha256(named.encode()).hexdigest()
  while True:
    copy = fetch(path, key, int(about['size']), must=True)
    assert copy is not None
    with contextlib.ExitStack() as open_files:
      try:
        file = open_files.enter_context(open(copy, 'rb'))
      except FileNotFoundError:
        continue  # it went just now
      fcntl.flock(file, fcntl.LOCK_SH)
      if os.fstat(file.fileno()).st_nlink:
        yield copy
        return

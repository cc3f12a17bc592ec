"""One run at a time holds a workdir: two that write into one spoil both."""

import contextlib
import errno
import fcntl
import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from gpt2_jax.core.buckets import place
from gpt2_jax.core.errors import UserError, saving
from gpt2_jax.core.files import parse_json, whole_number
from gpt2_jax.parallel.sharding import without_mesh
from gpt2_jax.training.lease import Lease

FILE = '.lock'  # of a workdir; what it says is of the run that holds it, or held it last
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
_held: set[int] = set()  # open files


def _let_go() -> None:
  """Closes the lock's file in a process that is forked off: the lock must end with the run itself."""
  for fd in _held:
    os.close(fd)
  _held.clear()


os.register_at_fork(after_in_child=_let_go)


def _holder(fd: int) -> str:
  try:
    said = parse_json(os.pread(fd, 2**16, 0), {'host': str, 'pid': whole_number, 'since': str})
  except (OSError, ValueError):  # it has not said so yet
    return 'another process'
  return f'process {said["pid"]} on {said["host"][:100]}, since {said["since"][:40]}'


def _take(workdir: Path) -> int:
  """Takes the lock of a workdir. Returns its open file.

  The system's lock (flock): it goes with the process, however it ends. `filelock` empties the file
  before it has the lock, and its lock would live on in processes that are forked off.
  """
  with saving('the workdir', workdir):
    workdir.mkdir(parents=True, exist_ok=True)
    fd = os.open(workdir / FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
  try:
    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    held_by = _holder(fd)
    os.close(fd)
    raise UserError(
      f'{workdir} is held by a run that goes on ({held_by}): wait for its end or stop '
      'it, or name another --workdir.'
    ) from None
  except OSError as e:
    if e.errno not in NO_LOCKS:
      os.close(fd)
      raise
    print(
      f'{workdir}: nothing can be locked there ({e.strerror}): see to it that no other run uses it',
      file=sys.stderr,
      flush=True,
    )
  if not os.fstat(fd).st_nlink:  # a run that came to nothing has just removed it
    os.close(fd)
    return _take(workdir)
  said = {
    'host': socket.gethostname(),
    'pid': os.getpid(),
    'since': time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime()),
  }
  with saving('the workdir', workdir / FILE):
    os.ftruncate(fd, 0)
    os.pwrite(fd, (json.dumps(said) + '\n').encode(), 0)
  _held.add(fd)
  return fd


def _leave(workdir: Path, fd: int) -> None:
  """Lets go of a workdir; one in which nothing but the lock is left is as if it had never been."""
  with contextlib.suppress(OSError):  # it may be gone, and what is said of that is another's
    if os.listdir(workdir) == [FILE]:
      (workdir / FILE).unlink()
      workdir.rmdir()
  _held.remove(fd)
  os.close(fd)


@contextlib.contextmanager
def held(workdir: str | os.PathLike) -> Iterator[Lease | None]:
  """Makes a workdir and holds it as long as the context lasts; of several processes, process 0 does.

  Yields the lease of one in a bucket, on process 0.

  Who only reads needs no lock.

  Raises:
    UserError: another run holds it, or it can't be written to; on all processes.
  """
  workdir, mine, error = place(workdir, '--workdir'), None, None
  if jax.process_index() == 0:
    try:
      mine = _take(workdir) if isinstance(workdir, Path) else Lease(workdir)
    except UserError as e:
      error = e
  try:
    if jax.process_count() > 1:
      with without_mesh():
        refused = multihost_utils.broadcast_one_to_all(np.array(error is not None))
      if refused and error is None:
        error = UserError(f"process 0 can't have the workdir {workdir}: see what it says.")
    if error is not None:
      raise error
    yield mine if isinstance(mine, Lease) else None
  finally:
    if isinstance(mine, Lease):
      mine.leave()
    elif isinstance(workdir, Path) and mine in _held:
      _leave(workdir, mine)

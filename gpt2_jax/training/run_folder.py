"""Where a run lies: on a disk, or in a bucket with a copy of its record on this machine.

A bucket's files can't be appended to. So the record of a run (all but its checkpoints) is written in
a folder of this machine, and what has changed is copied into the bucket every half minute and before
a checkpoint is committed: a run that goes on anywhere finds a line of every step that its checkpoint
has seen. Checkpoints go straight into the bucket, from every host.
"""

import contextlib
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import jax

from gpt2_jax.checkpoints.workdir import in_record
from gpt2_jax.core import buckets
from gpt2_jax.core.buckets import AnyPath
from gpt2_jax.core.errors import UserError
from gpt2_jax.training import lease, workdir_lock

COPY_EVERY_S = 30.0
COPY_SHARE = 0.05  # of the time at most


class RunFolder:
  """Where a run lies.

  Attributes:
    place: as its user names it; the checkpoints lie there.
    record: the folder of this machine that all else is written in; on a disk the same.
  """

  def __init__(self, place: AnyPath, record: Path):
    self.place, self.record = place, record

  def keep(self) -> None:
    """Copies what has changed in the record to where the run lies; returns when it is there."""

  def check(self) -> None:
    """Raises a UserError if the place is no longer this run's."""


class BucketFolder(RunFolder):
  """A run in a bucket. As a context it copies the record now and then, and at the end."""

  def __init__(self, place: AnyPath, held: lease.Lease | None):
    """
    Args:
      place: in the bucket.
      held: the lease of it, on process 0.
    """
    home = buckets.kept(place) / f'process-{jax.process_index()}'
    super().__init__(place, home / place.name)
    self._held, self._known = held, {}
    self._lock, self._end = threading.Lock(), threading.Event()
    shutil.rmtree(home, ignore_errors=True)  # the bucket has what counts
    self.record.mkdir(parents=True)
    for name, about in buckets.listing(place).items():
      if in_record(name):
        buckets.fetch_file(place / name, self.record / name, about)
    self._known = self._states()  # what only grows was not fetched: it goes on under new names
    self._thread = threading.Thread(target=self._copy_on, name='record', daemon=True)

  def _states(self) -> dict[str, tuple[int, int]]:
    """Returns the size and time of change of each file of the record."""
    found = {}
    for path in self.record.rglob('*'):
      with contextlib.suppress(FileNotFoundError):
        stat = path.stat()
        if path.is_file() and path.suffix != '.tmp':
          found[str(path.relative_to(self.record))] = stat.st_size, stat.st_mtime_ns
    return found

  def keep(self) -> None:
    self.check()
    with self._lock, tempfile.TemporaryDirectory(prefix='gpt2_jax-') as scratch:
      now = self._states()
      for name in sorted(name for name, state in now.items() if self._known.get(name) != state):
        copy = Path(scratch) / 'copy'  # the file may grow meanwhile
        with contextlib.suppress(FileNotFoundError):
          shutil.copyfile(self.record / name, copy)
          buckets.upload(copy, self.place / name)
          self._known[name] = now[name]
      for name in self._known.keys() - now.keys():
        (self.place / name).unlink(missing_ok=True)
        del self._known[name]

  def check(self) -> None:
    if self._held is not None:
      self._held.check()

  def _copy_on(self) -> None:
    pause = COPY_EVERY_S
    while not self._end.wait(pause):
      began = time.monotonic()
      try:
        self.keep()
      except UserError as e:  # the next checkpoint says so again, and is not committed
        print(f'the record is not copied: {e}', file=sys.stderr, flush=True)
      pause = max(COPY_EVERY_S, (time.monotonic() - began) / COPY_SHARE)

  def __enter__(self) -> 'BucketFolder':
    self._thread.start()
    return self

  def __exit__(self, *_) -> None:
    self._end.set()
    self._thread.join()
    self.keep()


def checked(workdir: str | os.PathLike) -> AnyPath:
  """Returns the place of a run as it is named.

  Raises:
    UserError: no run can lie there.
  """
  if buckets.is_bucket(workdir) and not (named := str(buckets.address(workdir))).startswith('gs://'):
    raise UserError(
      f'--workdir {named}: Orbax keeps checkpoints on disks and in gs://, not there. Data and models '
      'may lie there.'
    )
  place = buckets.place(workdir, '--workdir')
  if os.fspath(place).count('/') == 2 and buckets.is_bucket(place):
    raise UserError(f'--workdir {place} is a whole bucket: name a folder in it, {place}/runs/a say.')
  return place


@contextlib.contextmanager
def opened(workdir: str | os.PathLike) -> Iterator[RunFolder]:
  """Makes the place of a run, and holds it as long as the context lasts.

  Raises:
    UserError: another run holds it, or it can't be written to; on all processes.
  """
  place = checked(workdir)
  with workdir_lock.held(place) as held:
    if isinstance(place, Path):
      yield RunFolder(place, place)
    else:
      with BucketFolder(place, held) as folder:
        yield folder

"""One run at a time holds a workdir in a bucket, where nothing can be locked: by a lease.

The lease is an object, `.lock`, written anew every half minute on the condition that nobody else has
written it since (its generation). A run that dies leaves it behind: it is taken over once it is
stale by the clock of the bucket, at once by a run on the same machine, which sees that the process is
gone.
"""

import contextlib
import json
import os
import socket
import sys
import threading
import time
import uuid
from pathlib import Path
from typing import Any

from gpt2_jax.core.buckets import AnyPath
from gpt2_jax.core.errors import BUCKET_WAY_OUT, Unreachable, UserError
from gpt2_jax.core.files import parse_json, whole_number

FILE = '.lock'
RENEW_S = 30.0
STALE_S = 180.0  # longer than a bucket is out of reach for once, and than clocks differ
SHAPE = {'host': str, 'machine': str, 'pid': whole_number, 'since': str, 'id': str}


def machine() -> str:
  """Names this machine since it was started, and the processes that see one another; '' if unknown.

  Names of hosts won't do: many are called localhost.
  """
  try:
    boot = Path('/proc/sys/kernel/random/boot_id').read_text().strip()
    return f'{boot} {os.readlink("/proc/self/ns/pid")}'
  except OSError:
    return ''


class Lease:
  """The lease of a workdir, held from when it is made until `leave`."""

  def __init__(self, workdir: AnyPath):
    """Takes the lease; waits for one that may be a dead run's to become stale.

    Raises:
      UserError: a run that goes on holds it, or the bucket can't be reached.
    """
    from google.cloud import storage

    self.workdir, self._lost, self._end = workdir, '', threading.Event()
    self._generation = 0  # of the lease as this run wrote it last
    self._said = {
      'host': socket.gethostname(),
      'machine': machine(),
      'pid': os.getpid(),
      'since': time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime()),
      'id': uuid.uuid4().hex,
    }
    bucket, _, name = os.fspath(workdir).removeprefix('gs://').partition('/')
    with self._reaching():
      client = storage.Client(project=os.environ.get('GOOGLE_CLOUD_PROJECT', 'none'))
      there = client.bucket(bucket)
      self._blob = there.blob(f'{name}/{FILE}')
      self._clock = there.blob(f'{name}/{FILE}-clock-{self._said["id"]}')
      self._take()
    self._thread = threading.Thread(target=self._renew, name='lease', daemon=True)
    self._thread.start()

  @contextlib.contextmanager
  def _reaching(self):
    """Turns what goes wrong on the way to the bucket into a `UserError`."""
    import google.api_core.exceptions
    import google.auth.exceptions
    import requests

    try:
      yield
    except (
      google.api_core.exceptions.GoogleAPICallError,
      google.api_core.exceptions.RetryError,
      google.auth.exceptions.GoogleAuthError,
      requests.RequestException,
    ) as e:
      raise Unreachable(
        f"{self.workdir} can't be written to: {str(e).splitlines()[0][:300]}. {BUCKET_WAY_OUT}"
      ) from e

  def _holder(self) -> dict[str, Any] | None:
    """Returns what the lease says, and its `generation` and `age` in seconds; None without one."""
    import google.api_core.exceptions

    try:
      text = self._blob.download_as_bytes(timeout=20)
    except google.api_core.exceptions.NotFound:
      return None
    try:
      said = parse_json(text, SHAPE)
    except ValueError:
      said = {'host': '?', 'machine': '', 'pid': 0, 'since': '?', 'id': ''}
    self._blob.reload(timeout=20)
    self._clock.upload_from_string('', timeout=20)  # when the bucket says that it was written, is now
    assert self._clock.updated is not None and self._blob.updated is not None
    age = (self._clock.updated - self._blob.updated).total_seconds()
    self._clock.delete(timeout=20)
    return said | {'generation': self._blob.generation, 'age': age}

  def _take(self) -> None:
    told, first = False, None
    while True:
      held = self._holder()
      if held is None or held['age'] > STALE_S or self._dead(held):
        if self._write(0 if held is None else held['generation']):
          return
        continue  # another was faster
      who = f'process {held["pid"]} on {held["host"][:100]}, since {held["since"][:40]}'
      if first not in (None, held['generation']):
        raise UserError(
          f'{self.workdir} is held by a run that goes on ({who}): wait for its end or stop it, or '
          'name another --workdir.'
        )
      if not told:
        print(
          f'{self.workdir} was held {held["age"]:.0f} s ago ({who}): waiting to see whether that run '
          f'goes on, {STALE_S - held["age"]:.0f} s at most',
          file=sys.stderr,
          flush=True,
        )
      told, first = True, held['generation']
      time.sleep(2)

  @staticmethod
  def _dead(held: dict[str, Any]) -> bool:
    """Whether the holder was a process of this machine that has ended."""
    here = machine()
    return here != '' and held['machine'] == here and not os.path.exists(f'/proc/{held["pid"]}')

  def _write(self, generation: int) -> bool:
    """Writes the lease if its generation is this one still; 0: if there is none. Whether it was."""
    import google.api_core.exceptions

    try:
      self._blob.upload_from_string(
        json.dumps(self._said) + '\n', if_generation_match=generation, timeout=20
      )
    except google.api_core.exceptions.PreconditionFailed:
      held = self._holder()  # perhaps we ourselves, by a request whose answer was lost
      if held is None or held['id'] != self._said['id']:
        return False
    self._generation = self._blob.generation or 0
    return True

  def _renew(self) -> None:
    while not self._end.wait(RENEW_S):
      with contextlib.suppress(Exception):  # out of reach: again in half a minute
        if not self._write(self._generation):
          held = self._holder()
          who = f'process {held["pid"]} on {held["host"]}' if held else 'somebody'
          self._lost = (
            f'{self.workdir} was taken over by another run ({who}), as this one had not been heard '
            'of: it ends here, and has saved nothing since.'
          )
          return

  def check(self) -> None:
    """Raises a UserError if another run has taken the workdir over."""
    if self._lost:
      raise UserError(self._lost)

  def leave(self) -> None:
    """Gives the lease back."""
    self._end.set()
    self._thread.join()
    with contextlib.suppress(Exception):  # it becomes stale, or is another's
      self._blob.delete(if_generation_match=self._generation, timeout=20)

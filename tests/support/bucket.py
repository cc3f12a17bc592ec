"""A bucket on this machine, to use from this process and those it starts."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import fsspec
from etils.epath import backend

from support.processes import ROOT

SERVER = ROOT / 'tests' / 'bucket_server.py'
START_S = 30


class Bucket:
  """An emulated bucket of Cloud Storage (`tests/bucket_server.py`).

  Attributes:
    url: gs://bucket.
    env: what processes need in their environment to find it, and a cache of their own.
    folder: where its state is.
  """

  url = 'gs://bucket'

  def __init__(self, folder: Path):
    self.folder, self._server = folder, None
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
      free.bind(('127.0.0.1', 0))
      self._port = free.getsockname()[1]
    address = f'http://127.0.0.1:{self._port}'
    self.env = {
      'STORAGE_EMULATOR_HOST': address,
      'TENSORSTORE_GCS_HTTP_URL': address,
      'GOOGLE_CLOUD_PROJECT': 'project',
      'XDG_CACHE_HOME': str(folder / 'cache'),
    }

  def start(self) -> None:
    """Starts the server, and waits until it answers."""
    assert self._server is None
    command = [sys.executable, str(SERVER), str(self._port), str(self.folder)]
    self._server = subprocess.Popen(command)
    until = time.monotonic() + START_S
    while True:
      with contextlib.suppress(OSError):
        socket.create_connection(('127.0.0.1', self._port), 1).close()
        return
      assert self._server.poll() is None and time.monotonic() < until, 'the server did not start'
      time.sleep(0.05)

  def stop(self) -> None:
    """Ends the server: nobody answers from here on. What lies in the bucket stays there."""
    if self._server is not None:
      self._server.terminate()
      self._server.wait()
      self._server = None

  def faults(self, **faults: float) -> None:
    """Sets the faults of the server from here on, as its file has them; none: all is well."""
    scratch = self.folder / 'faults.json.tmp'
    scratch.write_text(json.dumps(faults))
    scratch.replace(self.folder / 'faults.json')

  def asked(self) -> list[str]:
    """Returns what was asked for so far: METHOD PATH RANGE, of each request."""
    path = self.folder / 'asked.txt'
    return path.read_text().splitlines() if path.exists() else []


@contextlib.contextmanager
def emulated(folder: Path) -> Iterator[Bucket]:
  """Yields a bucket that this process finds too; its state is kept in `folder / 'bucket'`."""
  there = Bucket(folder / 'bucket')
  before = {name: os.environ.get(name) for name in there.env}
  os.environ.update(there.env)
  _forget()
  there.start()
  try:
    yield there
  finally:
    there.stop()
    _forget()
    for name, value in before.items():
      if value is None:
        del os.environ[name]
      else:
        os.environ[name] = value


def _forget() -> None:
  """Lets file systems be made anew: one keeps the address that it found when it was made."""
  kinds = [fsspec.AbstractFileSystem]
  while kinds:
    kind = kinds.pop()
    kind.clear_instance_cache()
    kinds += kind.__subclasses__()
  type(backend.fsspec_backend)._get_filesystem.cache_clear()

"""Files from the web: fetched once, resumed where a transfer broke off, checked, unpacked.

They are kept in ~/.cache/gpt2_jax/data ($XDG_CACHE_HOME for ~/.cache). Of the packages that this
project needs anyway none resumes a transfer from any address: huggingface_hub does so from the hub
alone, and TensorFlow Datasets begins anew.
"""

import hashlib
import http.client
import lzma
import shutil
import socket
import ssl
import tarfile
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import IO

import filelock

from gpt2_jax.core import progress, verified
from gpt2_jax.core.errors import UserError, saving
from gpt2_jax.data.sources import Source

TIMEOUT_S = 30.0  # without a byte, after which a transfer is taken up again
ATTEMPTS = 5  # in a row that bring nothing
WAIT_S = 1.0  # before the second attempt; doubled before each further one
CHUNK = 2**20


class _Failed(Exception):
  """An address that doesn't serve the file; the next one may."""


def cache() -> Path:
  """Returns the folder of fetched files."""
  return verified.cache() / 'data'


def sha256_of(path: Path) -> str:
  with open(path, 'rb') as f:
    return hashlib.file_digest(f, 'sha256').hexdigest()


def fetch(source: Source) -> Path:
  """Returns the path of a published file, fetched unless it is there, with its sha256 checked.

  A transfer that was stopped goes on where it was, in the next process too. Only a file that was
  checked gets its name; one that was put there by hand is checked when it is first read.

  Raises:
    UserError: no address serves it, or none serves what the sha256 says; has the manual steps.
  """
  path = cache() / source.file
  if path.exists():
    return _check_by_hand(path, source)
  if not source.urls:
    raise UserError(f'{source.file} is not for a program to fetch: {source.steps}. {_by_hand(path)}')
  with saving(source.file, path.parent):
    path.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(f'{path}.lock'):
      failures = []
      for url in source.urls:
        if path.exists():  # by now, from another process or address
          break
        try:
          _download(url, path, source)
        except _Failed as e:
          failures.append(f'  {url}: {e}')
  if not path.exists():
    raise UserError(
      f"{source.file} can't be fetched:\n" + '\n'.join(failures) + '\n'
      'What came is kept, and the same command goes on from there. Without a network: '
      f'fetch it elsewhere. {_by_hand(path)}'
    )
  return path


def _by_hand(path: Path) -> str:
  return f'Then save it as {path}, or give `evaluate` its place, unpacked, with --data PATH.'


def _record(path: Path) -> Path:
  """Returns the file with the sha256 of a file that was checked."""
  return path.with_name(path.name + '.sha256')


def _check(content: Path, path: Path, source: Source) -> None:
  """Checks content that is, or will be, at `path`, and records its sha256."""
  found, record = sha256_of(content), _record(path)
  wanted = source.sha256 or (record.read_text().strip() if record.exists() else found)
  if found != wanted:
    known = 'by ' + source.pinned if source.sha256 else f'when it was first fetched ({record})'
    raise _Failed(f'its sha256 is {found}, not {wanted}, as it was {known}')
  record.write_text(found + '\n')


def _check_by_hand(path: Path, source: Source) -> Path:
  record = _record(path)
  try:
    if record.exists():
      if not verified.Verified(path.parent).check([path.name], record.read_text().strip()):
        raise _Failed(f'its sha256 is not that which it had when it was fetched ({record})')
    elif source.urls:
      _check(path, path, source)
  except (_Failed, OSError, ValueError) as e:
    raise UserError(f'{path} is another file: {e}. Remove it.') from e
  return path


def _download(url: str, path: Path, source: Source) -> None:
  part = path.with_name(path.name + '.part')
  for begun in (part.exists(), False):
    _transfer_all(url, part, source)
    try:
      _check(part, path, source)
      break
    except _Failed:
      part.unlink()
      if not begun:  # else what was there may have been of another file
        raise
  part.rename(path)


def _transfer_all(url: str, part: Path, source: Source) -> None:
  """Fetches all of a file, in as many transfers as it takes, as long as they bring something."""
  have = lambda: part.stat().st_size if part.exists() else 0
  idle = 0
  while True:
    if source.sha256 is None:  # what can't be checked in the end is not pieced together
      part.unlink(missing_ok=True)
    before = have()
    try:
      return _transfer(url, part, before, source)
    except urllib.error.HTTPError as e:
      e.close()
      if e.code == 416:  # there is nothing behind what is here: it is of another file
        part.unlink(missing_ok=True)
      elif e.code < 500 and e.code not in (408, 429):
        raise _Failed(f'HTTP {e.code} {e.reason}') from e
      why = f'HTTP {e.code} {e.reason}'
    except (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError) as e:
      reason = getattr(e, 'reason', e)
      why = str(reason) or type(reason).__name__
      if isinstance(reason, (socket.gaierror, ssl.SSLCertVerificationError)):
        raise _Failed(why) from e  # no network, or no site to be trusted: time changes nothing
    idle = 0 if source.sha256 and have() > before else idle + 1
    if idle == ATTEMPTS:
      raise _Failed(f'{why} ({ATTEMPTS} times)')
    time.sleep(WAIT_S * 2**idle / 2)


def _transfer(url: str, part: Path, start: int, source: Source) -> None:
  """Makes one transfer, from byte `start` on if the server can do that."""
  if start and start == source.size:
    return
  ask = {'User-Agent': 'gpt2_jax', 'Accept-Encoding': 'identity'}
  ask |= {'Range': f'bytes={start}-'} if start else {}
  request = urllib.request.Request(url, headers=ask)
  with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:
    if not response.headers.get('Content-Range', '').startswith(f'bytes {start}-'):
      start = 0
    length = response.headers.get('Content-Length')
    total = start + int(length) if length else source.size
    if source.size and total != source.size:
      raise _Failed(f'it has {total:,} bytes there, not {source.size:,}')
    with (
      open(part, 'ab' if start else 'wb') as f,
      progress.track(source.file, total or 0, 'bytes', done=start) as advance,
    ):
      while chunk := response.read1(CHUNK):
        f.write(chunk)
        f.flush()  # what came is there, should this process be killed
        advance(len(chunk))
        if total and f.tell() > total:
          raise _Failed(f'it has more than its {total:,} bytes there')
      if total and f.tell() < total:
        raise ConnectionError(f'broken off after {f.tell():,} of {total:,} bytes')


# --- archives ---------------------------------------------------------------------------------


def unpack(archive: Path, names: Sequence[str]) -> list[Path]:
  """Returns the paths of members of a .zip or .tar.*, unpacked beside it unless they are there.

  Nothing else is written, and under these names alone, whatever the archive says.

  Raises:
    UserError: names the member that is missing, or says that the archive is damaged.
  """
  folder = archive.parent / archive.name.split('.')[0]
  paths = {name: folder.joinpath(*PurePosixPath(name).parts[-2:]) for name in names}
  missing = {name: path for name, path in paths.items() if not path.exists()}
  if missing:
    with saving(archive.name, folder):
      try:
        (_unzip if zipfile.is_zipfile(archive) else _untar)(archive, dict(missing))
      except (zipfile.BadZipFile, tarfile.TarError, EOFError, zlib.error, lzma.LZMAError) as e:
        raise UserError(f'{archive} is damaged ({e}): remove it, and it is fetched again.') from e
  for name, path in paths.items():
    if not path.exists():
      raise UserError(
        f'{archive} has no {name}: it is another archive, or cut short. Remove it, and '
        'it is fetched again.'
      )
  return list(paths.values())


def _write(content: IO[bytes], path: Path) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  part = path.with_name(path.name + '.part')
  with open(part, 'wb') as f:
    shutil.copyfileobj(content, f, CHUNK)
  part.rename(path)


def _unzip(archive: Path, wanted: dict[str, Path]) -> None:
  with zipfile.ZipFile(archive) as members:
    for name in wanted.keys() & set(members.namelist()):
      with members.open(name) as content:
        _write(content, wanted[name])


def _untar(archive: Path, wanted: dict[str, Path]) -> None:
  size = archive.stat().st_size
  with (
    open(archive, 'rb') as f,
    tarfile.open(fileobj=f, mode='r|*') as members,
    progress.track(f'unpacking {archive.name}', size, 'bytes') as advance,
  ):
    at = 0
    for member in members:
      name = member.name.removeprefix('./')
      if name in wanted and (content := members.extractfile(member)):
        _write(content, wanted.pop(name))
      advance(f.tell() - at)
      at = f.tell()
      if not wanted:
        return

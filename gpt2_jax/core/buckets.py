"""Buckets: what a path like gs://bucket/run names, through etils' `epath` and fsspec's libraries.

A bucket is no disk: nothing can be appended to, renamed or locked, and it may be out of reach for
minutes. What fails for good is an OSError, as a disk's would be, and one that is meant for the user.
"""

import base64
import concurrent.futures
import contextlib
import functools
import hashlib
import importlib.util
import json
import os
import re
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import filelock
from etils import epath

from gpt2_jax.core.errors import Unreachable, UserError, brief
from gpt2_jax.core.progress import track

AnyPath = Path | epath.Path  # of this machine, or of a bucket
LIBRARIES = {'gs': 'gcsfs', 's3': 's3fs'}  # by the scheme; each is an extra, named as in EXTRAS
EXTRAS = {'gs': 'gcs', 's3': 's3'}
THREADS = 16
BLOCK_BYTES = 16 * 2**20  # that are fetched at a time
SHOWN_BYTES = 2**30  # the fetching of less is over before one wonders
ADDRESS = re.compile(r'([A-Za-z][A-Za-z0-9+.\-]+):/+')


def address(path: str | os.PathLike) -> str | None:
  """Returns a path as SCHEME://REST if it is an address; a `Path` has lost a slash of its gs://."""
  found = ADDRESS.match(os.fspath(path))
  return f'{found[1].lower()}://{os.fspath(path)[found.end() :]}' if found else None


def place(path: str | os.PathLike, what: str = '') -> AnyPath:
  """Returns a path as a user names it: of this machine, or of a bucket. Nothing is read or made.

  Args:
    path: which: local, file:///…, gs://BUCKET/… or s3://BUCKET/….
    what: to put before it in a message, such as the name of a flag.

  Raises:
    UserError: it is an address of another kind, or the library for it is not there.
  """
  named = address(path)
  if named is None:
    return Path(path)
  scheme, _, rest = named.partition('://')
  said = f'{what} {brief(named)}'.lstrip()
  if scheme == 'file':
    # a Path has lost the slashes, so that file://tmp is taken for file:///tmp
    return Path('/' + rest.removeprefix('localhost/'))
  if scheme not in LIBRARIES:
    raise UserError(
      f'{said}: addresses of this kind are not supported: name a local path, gs://BUCKET/… or '
      's3://BUCKET/….'
    )
  if not rest.partition('/')[0]:
    raise UserError(f'{said} names no bucket: {scheme}://BUCKET/PATH.')
  if importlib.util.find_spec(LIBRARIES[scheme]) is None:
    raise UserError(
      f"{said} needs {LIBRARIES[scheme]}: pip install 'gpt2_jax[{EXTRAS[scheme]}]', or name a local "
      'path.'
    )
  _register()
  return epath.Path(named.rstrip('/'))


def is_bucket(path: str | os.PathLike) -> bool:
  """Whether a path lies in a bucket."""
  return (address(path) or '').partition('://')[0] in LIBRARIES


def filesystem(path: AnyPath) -> Any:
  """Returns fsspec's file system of a path in a bucket."""
  import fsspec

  _register()
  return fsspec.filesystem(os.fspath(path).partition('://')[0])


@functools.cache
def _register() -> None:
  """Makes epath and fsspec use file systems that are patient, and show what others have written."""
  os.environ.setdefault('EPATH_USE_TF', 'false')  # TensorFlow's own would be taken where it is
  if importlib.util.find_spec('gcsfs'):
    import fsspec

    from gpt2_jax.core.patient_gcs import PatientGCS

    for name in ('gs', 'gcs'):
      fsspec.register_implementation(name, PatientGCS, clobber=True)
  if importlib.util.find_spec('s3fs'):
    import fsspec.config

    fsspec.config.conf.setdefault('s3', {})['use_listings_cache'] = False


@contextlib.contextmanager
def reading(path: object, done: str = 'read') -> Iterator[None]:
  """Turns what a bucket's library says into a line for the user.

  Args:
    path: in a bucket.
    done: what is done with it, 'read' or 'written'.
  """
  try:
    yield
  except UserError:
    raise
  except OSError as e:
    raise Unreachable(f"{path} can't be {done}: {str(e) or type(e).__name__}.") from e


# --- What lies there -----------------------------------------------------------------------------


def listing(path: AnyPath) -> dict[str, dict[str, Any]]:
  """Returns what a bucket says of each file below a path, by its name relative to it.

  Keys: size; and what names the content, by the kind of bucket: md5Hash, crc32c, etag, generation.
  A path that is a file has the one name ''; of one that is not there nothing is returned.
  """
  root = os.fspath(path).partition('://')[2].rstrip('/')
  with reading(path):
    found = filesystem(path).find(os.fspath(path), detail=True)
  return {
    name[len(root) + 1 :]: about
    for name, about in sorted(found.items())
    if about.get('type') == 'file' and not name.endswith('/')
  }


def content(about: dict[str, Any]) -> list:
  """Returns what changes where a file does."""
  keys = ('size', 'md5Hash', 'crc32c', 'etag', 'ETag', 'generation')
  return [str(about[key]) for key in keys if about.get(key) is not None]


def md5(about: dict[str, Any]) -> str | None:
  """Returns the MD5 of a file in hex, by what a bucket says of it; None where it doesn't."""
  said = about.get('md5Hash')
  return base64.b64decode(said).hex() if said else None


def fetch_file(path: AnyPath, to: Path, about: dict[str, Any] | None = None) -> None:
  """Fetches a file, whole or not at all, and checks it by the hash that the bucket has of it.

  It comes in blocks, of which each is asked for again if it breaks off.

  Raises:
    Unreachable: another content came than the bucket says.
  """
  there, named = filesystem(path), os.fspath(path)
  partial = to.with_name(f'{to.name}.{os.getpid()}.{threading.get_ident()}.part')
  to.parent.mkdir(parents=True, exist_ok=True)
  about = dict(there.info(named)) if about is None else about
  size, want = int(about['size']), md5(about)
  try:
    with open(partial, 'wb') as file:
      have = hashlib.md5(usedforsecurity=False)
      for start in range(0, size, BLOCK_BYTES):
        with reading(path):  # not what this disk says
          block = there.cat_file(named, start=start, end=min(start + BLOCK_BYTES, size))
        file.write(block)
        have.update(block)
      if file.tell() != size:
        raise Unreachable(f'{path} came with {file.tell():,} bytes, not {size:,}')
    if want is not None and have.hexdigest() != want:
      raise Unreachable(f'{path} came with another content than the bucket has (MD5)')
    partial.replace(to)
  finally:
    partial.unlink(missing_ok=True)


def cache() -> Path:
  """Returns the folder in which copies of what lies in buckets are kept."""
  home = Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache')
  return home / 'gpt2_jax' / 'buckets'


def kept(path: str | os.PathLike) -> Path:
  """Returns the folder of this machine, made if need be, for what belongs to a path in a bucket."""
  folder = cache() / hashlib.sha256(str(address(path)).encode()).hexdigest()[:16]
  folder.mkdir(parents=True, exist_ok=True)
  return folder


def fetched(path: AnyPath, wanted: Callable[[str], bool] = lambda name: True) -> Path:
  """Returns a local copy of what lies in a bucket; a path of this machine is returned as it is.

  What was fetched before and has not changed is not fetched again. What is no longer there goes.

  Args:
    path: which.
    wanted: whether a file is needed, by its name relative to the path.

  Raises:
    Unreachable: it can't be fetched, or is not there.
  """
  if not is_bucket(path):
    return Path(path)
  home = kept(path)
  target, known = home / (path.name or 'bucket'), home / 'fetched.json'
  with filelock.FileLock(home / '.lock'):
    there = {name: about for name, about in listing(path).items() if wanted(name)}
    if not there:
      raise Unreachable(f'{path} is not there.')
    have = _known(known)
    for part in home.rglob('*.part'):  # what a kill has left
      part.unlink(missing_ok=True)
    for name in have.keys() - there.keys():
      (target / name if name else target).unlink(missing_ok=True)
    old = [
      name
      for name, about in there.items()
      if have.get(name) != content(about) or not (target / name if name else target).is_file()
    ]
    total = sum(int(there[name]['size']) for name in old)
    quiet = contextlib.nullcontext(lambda amount: None)
    with (
      track(f'fetching {path}', total, 'bytes') if total > SHOWN_BYTES else quiet as advance,
      concurrent.futures.ThreadPoolExecutor(THREADS) as pool,
    ):

      def get(name: str) -> str:
        fetch_file(*((path / name, target / name) if name else (path, target)), there[name])
        return name

      for name in pool.map(get, old):
        advance(int(there[name]['size']))
    known.write_text(json.dumps({name: content(about) for name, about in there.items()}))
  return target


def _known(path: Path) -> dict[str, list]:
  try:
    found = json.loads(path.read_text())
    return found if isinstance(found, dict) else {}
  except (OSError, ValueError):
    return {}


# --- What is written there -----------------------------------------------------------------------


def upload(folder: Path, to: AnyPath, last: Callable[[str], bool] = lambda name: False) -> None:
  """Copies a file or folder into a bucket.

  Args:
    folder: of this machine.
    to: what it becomes.
    last: whether a file is written after all others, by its name: what says that all is there.
  """
  there = filesystem(to)
  with reading(to, 'written'), concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
    if folder.is_file():
      there.put_file(str(folder), os.fspath(to))
      return
    names = [str(path.relative_to(folder)) for path in sorted(folder.rglob('*')) if path.is_file()]
    for group in ([n for n in names if not last(n)], [n for n in names if last(n)]):
      list(pool.map(lambda name: there.put_file(str(folder / name), f'{to}/{name}'), group))


@contextlib.contextmanager
def scratch_for(target: AnyPath) -> Iterator[Path]:
  """Yields a local path to write a file or folder to, which is copied to `target` if all goes well.

  The config.json of a folder, and an index or manifest, are written last.
  """
  ends = ('config.json', 'index.json', 'manifest.json')
  with tempfile.TemporaryDirectory(prefix='gpt2_jax-') as folder:
    local = Path(folder) / target.name
    yield local
    upload(local, target, lambda name: name.endswith(ends))

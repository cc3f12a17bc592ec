"""The manifest of a checkpoint: size and hash of each of its files, in a file beside them.

The hash is SHA-256; of a file in a bucket that keeps an MD5 of it, that one: nothing is read again to
write the manifest, nor to compare it.
"""

import concurrent.futures
import contextlib
import hashlib
import json
import os
from collections.abc import Collection
from pathlib import Path

from gpt2_jax.core import buckets
from gpt2_jax.core.buckets import AnyPath
from gpt2_jax.core.files import parse_json, whole_number, write_whole
from gpt2_jax.core.progress import track

FILE = 'manifest.json'
VERSION = 1
SHAPE = {'files': {str: {'bytes': whole_number}}}
# Written by Orbax behind the manifest, as it commits; nothing in them is needed.
LATER = ('_CHECKPOINT_METADATA', 'commit_success.txt')
SHOWN_BYTES = 2**30  # the reading of less is over before one wonders
KINDS = 'sha256', 'md5'  # of hashes, as hashlib names them


def _digest(path: AnyPath, kind: str) -> str:
  with path.open('rb') as f:
    return hashlib.file_digest(f, lambda: hashlib.new(kind, usedforsecurity=False)).hexdigest()  # pyright: ignore[reportArgumentType]


def _there(folder: AnyPath) -> dict[str, dict]:
  """Returns what is known of the files in a folder without reading them: bytes, in a bucket MD5."""
  if isinstance(folder, Path):
    files = {str(path.relative_to(folder)): path for path in folder.rglob('*') if path.is_file()}
    return {name: {'bytes': files[name].stat().st_size} for name in sorted(files)}
  return {
    name: {'bytes': about['size']} | ({'md5': found} if (found := buckets.md5(about)) else {})
    for name, about in buckets.listing(folder).items()
  }


def write(folder: AnyPath) -> None:
  """Writes the manifest of all files in a folder. In one thread: it runs beside the training."""
  files = {
    name: about if 'md5' in about else about | {'sha256': _digest(folder / name, 'sha256')}
    for name, about in _there(folder).items()
    if name not in (FILE, *LATER)
  }
  write_whole(folder / FILE, json.dumps({'version': VERSION, 'files': files}, indent=1) + '\n')


def damage(folder: AnyPath, items: Collection[str] | None = None) -> str | None:
  """Says what is wrong with the files of a checkpoint, by its manifest; None if nothing is.

  Args:
    folder: of the checkpoint; it has a manifest.
    items: subfolders whose content is read and hashed; default: all. Sizes are compared of all.
  """
  try:
    wanted = parse_json((folder / FILE).read_bytes(), SHAPE)['files']
    if not wanted:
      raise ValueError('it names no file')
    hashes = {name: _hash(about) for name, about in wanted.items()}
  except (OSError, ValueError) as e:
    return f'{FILE} is damaged ({e})'
  have = _there(folder)
  for name, about in wanted.items():
    if name not in have:
      return f'{name[:200]} is missing'
    if have[name]['bytes'] != about['bytes']:
      return f'{name} has {have[name]["bytes"]:,} bytes, not {about["bytes"]:,}'
  read = [name for name in wanted if items is None or name.split('/')[0] in items]
  total = sum(wanted[name]['bytes'] for name in read)

  def found(name: str) -> str:
    kind, _ = hashes[name]
    return have[name].get(kind) or _digest(folder / name, kind)

  quiet = contextlib.nullcontext(lambda amount: None)
  shown = track(f'checking {folder}', total, 'bytes') if total > SHOWN_BYTES else quiet
  with shown as advance, concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
    try:
      for name, digest in zip(read, pool.map(found, read)):
        kind, right = hashes[name]
        if digest != right:
          return f'{name} has other content than was written ({kind.upper().replace("SHA", "SHA-")})'
        advance(wanted[name]['bytes'])
    except OSError as e:
      return f"a file can't be read ({e})"
  return None


def _hash(about: dict) -> tuple[str, str]:
  """Returns kind and value of the hash that a manifest has of a file; a ValueError without one."""
  for kind in KINDS:
    if isinstance(about.get(kind), str):
      return kind, about[kind]
  raise ValueError('a file has no hash there')

"""The manifest of a checkpoint: the size and SHA-256 of each of its files, in a file beside them."""

import concurrent.futures
import contextlib
import hashlib
import json
import os
from collections.abc import Collection
from pathlib import Path

from gpt2_jax.core.files import parse_json, whole_number, write_whole
from gpt2_jax.core.progress import track

FILE = 'manifest.json'
VERSION = 1
SHAPE = {'files': {str: {'bytes': whole_number, 'sha256': str}}}
# Written by Orbax behind the manifest, as it commits; nothing in them is needed.
LATER = ('_CHECKPOINT_METADATA', 'commit_success.txt')
SHOWN_BYTES = 2**30  # the reading of less is over before one wonders


def _digest(path: Path) -> str:
  with open(path, 'rb') as f:
    return hashlib.file_digest(f, 'sha256').hexdigest()


def write(folder: Path) -> None:
  """Writes the manifest of all files in a folder. In one thread: it runs beside the training."""
  names = sorted(str(path.relative_to(folder)) for path in folder.rglob('*') if path.is_file())
  files = {
    name: {'bytes': (folder / name).stat().st_size, 'sha256': _digest(folder / name)}
    for name in names
    if name not in (FILE, *LATER)
  }
  write_whole(folder / FILE, json.dumps({'version': VERSION, 'files': files}, indent=1) + '\n')


def damage(folder: Path, items: Collection[str] | None = None) -> str | None:
  """Says what is wrong with the files of a checkpoint, by its manifest; None if nothing is.

  Args:
    folder: of the checkpoint; it has a manifest.
    items: subfolders whose content is read and hashed; default: all. Sizes are compared of all.
  """
  try:
    files = parse_json((folder / FILE).read_bytes(), SHAPE)['files']
    wanted = {name: (file['bytes'], file['sha256']) for name, file in files.items()}
    if not wanted:
      raise ValueError('it names no file')
  except (OSError, ValueError) as e:
    return f'{FILE} is damaged ({e})'
  for name, (size, _) in wanted.items():
    try:
      have = (folder / name).stat().st_size if (folder / name).is_file() else None
    except OSError:  # no name that a file could have
      have = None
    if have is None:
      return f'{name[:200]} is missing'
    if have != size:
      return f'{name} has {have:,} bytes, not {size:,}'
  read = [name for name in wanted if items is None or name.split('/')[0] in items]
  total = sum(wanted[name][0] for name in read)
  quiet = contextlib.nullcontext(lambda amount: None)
  shown = track(f'checking {folder}', total, 'bytes') if total > SHOWN_BYTES else quiet
  with shown as advance, concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
    try:
      for name, digest in zip(read, pool.map(lambda name: _digest(folder / name), read)):
        if digest != wanted[name][1]:
          return f'{name} has other content than was written (SHA-256)'
        advance(wanted[name][0])
    except OSError as e:
      return f"a file can't be read ({e})"
  return None

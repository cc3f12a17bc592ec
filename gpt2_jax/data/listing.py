"""Which files a pattern names: each real one once, however many links lead to it."""

import collections
import dataclasses
import fnmatch
import functools
import glob
import os
import stat
from collections.abc import Iterator

from gpt2_jax.core.buckets import address, content, is_bucket
from gpt2_jax.core.errors import UserError
from gpt2_jax.data import far_files, text_files

JOB = b'{"settings": {"corpus": '  # how the job of an unfinished token store begins
MAX_SAID = 8  # kinds of what is passed over that are told apart


@dataclasses.dataclass(frozen=True)
class File:
  path: str
  kind: str  # a value of text_files.FORMATS
  size: int
  mtime_ns: int | str  # in a bucket, whatever changes with the content


class _Search:
  """Expands a pattern as `glob` does, but goes through each real folder once, links or not.

  Attributes:
    passed: how many were passed over, by what they are.
    unreadable: folders.
  """

  def __init__(self):
    self.passed: collections.Counter[str] = collections.Counter()
    self.unreadable: set[str] = set()
    self._real = functools.lru_cache(None)(os.path.realpath)

  def _entries(self, folder: str) -> list[os.DirEntry]:
    try:
      with os.scandir(folder or '.') as entries:
        return sorted(entries, key=lambda entry: entry.name)
    except (OSError, ValueError):
      self.unreadable.add(folder)
      return []

  def match(self, folder: str, parts: list[str]) -> Iterator[str]:
    """Yields the paths below a folder that fit the parts of a pattern."""
    part, rest = parts[0], parts[1:]
    if part == '**':
      for below, names in self._walk(folder):
        yield from self.match(below, rest) if rest else (os.path.join(below, n) for n in names)
      return
    names = [part]
    if glob.has_magic(part):
      names = [
        e.name
        for e in self._entries(folder)
        if fnmatch.fnmatchcase(e.name, part) and (part.startswith('.') or not e.name.startswith('.'))
      ]
    for path in (os.path.join(folder, name) for name in names):
      if not rest:
        if os.path.lexists(path):
          yield path
      elif os.path.isdir(path):
        yield from self.match(path, rest)

  def _walk(self, top: str) -> Iterator[tuple[str, list[str]]]:
    """Yields (folder, names of its files): real folders first, then those that links lead to."""
    real = os.path.realpath(top)
    seen, folders, links = {real}, collections.deque([(top, real)]), collections.deque()
    while folders or links:
      if not folders:
        link = links.popleft()
        real = os.path.realpath(link)
        if real in seen:
          self.passed['links'] += 1
          continue
        seen.add(real)
        folders.append((link, real))
      folder, real = folders.popleft()
      names, entries = [], self._entries(folder)
      if _is_store(folder, {entry.name for entry in entries}):
        self.passed['token stores'] += 1
        continue
      for entry in entries:
        path, below = os.path.join(folder, entry.name), os.path.join(real, entry.name)
        if entry.name.startswith('.'):
          self.passed['hidden'] += 1
        elif entry.is_dir(follow_symlinks=False):
          if below in seen:
            self.passed['links'] += 1  # by which it was reached before
          else:
            seen.add(below)
            folders.append((path, below))
        elif _is_folder(entry):
          links.append(path)
        else:
          names.append(entry.name)
      yield folder, names

  def real(self, path: str) -> str:
    if os.path.islink(path):
      return os.path.realpath(path)
    folder, name = os.path.split(path)
    return os.path.join(self._real(folder), name)

  def file(self, path: str) -> tuple[File, tuple] | None:
    """Returns a file and a key that no other file has; None if it can't be read as text."""
    try:
      status = os.stat(path)
    except OSError:
      self.passed['broken links' if os.path.islink(path) else 'unreadable files'] += 1
      return None
    kind = text_files.kind_of(path)[0]
    if not stat.S_ISREG(status.st_mode):
      self.passed['folders' if stat.S_ISDIR(status.st_mode) else 'pipes and devices'] += 1
    elif kind is None:
      self.passed[os.path.splitext(path)[1].lower() or 'without suffix'] += 1
    else:
      hard = status.st_nlink > 1 and status.st_ino
      key = (status.st_dev, status.st_ino) if hard else (self.real(path),)
      return File(path, kind, status.st_size, status.st_mtime_ns), key
    return None


def _is_store(folder: str, names: set[str]) -> bool:
  """Whether a folder is a token store, finished or not: it may be the one that is being made."""
  if {'manifest.json', 'tokenizer'} <= names:
    return True
  try:
    with open(os.path.join(folder, 'job.json'), 'rb') as f:
      return f.read(len(JOB)) == JOB
  except OSError:
    return False


def _is_folder(entry: os.DirEntry) -> bool:
  try:
    return entry.is_dir()
  except OSError:  # a link to itself
    return False


def _said(passed: collections.Counter[str]) -> str:
  """Returns `.png: 3, links: 2`, the commonest first."""
  counts = passed.most_common()
  said = [f'{what}: {n:,}' for what, n in counts[:MAX_SAID]]
  others = sum(n for _, n in counts[MAX_SAID:])
  return ', '.join([*said, f'others: {others:,}'] if others else said)


def named(path: str, kind: str | None = None) -> File:
  """Returns a file that the user named, or that is known to be there."""
  if is_bucket(path):
    (file,), _ = _find_far(path, path)
    return dataclasses.replace(file, kind=kind or file.kind)
  with text_files.reading(path):
    status = os.stat(path)
  if not stat.S_ISREG(status.st_mode):
    raise UserError(f'{path} is no file, but a folder, pipe or device: name a file.')
  return File(path, kind or text_files.kind_of_named(path)[0], status.st_size, status.st_mtime_ns)


def find(spec: str, pattern: str) -> tuple[list[File], tuple[str, ...]]:
  """Returns the files of a name, folder or pattern, by path, and notes on those passed over.

  A file named outright may have any suffix and is then plain text. Links are followed; of several
  ways to one file (links, hard links) the straight one is taken, or else the first.

  Raises:
    UserError: there is no file that can be read.
  """
  if is_bucket(pattern):
    return _find_far(spec, pattern)
  pattern = os.path.expanduser(pattern)
  if os.path.isfile(pattern):
    return [named(pattern)], ()
  if os.path.isdir(pattern):
    top, parts = pattern, ['**']
  else:
    top, parts = '/' * pattern.startswith('/'), [part for part in pattern.split('/') if part]
  if not parts or (os.path.lexists(pattern) and not os.path.isdir(pattern)):
    raise UserError(f'corpus {spec!r}: that is a pipe, a device or a broken link, not a file.')
  search = _Search()
  ways: dict[tuple, list[File]] = {}
  for path in sorted(set(search.match(top, parts))):
    if found := search.file(path):
      ways.setdefault(found[1], []).append(found[0])

  def is_straight(file: File) -> bool:
    return os.path.abspath(file.path) == search.real(file.path)

  files = [next(filter(is_straight, way), way[0]) for way in ways.values()]
  links = sum(map(len, ways.values())) - len(files)
  more = {'links': links, 'unreadable folders': len(search.unreadable)}
  search.passed.update({what: n for what, n in more.items() if n})
  return _found(spec, files, search.passed)


def _found(
  spec: str, files: list[File], passed: collections.Counter[str]
) -> tuple[list[File], tuple[str, ...]]:
  if not files:
    raise UserError(
      f'corpus {spec!r}: '
      + (
        f'nothing there is text ({_said(passed)}). Read are '
        f'{", ".join(text_files.FORMATS)}, also with {", ".join(text_files.PACKED)}.'
        if passed
        else 'no such file or folder, or an empty one.'
      )
    )
  notes = (f'{spec}: files read: {len(files):,}, passed over: {_said(passed)}.',)
  return sorted(files, key=lambda file: file.path), notes if passed else ()


def _find_far(spec: str, pattern: str) -> tuple[list[File], tuple[str, ...]]:
  found, passed = far_files.find(str(address(pattern)))
  files = [
    File(path, text_files.kind_of_named(path)[0], int(about['size']), ' '.join(content(about)))
    for path, about in found.items()
  ]
  return _found(spec, files, passed)

"""Files of text in buckets: found as those of a disk are (`listing.py`), copied as they are read."""

import collections
import contextlib
import fnmatch
import glob
import os
from collections.abc import Iterator, Sequence
from typing import Any

from gpt2_jax.core import bucket_copies, buckets
from gpt2_jax.core.errors import UserError
from gpt2_jax.data import text_files


def find(pattern: str) -> tuple[dict[str, dict[str, Any]], collections.Counter[str]]:
  """Returns what a bucket says of each file that a pattern names, and counts what is passed over.

  A pattern means what it means on a disk, where there are no links.

  Args:
    pattern: an address: of a file, a folder, or with the signs of `glob` (`**` too).

  Raises:
    UserError: the bucket can't be reached.
  """
  scheme, _, rest = pattern.partition('://')
  parts = [part for part in rest.split('/') if part]
  fixed = next((i for i, part in enumerate(parts) if glob.has_magic(part)), len(parts))
  top = buckets.place(f'{scheme}://{"/".join(parts[:fixed])}')
  with buckets.reading(top):
    there = buckets.listing(top)
  if '' in there:
    return {os.fspath(top): there['']}, collections.Counter()
  stores, wanted = _stores(there), parts[fixed:] or ['**']
  found, passed = {}, collections.Counter()
  for name, about in there.items():
    path = name.split('/')
    if not _fits(path, wanted):
      continue
    if any('/'.join(path[:i]) in stores for i in range(len(path))):
      passed['in token stores'] += 1
    elif not _fits(path, wanted, hidden=False):
      passed['hidden'] += 1
    elif text_files.kind_of(name)[0] is None:
      passed[os.path.splitext(name)[1].lower() or 'without suffix'] += 1
    else:
      found[f'{top}/{name}'] = about
  return found, passed


def _fits(path: Sequence[str], pattern: Sequence[str], hidden: bool = True) -> bool:
  """Whether the parts of a path fit those of a pattern; `hidden`: `*` stands for a first dot too."""
  if not pattern:
    return not path
  if pattern[0] == '**':
    first = (i for i, part in enumerate(path) if part.startswith('.') and not hidden)
    ways = range(next(first, len(path)) + 1)
    return any(_fits(path[i:], pattern[1:] or ['*'], hidden) for i in ways)
  if not path or not fnmatch.fnmatchcase(path[0], pattern[0]):
    return False
  seen = hidden or pattern[0].startswith('.') or not path[0].startswith('.')
  return seen and _fits(path[1:], pattern[1:], hidden)


def _stores(names: dict[str, Any]) -> set[str]:
  """Returns the folders that are token stores, finished or not."""
  inside = {name.rpartition('/tokenizer/')[0] for name in names if '/tokenizer/' in f'/{name}'}
  said = {name.rpartition('/')[0] for name in names if name.endswith(('manifest.json', 'job.json'))}
  return inside & said


@contextlib.contextmanager
def at_hand(path: str) -> Iterator[str]:
  """Yields a path of this machine at which a file lies as long; messages keep the name that it had.

  Raises:
    UserError: it can't be fetched.
  """
  if not buckets.is_bucket(path):
    yield path
    return
  with contextlib.ExitStack() as held:
    with buckets.reading(path):
      copy = str(held.enter_context(bucket_copies.held(buckets.place(path))))
    try:
      yield copy
    except UserError as e:
      raise UserError(str(e).replace(copy, path)) from e


def head(path: str, size: int) -> bytes:
  """Returns the first bytes of a file, `size` at most."""
  with buckets.reading(path):
    return buckets.filesystem(buckets.place(path)).cat_file(path, start=0, end=size)

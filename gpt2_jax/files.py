"""Files that may come from strangers, and files that appear whole or not at all."""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gpt2_jax.errors import UserError, saving


def unreadable(path: str | os.PathLike, why: object) -> UserError:
  """The error for a file that is not what its name says."""
  return UserError(f'{path} can\'t be read: {why}. It is cut short or broken, or of another kind: '
                   'fetch or write it again.')


def read_json(path: Path) -> dict[str, Any]:
  """A JSON object from a file, as a dict."""
  try:
    value = json.loads(path.read_text(encoding='utf-8'))
  except (OSError, ValueError, RecursionError) as e:
    raise unreadable(path, e) from e
  if not isinstance(value, dict):
    raise unreadable(path, 'it holds no JSON object')
  return value


def check_place(path: Path) -> None:
  """Checks that a file is there, and is no link to somewhere else.

  The hub's cache is made of links, from models--NAME/snapshots/COMMIT/FILE to models--NAME/blobs/.
  """
  if not path.exists():
    raise UserError(f'{path} is missing: fetch the checkpoint again.')
  folder, real = path.parent.resolve(), path.resolve()
  home = folder.parent.parent if folder.parent.name == 'snapshots' else folder
  if not real.is_relative_to(home):
    raise UserError(f'{path} is a link to {real}, outside of its folder: such a checkpoint can\'t be '
                    'trusted. Copy the file in place of the link if you mean it.')


@contextlib.contextmanager
def whole(target: str | os.PathLike) -> Iterator[Path]:
  """Yields a path to write a new file or folder to, which becomes `target` if all goes well.

  Raises:
    UserError: the target is there already, or can't be written.
  """
  target = Path(target)
  if target.is_dir() and not any(target.iterdir()):
    target.rmdir()
  if target.exists():
    raise UserError(f'{target} is there already: name a new place, or remove it.')
  with saving(target.name, target.parent):
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f'.{target.name}.', dir=target.parent))
    try:
      yield scratch / target.name
      (scratch / target.name).rename(target)
    finally:
      shutil.rmtree(scratch)


def write_whole(path: Path, content: bytes | str) -> None:
  """Writes a file whole or not at all."""
  temporary = path.with_name(path.name + '.tmp')
  with open(temporary, 'wb') as f:
    f.write(content.encode() if isinstance(content, str) else content)
    f.flush()
    os.fsync(f.fileno())
  os.replace(temporary, path)

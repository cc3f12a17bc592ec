"""Files that may come from strangers, and files that appear whole or not at all."""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gpt2_jax.core import buckets
from gpt2_jax.core.buckets import AnyPath
from gpt2_jax.core.errors import UserError, brief, saving


def unreadable(path: str | os.PathLike, why: object) -> UserError:
  """Returns the error for a file that is not what its name says."""
  return UserError(
    f"{path} can't be read: {why}. It is cut short or broken, or of another kind: "
    'fetch or write it again.'
  )


def local(path: str | os.PathLike, what: str = '') -> Path:
  """Returns a path that can only be of this machine, as a user names it. Nothing is read or made.

  Args:
    path: which.
    what: to put before it in a message, such as the name of a flag.

  Raises:
    UserError: it is an address, of a bucket for instance.
  """
  found = buckets.place(path, what)
  if not isinstance(found, Path):
    raise UserError(
      f'{f"{what} {brief(str(found))}".lstrip()} can only be a path of this machine, not of a bucket.'
    )
  return found


# --- JSON, which may be broken or hold anything ------------------------------------------------


def whole_number(value: Any) -> bool:
  """Whether a value of JSON is 0, 1, 2, … and fits 63 bits."""
  return type(value) is int and 0 <= value < 2**63


def name_of_file(value: Any) -> bool:
  """Whether a value of JSON can be the name of a file within a folder, and of nothing outside."""
  return (
    isinstance(value, str)
    and 0 < len(value) < 256
    and value not in ('.', '..')
    and not set(value) & {'/', '\\', '\0'}
  )


def misfit(value: Any, shape: Any, where: str = '') -> str | None:
  """Returns a text that says how a value of JSON differs from a shape; None where it does not.

  Args:
    value: of JSON.
    shape: what it should be: a type or tuple of types (True and False are no int); a function that
      says whether a value will do; [SHAPE], a list of such; {str: SHAPE}, a dict of such; or
      {KEY: SHAPE, …}, a dict with at least these keys.
    where: the value's place, for the message.
  """
  at = where or 'it'
  if isinstance(shape, dict):
    if not isinstance(value, dict):
      return f'{at} is {brief(value, 60)}, not an object'
    if missing := [key for key in shape if key is not str and key not in value]:
      return f'{at} has no {missing[0]!r}'
    pairs = [
      (f'{where}.{key}' if where else str(key), value[key], part)
      for name, part in shape.items()
      for key in (value if name is str else [name])
    ]
  elif isinstance(shape, list):
    if not isinstance(value, list):
      return f'{at} is {brief(value, 60)}, not a list'
    pairs = [(f'{where}[{i}]', part, shape[0]) for i, part in enumerate(value)]
  elif isinstance(shape, (type, tuple)):
    kinds = shape if isinstance(shape, tuple) else (shape,)
    right = isinstance(value, kinds) and (type(value) is not bool or bool in kinds)
    wanted = {dict: ', not an object', list: ', not a list'}.get(shape, '')
    return None if right else f'{at} is {brief(value, 60)}{wanted}'
  else:
    return None if shape(value) else f'{at} is {brief(value, 60)}'
  return next(
    (wrong for place, part, wanted in pairs if (wrong := misfit(part, wanted, place))), None
  )


def parse_json(text: str | bytes, shape: Any = None) -> Any:
  """Parses JSON.

  Args:
    text: of JSON.
    shape: as `misfit` takes it; None: any value will do.

  Raises:
    ValueError: it is no JSON, or not of this shape: says what is wrong, and nothing else is raised.
  """
  try:
    value = json.loads(text)
  except RecursionError:
    raise ValueError('it is nested too deeply') from None
  if shape is not None and (wrong := misfit(value, shape)):
    raise ValueError(wrong)
  return value


def read_text(path: AnyPath) -> str:
  """Reads a text of UTF-8 from a file.

  Raises:
    UserError: there is no such file, or it holds something else.
  """
  try:
    return path.read_text(encoding='utf-8')
  except (OSError, ValueError) as e:
    raise unreadable(path, e) from e


def read_json(path: AnyPath, shape: Any = dict) -> Any:
  """Reads a JSON object from a file, or a value of another `shape` (see `misfit`).

  Raises:
    UserError: there is no such file, or it holds something else. Nothing else is raised.
  """
  text = read_text(path)
  try:
    return parse_json(text, shape)
  except ValueError as e:
    raise unreadable(path, e) from e


def read_lines(path: AnyPath, shape: Any = dict) -> tuple[list[Any], int]:
  """Reads the values of a file of JSON lines, and counts the lines that are none of this shape.

  A last line without its end, which a kill has cut short, is not counted. No file: no lines.

  Raises:
    UserError: the file can't be read.
  """
  try:
    lines = path.read_bytes().split(b'\n') if path.exists() else []
  except OSError as e:
    raise unreadable(path, e) from e
  found, bad = [], 0
  for number, line in enumerate(lines, 1):
    try:
      found.append(parse_json(line, shape))
    except ValueError:
      bad += bool(line.strip()) and number < len(lines)
  return found, bad


def check_place(path: Path) -> None:
  """Checks that a file is there, and is no link to somewhere else.

  The hub's cache is made of links, from models--NAME/snapshots/COMMIT/FILE to models--NAME/blobs/.
  """
  if not path.exists():
    raise UserError(f'{path} is missing: fetch the checkpoint again.')
  folder, real = path.parent.resolve(), path.resolve()
  home = folder.parent.parent if folder.parent.name == 'snapshots' else folder
  if not real.is_relative_to(home):
    raise UserError(
      f"{path} is a link to {real}, outside of its folder: such a checkpoint can't be "
      'trusted. Copy the file in place of the link if you mean it.'
    )


@contextlib.contextmanager
def whole(target: str | os.PathLike) -> Iterator[Path]:
  """Yields a path to write a new file or folder to, which becomes `target` if all goes well.

  Raises:
    UserError: the target is there already, or can't be written.
  """
  target = buckets.place(target)
  if not isinstance(target, Path):
    if target.exists():
      raise UserError(f'{target} is there already: name a new place, or remove it.')
    with buckets.scratch_for(target) as path:
      yield path
    return
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


def save_text(path: str | os.PathLike, text: str, what: str) -> None:
  """Writes a text file, and makes the folders above it.

  Raises:
    UserError: it can't be written; `what` names the content.
  """
  path = buckets.place(path)
  with saving(what, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def write_whole(path: AnyPath, content: bytes | str) -> None:
  """Writes a file whole or not at all."""
  path = buckets.place(path)
  if not isinstance(path, Path):  # what is written there appears whole
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return
  temporary = path.with_name(path.name + '.tmp')
  with open(temporary, 'wb') as f:
    f.write(content.encode() if isinstance(content, str) else content)
    f.flush()
    os.fsync(f.fileno())
  os.replace(temporary, path)

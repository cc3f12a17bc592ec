"""The one kind of error that is meant for the user, not for the debugger."""

import contextlib
import difflib
import errno
import importlib.metadata
import os
import platform
import re
from collections.abc import Iterable


class UserError(ValueError):
  """Something in the input can't be used: the message names the thing and the way out.

  `launch.py` and the command line print the message alone and exit with status 1. Everything
  else that is raised is a defect of the program and keeps its traceback.
  """


class Unreachable(OSError, UserError):
  """A bucket, or what should lie there, can't be had."""


BUCKET_WAY_OUT = (
  "Look at the bucket's name, and at who you are (gcloud auth application-default login, or "
  'GOOGLE_APPLICATION_CREDENTIALS).'
)


def brief(value: object, limit: int = 80) -> str:
  """Returns a value from outside as a message may show it: its repr, cut in the middle if long."""
  try:
    text = value if isinstance(value, str) and len(value) > 10 * limit else repr(value)
  except ValueError:  # an integer of too many digits for a text
    text = f'a number of {value.bit_length():,} bits' if isinstance(value, int) else '?'
  if len(text) <= limit:
    return text
  return f'{text[: limit - 20]} … {text[-12:]} ({len(text):,} characters)'


def versions() -> str:
  """Returns a line with the versions that run, for a report of a fault."""
  said = [f'{name} {importlib.metadata.version(name)}' for name in ('gpt2_jax', 'jax')]
  return ', '.join([*said, f'Python {platform.python_version()}'])


def near(name: str, known: Iterable[str]) -> str:
  """Returns '; near it: a, b', the names that are most like an unknown one; '' if none is like it."""
  known, last = list(known), name.rpartition('.')[2]
  found = difflib.get_close_matches(name, known, 3, 0.75)
  found += [
    k
    for k in known
    if k not in found and difflib.SequenceMatcher(None, k.rpartition('.')[2], last).ratio() > 0.75
  ]
  return f'; near it: {", ".join(found[:3])}' if found else ''


# The ways out where the operating system refuses to write, by the number of its error.
WAYS_OUT = {
  'Make room there (or choose another place)': (errno.ENOSPC, errno.EDQUOT),
  'A file may not become so large there: lift the limit (`ulimit -f` shows it), or choose another '
  'place,': (errno.EFBIG,),
  'Choose a place that you may write to (or change its permissions),': (
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
  ),
  'A folder on the way there is missing: make it (or choose another place)': (errno.ENOENT,),
  'A file is where a folder should be, or the other way round: move it away (or choose another '
  'place)': (errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOTEMPTY),
  'Choose a shorter name': (errno.ENAMETOOLONG,),
  'The disk, or the way to it, fails: choose another place': (errno.EIO, errno.ESTALE),
}
NO_WRITE = {number: way for way, numbers in WAYS_OUT.items() for number in numbers}


def _errno(e: Exception) -> int | None:
  """Returns the operating system's error number, also where TensorStore hides it in a text."""
  if isinstance(e, OSError):
    return e.errno
  found = re.search(r"os_error_code='(\d+)'", str(e))
  return int(found[1]) if found else None


@contextlib.contextmanager
def saving(what: str, path: str | os.PathLike):
  """Turns the operating system's refusal to write `path` into a `UserError` with the way out."""
  try:
    yield
  except (OSError, ValueError) as e:
    number = _errno(e)
    if number is None or number not in NO_WRITE:
      raise
    reason = e if isinstance(e, OSError) else os.strerror(number)
    raise UserError(
      f'cannot write {what} to {path}: {reason}. {NO_WRITE[number]} and run the same '
      'command again: what was finished is kept.'
    ) from e

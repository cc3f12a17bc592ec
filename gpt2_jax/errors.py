"""The one kind of error that is meant for the user, not for the debugger."""

import contextlib
import errno
import os


class UserError(ValueError):
  """Something in the input can't be used: the message names the thing and the way out.

  `launch.py` and the command line print the message alone and exit with status 1. Everything
  else that is raised is a defect of the program and keeps its traceback.
  """


@contextlib.contextmanager
def saving(what: str, path: str | os.PathLike):
  """Turns the operating system's refusal to write `path` into a `UserError` with the way out."""
  try:
    yield
  except OSError as e:
    if e.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM,
                       errno.EROFS):
      raise
    raise UserError(
        f'cannot write {what} to {path}: {os.strerror(e.errno)}. Make room there (or choose another '
        'place) and run the same command again: what was finished is kept.') from e

"""What values an option may have, and the errors that say so."""

import dataclasses
import numbers
import operator
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from gpt2_jax.bounds import plain
from gpt2_jax.errors import UserError, brief


@dataclasses.dataclass(frozen=True)
class Range:
  """The values that an option may have."""

  says: str  # after 'must'
  has: Callable[[Any], bool]
  whole: bool = False

  def check(self, name: str, value: Any) -> Any:
    """The value as a NumPy scalar, to be traced.

    Raises:
      UserError: it is none of them.
    """
    value = plain(value)
    kind: Any = numbers.Integral if self.whole else numbers.Real
    finite = (
      isinstance(value, kind)
      and not isinstance(value, bool)
      and abs(value) <= float(np.finfo(np.float32).max)
    )
    if not finite or not self.has(value):
      raise UserError(f'{name} = {brief(value)} must {self.says}.')
    return np.int32(min(value, 1 << 30)) if self.whole else np.float32(value)


POSITIVE = lambda x: x >= np.finfo(np.float32).tiny
AT_LEAST_0 = Range('be a whole number of at least 0', lambda x: x >= 0, whole=True)
AT_LEAST_1 = Range('be a whole number of at least 1', lambda x: x >= 1, whole=True)
ABOVE_0 = Range('be positive', POSITIVE)
FINITE = Range('be a finite number', lambda x: True)


def id_list(name: str, value: Any, V: int) -> list[int]:
  """The ids that an option names: one, several or, if it is None, none.

  Raises:
    UserError: it names something else.
  """
  items = () if value is None else value if isinstance(value, Iterable) else (value,)
  try:
    ids = [operator.index(item) for item in items]
  except TypeError:
    raise UserError(f'{name} = {brief(value)} must be token ids.') from None
  bad = next((i for i in ids if not 0 <= i < V), None)
  if bad is not None:
    raise UserError(f'{name} has token id {brief(bad)}, but the vocabulary has {V} ids.')
  return ids

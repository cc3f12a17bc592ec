"""Kinds of values. Tables of these (name of a knob -> kind) are checked before anything is made.

`config.MODEL` is the table of a model, `training/knobs.py` has those of a run; each verb has one of
its flags. A value comes out as plain Python's own: scalars and dtypes of NumPy and JAX are taken for
what they are.
"""

import contextlib
import dataclasses
import operator
import os
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import ml_dtypes  # noqa: F401  so that NumPy knows the name bfloat16
import numpy as np

from gpt2_jax.core.buckets import place
from gpt2_jax.core.errors import UserError, brief

FLOAT32 = float(np.finfo(np.float32).max)
LARGE = 2**30  # no axis is longer: positions and token ids are int32, also a few beyond the last one
SEED_MOST = 2**64 - 1  # see `seeds.key`


@dataclasses.dataclass(frozen=True)
class Kind:
  """The values that a knob may have."""

  @property
  def says(self) -> str:
    """What the value must do, for a message: what comes after 'must'."""
    raise NotImplementedError

  def take(self, value: Any) -> Any:
    """Returns the value; a TypeError, ValueError or OverflowError if it is not of this kind."""
    raise NotImplementedError

  def check(self, name: str, value: Any, equals: str = ' = ') -> Any:
    """Returns the value, as plain Python's.

    Raises:
      UserError: it is none of them: in one line, with its name and what it must be.
    """
    try:
      return self.take(value)
    except UserError as e:  # of a path
      raise UserError(f'{name}{equals}{e}') from None
    except (TypeError, ValueError, OverflowError):
      shown = ' '.join(brief(value).split('\n'))
      raise UserError(f'{name}{equals}{shown} must {self.says}.') from None


def plain(value: Any) -> Any:
  """Returns a scalar of NumPy's or JAX's as Python's; any other value as it is."""
  return value.item() if getattr(value, 'ndim', None) == 0 and hasattr(value, 'item') else value


def shortened(text: str, most: int = 500) -> str:
  """Returns another library's message, cut in the middle if it is long."""
  return text if len(text) <= most else f'{text[: most - 100]} … {text[-80:]}'


def _demand(holds: bool) -> None:
  if not holds:
    raise ValueError


@dataclasses.dataclass(frozen=True)
class Int(Kind):
  """Whole numbers, both ends among them."""

  low: int
  high: int = LARGE
  words: str = ''  # in place of the ends, where these mean little

  @property
  def says(self) -> str:
    return self.words or f'be a whole number from {self.low:,} to {self.high:,}'

  def take(self, value: Any) -> int:
    value = plain(value)
    _demand(not isinstance(value, bool))
    number = operator.index(value)
    _demand(self.low <= number <= self.high)
    return number


@dataclasses.dataclass(frozen=True)
class Float(Kind):
  """Finite numbers; both ends are among them unless they are open."""

  low: float
  high: float
  open_low: bool = False
  open_high: bool = False
  words: str = ''  # in place of the ends, where these mean little

  @property
  def says(self) -> str:
    if self.words:
      return self.words
    return f'lie in {"[("[self.open_low]}{self.low:g}, {self.high:g}{"])"[self.open_high]}'

  def take(self, value: Any) -> float:
    value = plain(value)
    _demand(not isinstance(value, (bool, str, bytes)))
    number = float(value)
    _demand(self.low <= number <= self.high)
    _demand(not (self.open_low and number == self.low))
    _demand(not (self.open_high and number == self.high))
    return number


AT_LEAST_0 = Int(0, int(FLOAT32), 'be a whole number of at least 0')
AT_LEAST_1 = Int(1, int(FLOAT32), 'be a whole number of at least 1')
FINITE = Float(-FLOAT32, FLOAT32, words='be a finite number')
POSITIVE = Float(float(np.finfo(np.float32).tiny), FLOAT32, words='be positive')


@dataclasses.dataclass(frozen=True)
class Bool(Kind):
  """True or False."""

  @property
  def says(self) -> str:
    return 'be true or false'

  def take(self, value: Any) -> bool:
    value = plain(value)
    _demand(isinstance(value, bool))
    return value


@dataclasses.dataclass(frozen=True)
class Choice(Kind):
  """One of some names."""

  names: Collection[str]  # a dict too, to which names may be added later

  @property
  def says(self) -> str:
    return f'be one of {", ".join(self.names)}'

  def take(self, value: Any) -> str:
    _demand(isinstance(value, str) and value in self.names)
    return str(value)


@dataclasses.dataclass(frozen=True)
class Several(Choice):
  """Some of some names, with commas between; the empty text is none of them."""

  @property
  def says(self) -> str:
    return f"be of {', '.join(self.names)}, with commas between, or '' for none"

  def take(self, value: Any) -> str:
    _demand(isinstance(value, str))
    for name in filter(None, map(str.strip, value.split(','))):
      super().take(name)
    return str(value)


@dataclasses.dataclass(frozen=True)
class DType(Choice):
  """A dtype by one of some names, or by whatever `jnp.dtype` takes for it: `jnp.bfloat16`, say."""

  def take(self, value: Any) -> str:
    _demand(value is not None)  # which NumPy takes for float64
    return super().take(np.dtype(value).name)


@dataclasses.dataclass(frozen=True)
class Text(Kind):
  """Texts that UTF-8 can express."""

  most: int = 2**20  # characters
  empty: bool = True

  @property
  def says(self) -> str:
    return f'be {"a" if self.empty else "no empty"} text of at most {self.most:,} characters in UTF-8'

  def take(self, value: Any) -> str:
    _demand(isinstance(value, str) and len(value) <= self.most and (self.empty or bool(value)))
    value.encode()
    return str(value)


@dataclasses.dataclass(frozen=True)
class Place(Kind):
  """Paths, of this machine or of a bucket, names, and patterns of them."""

  @property
  def says(self) -> str:
    return 'be a path or name: no empty text, no part of it longer than 255 bytes, nor it than 4,095'

  def take(self, value: Any) -> str:
    text = os.fspath(value)
    _demand(isinstance(text, str) and text.strip() != '' and '\0' not in text)
    encoded = text.encode(errors='surrogateescape')
    _demand(len(encoded) < 4096 and all(len(part) < 256 for part in encoded.split(b'/')))
    place(text)
    return value


@dataclasses.dataclass(frozen=True)
class Corpus(Place):
  """Corpora: KIND:REST, or KIND alone; the rest is a place."""

  def take(self, value: Any) -> str:
    _demand(isinstance(value, str))
    kind, _, rest = value.partition(':')
    for part in filter(None, (kind or rest, rest)):
      super().take(part)
    return value


@dataclasses.dataclass(frozen=True)
class Optional(Kind):
  """Values of a kind, or None: then the value is derived."""

  kind: Kind

  @property
  def says(self) -> str:
    return f'{self.kind.says}, or not be set'

  def take(self, value: Any) -> Any:
    return None if value is None else self.kind.take(value)


@dataclasses.dataclass(frozen=True)
class Tuple(Kind):
  """Some values of one kind."""

  kind: Kind
  length: int | None = None

  @property
  def says(self) -> str:
    count = 'values' if self.length is None else f'{self.length} values'
    return f'be a list of {count}, each of which must {self.kind.says}'

  def take(self, value: Any) -> tuple:
    _demand(isinstance(value, (list, tuple)) and self.length in (None, len(value)))
    return tuple(map(self.kind.take, value))


@dataclasses.dataclass(frozen=True)
class OneOrMore(Kind):
  """A value of a kind, or a list of them."""

  kind: Kind

  @property
  def says(self) -> str:
    return f'{self.kind.says}, or be a list of such'

  def take(self, value: Any) -> Any:
    if isinstance(value, (list, tuple)):
      return list(map(self.kind.take, value))
    return self.kind.take(value)


@dataclasses.dataclass(frozen=True)
class Names(Kind):
  """Names by number: a dict of texts or numbers."""

  @property
  def says(self) -> str:
    return 'map numbers to names'

  def take(self, value: Any) -> dict:
    _demand(isinstance(value, dict))
    _demand(all(isinstance(name, (str, int, float)) for name in value.values()))
    return value


Table = Mapping[str, Kind]


def check_all(table: Table, values: Mapping[str, Any], prefix: str = '') -> dict[str, Any]:
  """Returns values by name, each checked by its row of a table; `prefix`: before names in messages.

  Raises:
    UserError: names the first one that can't be; or one that the table has not.
  """
  if unknown := [name for name in values if name not in table]:
    raise UserError(f'there is no {prefix}{brief(unknown[0])}; there is: {", ".join(table)}.')
  return {name: table[name].check(prefix + name, value) for name, value in values.items()}


@contextlib.contextmanager
def errors_of(where: str | os.PathLike) -> Iterator[None]:
  """Puts the name of the file that a value is from before the message of a UserError."""
  try:
    yield
  except UserError as e:
    raise UserError(f'{where}: {e}') from e


def check_flags(table: Table, verb: Any) -> None:
  """Checks the attributes of a verb of the command line that a table names.

  Raises:
    UserError: names the flag, as it is typed.
  """
  for name, kind in table.items():
    kind.check('--' + name.replace('_', '-'), getattr(verb, name), equals=' ')

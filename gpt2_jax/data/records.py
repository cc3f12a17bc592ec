"""Files of records, .jsonl, .json, .csv, .tsv and .parquet: the values of some fields of each.

A record is a line of .jsonl, an element of a .json array (or one of several objects that stand one
behind the other), a row of a table. An empty cell of .csv or .tsv is a null. Where one field is asked
for, a record may be nothing but its value, a text.
"""

import contextlib
import csv
import functools
import json
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from gpt2_jax.core.errors import UserError, brief
from gpt2_jax.data import text_files

FIELDS = (
  'Name the field that holds the text with config.data.text_field (--text-field), that of a '
  'label with config.data.label_field.'
)
HEAD = 4096
ROWS = 256  # of .parquet that are held at a time
SPACE = re.compile(r'[ \t\r\n]*')
JSON_NAMES = {
  dict: 'an object',
  list: 'a list',
  str: 'a text',
  bool: 'true or false',
  type(None): 'null',
}

Record = tuple[int, str, tuple]  # number, place in the file for messages, values of the fields


def kind_of_value(value: object) -> str:
  return JSON_NAMES.get(
    type(value), 'a number' if isinstance(value, (int, float)) else f'of type {type(value).__name__}'
  )


def text_of(value: object, where: str, field: str) -> str:
  """Returns the text of a field, '' for null; anything else is a UserError."""
  if isinstance(value, bytes):
    return text_files.utf8(value, f'{where}: {field!r}')
  if value is not None and not isinstance(value, str):
    raise UserError(
      f'{where}: {field!r} is {kind_of_value(value)}, not a text: {brief(value)}. {FIELDS}'
    )
  return value or ''


def _lacks(where: str, field: str, has: Sequence[str] | None = None) -> UserError:
  said = '' if has is None else f', but the columns {brief(list(has))}'
  return UserError(f'{where} has no field {field!r}{said}. {FIELDS}')


def _pick(record: object, fields: Sequence[str], where: str) -> tuple:
  if isinstance(record, str) and len(fields) == 1:
    return (record,)
  if not isinstance(record, dict):
    raise UserError(f'{where} is {kind_of_value(record)}, not an object: {brief(record)}.')
  lacking = next((field for field in fields if field not in record), None)
  if lacking is not None:
    raise _lacks(where, lacking)
  return tuple(record[field] for field in fields)


# --- JSON -------------------------------------------------------------------------------------


def _loads(line: bytes, where: str) -> Any:
  text = text_files.utf8(line, where)
  try:
    return json.loads(text)
  except (ValueError, RecursionError) as e:
    raise UserError(f'{where}: not a line of JSON ({e}). Mend or remove it.') from e


def jsonl(path: str, fields: Sequence[str]) -> Iterator[Record]:
  """Yields the records of all lines of a file."""
  if is_array(path):
    yield from json_values(path, fields)
    return
  for number, line in text_files.lines(path):
    if line.strip():
      place = f'line {number}'
      yield number, place, _pick(_loads(line, f'{path} {place}'), fields, f'{path} {place}')


def jsonl_between(path: str, start: int, stop: int, fields: Sequence[str]) -> Iterator[Record]:
  """Yields the lines that begin in bytes [start, stop) of a file that is not packed."""
  limit = text_files.MAX_RECORD + 1
  with text_files.reading(path), open(path, 'rb') as f:
    if start:
      f.seek(start - 1)
      while (skipped := f.readline(text_files.CHUNK)) and not skipped.endswith(b'\n'):
        pass
    while (offset := f.tell()) < stop and (line := f.readline(limit)):
      if line.strip():
        place = f'{path} at byte {offset}'
        text_files.check_size(len(line), place)
        yield offset, f'at byte {offset}', _pick(_loads(line, place), fields, place)


def is_array(path: str) -> bool:
  """Whether a file of JSON begins as an array."""
  with text_files.reading(path), text_files.open_unpacked(path) as f:
    return begins_array(f.read(HEAD))


def begins_array(head: bytes) -> bool:
  """Whether the first bytes of a file of JSON, `HEAD` of them, begin an array."""
  return head.removeprefix(text_files.BOM.encode()).lstrip()[:1] == b'['


class _Values:
  """The JSON values in a file, one after the other; few are held in memory at a time."""

  def __init__(self, path: str):
    self.path, self.line = path, 1
    self._parts = text_files.characters(path)
    self._text, self._at = '', 0
    self._decoder = json.JSONDecoder()

  def _more(self) -> bool:
    """Reads as much again as is held, or to the end. Returns whether there was more."""
    held = [self._text[self._at :]]
    for part in self._parts:
      held.append(part)
      if sum(map(len, held[1:])) >= len(held[0]):
        break
    self._text, self._at = ''.join(held), 0
    return len(held) > 1

  def _go(self, to: int) -> None:
    self.line += self._text.count('\n', self._at, to)
    self._at = to

  def peek(self) -> str:
    """Returns the next character that is no space, '' at the end."""
    while True:
      self._go(SPACE.match(self._text, self._at).end())  # pyright: ignore[reportOptionalMemberAccess]
      if self._at < len(self._text):
        return self._text[self._at]
      if not self._more():
        return ''

  def skip(self) -> None:
    self._at += 1

  def value(self) -> Any:
    """Returns the value that begins here."""
    while True:
      try:
        value, end = self._decoder.raw_decode(self._text, self._at)
        if end == len(self._text) and isinstance(value, (int, float)) and self._more():
          continue  # there may be more digits
        self._go(end)
        return value
      except (ValueError, RecursionError) as e:
        at = getattr(e, 'pos', self._at)
        text_files.check_size(len(self._text) - self._at, f'{self.path} line {self.line}')
        broken = at + 100 < len(self._text) and not str(e).startswith('Unterminated')
        if isinstance(e, RecursionError) or broken or not self._more():
          line = self.line + self._text.count('\n', self._at, at)
          raise self.error(f'not JSON ({getattr(e, "msg", e)})', line) from e

  def error(self, why: str, line: int | None = None) -> UserError:
    return UserError(
      f'{self.path} line {line or self.line}: {why}. The file is damaged or cut '
      'short, or no JSON: mend it, or leave it out.'
    )


def json_values(path: str, fields: Sequence[str]) -> Iterator[Record]:
  """Yields the elements of an array, or values one after the other, such as lines of objects."""
  values, number = _Values(path), 0
  array = values.peek() == '['
  if array:
    values.skip()
  while next_ := values.peek():
    if array and next_ == ']' and not number:
      break
    number += 1
    place = f'record {number:,} (line {values.line})'
    yield number, place, _pick(values.value(), fields, f'{path} {place}')
    if array:
      if (next_ := values.peek()) == ']':
        break
      if next_ != ',':
        raise values.error('an array goes on with a comma or ends with ]')
      values.skip()
  else:
    if array:
      raise values.error('the array has no end')
    return
  values.skip()
  if values.peek():
    raise values.error('something stands behind the array')


# --- tables -----------------------------------------------------------------------------------


def _columns(path: str, fields: Sequence[str], names: Sequence[str]) -> list[int]:
  for field in fields:
    if field not in names:
      raise _lacks(path, field, names)
    if names.count(field) > 1:
      raise UserError(f'{path} has {names.count(field)} columns {field!r}: rename all but one.')
  return [names.index(field) for field in fields]


def table(path: str, fields: Sequence[str], delimiter: str) -> Iterator[Record]:
  """Yields the rows of .csv and .tsv, whose first row has the names of the columns."""
  csv.field_size_limit(text_files.MAX_RECORD)
  held = begins = 0

  def texts() -> Iterator[str]:
    nonlocal held
    for number, line in text_files.lines(path):
      held += len(line)
      if held > text_files.MAX_RECORD:
        raise UserError(
          f'{path} line {begins + 1}: a row of more than {text_files.MAX_RECORD:,} '
          'bytes begins here. Is there a quotation mark that nothing closes?'
        )
      text = text_files.decode(line, f'{path} line {number}')
      yield text if number > 1 else text.removeprefix(text_files.BOM)

  reader, names, columns = csv.reader(texts(), delimiter=delimiter, strict=True), None, []
  try:
    for row in reader:
      place = f'line {begins + 1}'
      held, begins = 0, reader.line_num
      if not row:
        continue
      if names is None:
        names, columns = row, _columns(path, fields, row)
      elif len(row) != len(names):
        raise UserError(
          f'{path} {place} has {len(row)} columns, the first line {len(names)}: a text '
          'with a comma, tab or line end in it is to stand between quotation marks.'
        )
      else:
        yield begins, place, tuple(row[column] or None for column in columns)
  except csv.Error as e:
    raise UserError(
      f'{path} line {begins + 1}: {e}. A text with a quotation mark in it is to stand between '
      'quotation marks, and the one in it is to be doubled.'
    ) from e


@contextlib.contextmanager
def _reading_parquet(path: str):
  try:
    import pyarrow
  except ImportError as e:
    raise text_files.missing('pyarrow', path) from e
  try:
    yield
  except UserError:
    raise
  except (pyarrow.ArrowException, OSError, ValueError, KeyError, OverflowError) as e:
    raise text_files.damaged(path, str(e).strip().split('\n')[0][:200]) from e


def open_parquet(path: str, file: Any = None) -> Any:
  """Opens a file of Parquet; `file`: the open file, where `path` is none of this machine."""
  with _reading_parquet(path):
    import pyarrow.parquet

    return pyarrow.parquet.ParquetFile(file or path, page_checksum_verification=True)


def parquet(path: str, start: int, stop: int | None, fields: Sequence[str]) -> Iterator[Record]:
  """Yields the rows of row groups [start, stop)."""
  with open_parquet(path) as file, _reading_parquet(path):
    _columns(path, fields, file.schema_arrow.names)
    number = sum(file.metadata.row_group(i).num_rows for i in range(start))
    groups = range(start, file.metadata.num_row_groups if stop is None else stop)
    for batch in file.iter_batches(ROWS, row_groups=list(groups), columns=list(fields)):
      for values in zip(*(batch.column(field).to_pylist() for field in fields)):
        number += 1
        yield number, f'row {number:,}', values


READERS: dict[str, Callable[[str, Sequence[str]], Iterator[Record]]] = {
  'jsonl': jsonl,
  'json': json_values,
  'csv': functools.partial(table, delimiter=','),
  'tsv': functools.partial(table, delimiter='\t'),
  'parquet': lambda path, fields: parquet(path, 0, None, fields),
}

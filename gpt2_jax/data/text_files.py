"""Files of text: which suffixes there are, and their content in bounded pieces, packed or not.

What a file holds is decided by its name: `x.jsonl.zst` is .jsonl, packed by Zstandard. Text is UTF-8;
a byte order mark is dropped. Whatever a file holds, one gets its text or a `UserError`, and no more
memory than a document wants.
"""

import bz2
import codecs
import contextlib
import dataclasses
import functools
import gzip
import io
import lzma
import os
import zlib
from collections.abc import Iterator
from pathlib import PurePath
from typing import Any, BinaryIO

from gpt2_jax.core.errors import UserError

FORMATS = {
  '.txt': 'text',
  '.md': 'text',
  '.py': 'text',
  '.jsonl': 'jsonl',
  '.ndjson': 'jsonl',
  '.json': 'json',
  '.csv': 'csv',
  '.tsv': 'tsv',
  '.parquet': 'parquet',
}
PACKED = ('.gz', '.zst', '.xz', '.bz2')
ARCHIVES = ('.zip', '.tar', '.tgz', '.txz', '.7z', '.rar')
CHUNK = 2**20
LONG = 8 * 2**20  # characters from which on a text is not held as a whole
MAX_RECORD = 128 * 2**20  # bytes of a line, or characters of a value of JSON or a row of .csv
MAX_WINDOW = 2**31  # bytes that Zstandard may look back: what `zstd --long=31` needs
BOM = '\ufeff'


def kind_of(path: str) -> tuple[str | None, str]:
  """Returns (format, packing) of a file by its name; None and '' if they are not known."""
  path = path.lower()
  packing = next((suffix for suffix in PACKED if path.endswith(suffix)), '')
  kind = FORMATS.get(PurePath(path.removesuffix(packing)).suffix)
  return (None if packing and kind == 'parquet' else kind), packing


def kind_of_named(path: str) -> tuple[str, str]:
  """Returns as `kind_of`, of a file that the user names: plain text if it is of no other kind.

  Raises:
    UserError: it is an archive.
  """
  kind, packing = kind_of(path)
  inner = path.lower().removesuffix(packing)
  if kind is None and inner.endswith((*ARCHIVES, '.parquet')):
    raise UserError(f'{path} is to be unpacked first: name the files that are in it.')
  return kind or 'text', packing


# --- errors -----------------------------------------------------------------------------------


def missing(package: str, path: str) -> UserError:
  return UserError(f'{path} needs the package {package}: pip install {package}.')


def damaged(path: str, why: object) -> UserError:
  return UserError(f'{path} is damaged or cut short ({why}): fetch it again, or leave it out.')


def _zstandard(path: str) -> Any:
  try:
    import zstandard  # part of the extra `data`
  except ImportError as e:
    raise missing('zstandard', path) from e
  return zstandard


@contextlib.contextmanager
def reading(path: str) -> Iterator[None]:
  """Turns the errors of the system and the unpackers into a UserError that names the file."""
  errors = (zlib.error, lzma.LZMAError, EOFError, gzip.BadGzipFile)
  if kind_of(path)[1] == '.zst':
    errors += (_zstandard(path).ZstdError,)
  try:
    yield
  except errors as e:
    raise damaged(path, e) from e
  except OSError as e:
    if e.errno is None:  # bz2 says so
      raise damaged(path, e) from e
    raise UserError(f"{path} can't be read: {e.strerror}. Mend that, or leave it out.") from e


def _not_utf8(where: str, offset: int, byte: int, head: bytes) -> UserError:
  utf16 = offset < 2 and head[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
  return UserError(
    f'{where} is not UTF-8 (byte {offset}: {byte:#04x}){", but UTF-16" * utf16}. '
    f'Convert it, for example with iconv {"-f utf-16 " * utf16}-t utf-8, or leave it '
    'out.'
  )


def decode(content: bytes, where: str) -> str:
  """Returns the text of a file or line `where`; a UserError if it is not UTF-8."""
  try:
    return content.decode()
  except UnicodeDecodeError as e:
    raise _not_utf8(where, e.start, content[e.start], content) from e


def utf8(content: bytes, where: str) -> str:
  """Returns as `decode`, without a byte order mark."""
  return decode(content, where).removeprefix(BOM)


# --- content ----------------------------------------------------------------------------------


class _Zstandard(io.RawIOBase):
  """The frames of a file, one behind the other. Unlike the package's reader it says if the last one
  is cut short. It is fed with little at a time, as a few bytes may stand for megabytes.
  """

  FEED = 4096

  def __init__(self, file: BinaryIO, path: str):
    self._file, self._package = file, _zstandard(path)
    self._decoder: Any = None
    self._in, self._out = b'', memoryview(b'')

  def readable(self) -> bool:
    return True

  def close(self) -> None:
    self._file.close()
    super().close()

  def readinto(self, buffer) -> int:
    while not self._out:
      packed = self._in or self._file.read(self.FEED)
      if not packed:
        if self._decoder is None or not self._decoder.eof:
          raise EOFError('it ends in the middle of a frame')
        return 0
      if self._decoder is None or self._decoder.eof:
        self._decoder = self._package.ZstdDecompressor(max_window_size=MAX_WINDOW).decompressobj()
      self._out = memoryview(self._decoder.decompress(packed))
      self._in = self._decoder.unused_data
    n = min(len(buffer), len(self._out))
    buffer[:n], self._out = self._out[:n], self._out[n:]
    return n


def open_unpacked(path: str) -> Any:
  """Opens a file as a binary stream, unpacked as its name says. To be used inside `reading`."""
  packing = kind_of(path)[1]
  if packing and not os.path.getsize(path):
    raise EOFError('it is empty')  # which gzip takes for a file without a member
  if packing == '.zst':
    return io.BufferedReader(_Zstandard(open(path, 'rb'), path), CHUNK)
  return {'': open, '.gz': gzip.open, '.xz': lzma.open, '.bz2': bz2.open}[packing](path, 'rb')


def read_whole(path: str, limit: int = 2**30) -> bytes:
  """Returns all of a file, unpacked.

  Raises:
    UserError: it can't be read, or holds more than `limit` bytes.
  """
  with reading(path), open_unpacked(path) as f:
    content = f.read(limit + 1)
  if len(content) > limit:
    raise UserError(f'{path} holds more than {limit:,} bytes, which is too much for its kind.')
  return content


def characters(path: str) -> Iterator[str]:
  """Yields the text of a file, in pieces of about a million characters."""
  decoder, done, head = codecs.getincrementaldecoder('utf-8')(), 0, b''
  with reading(path), open_unpacked(path) as f:
    while True:
      chunk = f.read(CHUNK)
      kept = len(decoder.getstate()[0])
      head = head or chunk[:2]
      try:
        text = decoder.decode(chunk, final=not chunk)
      except UnicodeDecodeError as e:
        raise _not_utf8(path, done - kept + e.start, e.object[e.start], head) from e
      if text := (text if done else text.removeprefix(BOM)):
        yield text
      done += len(chunk)
      if not chunk:
        return


def lines(path: str) -> Iterator[tuple[int, bytes]]:
  """Yields (number, line with its end) of each line of a file."""
  with reading(path), open_unpacked(path) as f:
    number = 0
    while line := f.readline(MAX_RECORD + 1):
      number += 1
      check_size(len(line), f'{path} line {number}')
      yield number, line


def check_size(size: int, where: str) -> None:
  """Raises a UserError for a line or value that is too long to be held."""
  if size > MAX_RECORD:
    raise UserError(
      f'{where} is longer than {MAX_RECORD:,} bytes: it is too long for one document, '
      'or it is no such file. Cut it, or save it as plain text.'
    )


@dataclasses.dataclass(frozen=True)
class LongText:
  """The text of a file of plain text that is not held in memory: characters [start, stop)."""

  path: str
  start: int = 0
  stop: int | None = None

  @functools.cached_property
  def _size(self) -> int:
    return sum(map(len, characters(self.path))) if self.stop is None else self.stop

  def __len__(self) -> int:
    return self._size - self.start

  def parts(self) -> Iterator[str]:
    """Yields the text, piece by piece."""
    at = 0
    for part in characters(self.path):
      if self.stop is not None and at >= self.stop:
        return
      stop = None if self.stop is None else self.stop - at
      if cut := part[max(0, self.start - at) : stop]:
        yield cut
      at += len(part)

  def cut(self, at: int) -> tuple['LongText', 'LongText']:
    """Returns the text up to the last line that begins before or at `at`, and the rest."""
    begins = done = 0
    for part in self.parts():
      head = part[: at - done]
      if '\n' in head:
        begins = done + head.rindex('\n') + 1
      done += len(part)
      if done >= at:
        break
    edge = self.start + (begins or at)
    return LongText(self.path, self.start, edge), LongText(self.path, edge, self._size)


def plain_text(path: str) -> str | LongText:
  """Returns the text of a file of plain text; a long one as a `LongText`."""
  found, size = [], 0
  for part in characters(path):
    found.append(part)
    size += len(part)
    if size > LONG:
      return LongText(path)
  return ''.join(found)

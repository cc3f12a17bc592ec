"""Where text comes from. A corpus is named by a spec:

- `stdlib`: the sources of the running Python's standard library: real text without a download.
- `text:PATTERN`: files, folders or globs (`**` too) of .txt, .md, .py, .jsonl[.gz|.zst], .parquet.
  A file of plain text is one document; so is a line of .jsonl and a row of .parquet.
- `tfds:NAME[/CONFIG]`, or `tfds:FOLDER` for a prepared one: split `train` of a dataset of TensorFlow
  Datasets in array_record format, read without TensorFlow.
- `bin:FOLDER`: tokens, as nanoGPT (`train.bin`, `val.bin`) or llm.c (`*_train_*.bin`) left them.

A corpus is cut into pieces, which can be read in any order and in other processes.
"""

import dataclasses
import glob
import gzip
import io
import json
import os
import platform
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from gpt2_jax.data import store
from gpt2_jax.errors import UserError

PIECE_BYTES = 16 * 2**20
DATA_FIELDS = 'Name the field that holds the text with config.data.text_field (--text-field).'


@dataclasses.dataclass(frozen=True)
class Piece:
  """A part of a corpus: `start` to `stop` of a file, in the unit that its reader counts in."""

  reader: str  # a key of READERS
  path: str
  start: int
  stop: int
  bytes: int  # about how much text it is, for progress


@dataclasses.dataclass(frozen=True)
class Document:
  """A text, or tokens where the corpus holds tokens."""

  text: str | np.ndarray
  split: str | None = None  # where the corpus says to which split it belongs


@dataclasses.dataclass(frozen=True)
class Corpus:
  """What a spec stands for. `identity` says which text it is, for humans and for comparison."""

  spec: str
  licence: str
  identity: dict
  pieces: list[Piece]


def slug(spec: str) -> str:
  """A name for files and folders that says which corpus it is."""
  spec = f'stdlib-{platform.python_version()}' if spec == 'stdlib' else spec
  return ''.join(c if c.isalnum() or c in '.-' else '-' for c in spec).strip('-.').lower()


# --- readers: Piece, field -> documents -------------------------------------------------------


def utf8(content: bytes, where: str) -> str:
  """The text of a file or line `where`, without a byte order mark; a UserError if it is not UTF-8."""
  try:
    return content.decode('utf-8-sig')
  except UnicodeDecodeError as e:
    raise UserError(f'{where} is not UTF-8 (byte {e.start}: {content[e.start]:#04x}). Convert it, '
                    'for example with iconv -t utf-8, or leave it out.') from e


def _read_text(piece: Piece, field: str) -> Iterator[Document]:
  yield Document(utf8(Path(piece.path).read_bytes(), piece.path))


def _parse_line(line: bytes, where: str, field: str) -> Document:
  try:
    return Document(json.loads(utf8(line, where))[field])
  except json.JSONDecodeError as e:
    raise UserError(f'{where}: not a line of JSON ({e}).') from e
  except (KeyError, TypeError) as e:
    raise UserError(f'{where} has no field {field!r}. {DATA_FIELDS}') from e


def _read_jsonl(piece: Piece, field: str) -> Iterator[Document]:
  """The lines that begin in [start, stop) bytes."""
  with open(piece.path, 'rb') as f:
    if piece.start:
      f.seek(piece.start - 1)
      f.readline()
    while (offset := f.tell()) < piece.stop and (line := f.readline()):
      if line.strip():
        yield _parse_line(line, f'{piece.path} at byte {offset}', field)


def _read_jsonl_packed(piece: Piece, field: str) -> Iterator[Document]:
  try:
    if piece.path.endswith('.zst'):
      import zstandard  # part of the extra `data`
      lines = io.BufferedReader(zstandard.open(piece.path, 'rb'))
    else:
      lines = gzip.open(piece.path, 'rb')
    with lines:
      for number, line in enumerate(lines, 1):
        if line.strip():
          yield _parse_line(line, f'{piece.path} line {number}', field)
  except ImportError as e:
    raise _missing('zstandard', piece.path) from e
  except (EOFError, gzip.BadGzipFile) as e:
    raise UserError(f'{piece.path} is damaged or cut short ({e}): fetch it again.') from e


def _missing(package: str, path: str) -> UserError:
  return UserError(f'{path} needs the package {package}: pip install {package}.')


def _parquet(path: str):
  try:
    import pyarrow.parquet  # part of the extra `data`
  except ImportError as e:
    raise _missing('pyarrow', path) from e
  try:
    return pyarrow.parquet.ParquetFile(path)
  except (pyarrow.ArrowInvalid, OSError) as e:
    raise UserError(f'{path} is damaged or cut short ({e}): fetch it again.') from e


def _read_parquet(piece: Piece, field: str) -> Iterator[Document]:
  file = _parquet(piece.path)
  if field not in file.schema_arrow.names:
    raise UserError(f'{piece.path} has the columns {file.schema_arrow.names}, not {field!r}. '
                    f'{DATA_FIELDS}')
  for group in range(piece.start, piece.stop):
    for value in file.read_row_group(group, columns=[field])[field]:
      yield Document(value.as_py() or '')


def _tfds_builder(name: str) -> Any:
  import tensorflow_datasets as tfds
  if Path(name).is_dir():
    return tfds.builder_from_directory(name)
  from gpt2_jax.data import builders  # noqa: F401  its classes are known by name once imported
  tfds.text  # noqa: B018  the builders of text are known only once this was touched
  return tfds.builder(name, file_format='array_record')


def _read_tfds(piece: Piece, field: str) -> Iterator[Document]:
  source: Any = _tfds_builder(piece.path).as_data_source('train')
  for i in range(piece.start, piece.stop):
    try:
      text = source[i][field]
    except KeyError as e:
      raise UserError(f'tfds:{piece.path} has the features {sorted(source[i])}, not {field!r}. '
                      f'{DATA_FIELDS}') from e
    yield Document(utf8(text, f'tfds:{piece.path} {i}') if isinstance(text, bytes) else text)


def _read_bin(piece: Piece, field: str) -> Iterator[Document]:
  """Documents of a token file: each begins after, or with, an <|endoftext|> of GPT-2's."""
  shard = store.foreign_shard(Path(piece.path))
  tokens = shard.array()
  split = 'val' if 'val' in Path(piece.path).name else 'train'
  (ends,) = np.nonzero(tokens == store.GPT2_EOT)
  for start, stop in zip([0, *(ends + 1)], [*ends, len(tokens)]):
    if stop > start:
      yield Document(np.asarray(tokens[start:stop]), split)


READERS: dict[str, Callable[[Piece, str], Iterator[Document]]] = {
    'text': _read_text, 'jsonl': _read_jsonl, 'jsonl packed': _read_jsonl_packed,
    'parquet': _read_parquet, 'tfds': _read_tfds, 'bin': _read_bin,
}
SUFFIXES = {
    '.txt': 'text', '.md': 'text', '.py': 'text', '.jsonl': 'jsonl', '.jsonl.gz': 'jsonl packed',
    '.jsonl.zst': 'jsonl packed', '.parquet': 'parquet',
}


def documents(piece: Piece, field: str) -> Iterator[Document]:
  """The documents of a piece, in order."""
  return READERS[piece.reader](piece, field)


# --- specs: which pieces there are ------------------------------------------------------------


def _reader_of(path: str) -> str | None:
  return next((r for suffix, r in SUFFIXES.items() if path.lower().endswith(suffix)), None)


def _cut(path: str) -> Iterator[Piece]:
  size, reader = os.path.getsize(path), _reader_of(path) or 'text'
  if reader == 'jsonl':
    for start in range(0, size, PIECE_BYTES):
      stop = min(start + PIECE_BYTES, size)
      yield Piece(reader, path, start, stop, stop - start)
  elif reader == 'parquet':
    meta = _parquet(path).metadata
    for group in range(meta.num_row_groups):
      yield Piece(reader, path, group, group + 1, meta.row_group(group).total_byte_size)
  else:
    yield Piece(reader, path, 0, size, size)


def _files(spec: str, paths: list[str], licence: str) -> Corpus:
  listing = [(path, os.path.getsize(path), os.stat(path).st_mtime_ns) for path in paths]
  return Corpus(spec, licence, {'files': listing}, [p for path in paths for p in _cut(path)])


def _open_text(spec: str, pattern: str) -> Corpus:
  """Files in sorted order. A file named outright may have any suffix and is then plain text."""
  pattern = os.path.expanduser(pattern)
  if os.path.isfile(pattern):
    return _files(spec, [pattern], 'unstated')
  if os.path.isdir(pattern):
    pattern = os.path.join(glob.escape(pattern), '**')
  found = sorted(path for path in glob.glob(pattern, recursive=True) if os.path.isfile(path))
  paths = [path for path in found if _reader_of(path)]
  if not paths:
    raise UserError(
        f'corpus {spec!r}: ' + (f'none of the {len(found)} files there ends in one of '
                                f'{", ".join(SUFFIXES)}.' if found else 'no such file or folder.'))
  return _files(spec, paths, 'unstated')


def _open_stdlib(spec: str, _: str) -> Corpus:
  root = Path(sysconfig.get_path('stdlib'))
  skip = {'site-packages', 'dist-packages', 'test', 'tests', 'idle_test', '__pycache__',
          'encodings', 'pydoc_data'}  # the last two are tables
  paths = []
  for folder, folders, names in os.walk(root):
    folders[:] = [name for name in folders if name not in skip]  # not entered: what is installed
    paths += [Path(folder, name) for name in names if name.endswith('.py')]
  paths = sorted(path for path in paths if path.stat().st_size)
  corpus = _files(spec, [str(path) for path in paths], 'PSF-2.0')
  listing = [(str(p.relative_to(root)), p.stat().st_size) for p in paths]
  return dataclasses.replace(
      corpus, identity={'python': platform.python_version(), 'files': listing})


def _open_tfds(spec: str, name: str) -> Corpus:
  try:
    builder = _tfds_builder(name)
    builder.download_and_prepare()
    examples = builder.info.splits['train'].num_examples
  except UserError:  # of a builder of ours
    raise
  except Exception as e:  # the library raises kinds of its own for each of many causes
    raise UserError(f'corpus {spec!r} can\'t be had: {type(e).__name__}: '
                    f'{str(e).strip().splitlines()[0] if str(e) else ""}. See the catalog of '
                    'TensorFlow Datasets for its name, and docs/data.md for what works without '
                    'TensorFlow.') from e
  step = 10_000
  mean = builder.info.dataset_size / max(1, examples)
  pieces = [Piece('tfds', name, start, min(start + step, examples),
                  int(mean * (min(start + step, examples) - start)))
            for start in range(0, examples, step)]
  licence = getattr(builder, 'licence', 'see its page in the catalog of TensorFlow Datasets')
  return Corpus(spec, licence,
                {'tfds': builder.info.full_name, 'examples': examples}, pieces)


def _open_bin(spec: str, folder: str) -> Corpus:
  paths = [str(path) for paths in store.foreign_files(Path(folder)).values() for path in paths]
  if not paths:
    raise UserError(f'corpus {spec!r}: no train.bin (nanoGPT) or *_train_*.bin (llm.c) there.')
  corpus = _files(spec, paths, 'unstated')
  return dataclasses.replace(
      corpus, pieces=[dataclasses.replace(p, reader='bin') for p in corpus.pieces])


KINDS = {'stdlib': _open_stdlib, 'text': _open_text, 'tfds': _open_tfds, 'bin': _open_bin}


def open_corpus(spec: str) -> Corpus:
  """The corpus that a spec names.

  Raises:
    UserError: no such corpus, or nothing in it.
  """
  kind, _, rest = spec.partition(':')
  if kind not in KINDS or (kind != 'stdlib' and not rest):
    raise UserError(f'corpus {spec!r} is none of: stdlib, text:PATTERN, tfds:NAME, bin:FOLDER.')
  return KINDS[kind](spec, rest)

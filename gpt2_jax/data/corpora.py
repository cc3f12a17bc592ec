"""Where text comes from: the extension point for corpora (docs/extending.md). A spec names one:

- `stdlib`: the sources of the running Python's standard library: real text without a download.
- `text:PATTERN`: a file, a folder, or a glob (`**` too) of .txt, .md, .py, .jsonl, .json, .csv, .tsv,
  each also packed (.gz, .zst, .xz, .bz2), and .parquet. A file of plain text is one document; so is a
  line of .jsonl, an element of .json, a row of a table.
- `tfds:NAME[/CONFIG]`, or `tfds:FOLDER` for a prepared one: split `train` of a dataset of TensorFlow
  Datasets in array_record format, read without TensorFlow.
- `bin:FOLDER`: tokens, as nanoGPT (`train.bin`, `val.bin`) or llm.c (`*_train_*.bin`) left them.

What comes after the colon may lie in a bucket (gs://…): files are copied from there as they are read.
A corpus is cut into pieces, which can be read in any order and in other processes.
"""

import concurrent.futures
import contextlib
import dataclasses
import os
import platform
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from gpt2_jax.core import buckets
from gpt2_jax.core.buckets import THREADS, fetched, filesystem, is_bucket, reading
from gpt2_jax.core.errors import UserError
from gpt2_jax.data import far_files, listing, records, shards, text_files
from gpt2_jax.data.text_files import LongText

PIECE_BYTES, PIECE_EXAMPLES = 16 * 2**20, 10_000


@dataclasses.dataclass(frozen=True)
class Piece:
  """A part of a corpus: `start` to `stop` of what lies at `path`, in the unit of its reader."""

  reader: str  # a key of READERS
  path: str
  start: int
  stop: int
  bytes: int  # about how much text it is, for progress


@dataclasses.dataclass(frozen=True)
class Document:
  """A text, or tokens where the corpus holds tokens; empty where the corpus has a null."""

  text: str | LongText | np.ndarray
  split: str | None = None  # where the corpus says to which split it belongs


@dataclasses.dataclass(frozen=True)
class Corpus:
  """A text, or several, as a spec names it.

  Attributes:
    identity: JSON that says which text it is, for readers and to notice a change.
    notes: lines for the user, on files that are passed over.
    is_tokens: whether its documents are GPT-2's tokens, not texts.
  """

  spec: str
  licence: str
  identity: dict
  pieces: list[Piece]
  notes: tuple[str, ...] = ()
  is_tokens: bool = False


def slug(spec: str) -> str:
  """Returns a name for files and folders that says which corpus it is."""
  spec = f'stdlib-{platform.python_version()}' if spec == 'stdlib' else spec
  return ''.join(c if c.isalnum() or c in '.-' else '-' for c in spec).strip('-.').lower()


# --- How a piece is read: (piece, name of the field with the text) -> documents ----------------


def _read_text(piece: Piece, field: str) -> Iterator[Document]:
  yield Document(text_files.plain_text(piece.path))


def _read_records(piece: Piece, field: str) -> Iterator[Document]:
  """Yields the records of a file, or of the part of it that the piece is."""
  if piece.reader == 'jsonl cut':
    found = records.jsonl_between(piece.path, piece.start, piece.stop, [field])
  elif piece.reader == 'parquet':
    found = records.parquet(piece.path, piece.start, piece.stop, [field])
  else:
    found = records.READERS[piece.reader](piece.path, [field])
  for _, place, (value,) in found:
    yield Document(records.text_of(value, f'{piece.path} {place}', field))


def _tfds_builder(name: str) -> Any:
  try:
    import tensorflow_datasets as tfds
  except ModuleNotFoundError as e:
    raise UserError(
      f"tfds:{name} needs TensorFlow Datasets ({e}): pip install 'gpt2_jax[tfds]'."
    ) from e
  if is_bucket(name):
    with reading(name):
      name = str(fetched(buckets.place(name)))
  if Path(name).is_dir():
    return tfds.builder_from_directory(name)
  from gpt2_jax.data import tfds_builders  # noqa: F401  its classes are known by name once imported

  tfds.text  # noqa: B018  the builders of text are known only once this was touched
  return tfds.builder(name, file_format='array_record')


def _read_tfds(piece: Piece, field: str) -> Iterator[Document]:
  try:
    source: Any = _tfds_builder(piece.path).as_data_source('train')
    examples = (source[i] for i in range(piece.start, piece.stop))
    for i, example in enumerate(examples, piece.start):
      if field not in example:
        raise UserError(
          f'tfds:{piece.path} has the features {sorted(example)}, not {field!r}. {records.FIELDS}'
        )
      yield Document(records.text_of(example[field], f'tfds:{piece.path} {i}', field))
  except UserError:
    raise
  except Exception as e:  # the library raises kinds of its own, and array_record others
    raise UserError(f"tfds:{piece.path} can't be read: {_first_line(e)}. Prepare it anew.") from e


def _read_bin(piece: Piece, field: str) -> Iterator[Document]:
  """Yields the documents of a token file: each begins after, or with, an <|endoftext|> of GPT-2's."""
  path = Path(piece.path)
  tokens = shards.foreign_shard(path).array()
  split = 'val' if path.name == 'val.bin' or path.match('*_val_*.bin') else 'train'
  (ends,) = np.nonzero(tokens == shards.GPT2_EOT)
  for start, stop in zip([0, *(ends + 1)], [*ends, len(tokens)]):
    if stop > start:
      yield Document(np.asarray(tokens[start:stop]), split)


READERS: dict[str, Callable[[Piece, str], Iterator[Document]]] = {
  'text': _read_text,
  'tfds': _read_tfds,
  'bin': _read_bin,
  'jsonl cut': _read_records,
  **dict.fromkeys(records.READERS, _read_records),
}


def documents(piece: Piece, field: str) -> Iterator[Document]:
  """Yields the documents of a piece, in order; `field`: the name of the field that holds the text."""
  if piece.reader == 'tfds':  # which has a reader of files of its own
    yield from _read_tfds(piece, field)
    return
  with far_files.at_hand(piece.path) as path:
    yield from READERS[piece.reader](dataclasses.replace(piece, path=path), field)


# --- How a spec is opened: (spec, what is after its colon) -> corpus ---------------------------


def _cut(file: listing.File) -> Iterator[Piece]:
  path, kind, size = file.path, file.kind, file.size
  if kind == 'jsonl' and not text_files.kind_of(path)[1] and not _is_array(path):
    for start in range(0, size, PIECE_BYTES):
      stop = min(start + PIECE_BYTES, size)
      yield Piece('jsonl cut', path, start, stop, stop - start)
  elif kind == 'parquet':
    with _open_parquet(path) as opened:
      sizes = [
        opened.metadata.row_group(i).total_byte_size for i in range(opened.metadata.num_row_groups)
      ]
    yield from (Piece(kind, path, i, i + 1, size) for i, size in enumerate(sizes))
  else:
    yield Piece(kind, path, 0, size, size)


def _is_array(path: str) -> bool:
  if is_bucket(path):
    return records.begins_array(far_files.head(path, records.HEAD))
  return records.is_array(path)


@contextlib.contextmanager
def _open_parquet(path: str) -> Iterator[Any]:
  with contextlib.ExitStack() as open_files:
    file = None
    if is_bucket(path):  # little more than its end is read
      open_files.enter_context(reading(path))
      there = filesystem(buckets.place(path)).open(path, 'rb', block_size=2**18)
      file = open_files.enter_context(there)
    yield open_files.enter_context(records.open_parquet(path, file))


def _files(spec: str, files: list[listing.File], licence: str) -> Corpus:
  identity = [(file.path, file.size, file.mtime_ns) for file in files]
  with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:  # a bucket takes its time for each
    far = bool(files) and is_bucket(files[0].path)
    cut = (pool.map if far else map)(lambda file: list(_cut(file)), files)
    pieces = [piece for some in cut for piece in some]
  return Corpus(spec, licence, {'files': identity}, pieces)


def _open_text(spec: str, pattern: str) -> Corpus:
  files, notes = listing.find(spec, pattern)
  return dataclasses.replace(_files(spec, files, 'unstated'), notes=notes)


def _open_stdlib(spec: str, _: str) -> Corpus:
  root = Path(sysconfig.get_path('stdlib'))
  skip = set('site-packages dist-packages test tests idle_test __pycache__'.split())
  skip |= {'encodings', 'pydoc_data'}  # tables
  paths = []
  for folder, folders, names in os.walk(root):
    folders[:] = [name for name in folders if name not in skip]  # not entered: what is installed
    paths += [Path(folder, name) for name in names if name.endswith('.py')]
  files = [listing.named(str(path), 'text') for path in sorted(paths) if path.is_file()]
  files = [file for file in files if file.size]
  corpus = _files(spec, files, 'PSF-2.0')
  sizes = [(str(Path(file.path).relative_to(root)), file.size) for file in files]
  return dataclasses.replace(corpus, identity={'python': platform.python_version(), 'files': sizes})


def _first_line(e: Exception) -> str:
  return f'{type(e).__name__}: {(str(e).strip().splitlines() or [""])[0][:300]}'


def _open_tfds(spec: str, name: str) -> Corpus:
  try:
    builder = _tfds_builder(name)
    builder.download_and_prepare()
    examples = builder.info.splits['train'].num_examples
  except UserError:  # of a builder of ours
    raise
  except Exception as e:  # the library raises kinds of its own for each of many causes
    raise UserError(
      f"corpus {spec!r} can't be had: {_first_line(e)}. See the catalog of TensorFlow "
      'Datasets for its name, and docs/data.md for what works without that.'
    ) from e
  mean = builder.info.dataset_size / max(1, examples)
  edges = [*range(0, examples, PIECE_EXAMPLES), examples]
  pieces = [Piece('tfds', name, a, b, int(mean * (b - a))) for a, b in zip(edges, edges[1:])]
  licence = getattr(builder, 'licence', 'see its page in the catalog of TensorFlow Datasets')
  return Corpus(spec, licence, {'tfds': builder.info.full_name, 'examples': examples}, pieces)


def _open_bin(spec: str, folder: str) -> Corpus:
  paths = [
    str(path) for paths in shards.foreign_files(buckets.place(folder)).values() for path in paths
  ]
  if not paths:
    raise UserError(f'corpus {spec!r}: no train.bin (nanoGPT) or *_train_*.bin (llm.c) there.')
  corpus = _files(spec, [listing.named(path, 'bin') for path in paths], 'unstated')
  return dataclasses.replace(corpus, is_tokens=True)


# What is before the colon of a spec -> what is after it (none: ''), and how the corpus is opened.
CORPORA: dict[str, tuple[str, Callable[[str, str], Corpus]]] = {
  'stdlib': ('', _open_stdlib),
  'text': ('PATTERN', _open_text),
  'tfds': ('NAME', _open_tfds),
  'bin': ('FOLDER', _open_bin),
}


def open_corpus(spec: str) -> Corpus:
  """Opens the corpus that a spec names.

  Raises:
    UserError: no such corpus, or nothing in it.
  """
  kind, _, rest = spec.partition(':')
  wanted, opener = CORPORA.get(kind, ('', None))
  if opener is None or (wanted and not rest):
    specs = (f'{name}:{after}' if after else name for name, (after, _) in CORPORA.items())
    raise UserError(f'corpus {spec!r} is none of: {", ".join(specs)}.')
  return opener(spec, rest)

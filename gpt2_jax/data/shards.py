"""Files of tokens: shards of a token store, and those of nanoGPT and llm.c."""

import bisect
import dataclasses
import functools
import hashlib
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from gpt2_jax.core.buckets import AnyPath, content, filesystem, is_bucket
from gpt2_jax.core.errors import UserError
from gpt2_jax.data import shard_files
from gpt2_jax.data.bucket_shards import BucketShards
from gpt2_jax.tokenizer.bpe import GPT2_SIZE

GPT2_EOT = GPT2_SIZE - 1
LLMC_MAGIC, LLMC_HEADER_BYTES = 20240520, 1024
LLMC_LLAMA = 20240801  # magic number of llm.c's files for Llama 3: uint32, another vocabulary


@dataclasses.dataclass(frozen=True)
class Shard:
  """A run of tokens in a file."""

  path: AnyPath
  tokens: int
  dtype: str
  offset: int = 0  # bytes before the first token
  index: AnyPath | None = None
  documents: int = 0
  max_token: int | None = None
  sha256: str | None = None  # of its tokens and its index, where it is known: see verify.py
  mark: str = ''  # changes where a file in a bucket does

  @staticmethod
  def of_manifest(folder: AnyPath, entry: dict, dtype: str) -> 'Shard':
    """Returns the shard of a store in `folder` that its manifest describes so (`store.SHARD`)."""
    rest = {key: entry[key] for key in ('documents', 'max_token', 'sha256')}
    file, index = folder / entry['file'], folder / entry['index']
    return Shard(file, entry['tokens'], dtype, index=index, **rest)

  @property
  def size(self) -> int:
    """Bytes of its file."""
    return self.offset + self.tokens * np.dtype(self.dtype).itemsize

  @functools.cached_property
  def key(self) -> str:
    """A hash that names the content of a file in a bucket."""
    return self.sha256 or hashlib.sha256(f'{self.path} {self.mark}'.encode()).hexdigest()

  def array(self) -> np.ndarray:
    """Returns the tokens [tokens], read from the file as they are used."""
    tokens = np.memmap(self.path, self.dtype, 'r', self.offset, (self.tokens,))
    return np.asarray(tokens)  # a slice of a memmap takes ten times as long as one of an array

  def check(self, size_of: Callable[[AnyPath], int]) -> None:
    """Raises a UserError if a file has more or fewer bytes than it should have.

    Args:
      size_of: returns the bytes of a file; -1: there is none.
    """
    for path, want in ((self.path, self.size), (self.index, 8 * self.documents)):
      have = want if path is None else size_of(path)
      if path is not None and have != want:
        why = 'is missing' if have < 0 else f'has {have:,} bytes, not {want:,}'
        raise shard_files.damaged(path, why)


Extent = tuple[Shard, int, memoryview]  # the bytes of its file from an offset on, and where they go


def size_of(path: AnyPath) -> int:
  """Returns the bytes of a file on this machine; -1: there is none."""
  return path.stat().st_size if path.is_file() else -1  # pyright: ignore


class LocalShards:
  """The files of a split on this machine; `BucketShards` has the same methods."""

  def __init__(self, random: bool):
    self._files = shard_files.Files(random)

  def read(self, extents: Iterable[Extent]) -> None:
    try:
      self._files.read((shard.path, *rest) for shard, *rest in extents)  # pyright: ignore
    except OSError as e:
      raise shard_files.unreadable(Path(e.filename), e) from e

  def expect(self, rows: int, size: int) -> None:
    pass

  def stop(self) -> None:
    pass


@dataclasses.dataclass(frozen=True)
class Split:
  """The shards of a split, as one run of `len(split)` tokens."""

  name: str
  shards: tuple[Shard, ...]

  @functools.cached_property
  def _ends(self) -> list[int]:
    return list(itertools.accumulate(shard.tokens for shard in self.shards))

  @property
  def is_far(self) -> bool:
    """Whether its files lie in a bucket."""
    return bool(self.shards) and is_bucket(self.shards[0].path)

  @functools.cached_property
  def at_random(self) -> LocalShards | BucketShards:
    """Its files, as rows at random are read."""
    return BucketShards(self.shards) if self.is_far else LocalShards(random=True)

  @functools.cached_property
  def _in_order(self) -> LocalShards | BucketShards:
    return BucketShards(self.shards, random=False) if self.is_far else LocalShards(random=False)

  def __len__(self) -> int:
    return self._ends[-1] if self.shards else 0

  @property
  def documents(self) -> int:
    """The number of documents; 0 if it isn't known."""
    return sum(shard.documents for shard in self.shards)

  def read(self, start: int, stop: int) -> np.ndarray:
    """Returns tokens [start, stop) as int32; the system reads ahead of them."""
    return self._read(self._in_order, [start], stop - start)[0]

  def rows(self, starts: Sequence[int], length: int) -> np.ndarray:
    """Returns the `length` tokens from each of `starts` on, int32 [rows, length]; reads no others."""
    return self._read(self.at_random, starts, length)

  def _read(
    self, files: LocalShards | BucketShards, starts: Sequence[int], length: int
  ) -> np.ndarray:
    rows = np.empty((len(starts), length), self.shards[0].dtype if self.shards else '<u2')
    out = memoryview(rows.reshape(-1).view(np.uint8))  # pyright: ignore[reportArgumentType]
    files.read(self._extents(starts, length, out))
    return rows.astype(np.int32)

  def _extents(self, starts: Sequence[int], length: int, out: memoryview) -> Iterator[Extent]:
    """Yields where the tokens of rows lie: shard, offset in its file, and where they go in `out`."""
    width, at = len(out) // max(1, len(starts) * length), 0
    for start in starts:
      i, stop = bisect.bisect_right(self._ends, start), start + length
      while start < stop:
        shard, end = self.shards[i], self._ends[i]
        size = (min(stop, end) - start) * width
        yield shard, shard.offset + (start - end + shard.tokens) * width, out[at : at + size]
        start, at, i = end, at + size, i + 1

  def documents_in(self, start: int, stop: int) -> list[str]:
    """Returns the names of the documents that tokens [start, stop) belong to: `shard:number`."""
    names = []
    for i, shard in enumerate(self.shards):
      base = self._ends[i] - shard.tokens
      if shard.index is None or stop <= base or start >= self._ends[i]:
        continue
      begins = np.fromfile(BucketShards.index(shard) if self.is_far else shard.index, '<u8')
      first = int(np.searchsorted(begins, max(0, start - base), 'right')) - 1
      last = int(np.searchsorted(begins, stop - base, 'left'))
      names += [f'{shard.path.stem}:{n}' for n in range(max(0, first), last)]
    return names


def bad_token(token: int, where: object, vocab_size: int) -> UserError:
  """Returns the error for an id beyond the vocabulary; `where`: the thing that holds it."""
  return UserError(
    f"{where} holds token id {token}, beyond the model's vocabulary of {vocab_size}. Set "
    'config.model.vocab_size to the size of the tokenizer that made the data, or prepare the data '
    'with the tokenizer of this model.'
  )


def foreign_files(folder: AnyPath) -> dict[str, list[AnyPath]]:
  """Returns nanoGPT's or llm.c's token files in a folder, by split; empty lists if there are none."""
  splits = {}
  for split in ('train', 'val'):
    own = folder / f'{split}.bin'
    splits[split] = [own] if own.exists() else sorted(folder.glob(f'*_{split}_*.bin'))
  return splits


def foreign_shard(path: AnyPath) -> Shard:
  """Opens a token file of nanoGPT or llm.c; llm.c's have a magic number.

  Raises:
    UserError: it can't be read, is damaged, or of another kind.
  """
  if not path.is_file():
    raise UserError(f'{path} is no file of tokens, but a folder, pipe or device.')
  mark = ''
  try:
    if is_bucket(path):
      there = filesystem(path)
      about = there.info(os.fspath(path))
      size, mark = int(about['size']), ' '.join(content(about))
      head = there.cat_file(os.fspath(path), start=0, end=min(size, LLMC_HEADER_BYTES))
    else:
      size, head = size_of(path), np.fromfile(path, np.uint8, LLMC_HEADER_BYTES).tobytes()
  except OSError as e:
    raise UserError(f"{path} can't be read: {e.strerror or e}.") from e
  header = np.frombuffer(head, '<i4', len(head) // 4)
  if len(header) and header[0] == LLMC_LLAMA:
    raise UserError(f'{path} has tokens of Llama 3, which no GPT-2 knows. Tokenize its text anew.')
  if len(header) == 256 and header[0] == LLMC_MAGIC:
    if header[1] != 1:
      raise UserError(f"{path}: version {header[1]} of llm.c's token files is not known, only 1.")
    tokens, there = int(header[2]), (size - LLMC_HEADER_BYTES) / 2
    if tokens != there or not tokens:
      raise UserError(
        f'{path} has {there:,.10g} tokens, but its header says {tokens:,}: it is '
        'empty, damaged or cut short. Make or fetch it again.'
      )
    return Shard(path, tokens, '<u2', offset=LLMC_HEADER_BYTES, mark=mark)
  if size == 0 or size % 2:
    raise UserError(
      f'{path} has {size} bytes, which is no whole number of uint16 tokens: it is '
      'empty or cut short. Make it again.'
    )
  return Shard(path, size // 2, '<u2', mark=mark)

"""Texts with labels, to fine-tune a classifier on: files of records {"text": …, "label": …}.

A training uses them as it uses a token store and its batches (`training_data.py`). A batch is a dict
of `tokens` [A, M, T] (padded on the right), `lengths` and `labels` [A, M]. Its rows are a function of
the seed and of the rows seen before, as those of a token store are. Everything is kept in memory.
"""

import dataclasses
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from gpt2_jax.core.errors import UserError, brief
from gpt2_jax.data import far_files, listing, records
from gpt2_jax.data.token_batches import Order
from gpt2_jax.parallel import sharding as sharding_lib
from gpt2_jax.tokenizer import bpe as tokenizers


@dataclasses.dataclass(frozen=True)
class Split:
  """Examples of one split: each (name, ids, label's number)."""

  name: str
  examples: tuple[tuple[str, list[int], int], ...]

  def __len__(self) -> int:
    return len(self.examples)


@dataclasses.dataclass(frozen=True)
class Labelled:
  """An open set of examples.

  Attributes:
    labels: the labels' names, sorted.
    T: tokens of a row.
    cut: how many texts were longer than that; what is beyond it is not seen.
    notes: on what is passed over.
  """

  path: str
  splits: dict[str, Split]
  labels: tuple[str, ...]
  manifest: dict
  T: int
  cut: int
  tokenizer: tokenizers.Tokenizer
  notes: tuple[str, ...] = ()
  unit: str = 'texts'

  @property
  def sha256(self) -> str:
    return self.manifest['sha256']

  @property
  def eot(self) -> int:
    return self.tokenizer.eot

  def check_vocabulary(self, vocab_size: int) -> None:
    if self.tokenizer.vocab_size > vocab_size:
      raise UserError(
        f'the tokenizer has {self.tokenizer.vocab_size} ids, the model {vocab_size}: '
        "leave config.data.tokenizer unset to take the model's own."
      )

  def remarks(self) -> list[str]:
    """Lines for the user: the labels, how many texts are cut, what is passed over."""
    first = f'labels {", ".join(self.labels[:12])}'
    if len(self.labels) > 12:
      first += ', …'
    if self.cut:
      first += f'; {self.cut:,} texts are cut to {self.T} tokens'
    return [first, *self.notes]


def _read(file: listing.File, data: Any) -> Iterator[tuple[str, str | None, str]]:
  """Yields (name, text, label) of each record; the label of a null text is not read."""
  with far_files.at_hand(file.path) as path:
    yield from _records(file, path, data)


def _records(file: listing.File, path: str, data: Any) -> Iterator[tuple[str, str | None, str]]:
  for number, place, (text, label) in records.READERS[file.kind](
    path, [data.text_field, data.label_field]
  ):
    where = f'{file.path}, {place}'
    name = f'{Path(file.path).name}:{number}'
    if text is None:
      yield name, None, ''
      continue
    text = records.text_of(text, where, data.text_field)
    if not isinstance(label, (str, int, bool)):
      raise UserError(
        f'{where}: {data.label_field!r} is {records.kind_of_value(label)}, not a text '
        f'or whole number: {brief(label)}. Mend or remove it.'
      )
    yield name, text, str(label)


def _held_out(seed: int, text: str, fraction: float) -> bool:
  key = hashlib.blake2b(f'{seed}:{text}'.encode('utf-8', 'surrogatepass'), digest_size=8).digest()
  return int.from_bytes(key, 'little') / 2**64 < fraction


def _files(data: Any) -> tuple[list[listing.File], tuple[str, ...]]:
  """Returns the files that a config's `data` section names, and notes on those passed over."""
  kinds = f'.{", .".join(records.READERS)}'
  wanted = (
    f'data.corpus = {data.corpus!r}: a classifier learns from text:FILE, records of '
    f'{{"{data.text_field}": …, "{data.label_field}": …}} in {kinds}'
  )
  if not data.corpus.startswith('text:'):
    raise UserError(f'{wanted}.')
  files, notes = listing.find(data.corpus, data.corpus.removeprefix('text:'))
  plain = next((file.path for file in files if file.kind not in records.READERS), None)
  if plain:
    raise UserError(f'{wanted}; {plain} is another file.')
  return files, notes


def label_names(data: Any) -> tuple[str, ...]:
  """Returns the labels in the files of a config's `data` section, sorted. They are at least two."""
  names = {
    label for file in _files(data)[0] for _, text, label in _read(file, data) if text is not None
  }
  if len(names) < 2:
    raise UserError(
      f'{data.corpus}: a classifier needs two labels, there is '
      f'{brief(next(iter(names))) if names else "no example"}.'
    )
  return tuple(sorted(names))


def open_labelled(data: Any, tokenizer: tokenizers.Tokenizer, T: int) -> Labelled:
  """Opens the examples that a config's `data` section names, cut to T tokens.

  `val_fraction` of the texts are held out, chosen by the text itself: equal texts are in one split.

  Raises:
    UserError: names the file and line that can't be used.
  """
  rows, cut, nulls, sha256 = [], 0, 0, hashlib.sha256()
  files, notes = _files(data)
  for file in files:
    for name, text, label in _read(file, data):
      if text is None:
        nulls += 1
        continue
      ids = tokenizer.encode(text, allow_special=data.special) or [tokenizer.eot]
      cut += len(ids) > T
      sha256.update(repr((text, label)).encode('utf-8', 'surrogatepass'))
      rows.append((name, ids[:T], label, _held_out(data.split_seed, text, data.val_fraction)))
  labels = label_names(data)
  sha256.update(f'{T}:{tokenizer.sha256}:{data.val_fraction}:{data.split_seed}'.encode())
  if data.special:
    sha256.update(b':special')
  splits = {
    name: Split(
      name,
      tuple((where, ids, labels.index(label)) for where, ids, label, held in rows if held == is_val),
    )
    for name, is_val in (('train', False), ('val', True))
  }
  for split in splits.values():
    if not split.examples:
      raise UserError(
        f'{data.corpus}: {len(rows)} examples leave none for the split {split.name!r}: '
        'change config.data.val_fraction.'
      )
  manifest = {
    'sha256': sha256.hexdigest(),
    'source': {'corpus': data.corpus, 'licence': 'unstated'},
    'tokenizer': {'sha256': tokenizer.sha256, 'vocab_size': tokenizer.vocab_size},
  }
  if nulls:
    notes += (f'{data.corpus}: {nulls:,} texts are null, and passed over.',)
  return Labelled(data.corpus, splits, labels, manifest, T, cut, tokenizer, notes)


def _row(example: tuple[str, list[int], int] | None, T: int) -> dict[str, np.ndarray]:
  tokens, label = (example[1], example[2]) if example else ([0], 0)
  padded_T = np.zeros(T, np.int32)
  padded_T[: len(tokens)] = tokens
  return {
    'tokens': padded_T,
    'lengths': np.array(len(tokens), np.int32),
    'labels': np.array(label, np.int32),
  }


def _place(rows: dict[int, dict], shape: tuple[int, int], T: int, sharding: NamedSharding) -> dict:
  return {
    key: sharding_lib.place(
      {i: row[key] for i, row in rows.items()}, (*shape, T) if key == 'tokens' else shape, sharding
    )
    for key in ('tokens', 'lengths', 'labels')
  }


class LabelledBatches(Order):
  """Batches of G examples, as a function of (seed, step, rows seen before)."""

  def __init__(self, split: Split, T: int, G: int, seed: int, vocab_size: int):
    del vocab_size  # checked when the data was opened
    self.split, self.T = split, T
    super().__init__(len(split), G, seed)

  @property
  def steps_per_epoch(self) -> float:
    return len(self.split) / self.G

  def _example(self, step: int, row: int):
    return self.split.examples[self.number(step, row)]

  def documents(self, step: int) -> list[list[str]]:
    """Returns the name of the example in each row of a batch."""
    return [[self._example(step, row)[0]] for row in range(self.G)]

  def batches(self, start: int, stop: int, A: int, sharding: NamedSharding) -> Iterator[dict]:
    """The batches of steps [start, stop), in A micro-batches."""
    shape = (A, self.G // A)
    local = sharding_lib.local_rows(shape, sharding)
    for step in range(start, stop):
      rows = {row: _row(self._example(step, row), self.T) for row in local}
      yield _place(rows, shape, self.T, sharding)

  @staticmethod
  def eval_batches(
    split: Split, T: int, R: int, sharding: NamedSharding
  ) -> Iterator[tuple[dict, jax.Array]]:
    """Yields all of a split: batches [1, R, …], weights [1, R], 1 for examples, 0 for padding."""
    local = sharding_lib.local_rows((1, R), sharding)
    for first in range(0, len(split), R):
      there = {row: first + row < len(split) for row in local}
      rows = {row: _row(split.examples[first + row] if there[row] else None, T) for row in local}
      weights = {row: np.float32(there[row]) for row in local}
      yield (_place(rows, (1, R), T, sharding), sharding_lib.place(weights, (1, R), sharding))  # pyright: ignore[reportArgumentType]

  @staticmethod
  def eval_size(split: Split, T: int, R: int) -> int:
    """Returns the number of batches of `eval_batches`."""
    del T
    return -(-len(split) // R)

"""Texts with labels, to fine-tune a classifier on: .jsonl files of {"text": …, "label": …}.

The same three names as in `loader.py`, so that the training loop needs not know which it is given. A
batch is a dict of `tokens` [A, M, T] (padded on the right), `lengths` and `labels` [A, M]. Its rows
are a function of the seed and the rows seen here as well. Everything is kept in memory.
"""

import dataclasses
import glob
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from gpt2_jax import sharding as sharding_lib
from gpt2_jax import tokenizer as tokenizers
from gpt2_jax.data.loader import Order
from gpt2_jax.errors import UserError
from gpt2_jax.files import local, parse_json


@dataclasses.dataclass(frozen=True)
class Split:
  """Examples of one split: each (name, ids, label's number)."""

  name: str
  examples: tuple[tuple[str, list[int], int], ...]

  def __len__(self) -> int:
    return len(self.examples)


@dataclasses.dataclass(frozen=True)
class Labelled:
  """An open set of examples; as a `store.TokenStore` to the training loop.

  Attributes:
    labels: the labels' names, sorted.
    cut: how many texts were longer than T tokens; what is beyond them is not seen.
  """

  path: str
  splits: dict[str, Split]
  labels: tuple[str, ...]
  manifest: dict
  cut: int
  tokenizer: tokenizers.Tokenizer

  @property
  def sha256(self) -> str:
    return self.manifest['sha256']

  @property
  def eot(self) -> int:
    return self.tokenizer.eot

  def check_vocabulary(self, vocab_size: int) -> None:
    if self.tokenizer.vocab_size > vocab_size:
      raise UserError(f'the tokenizer has {self.tokenizer.vocab_size} ids, the model {vocab_size}: '
                      'leave config.data.tokenizer unset to take the model\'s own.')


def _read(path: str, text_field: str, label_field: str) -> Iterator[tuple[str, str, str]]:
  """(name, text, label) of each line."""
  try:
    lines = Path(path).read_text(encoding='utf-8-sig').split('\n')  # JSON may hold other line ends
  except UnicodeDecodeError as e:
    raise UserError(f'{path} is not UTF-8 (byte {e.start}). Convert it first.') from e
  for number, line in enumerate(lines, 1):
    if not line.strip():
      continue
    where = f'{path}, line {number}'
    try:
      example = parse_json(line)
      text, label = example[text_field], example[label_field]
    except ValueError as e:
      raise UserError(f'{where}: not a line of JSON ({e}).') from e
    except (KeyError, TypeError) as e:
      raise UserError(f'{where} has no field {e}: set config.data.text_field and '
                      'config.data.label_field to the names there.') from e
    if not isinstance(text, str) or not isinstance(label, (str, int, bool)):
      raise UserError(f'{where}: {text_field!r} must be a text, {label_field!r} a text or a whole '
                      'number.')
    yield f'{Path(path).name}:{number}', text, str(label)


def _held_out(seed: int, text: str, fraction: float) -> bool:
  key = hashlib.blake2b(f'{seed}:{text}'.encode('utf-8', 'surrogatepass'), digest_size=8).digest()
  return int.from_bytes(key, 'little') / 2**64 < fraction


def _paths(data: Any) -> list[str]:
  local(data.corpus.partition(':')[2], 'data.corpus')
  paths = sorted(glob.glob(data.corpus.removeprefix('text:'), recursive=True))
  if not data.corpus.startswith('text:') or not paths or any(
      Path(path).suffix != '.jsonl' for path in paths):
    raise UserError(f'data.corpus = {data.corpus!r}: a classifier learns from text:FILE.jsonl, lines '
                    f'of {{"{data.text_field}": …, "{data.label_field}": …}}; '
                    f'{"there is no such file" if not paths else "these are other files"}.')
  return paths


def label_names(data: Any) -> tuple[str, ...]:
  """The labels that occur in the files of a config's `data` section, sorted: at least two."""
  names = {label for path in _paths(data)
           for _, _, label in _read(path, data.text_field, data.label_field)}
  if len(names) < 2:
    raise UserError(f'{data.corpus}: a classifier needs two labels, there is '
                    f'{", ".join(names) or "no example"}.')
  return tuple(sorted(names))


def open_labelled(data: Any, tokenizer: tokenizers.Tokenizer, T: int) -> Labelled:
  """The examples that a config's `data` section names, cut to T tokens.

  Held out are `val_fraction` of the texts, chosen by the text itself: equal ones fall on one side.

  Raises:
    UserError: names the file and line that can't be used.
  """
  rows, cut, sha256 = [], 0, hashlib.sha256()
  for path in _paths(data):
    for name, text, label in _read(path, data.text_field, data.label_field):
      ids = tokenizer.encode(text, allow_special=data.special) or [tokenizer.eot]
      cut += len(ids) > T
      sha256.update(repr((text, label)).encode('utf-8', 'surrogatepass'))
      rows.append((name, ids[:T], label, _held_out(data.split_seed, text, data.val_fraction)))
  labels = label_names(data)
  sha256.update(f'{T}:{tokenizer.sha256}:{data.val_fraction}:{data.split_seed}'.encode())
  sha256.update(b':special' * data.special)
  splits = {name: Split(name, tuple(
      (where, ids, labels.index(label)) for where, ids, label, held in rows if held == is_val))
      for name, is_val in (('train', False), ('val', True))}
  for split in splits.values():
    if not split.examples:
      raise UserError(f'{data.corpus}: {len(rows)} examples leave none for the split {split.name!r}: '
                      'change config.data.val_fraction.')
  manifest = {'sha256': sha256.hexdigest(),
              'source': {'corpus': data.corpus, 'licence': 'unstated'},
              'tokenizer': {'sha256': tokenizer.sha256, 'vocab_size': tokenizer.vocab_size}}
  return Labelled(data.corpus, splits, labels, manifest, cut, tokenizer)


def _row(example: tuple[str, list[int], int] | None, T: int) -> dict[str, np.ndarray]:
  tokens, label = (example[1], example[2]) if example else ([0], 0)
  padded_T = np.zeros(T, np.int32)
  padded_T[:len(tokens)] = tokens
  return {'tokens': padded_T, 'lengths': np.array(len(tokens), np.int32),
          'labels': np.array(label, np.int32)}


def _place(rows: dict[int, dict], shape: tuple[int, int], T: int, sharding: NamedSharding) -> dict:
  return {key: sharding_lib.place({i: row[key] for i, row in rows.items()},
                                  (*shape, T) if key == 'tokens' else shape, sharding)
          for key in ('tokens', 'lengths', 'labels')}


class TrainLoader(Order):
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
    """Per row of a batch, the name of its example."""
    return [[self._example(step, row)[0]] for row in range(self.G)]

  def batches(self, start: int, stop: int, A: int, sharding: NamedSharding) -> Iterator[dict]:
    """The batches of steps [start, stop), in A micro-batches."""
    shape = (A, self.G // A)
    local = sharding_lib.local_rows(shape, sharding)
    for step in range(start, stop):
      rows = {row: _row(self._example(step, row), self.T) for row in local}
      yield _place(rows, shape, self.T, sharding)


def eval_batches(
    split: Split, T: int, R: int, sharding: NamedSharding) -> Iterator[tuple[dict, jax.Array]]:
  """All of a split: batches [1, R, …] and weights [1, R], 1 for examples that count, else 0."""
  local = sharding_lib.local_rows((1, R), sharding)
  for first in range(0, len(split), R):
    there = {row: first + row < len(split) for row in local}
    rows = {row: _row(split.examples[first + row] if there[row] else None, T) for row in local}
    weights = {row: np.float32(there[row]) for row in local}
    yield (_place(rows, (1, R), T, sharding),
           sharding_lib.place(weights, (1, R), sharding))  # pyright: ignore[reportArgumentType]


def eval_size(split: Split, T: int, R: int) -> int:
  """Number of batches of `eval_batches`."""
  del T
  return -(-len(split) // R)

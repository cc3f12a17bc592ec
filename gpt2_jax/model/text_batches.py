"""Texts to batches, for everything that is not training: generation, features, classification."""

import contextlib
import functools
import operator
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from gpt2_jax.core.errors import UserError, brief
from gpt2_jax.model.config import GPTConfig
from gpt2_jax.parallel import sharding
from gpt2_jax.tokenizer.bpe import Tokenizer

ROWS = 8  # texts at a time
Texts = (
  str
  | Sequence[int]
  | Sequence[str | Sequence[int]]
  | np.ndarray
  | jax.Array
  | Sequence[np.ndarray]
  | Sequence[jax.Array]
)


def bucket(n: int, most: int, least: int = 16) -> int:
  """Returns n rounded up to a power of two, so that few lengths are compiled; at most `most`."""
  return min(most, max(least, 1 << (n - 1).bit_length()))


@functools.cache
def say_once(text: str) -> None:
  """Prints a note that may concern many texts, once."""
  print(text, file=sys.stderr, flush=True)


def special_note(tokenizer: Tokenizer, text: str) -> str | None:
  """Returns the note for a text that is read without its special tokens; None: it has none."""
  found = tokenizer.special_in(text)
  return found and (
    f'note: {brief(found)} in a prompt is read as text. To have the special token, '
    'say so: --special, allow_special=True, or give ids.'
  )


def _is_id(value: Any) -> bool:
  """Whether a value is a whole number, of Python, NumPy, JAX or another."""
  with contextlib.suppress(TypeError):
    return operator.index(value) is not None
  return False


def _ids(number: int, prompt: Any) -> list[int]:
  """Returns the ids of a prompt that is no text: a list, a tuple, an array of one axis."""
  if hasattr(prompt, 'tolist'):  # at once: an array on a device gives its elements slowly
    prompt = prompt.tolist()
  try:
    return [operator.index(token) for token in prompt]
  except TypeError:
    raise UserError(
      f'prompt {number} = {brief(prompt)} is neither a text nor a list of ids.'
    ) from None


def id_list(name: str, value: Any, V: int) -> list[int]:
  """Returns the ids that an option names: one, several or, if it is None, none.

  Raises:
    UserError: it names something that is no id of a vocabulary of V.
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


def encode(
  texts: Texts,
  tokenizer: Tokenizer | None,
  config: GPTConfig,
  *,
  leave: int = 0,
  allow_special: bool = False,
) -> list[list[int]]:
  """Returns the ids of a text, of texts, or lists of ids. An empty text becomes the end-of-text id.

  Args:
    texts: what to encode.
    tokenizer: for texts.
    config: its vocabulary and context bound the ids.
    leave: how many positions of the context must stay free.
    allow_special: whether special tokens count in a text. Where not, and there are some, it is said.

  Raises:
    UserError: names the text that can't be used.
  """
  items: Any = [texts] if isinstance(texts, str) else list(texts)
  if items and _is_id(items[0]):
    items = [items]
  rows = []
  for i, text in enumerate(items):
    if isinstance(text, str):
      if tokenizer is None:
        raise UserError('a text needs a tokenizer: pass tokenizer=, or ids in place of texts.')
      if not allow_special and (note := special_note(tokenizer, text)):
        say_once(note)
      # an empty prompt: a document begins
      ids = tokenizer.encode(text, allow_special=allow_special) or [tokenizer.eot]
    else:
      ids = _ids(i, text)
      if not ids:
        raise UserError(f'prompt {i} has no ids: begin with the end-of-text id for a free text.')
    bad = next((token for token in ids if not 0 <= token < config.vocab_size), None)
    if bad is not None:
      raise UserError(
        f'prompt {i} holds token id {brief(bad)}, but the vocabulary has {config.vocab_size} ids.'
      )
    if config.n_positions <= leave:
      raise UserError(
        f'a model of n_positions = {config.n_positions} has no place for a token after '
        "another: it can't write. Features and scores it can give."
      )
    if len(ids) + leave > config.n_positions:
      raise UserError(
        f"prompt {i} has {len(ids)} tokens; the model's context of "
        f'{config.n_positions} (n_positions) has no room for '
        f'{"more" if leave else "them"}. Shorten it.'
      )
    rows.append(ids)
  if not rows:
    raise UserError('there is no prompt.')
  return rows


def pad(rows: Sequence[Sequence[int]], most: int) -> tuple[np.ndarray, np.ndarray]:
  """Pads rows on the right to a bucket of at most `most`: [B, P], and their lengths, [B]."""
  lengths_B = np.array([len(ids) for ids in rows], np.int32)
  padded_BP = np.zeros((len(rows), bucket(int(lengths_B.max()), most)), np.int32)
  for row, ids in zip(padded_BP, rows):
    row[: len(ids)] = ids
  return padded_BP, lengths_B


def batches(rows: list[list[int]], most: int) -> Iterator[tuple[list[list[int]], tuple]]:
  """Rows, ROWS at a time, and each such batch on the devices: (tokens_BT, lengths_B)."""
  size = -(-min(ROWS, len(rows)) // split()) * split()
  for first in range(0, len(rows), size):
    batch = rows[first : first + size]
    filled = batch + [batch[0]] * (size - len(batch))
    yield batch, tuple(map(place, pad(filled, most)))


def split() -> int:
  """Returns the number of parts that the mesh cuts a batch into: rows must be a multiple of it."""
  mesh = jax.sharding.get_abstract_mesh()
  return 1 if mesh.empty else mesh.shape['data'] * mesh.shape['fsdp']


def place(x: np.ndarray) -> jax.Array:
  """Puts an array [B, …] on the devices, its rows split."""
  return jax.device_put(x, sharding.layout(sharding.P(sharding.BATCH, *(None for _ in x.shape[1:]))))


def fetch(tree):
  """Brings arrays back to the host, whole."""
  if sharding.in_mesh():
    tree = jax.tree.map(lambda x: sharding.reshard(x, sharding.P()), tree)
  return jax.device_get(tree)

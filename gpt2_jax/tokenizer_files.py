"""Hugging Face's files of a byte-level BPE, read and written.

Read, as transformers does: `tokenizer.json`; else `vocab.json` and `merges.txt`, or `encoder.json`
and `vocab.bpe` (their names in OpenAI's release). Beside it `tokenizer_config.json`, for tokens
behind the vocabulary and for what tokens are used as; where that has no added_tokens_decoder, the
older `special_tokens_map.json` and `added_tokens.json` too. Its `add_prefix_space` outranks that of
tokenizer.json.

What would change ids and isn't GPT-2's (a normalizer, another pre_tokenizer, a dropout) is refused by
name. What is put around a text (post_processor, add_bos_token, truncation, padding) is no part of
encoding here and isn't read; nor is a chat_template.
"""

import dataclasses
import functools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gpt2_jax.errors import UserError

EOT = '<|endoftext|>'
ROLES = ('bos_token', 'eos_token', 'unk_token', 'sep_token', 'pad_token', 'cls_token', 'mask_token')
MAX_ID = 2**24  # far above any vocabulary's; tables of the model have a row per id


@dataclasses.dataclass(frozen=True)
class Added:
  """A token that is found in a text as a whole, before the BPE: Hugging Face's AddedToken.

  `lstrip` and `rstrip`: it takes along the white space before and behind it. `single_word`: not
  inside of a word. `normalized`: looked for after those that are not. `special`: found only where
  that is asked for; so are all that are used as something, and the end of a text.
  """

  id: int
  content: str
  single_word: bool = False
  lstrip: bool = False
  rstrip: bool = False
  normalized: bool = False
  special: bool = True


@dataclasses.dataclass(frozen=True)
class Tables:
  """What the files say.

  Attributes:
    vocab: id of every token by its name, as in the files: an added token's name is its text, any
      other's has a printable character for each byte.
    pairs: the merges by names, the first ones first in priority.
    added: the tokens that are found as a whole, by id.
    roles: what some tokens are used as, for example {'eos_token': '</s>'}.
    prefix_space: whether a text that doesn't begin with a space is given one.
    eot: id of `<|endoftext|>`; without it of the eos_token; without that of `</s>`.
  """

  vocab: dict[str, int]
  pairs: list[tuple[str, str]]
  added: list[Added]
  roles: dict[str, str]
  prefix_space: bool
  eot: int


@functools.cache
def byte_to_char() -> dict[int, str]:
  """GPT-2's printable stand-in for each byte (openai/gpt-2 `src/encoder.py`), in id order."""
  visible = [
    *range(ord('!'), ord('~') + 1),
    *range(ord('¡'), ord('¬') + 1),
    *range(ord('®'), ord('ÿ') + 1),
  ]
  hidden = [b for b in range(256) if b not in set(visible)]
  return {b: chr(b) for b in visible} | {b: chr(256 + i) for i, b in enumerate(hidden)}


CHAR_TO_BYTE = {char: b for b, char in byte_to_char().items()}


def to_chars(token: bytes) -> str:
  return token.decode('latin-1').translate(byte_to_char())


def to_bytes(name: str) -> bytes | None:
  """The bytes that a token's name stands for; None where it stands for none."""
  try:
    return bytes(map(CHAR_TO_BYTE.__getitem__, name))
  except KeyError:
    return None


def read_pairs(merges_txt: str) -> list[list[str]]:
  lines = merges_txt.split('\n')
  return [line.split(' ') for line in lines if line and not line.startswith('#version')]


def merges_txt(pairs: Iterable[tuple[str, str]]) -> str:
  """The content of a merges.txt, the same as OpenAI's vocab.bpe."""
  return ''.join(['#version: 0.2\n', *(f'{a} {b}\n' for a, b in pairs)])


def _text(path: Path) -> str:
  try:
    return path.read_text(encoding='utf-8')
  except (OSError, ValueError) as e:
    raise UserError(f"{path} can't be read ({e}). Fetch it anew.") from e


def _json(path: Path) -> dict[str, Any]:
  """The JSON object in a file; an empty one where there is no file."""
  text = _text(path) if path.exists() else '{}'
  try:
    content = json.loads(text)
  except (ValueError, RecursionError) as e:
    raise UserError(f"{path} can't be read ({e}). Fetch it anew.") from e
  return _dict(content, str(path))


def _dict(value: Any, what: str) -> dict[str, Any]:
  if not isinstance(value, dict):
    raise UserError(f'{what} is {value!r:.40}, not a JSON object. Fetch the file anew.')
  return value


def _list(value: Any, what: str) -> list[Any]:
  if not isinstance(value, list):
    raise UserError(f'{what} is {value!r:.40}, not a list. Fetch the file anew.')
  return value


def _content(token: Any, where: str) -> str:
  """The text of a token, which is given by it or by an object with flags."""
  content = token.get('content') if isinstance(token, dict) else token
  if not isinstance(content, str) or not content or re.search('[\ud800-\udfff]', content):
    raise UserError(f'{where}: {content!r:.60} is no text of a token. Mend the entry or remove it.')
  return content


def _id(value: Any, content: str, where: str) -> int:
  if type(value) is not int or not 0 <= value < MAX_ID:
    raise UserError(
      f'{where}: the id of {content!r:.60} is {value!r:.40}, not a whole number from 0 '
      f'to {MAX_ID - 1}. Mend the entry or remove it.'
    )
  return value


def _pair(value: Any, vocab: Mapping[str, int], where: str) -> tuple[str, str]:
  pair = value.split(' ') if isinstance(value, str) else value
  if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(s, str) for s in pair)):
    raise UserError(f'{where}: the merge {value!r:.60} is not of two tokens. Fetch the file anew.')
  for name in (*pair, pair[0] + pair[1]):
    if not to_bytes(name):
      raise UserError(
        f"{where}: not a byte-level BPE of GPT-2's kind: the merge {value!r:.60} has "
        'characters that stand for no byte.'
      )
    if name not in vocab:
      raise UserError(
        f'{where}: the merge {value!r:.60} needs a token {name!r:.60}, which has no '
        'id: vocabulary and merges are not of one tokenizer.'
      )
  return pair[0], pair[1]


def _model(content: Mapping[str, Any], where: str) -> tuple[dict[str, Any], list[Any], bool]:
  """Vocabulary, merges and add_prefix_space of a tokenizer.json, if it is a BPE as GPT-2's is."""
  model = _dict(content.get('model'), f'{where}: model')
  before = _dict(content.get('pre_tokenizer'), f'{where}: pre_tokenizer')
  parts = {'normalizer': content.get('normalizer')}
  parts |= {f'model.{key}': value for key, value in model.items()}
  parts |= {f'pre_tokenizer.{key}': value for key, value in before.items()}
  without = (
    'normalizer',
    'model.dropout',
    'model.continuing_subword_prefix',
    'model.end_of_word_suffix',
    'model.byte_fallback',
    'model.ignore_merges',
  )
  odd = [key for key in without if parts.get(key)]
  wanted = {'model.type': 'BPE', 'pre_tokenizer.type': 'ByteLevel', 'pre_tokenizer.use_regex': True}
  odd += [key for key, value in wanted.items() if parts.get(key, value) != value]
  if odd:
    raise UserError(
      f"{where}: {odd[0]} is {parts[odd[0]]!r:.80}, which can't be honoured: it "
      "is not of GPT-2's byte-level BPE. Use ids of its own tokenizer, not texts."
    )
  return (
    _dict(model.get('vocab'), f'{where}: model.vocab'),
    _list(model.get('merges'), f'{where}: model.merges'),
    before.get('add_prefix_space') is True,
  )


def _specials(settings: Mapping[str, Any], where: str) -> tuple[dict[str, str], dict[str, Any]]:
  """What some tokens are used as, and the special tokens, as given, by their texts."""
  roles = {role: _content(settings[role], f'{where}: {role}') for role in ROLES if settings.get(role)}
  specials = {content: settings[role] for role, content in roles.items()}
  for key in ('additional_special_tokens', 'extra_special_tokens'):
    more = settings.get(key) or []
    more = list(more.values()) if isinstance(more, dict) else _list(more, f'{where}: {key}')
    specials |= {_content(token, f'{where}: {key}'): token for token in more}
  return roles, specials


class _Reader:
  """Gathers the ids of tokens from several files, which have to agree."""

  def __init__(self, vocab: Mapping[str, Any], where: str):
    self.vocab = {name: _id(id, _content(name, where), where) for name, id in vocab.items()}
    self.names: dict[int, str] = {}
    for name, id in self.vocab.items():
      self._take(id, name, where)
    self.added: dict[str, Added] = {}

  def _take(self, id: int, name: str, where: str) -> None:
    if self.names.setdefault(id, name) != name:
      raise UserError(
        f'{where}: the tokens {self.names[id]!r:.60} and {name!r:.60} have the same id '
        f'{id}. Remove the wrong one.'
      )

  def add(self, id: Any, token: Any, where: str, *, special: bool = False) -> None:
    """Adds a token, a text or an object with flags; those of an earlier file stay as they are.

    Where it doesn't say so itself, it is `special` or not.
    """
    content = _content(token, where)
    id = _id(id, content, where)
    if self.vocab.setdefault(content, id) != id:
      raise UserError(
        f'{where}: the token {content!r:.60} has the id {id} here, but '
        f'{self.vocab[content]} elsewhere in the tokenizer. Remove the wrong one.'
      )
    self._take(id, content, where)
    given = token if isinstance(token, dict) else {}
    given = {'special': special, 'normalized': not given.get('special', special)} | given
    flags = {f.name: given[f.name] is True for f in dataclasses.fields(Added)[2:] if f.name in given}
    self.added.setdefault(content, Added(id, content, **flags))


def _complete(
  vocab: Mapping[str, Any],
  pairs: Iterable[Any],
  where: Path,
  added: Sequence[Any] = (),
  prefix_space: bool = False,
) -> Tables:
  """Checks what was read of `where`, and takes in the small files beside it."""
  reader = _Reader(vocab, str(where))
  checked = [_pair(pair, reader.vocab, str(where)) for pair in pairs]
  for token in added:
    token = _dict(token, f'{where}: an entry of added_tokens')
    reader.add(token.get('id'), token, str(where))

  path, older, oldest = (
    where.parent / name
    for name in ('tokenizer_config.json', 'special_tokens_map.json', 'added_tokens.json')
  )
  settings, ids = _json(path), {}
  if 'added_tokens_decoder' in settings:
    decoder = _dict(settings['added_tokens_decoder'], f'{path}: added_tokens_decoder')
    for id, token in decoder.items():
      reader.add(int(id) if id.isdecimal() and len(id) < 20 else id, token, str(path))
  else:
    settings, ids = settings | _json(older), _json(oldest)
  roles, specials = _specials(settings, f'{older if older.exists() else path}')
  for content, token in specials.items():
    if content in reader.vocab or content in ids:
      reader.add(reader.vocab.get(content, ids.get(content)), token, str(oldest), special=True)
  for content, id in ids.items():
    reader.add(id, {'content': content, 'normalized': True, 'special': False}, str(oldest))

  eot = next((c for c in (EOT, roles.get('eos_token'), '</s>') if c in reader.vocab), None)
  if eot is None:
    raise UserError(
      f'{where}: no token ends a text: there is neither {EOT}, nor an eos_token, nor '
      '</s>. Name one of its tokens as eos_token in tokenizer_config.json.'
    )
  reader.add(reader.vocab[eot], eot, str(where), special=True)
  added = [
    dataclasses.replace(token, special=token.special or token.content in (eot, *specials))
    for token in reader.added.values()
  ]
  return Tables(
    vocab=dict(sorted(reader.vocab.items(), key=lambda item: item[1])),
    pairs=checked,
    added=sorted(added, key=lambda token: token.id),
    roles=roles,
    prefix_space=settings.get('add_prefix_space', prefix_space) is True,
    eot=reader.vocab[eot],
  )


def read(folder: Path) -> Tables:
  """The tables of a folder.

  Raises:
    UserError: there are none, or names the file and the entry that can't be used.
  """
  whole = folder / 'tokenizer.json'
  if whole.exists():
    content = _json(whole)
    vocab, pairs, prefix_space = _model(content, str(whole))
    added = _list(content.get('added_tokens') or [], f'{whole}: added_tokens')
    return _complete(vocab, pairs, whole, added, prefix_space)
  for vocab, merges in (('vocab.json', 'merges.txt'), ('encoder.json', 'vocab.bpe')):
    if (folder / vocab).exists() and (folder / merges).exists():
      pairs = read_pairs(_text(folder / merges))
      return _complete(_json(folder / vocab), pairs, folder / vocab)
  raise UserError(f'{folder} holds neither vocab.json and merges.txt nor tokenizer.json.')


def tokenizer_json(
  vocab: Mapping[str, int],
  pairs: Sequence[tuple[str, str]],
  added: Iterable[Added],
  prefix_space: bool,
) -> str:
  """The content of a tokenizer.json. Added tokens are in `vocab` too, which fixes their ids."""
  level = {'type': 'ByteLevel', 'add_prefix_space': True, 'trim_offsets': True, 'use_regex': True}
  return json.dumps(
    {
      'version': '1.0',
      'truncation': None,
      'padding': None,
      'added_tokens': [dataclasses.asdict(token) for token in added],
      'normalizer': None,
      'pre_tokenizer': level | {'add_prefix_space': prefix_space},
      'post_processor': level | {'trim_offsets': False},
      'decoder': level,
      'model': {
        'type': 'BPE',
        'dropout': None,
        'unk_token': None,
        'continuing_subword_prefix': None,
        'end_of_word_suffix': None,
        'fuse_unk': False,
        'byte_fallback': False,
        'ignore_merges': False,
        'vocab': vocab,
        'merges': pairs,
      },
    },
    ensure_ascii=False,
    separators=(',', ':'),
  )


def write(tables: Tables, folder: Path, model_max_length: int | None) -> None:
  """Writes `vocab.json`, `merges.txt`, `tokenizer.json` and `tokenizer_config.json`."""
  eot = next(token.content for token in tables.added if token.id == tables.eot)
  settings = {
    'tokenizer_class': 'GPT2Tokenizer',
    'add_prefix_space': tables.prefix_space,
    'bos_token': eot,
    'eos_token': eot,
    'unk_token': eot,
  } | tables.roles
  if model_max_length is not None:
    settings['model_max_length'] = model_max_length
  files = {
    'vocab.json': json.dumps(tables.vocab, ensure_ascii=False),
    'merges.txt': merges_txt(tables.pairs),
    'tokenizer_config.json': json.dumps(settings, indent=2, ensure_ascii=False),
    'tokenizer.json': tokenizer_json(tables.vocab, tables.pairs, tables.added, tables.prefix_space),
  }
  folder.mkdir(parents=True, exist_ok=True)
  for name, content in files.items():
    (folder / name).write_text(content, encoding='utf-8')

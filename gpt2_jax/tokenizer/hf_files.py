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
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gpt2_jax.core.errors import UserError
from gpt2_jax.core.files import misfit, read_json, read_text, unreadable
from gpt2_jax.tokenizer.tables import EOT, Added, Tables, to_bytes

# of a tokenizer.json: what must be off, and what must be so where it is said
OFF = (
  'normalizer',
  'model.dropout',
  'model.continuing_subword_prefix',
  'model.end_of_word_suffix',
  'model.byte_fallback',
  'model.ignore_merges',
)
WANTED = {'model.type': 'BPE', 'pre_tokenizer.type': 'ByteLevel', 'pre_tokenizer.use_regex': True}
MODEL = {'model': {'vocab': dict, 'merges': list}, 'pre_tokenizer': dict}
ROLES = ('bos_token', 'eos_token', 'unk_token', 'sep_token', 'pad_token', 'cls_token', 'mask_token')
MAX_ID = 2**24  # far above any vocabulary's; tables of the model have a row per id


def read_pairs(merges_txt: str) -> list[list[str]]:
  lines = merges_txt.split('\n')
  return [line.split(' ') for line in lines if line and not line.startswith('#version')]


def merges_txt(pairs: Iterable[tuple[str, str]]) -> str:
  """Returns the content of a merges.txt, the same as OpenAI's vocab.bpe."""
  return ''.join(['#version: 0.2\n', *(f'{a} {b}\n' for a, b in pairs)])


def _shaped(value: Any, shape: Any, path: Path, at: str) -> Any:
  """Returns the value, if it has a shape (see `files.misfit`); `at` is its place in the file."""
  if wrong := misfit(value, shape, at):
    raise unreadable(path, wrong)
  return value


def _content(token: Any, where: str) -> str:
  """Returns the text of a token, which is given by it or by an object with flags."""
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


def _check_model(content: Mapping[str, Any], path: Path) -> None:
  """Raises a `UserError` that names what is not of a BPE such as GPT-2's in a tokenizer.json."""
  parts = {'normalizer': content.get('normalizer')}
  parts |= {f'model.{key}': value for key, value in content['model'].items()}
  parts |= {f'pre_tokenizer.{key}': value for key, value in content['pre_tokenizer'].items()}
  odd = [key for key in OFF if parts.get(key)]
  odd += [key for key, value in WANTED.items() if parts.get(key, value) != value]
  if odd:
    raise UserError(
      f"{path}: {odd[0]} is {parts[odd[0]]!r:.80}, which can't be honoured: it "
      "is not of GPT-2's byte-level BPE. Use ids of its own tokenizer, not texts."
    )


def _small(path: Path) -> dict[str, Any]:
  """Reads one of the small files; an empty object where there is none."""
  return read_json(path) if path.exists() else {}


def _specials(settings: Mapping[str, Any], path: Path) -> tuple[dict[str, str], dict[str, Any]]:
  """Returns the roles of some tokens, and the special tokens, as given, by their texts."""
  roles = {role: _content(settings[role], f'{path}: {role}') for role in ROLES if settings.get(role)}
  specials = {content: settings[role] for role, content in roles.items()}
  for key in ('additional_special_tokens', 'extra_special_tokens'):
    more = settings.get(key) or []
    more = list(more.values()) if isinstance(more, dict) else _shaped(more, list, path, key)
    specials |= {_content(token, f'{path}: {key}'): token for token in more}
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
    reader.add(token.get('id'), token, str(where))

  path, older, oldest = (
    where.parent / name
    for name in ('tokenizer_config.json', 'special_tokens_map.json', 'added_tokens.json')
  )
  settings, ids = _small(path), {}
  if 'added_tokens_decoder' in settings:
    decoder = 'added_tokens_decoder'
    for id, token in _shaped(settings[decoder], dict, path, decoder).items():
      reader.add(int(id) if id.isdecimal() and len(id) < 20 else id, token, str(path))
  else:
    settings, ids = settings | _small(older), _small(oldest)
  roles, specials = _specials(settings, older if older.exists() else path)
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
  """Returns the tables of a folder.

  Raises:
    UserError: there are none, or names the file and the entry that can't be used.
  """
  whole = folder / 'tokenizer.json'
  if whole.exists():
    content = read_json(whole, MODEL)
    _check_model(content, whole)
    added = _shaped(content.get('added_tokens') or [], [dict], whole, 'added_tokens')
    model, prefix_space = content['model'], content['pre_tokenizer'].get('add_prefix_space') is True
    return _complete(model['vocab'], model['merges'], whole, added, prefix_space)
  for vocab, merges in (('vocab.json', 'merges.txt'), ('encoder.json', 'vocab.bpe')):
    if (folder / vocab).exists() and (folder / merges).exists():
      pairs = read_pairs(read_text(folder / merges))
      return _complete(read_json(folder / vocab), pairs, folder / vocab)
  raise UserError(f'{folder} holds neither vocab.json and merges.txt nor tokenizer.json.')


def tokenizer_json(
  vocab: Mapping[str, int],
  pairs: Sequence[tuple[str, str]],
  added: Iterable[Added],
  prefix_space: bool,
) -> str:
  """Returns the content of a tokenizer.json. Added tokens are in `vocab` too: it has their ids."""
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

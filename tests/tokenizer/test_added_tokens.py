"""Added tokens in texts: the ids of transformers, with all flags; special ones by a switch."""

import functools
import itertools
import json
import random
import tempfile
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2_jax.tokenizer import bpe
from gpt2_jax.tokenizer.added_tokens import SPACE, WORD, Finder, pattern
from gpt2_jax.tokenizer.bpe import EOT
from gpt2_jax.tokenizer.tables import Added

CONTENTS = [
  'COVID',
  'COVID-19',
  'ID-19 x',
  '<|a|>',
  '<|a|>b',
  ' blank',
  'blank ',
  'éé',
  '½.',
  'a',
  'ab',
  'the loss',
  '東京',
  '\n',
  '_x_',
  '  ',
]
BETWEEN = [
  ' ',
  '  ',
  '\t',
  '\n\n',
  '\xa0',
  '\u3000',
  '\x1f',
  '\x85',
  'a',
  'COV',
  '-19',
  'x',
  '_',
  '²',
  '\u0301',
  '\u200d',
  'Ⓐ',
  '<|',
  'b',
  'the',
  ' loss',
  '東',
  '.',
  '🙂',
  EOT,
]


@functools.cache
def base() -> bpe.Tokenizer:
  texts = ['the loss is low, the loss is high, COVID COVID blank blank'] * 3
  return bpe.train_bpe(texts, 290)


def saved(folder: Path, tokens: list[dict]) -> bpe.Tokenizer:
  """A tokenizer with added tokens, in a folder."""
  base().save(folder)
  path = folder / 'tokenizer.json'
  content = json.loads(path.read_text())
  vocab, new = content['model']['vocab'], itertools.count(base().eot + 1)
  content['added_tokens'] += [
    dict.fromkeys(('lstrip', 'rstrip', 'single_word', 'normalized', 'special'), False)
    | {'id': vocab[name] if (name := token['content']) in vocab else next(new)}
    | token
    for token in tokens
  ]
  path.write_text(json.dumps(content))
  return bpe.load(folder)


FLAGS = st.fixed_dictionaries(
  dict.fromkeys(('lstrip', 'rstrip', 'single_word', 'normalized', 'special'), st.booleans())
)
TOKENS = st.lists(
  st.tuples(st.sampled_from(CONTENTS), FLAGS).map(lambda pair: {'content': pair[0]} | pair[1]),
  unique_by=lambda token: token['content'],
  max_size=7,
)
TEXTS = st.lists(
  st.lists(st.sampled_from(CONTENTS + BETWEEN), max_size=12).map(''.join), min_size=8, max_size=8
)


def check(ours, theirs, tokens, texts) -> None:
  """That our ids are those of a function (text, whether special tokens count) -> ids."""
  stripped = any(token['lstrip'] or token['rstrip'] for token in tokens)
  for text in texts:
    for allow in (False, True):
      mine = ours.encode(text, allow_special=allow)
      try:
        ids = theirs(text, allow)
      except BaseException as e:  # Rust's panic, where two tokens take the same blanks
        assert stripped and type(e).__name__ == 'PanicException'
        continue
      assert mine == ids, (text, allow)
      if not stripped:
        assert ours.decode(ids) == text
    special = {EOT, *(token['content'] for token in tokens if token['special'])}
    held = ours.special_in(text)
    if held is None:
      assert ours.encode(text) == ours.encode(text, allow_special=True)
    else:
      assert held in special and held in text


@settings(max_examples=60, deadline=None)
@given(TOKENS, TEXTS)
def test_ids_are_those_of_the_tokenizers_library(tokens, texts):
  import tokenizers

  with tempfile.TemporaryDirectory() as folder:
    ours = saved(Path(folder), tokens)
    library = tokenizers.Tokenizer.from_file(f'{folder}/tokenizer.json')

  def theirs(text, allow):
    library.encode_special_tokens = not allow
    return library.encode(text).ids

  check(ours, theirs, tokens, texts)


@settings(max_examples=15, deadline=None)
@given(TOKENS, TEXTS, st.booleans())
def test_ids_are_those_of_transformers(tokens, texts, again):
  """Of its fast tokenizer, with `split_special_tokens` where special ones don't count."""
  transformers = pytest.importorskip('transformers', reason='needs the extra parity')
  with tempfile.TemporaryDirectory() as name:
    folder = Path(name, 'x')
    folder.mkdir()
    ours = saved(folder, tokens)
    if again:  # what we save is read alike
      ours.save(folder)
      assert bpe.load(folder).sha256 == ours.sha256
    fast = transformers.AutoTokenizer.from_pretrained(folder)
  assert fast.is_fast
  check(
    ours,
    lambda text, allow: fast(text, split_special_tokens=not allow, add_special_tokens=False)[
      'input_ids'
    ],
    tokens,
    texts,
  )


def test_words_and_blanks_are_rust_s():
  """What `single_word`, `lstrip` and `rstrip` take for a word and for white space."""
  import tokenizers

  made = tokenizers.Tokenizer(tokenizers.models.WordLevel({'': 0}, unk_token=''))
  made.add_tokens(
    [tokenizers.AddedToken('☃', single_word=True), tokenizers.AddedToken('☄', lstrip=True)]
  )
  kinds = {}
  for code in range(0x20000):
    kinds.setdefault(unicodedata.category(chr(code)), []).append(chr(code))
  rng = random.Random(0)
  for kind in sorted(set(kinds) - {'Cs', 'Cn'}):  # of Cn the Unicode version decides
    for char in {*kinds[kind][:40], *rng.sample(kinds[kind], min(60, len(kinds[kind])))} - {*'☃☄'}:
      assert (made.encode(f'{char}☃').ids == [0]) == bool(WORD.match(char)), repr(char)
      assert (made.encode(f'{char}☄').ids == [2]) == bool(SPACE.match(char)), repr(char)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.text('ab.|', min_size=1, max_size=5), min_size=1, max_size=9), st.text('ab.|'))
def test_the_longest_of_the_leftmost_is_found(words, text):
  import re

  found = [match[0] for match in re.finditer(pattern(words), text)]
  wanted, at = [], 0
  while at < len(text):
    word = max((word for word in words if text.startswith(word, at)), key=len, default='')
    wanted += [word] * bool(word)
    at += len(word) or 1
  assert found == wanted


def test_words_that_begin_alike_without_end():
  words = ['a' * n for n in range(1, 300)]
  finder = Finder([Added(n, word, special=False) for n, word in enumerate(words)])
  assert [token and token.id for token, *_ in finder.pieces('b' + words[-1] + 'b', False)] == [
    None,
    298,
    None,
  ]


def test_special_is_what_is_used_as_something(tmp_path):
  """Whatever a file says of it; what says nothing is an ordinary token, as in transformers."""
  saved(tmp_path, [{'content': '<end>', 'special': False}])
  path = tmp_path / 'tokenizer_config.json'
  eot = bpe.load(tmp_path).eot
  path.write_text(
    json.dumps(
      json.loads(path.read_text())
      | {'pad_token': '<end>', 'added_tokens_decoder': {str(eot + 2): {'content': '<user>'}}}
    )
  )
  t = bpe.load(tmp_path)
  assert t.encode('<user>') == [eot + 2] and eot + 1 not in t.encode('<end>')
  assert t.encode('<end>', allow_special=True) == [eot + 1]
  assert t.special_in('<user>x<end>') == '<end>' and t.special_in('<user>') is None


def test_ordinary_tokens_are_another_vocabulary(tmp_path):
  """A store made when they were not looked for has other ids, and says so by its hash."""
  token = {'content': 'COVID-19', 'normalized': True}
  for i, special in enumerate((False, True)):
    (tmp_path / str(i)).mkdir()
    saved(tmp_path / str(i), [token | {'special': special}])
  ordinary, special = (bpe.load(tmp_path / str(i)) for i in range(2))
  before = 'fe0dfcf7c7e33f563c3ba98d61e35b9484f65e5ad2fb9ab54f0ea21b94d16482'  # of both
  assert special.sha256 == before != ordinary.sha256

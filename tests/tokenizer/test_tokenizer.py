"""Tokenizers: GPT-2's own ids, lossless on any text, the same in Hugging Face's files."""

import hashlib
import json
import os
import random
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.processes import ROOT

from gpt2_jax.core.errors import UserError
from gpt2_jax.tokenizer import bpe as tokenizer
from gpt2_jax.tokenizer import tables
from gpt2_jax.tokenizer.bpe import EOT
from gpt2_jax.tokenizer.tables import byte_to_char, to_chars

TEXT = "The loss is low, isn't it?\n\n\tdef f(x):\n\t\treturn x  # naïve 東京 🙂 1234\r\n" * 30


def theirs(t):
  """The package tokenizers' reading of what we save."""
  import tokenizers

  with tempfile.TemporaryDirectory() as folder:
    t.save(folder)
    return tokenizers.Tokenizer.from_file(f'{folder}/tokenizer.json')


def saved(t, folder: Path) -> dict[str, bytes]:
  t.save(folder)
  return {path.name: path.read_bytes() for path in folder.iterdir()}


def edit(path: Path, change) -> None:
  """Applies `change` to the JSON value in a file."""
  content = json.loads(path.read_text()) if path.exists() else {}
  path.write_text(json.dumps(change(content) or content))


@pytest.fixture(scope='module')
def trained():
  return tokenizer.train_bpe([TEXT, 'another text, the other one'], 400)


@pytest.mark.parametrize(
  'text,ids',
  [  # gpt2-facts: tiktoken's and Hugging Face's
    ('Hello world', [15496, 995]),
    (' Hello world', [18435, 995]),
    ("Hello, I'm a language model,", [15496, 11, 314, 1101, 257, 3303, 2746, 11]),
    ('', []),
  ],
)
def test_gpt2_ids(text, ids):
  assert tokenizer.load('gpt2').encode(text) == ids


def test_gpt2_is_the_released_vocabulary():
  gpt2 = tokenizer.load('gpt2')
  assert (gpt2.vocab_size, gpt2.eot, len(gpt2.merges)) == (50257, 50256, 50000)
  assert tokenizer.vocab_size('gpt2') == 50257


def test_gpt2_equals_tiktoken(monkeypatch):
  folder = os.environ.get('GPT2_JAX_TEST_TOKENIZER')
  if not folder:
    pytest.skip('GPT2_JAX_TEST_TOKENIZER names no tiktoken cache')
  import tiktoken

  monkeypatch.setenv('TIKTOKEN_CACHE_DIR', folder)
  released, ours = tiktoken.get_encoding('gpt2'), tokenizer.load('gpt2')
  assert ours._encoding._mergeable_ranks == released._mergeable_ranks
  for text in (TEXT, ' \n \t  x' * 50, "I'LL we'll  ''ll"):
    assert ours.encode(text) == released.encode_ordinary(text)


def test_gpt2_comes_with_the_package_as_it_was_released():
  content = tokenizer.RELEASED.read_bytes()
  assert hashlib.sha256(content).hexdigest() == tokenizer.MERGES_SHA256
  assert f'= {tokenizer.RELEASED.name}\n' in (ROOT / 'setup.cfg').read_text()  # of the package's data


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=200))
@pytest.mark.parametrize('name', ['gpt2', 'byte', 'trained'])
def test_any_text_comes_back(trained, name, text):
  t = trained if name == 'trained' else tokenizer.load(name)
  ids = t.encode(text)
  assert t.decode(ids) == text
  np.testing.assert_array_equal(t.encode_array(text), ids)
  assert all(0 <= i < t.eot for i in ids)


@settings(max_examples=150, deadline=None)
@given(st.text(alphabet='the losi\n\tdfx(:)rtu #naïv東🙂12', max_size=120))
def test_trained_ids_equal_the_tokenizers_library(trained, text):
  """Two engines, one vocabulary: tiktoken's merging by rank, tokenizers' by list of merges."""
  if not hasattr(trained, 'theirs'):
    trained.theirs = theirs(trained)
  assert trained.theirs.encode(text).ids == trained.encode(text)


def test_training_is_repeatable_and_useful(trained):
  again = tokenizer.train_bpe([TEXT, 'another text, the other one'], 400)
  assert again.sha256 == trained.sha256 and again.merges == trained.merges
  assert trained.vocab_size <= 400
  assert len(trained.encode(TEXT)) < len(TEXT.encode()) / 2.5


@pytest.mark.parametrize('name', ['gpt2', 'byte', 'trained'])
@pytest.mark.parametrize('files', [('vocab.json', 'merges.txt'), ('tokenizer.json',)])
def test_saved_files_load_again(trained, tmp_path, name, files):
  t = trained if name == 'trained' else tokenizer.load(name)
  t.save(tmp_path)
  for path in tmp_path.iterdir():
    if path.name not in files:
      path.unlink()
  loaded = tokenizer.load(tmp_path)
  assert loaded.sha256 == t.sha256 and loaded.vocab_size == t.vocab_size
  assert loaded.encode(TEXT) == t.encode(TEXT)


def test_saved_files_load_in_transformers(trained, tmp_path):
  transformers = pytest.importorskip('transformers', reason='needs the extra parity')
  trained.save(tmp_path)
  theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
  assert theirs(TEXT)['input_ids'] == trained.encode(TEXT)
  assert theirs.eos_token_id == trained.eot
  assert theirs(EOT)['input_ids'] == [trained.eot]
  assert theirs.decode(trained.encode(TEXT)) == TEXT


def test_gpt2_files_are_the_released_ones(tmp_path):
  tokenizer.load('gpt2').save(tmp_path)
  vocab = json.loads((tmp_path / 'vocab.json').read_text())
  assert len(vocab) == 50257 and vocab[EOT] == 50256 and vocab['Ġworld'] == 995
  assert (tmp_path / 'merges.txt').read_text().split('\n')[:3] == ['#version: 0.2', 'Ġ t', 'Ġ a']


@pytest.mark.parametrize('spec', ['gpt2', 'byte'])
def test_a_text_cannot_end_its_document(spec):
  t = tokenizer.load(spec)
  text = f'one{EOT}two'
  assert t.eot not in t.encode(text) and t.decode(t.encode(text)) == text
  assert t.eot not in t.encode_array(text).tolist()
  assert t.encode(text, allow_special=True) == [*t.encode('one'), t.eot, *t.encode('two')]


def test_half_a_surrogate_pair_is_replaced():
  t = tokenizer.load('byte')
  assert t.decode(t.encode_array('a\ud800b').tolist()) == 'a\ufffdb'


@pytest.mark.parametrize('spec', ['bpe:', 'bpe:x', 'bpe:256', 'bpe:-5'])
def test_a_size_that_cannot_be_is_refused(spec):
  with pytest.raises(UserError, match='at least 257'):
    tokenizer.vocab_size(spec)


def test_errors_name_the_thing(tmp_path):
  with pytest.raises(UserError, match="'wordpiece' is none of: gpt2"):
    tokenizer.load('wordpiece')
  with pytest.raises(UserError, match='holds neither vocab.json'):
    tokenizer.load(tmp_path)
  with pytest.raises(UserError, match='token id 257 is not in the vocabulary of 257'):
    tokenizer.load('byte').decode([257])
  tokenizer.load('byte').save(tmp_path)
  (tmp_path / 'tokenizer.json').unlink()  # it would be read instead
  (tmp_path / 'vocab.json').write_text('{"a": ')
  with pytest.raises(UserError, match="can't be read"):
    tokenizer.load(tmp_path)


# Fine-tunes' tokenizers: other ids, added tokens, other files.


@pytest.mark.parametrize(
  'name,sha256',
  [
    ('byte', '4f53cda18c2baa0c0354bb5f9a3ecbe5ed12ab4d8e11ba873c2f11161202b945'),
    ('gpt2', '92dec3db9d6a44e587c03cdb69bc294799874e414f518971f16c52b02269c13f'),
  ],
)
def test_the_hash_that_stores_carry_stays(name, sha256):
  assert tokenizer.load(name).sha256 == sha256


def odd_vocabulary(rng: random.Random):
  """Any merges over three letters, also such as no training makes; ids in any order, with gaps."""
  tokens, merges = [b'a', b'b', b'c'], []
  for _ in range(rng.randint(0, 9)):
    merges.append((rng.choice(tokens), rng.choice(tokens)))
    tokens = [*dict.fromkeys([*tokens, b''.join(merges[-1])])]
  if rng.random() < 0.3:
    rng.shuffle(merges)
  names = [*byte_to_char().values(), *dict.fromkeys(to_chars(a + b) for a, b in merges), EOT]
  vocab = dict(zip(names, rng.sample(range(len(names) + 3), len(names))))
  return tokenizer.Tokenizer(
    merges,
    tables.Tables(
      vocab,
      [(to_chars(a), to_chars(b)) for a, b in merges],
      [tables.Added(vocab[EOT], EOT)],
      {},
      rng.random() < 0.5,
      vocab[EOT],
    ),
  )


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32))
def test_any_merges_in_any_order_of_ids(seed):
  rng = random.Random(seed)
  t = odd_vocabulary(rng)
  other = theirs(t)
  for _ in range(20):
    text = ''.join(rng.choices('abc \n', [9, 9, 6, 1, 1], k=rng.randint(0, 40)))
    assert t.encode(text) == other.encode(text).ids
    space = ' ' * (t._tables.prefix_space and text[:1] not in ('', ' '))
    assert t.decode(t.encode(text)) == space + text
    text = f'{text}{EOT}{text}'
    assert t.encode(text, allow_special=True) == other.encode(text).ids
  gap = next(i for i in range(500) if i not in t._tables.vocab.values())
  with pytest.raises(UserError, match=f'token id {gap} is not in the vocabulary'):
    t.decode([gap])


def test_both_engines_are_in_use():
  """Of these merges tiktoken would make abc: it asks for tokens, not for the pairs that make them."""
  merges = [(b'a', b'b'), (b'b', b'c'), (b'a', b'bc')]
  odd = tokenizer.Tokenizer(merges)
  assert not odd._tiktoken_is_exact
  assert [odd.decode([i]) for i in odd.encode('abc')] == ['ab', 'c']
  assert theirs(odd).encode('abc').ids == odd.encode('abc')
  assert tokenizer.Tokenizer(merges[:2])._tiktoken_is_exact


@pytest.fixture(scope='module', params=['tokenizer.json', 'vocab.json'])
def specials_first(request, tmp_path_factory):
  """As Hugging Face's tutorials train: ours, and the trainer's own."""
  import tokenizers

  bpe = tokenizers.ByteLevelBPETokenizer()
  bpe.train_from_iterator(
    [TEXT],
    vocab_size=400,
    min_frequency=2,
    show_progress=False,
    special_tokens=['<s>', '<pad>', '</s>', '<unk>', tokenizers.AddedToken('<mask>', lstrip=True)],
  )
  folder = tmp_path_factory.mktemp('first')
  if request.param == 'tokenizer.json':
    bpe.save(str(folder / request.param))
  else:
    bpe.save_model(str(folder))
    mask = {'content': '<mask>', 'lstrip': True, 'special': True}
    (folder / 'special_tokens_map.json').write_text(
      json.dumps(
        {
          'bos_token': '<s>',
          'eos_token': {'content': '</s>'},
          'unk_token': '<unk>',
          'mask_token': mask,
          'additional_special_tokens': ['<pad>'],
        }
      )
    )
  return tokenizer.load(folder), bpe


PIECES = st.sampled_from(['the los', 'x', ' ', '  ', '\n', '東', '🙂', "'ll", '12', 'é', '\xa0'])


@settings(max_examples=60, deadline=None)
@given(st.lists(PIECES | st.sampled_from(['<s>', '<mask>', '</s>', '<pad>', '<unk>'])).map(''.join))
def test_special_tokens_may_come_first(specials_first, text):
  t, bpe = specials_first
  ids = bpe.encode(text).ids
  assert t.encode(text, allow_special=True) == ids
  assert t.decode(t.encode(text)) == text
  assert min(t.encode(text), default=5) >= 5


def test_what_special_tokens_are_used_as(specials_first):
  t, bpe = specials_first
  assert t.eot == 2 and t.vocab_size == bpe.get_vocab_size() > 300
  assert t.decode([0, 4, 2]) == '<s><mask></s>'


ADDED = {
  '<|pad|>': (1, {}),
  '<|im_start|>': (2, {'special': False, 'normalized': True}),
  ' é': (5, {'lstrip': True}),
  '🙂': (9, {'single_word': True}),
}


def with_added(trained, folder: Path, route: str):
  """The trained tokenizer with tokens behind it, with gaps, given in one of three files."""
  trained.save(folder)
  flags = {
    name: dict.fromkeys(('lstrip', 'rstrip', 'single_word', 'normalized'), False)
    | {'content': name, 'special': True}
    | more
    for name, (_, more) in ADDED.items()
  }
  ids = {name: trained.eot + k for name, (k, _) in ADDED.items()}
  if route == 'tokenizer.json':
    edit(
      folder / route,
      lambda c: c['added_tokens'].extend({'id': ids[name], **flags[name]} for name in ADDED),
    )
  elif route == 'added_tokens_decoder':
    edit(
      folder / 'tokenizer_config.json',
      lambda c: c.update({route: {str(ids[name]): flags[name] for name in ADDED}}),
    )
  else:
    (folder / route).write_text(json.dumps(ids))
    (folder / 'special_tokens_map.json').write_text(
      json.dumps({'additional_special_tokens': [f for f in flags.values() if f['special']]})
    )
  return tokenizer.load(folder)


ROUTES = ('tokenizer.json', 'added_tokens_decoder', 'added_tokens.json')


@pytest.fixture(scope='module')
def added(trained, tmp_path_factory):
  return [with_added(trained, tmp_path_factory.mktemp('added'), route) for route in ROUTES]


@settings(max_examples=60, deadline=None)
@given(text=st.lists(PIECES | st.sampled_from([*ADDED, EOT])).map(''.join))
def test_tokens_added_behind_the_vocabulary(trained, added, text):
  if not hasattr(added[0], 'theirs'):
    added[0].theirs = theirs(added[0])
  ids = added[0].theirs.encode(text).ids
  for t in added:
    assert t.encode(text, allow_special=True) == ids
    ordinary = iter(text.split('<|im_start|>'))  # special ones stay text
    plain = trained.encode(next(ordinary))
    for rest in ordinary:
      plain += [t.eot + 2, *trained.encode(rest)]
    assert t.encode(text) == plain == t.encode_array(text).tolist()
    assert t.decode(t.encode(text)) == text


def test_added_tokens_decode_and_count(trained, added):
  assert len({t.sha256 for t in added}) == 1 and added[0].sha256 != trained.sha256
  for t in added:
    assert (t.eot, t.vocab_size) == (trained.eot, trained.eot + 10)
    assert t.decode([t.eot + k for k, _ in ADDED.values()]) == ''.join(ADDED)
    with pytest.raises(UserError, match=f'token id {t.eot + 3} is not in'):
      t.decode([t.eot + 3])


def test_saving_twice_gives_the_same_bytes(trained, added, specials_first, tmp_path):
  for i, t in enumerate([trained, specials_first[0], *added]):
    files = saved(t, tmp_path / f'{i}a')
    again = tokenizer.load(tmp_path / f'{i}a')
    assert saved(again, tmp_path / f'{i}b') == files
    assert (again.sha256, again.eot, again.vocab_size) == (t.sha256, t.eot, t.vocab_size)
    for name in ('tokenizer.json', 'tokenizer_config.json'):  # what is left still says the ids
      (tmp_path / f'{i}a' / name).unlink()
    (tmp_path / f'{i}a' / 'special_tokens_map.json').write_text(
      json.dumps({'eos_token': t.decode([t.eot])})
    )
    assert tokenizer.load(tmp_path / f'{i}a').encode(TEXT) == t.encode(TEXT)


def test_fine_tunes_load_in_transformers(added, specials_first, tmp_path):
  transformers = pytest.importorskip('transformers', reason='needs the extra parity')
  for i, t in enumerate([specials_first[0], *added]):
    t.save(tmp_path / str(i), model_max_length=64)
    other = transformers.AutoTokenizer.from_pretrained(tmp_path / str(i))
    text = TEXT[:200] + ''.join(f'{token.content} the {token.content}' for token in t._tables.added)
    assert other(text)['input_ids'] == t.encode(text, allow_special=True)
    assert other.eos_token_id == t.eot and other.model_max_length == 64
    assert len(other) == len(t._tables.vocab)


@settings(max_examples=40, deadline=None)
@given(st.text(alphabet='ab \n\t\xa0\u3000', max_size=8))
@pytest.mark.parametrize('file', ['tokenizer.json', 'tokenizer_config.json'])
def test_add_prefix_space_is_honoured(file, text):
  import tokenizers

  with tempfile.TemporaryDirectory() as name:
    folder = Path(name)
    tokenizer.load('byte').save(folder)
    if file == 'tokenizer.json':
      (folder / 'tokenizer_config.json').unlink()
      edit(folder / file, lambda c: c['pre_tokenizer'].update(add_prefix_space=True))
    else:
      edit(folder / file, lambda c: c.update(add_prefix_space=True))
    t = tokenizer.load(folder)
    t.save(folder)
    other = tokenizers.Tokenizer.from_file(f'{folder}/tokenizer.json')
  assert t.encode(text) == other.encode(text).ids
  text = f'{text}{EOT}{EOT}a{EOT} {text}'
  assert t.encode(text, allow_special=True) == other.encode(text).ids
  assert t.sha256 != tokenizer.load('byte').sha256


def test_the_hub_s_older_tokenizer_json(trained, tmp_path):
  """Merges as texts, no `type`, and an end that is `normalized`, as in openai-community/gpt2."""
  trained.save(tmp_path)

  def older(content):
    content['model']['merges'] = [' '.join(pair) for pair in content['model']['merges']]
    content['added_tokens'][0]['normalized'] = True
    del content['model']['type'], content['pre_tokenizer']['use_regex']

  edit(tmp_path / 'tokenizer.json', older)
  loaded = tokenizer.load(tmp_path)
  assert loaded.sha256 == trained.sha256 and loaded.encode(TEXT) == trained.encode(TEXT)


def test_openais_file_names(trained, tmp_path):
  trained.save(tmp_path)
  (tmp_path / 'vocab.json').rename(tmp_path / 'encoder.json')
  (tmp_path / 'merges.txt').rename(tmp_path / 'vocab.bpe')
  (tmp_path / 'tokenizer.json').unlink()
  loaded = tokenizer.load(tmp_path)
  assert loaded.sha256 == trained.sha256 and loaded.encode(TEXT) == trained.encode(TEXT)


def test_tokenizer_json_comes_first(trained, tmp_path):
  trained.save(tmp_path)
  trained_files = (tmp_path / 'tokenizer.json').read_bytes()
  tokenizer.load('byte').save(tmp_path)
  (tmp_path / 'tokenizer.json').write_bytes(trained_files)
  assert tokenizer.load(tmp_path).sha256 == trained.sha256


def test_the_end_is_the_eos_token_or_said_to_be_missing(tmp_path):
  vocab = dict(zip([*byte_to_char().values(), '[END]', '</s>'], range(258)))
  (tmp_path / 'vocab.json').write_text(json.dumps(vocab))
  (tmp_path / 'merges.txt').write_text('#version: 0.2\n')
  assert tokenizer.load(tmp_path).eot == 257
  (tmp_path / 'special_tokens_map.json').write_text('{"eos_token": {"content": "[END]"}}')
  assert tokenizer.load(tmp_path).eot == 256
  edit(tmp_path / 'vocab.json', lambda c: c.pop('</s>') and None)
  (tmp_path / 'special_tokens_map.json').unlink()
  with pytest.raises(UserError, match='no token ends a text.*Name one'):
    tokenizer.load(tmp_path)


def test_a_byte_without_a_token(tmp_path):
  tokenizer.load('byte').save(tmp_path)
  for name in ('vocab.json', 'tokenizer.json'):
    edit(tmp_path / name, lambda c: c.get('model', {'vocab': c})['vocab'].pop('z') and None)
  t = tokenizer.load(tmp_path)
  assert t.decode(t.encode('abc')) == 'abc'
  for encode in (t.encode, t.encode_array, lambda text: t.encode(text, allow_special=True)):
    with pytest.raises(UserError, match="the text has the byte b'z'"):
      encode('xyz')


@pytest.mark.parametrize(
  'key,value',
  [
    ('normalizer', {'type': 'NFC'}),
    ('model.type', 'Unigram'),
    ('model.dropout', 0.1),
    ('model.continuing_subword_prefix', '##'),
    ('model.end_of_word_suffix', '</w>'),
    ('model.byte_fallback', True),
    ('model.ignore_merges', True),
    ('pre_tokenizer.type', 'Metaspace'),
    ('pre_tokenizer.use_regex', False),
  ],
)
def test_another_kind_of_tokenizer_is_refused_by_name(tmp_path, key, value):
  tokenizer.load('byte').save(tmp_path)
  *part, last = key.split('.')
  edit(tmp_path / 'tokenizer.json', lambda c: (c[part[0]] if part else c).update({last: value}))
  with pytest.raises(UserError, match=rf'tokenizer\.json: {key} is .*, which can\'t be honoured'):
    tokenizer.load(tmp_path)


DEEP = '[' * 100_000
HOSTILE = [
  ('tokenizer.json', '[]', 'not an object'),
  ('tokenizer.json', DEEP, "can't be read"),
  ('tokenizer.json', '{"model": {"vocab": 1' + '0' * 9999 + '}}', "can't be read"),
  ('tokenizer.json', '\udcff', "can't be read"),
  ('tokenizer.json', '{}', "no 'model'"),
  ('tokenizer.json', {'pre_tokenizer': None}, 'pre_tokenizer is None'),
  ('tokenizer.json', {'added_tokens': {}, 'model': []}, 'model is'),
  ('tokenizer.json', {'added_tokens': {'a': 1}}, 'not a list'),
  ('tokenizer.json', {'added_tokens': [7]}, r'added_tokens\[0\] is 7'),
  ('tokenizer.json', {'added_tokens': [{'id': 300}]}, 'None is no text of a token'),
  ('tokenizer.json', {'added_tokens': [{'content': '<x>'}]}, 'id of .<x>. is None'),
  ('tokenizer.json', {'added_tokens': [{'id': 3, 'content': '<x>'}]}, 'have the same id 3'),
  ('tokenizer.json', {'added_tokens': [{'id': 300, 'content': 'a'}]}, "'a' has the id 300 here"),
  ('tokenizer_config.json', '"x"', 'not an object'),
  ('tokenizer_config.json', {'added_tokens_decoder': 3}, 'added_tokens_decoder is 3'),
  ('tokenizer_config.json', {'added_tokens_decoder': {'-1': {'content': '<x>'}}}, "is '-1', not"),
  ('tokenizer_config.json', {'added_tokens_decoder': {'9' * 5000: {'content': '<x>'}}}, 'a whole'),
  ('tokenizer_config.json', {'eos_token': 5}, 'eos_token: 5 is no text'),
  ('special_tokens_map.json', {'additional_special_tokens': 'abc'}, "is 'abc', not a list"),
  ('added_tokens.json', {'<x>': 10**12}, 'id of .<x>. is 1000000000000, not'),
  ('added_tokens.json', {'<x>': -1}, 'is -1, not'),
  ('added_tokens.json', '[1]', 'not an object'),
  ('added_tokens.json', {'<x>': 1.5}, 'is 1.5, not'),
  ('added_tokens.json', {'': 300}, "'' is no"),
  ('added_tokens.json', {'<x>': True}, 'is True'),
  ('added_tokens.json', '{"\\udfff": 3}', 'text'),
  ('added_tokens.json', {'<x>': 300, '<y>': 300}, "'<x>' and '<y>' have the same id 300"),
  ('vocab.json', {'<x>': 0}, "'!' and '<x>' have the same id 0"),
  ('vocab.json', {'a': '0'}, "id of 'a' is '0'"),
  ('vocab.json', {'a': 10**12}, 'is 1000000000000'),
  ('merges.txt', 'a b', "needs a token 'ab', which has no id"),
  ('merges.txt', 'abc', 'not of two'),
  ('merges.txt', 'a b c', 'not of two tokens'),
  ('merges.txt', 'a 東', 'not a byte-level BPE'),
  ('merges.txt', 'a ', 'not a byte-level BPE'),
  ('merges.txt', '\udcff', "can't be read"),
]


@pytest.mark.parametrize('file,content,message', HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_files_are_one_clear_error(tmp_path, file, content, message):
  tokenizer.load('byte').save(tmp_path)
  if file in ('vocab.json', 'merges.txt'):
    (tmp_path / 'tokenizer.json').unlink()
  if isinstance(content, dict):
    edit(tmp_path / file, lambda c: c.update(content))
  else:
    (tmp_path / file).write_bytes(content.encode('utf-8', 'surrogateescape'))
  with pytest.raises(UserError, match=message) as e:
    tokenizer.load(tmp_path)
  assert str(tmp_path) in str(e.value) and len(str(e.value)) < 600

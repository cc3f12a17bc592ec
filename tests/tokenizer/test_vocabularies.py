"""Ids of one tokenizer meet no model of another, unless the user says so."""

import json

import numpy as np
import pytest
from support.contexts import evaluated, one_device, shrunk  # noqa: F401# noqa: F401

import gpt2_jax
from configs import finetune
from gpt2_jax.core.errors import UserError
from gpt2_jax.data import prepare, token_store
from gpt2_jax.tokenizer import bpe
from gpt2_jax.training import run_data, run_plan, train


@pytest.fixture(scope='module')
def permuted(tmp_path_factory):
  """The folder of a tokenizer with as many ids as `byte`, two of them the other way round."""
  folder = tmp_path_factory.mktemp('tokenizer') / 'permuted'
  bpe.load('byte').save(folder)
  (folder / 'tokenizer.json').unlink()
  vocab = json.loads((folder / 'vocab.json').read_text())
  vocab['a'], vocab['b'] = vocab['b'], vocab['a']
  (folder / 'vocab.json').write_text(json.dumps(vocab))
  return folder


def settings(texts, spec):
  return prepare.Settings(f'text:{texts}/one.txt', str(spec), 0.1, 0, 'tail')


@pytest.fixture(scope='module')
def other(texts, permuted, tmp_path_factory):
  """A store of the same text, made with it."""
  folder = tmp_path_factory.mktemp('other') / 'store'
  return prepare.ensure_store(settings(texts, permuted), folder, 1)


def test_a_store_of_another_tokenizer_is_not_scored(begun, other, tmp_path, capfd):
  with pytest.raises(UserError, match=f'another tokenizer .*--tokenizer={other.path}/tokenizer'):
    evaluated(begun, other.path, tmp_path)
  assert not (tmp_path / 'found.json').exists()
  assert evaluated(begun, other.path, tmp_path, tokenizer=str(other.path / 'tokenizer'))
  assert 'is taken in place of' in capfd.readouterr().err
  found = json.loads((tmp_path / 'found.json').read_text())
  assert found['tokenizer'] == other.manifest['tokenizer']['sha256']


def test_a_store_is_known_by_its_ids_not_by_a_name(begun, texts, other, permuted, tmp_path):
  own = gpt2_jax.from_pretrained(begun).tokenizer
  made = prepare.ensure_store(settings(texts, 'byte'), tmp_path / 's', 1)
  # asked for by another name
  own.save(tmp_path / 'own')
  assert prepare.ensure_store(settings(texts, tmp_path / 'own'), made.path).sha256 == made.sha256
  with pytest.raises(UserError, match="tokenizer: 'byte' there, '.*permuted' asked for"):
    prepare.ensure_store(settings(texts, permuted), made.path)


def test_tokens_that_say_nothing_are_gpt2s(tmp_path):
  np.arange(100, dtype='<u2').tofile(tmp_path / 'train.bin')
  opened = token_store.open_store(tmp_path)
  for own in (None, bpe.load('gpt2'), bpe.load('byte')):  # fewer ids: those beyond tell
    opened.check_tokenizer(own, 'the model', '--tokenizer')
  merges = bpe.load('gpt2').merges
  swapped = bpe.Tokenizer([merges[1], merges[0], *merges[2:]])
  assert swapped.vocab_size == bpe.GPT2_SIZE
  with pytest.raises(UserError, match="'gpt2'.*--tokenizer=gpt2"):
    opened.check_tokenizer(swapped, 'the model', '--tokenizer')


def test_training_does_not_begin_on_the_ids_of_another(begun, other, texts, tmp_path, capsys):
  config = finetune.get_config()
  config.init_from = str(begun)
  config = shrunk(config, texts)
  config.data.corpus = f'bin:{other.path}'
  with pytest.raises(UserError, match=f'that of {begun} .*--config.data.tokenizer={other.path}/tok'):
    train.train(config, tmp_path / 'run')
  assert not (tmp_path / 'run').exists()
  config.data.tokenizer = str(other.path / 'tokenizer')
  made = run_plan.make_plan(config)
  assert run_data.open_data(made).sha256 == other.sha256
  assert 'is not the tokenizer that it was trained with' in made.describe()
  config.data.tokenizer = 'byte'  # its own, by name
  assert 'is not the tokenizer' not in run_plan.make_plan(config).describe()
  with pytest.raises(UserError, match='that of data.tokenizer'):
    run_data.open_data(run_plan.make_plan(config))


def test_an_assistant_has_the_tokenizer_of_the_model(begun, permuted):
  model, assistant = (gpt2_jax.from_pretrained(begun) for _ in range(2))
  options = dict(max_new_tokens=4, do_sample=False)
  want = gpt2_jax.generate(model, 'the', **options)[0].tokens
  assert gpt2_jax.generate(model, 'the', assistant_model=assistant, **options)[0].tokens == want
  assistant.tokenizer = bpe.load(permuted)
  with pytest.raises(UserError, match='the assistant model has another tokenizer'):
    gpt2_jax.generate(model, 'the', assistant_model=assistant, **options)
  with pytest.raises(UserError, match='the assistant model has another tokenizer'):
    next(gpt2_jax.stream(model, 'the', assistant_model=assistant, **options))
  (found,) = gpt2_jax.generate(
    model, 'the', assistant_model=assistant, tokenizer=model.tokenizer, **options
  )
  assert found.tokens == want

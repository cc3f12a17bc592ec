"""Models by name: a local stand-in for the Hugging Face hub, asked over HTTP by real processes."""

import json
import re
import shlex
import shutil

import huggingface_hub
import pytest
from huggingface_hub import errors
from support.hub import COMMIT, GOLDEN
from support.processes import ROOT, run

import gpt2_jax
from gpt2_jax.checkpoints import hub as hub_module
from gpt2_jax.model.config import GPTConfig
from gpt2_jax.tokenizer import bpe

SAMPLE = (
  '-m',
  'gpt2_jax',
  'sample',
  '--max-new-tokens',
  '4',
  '--seed',
  '3',
  '--json',
  '--checkpoint',
)


@pytest.mark.slow
def test_a_model_is_fetched_by_name_and_then_works_offline(hub):
  folder, env, asked = hub
  model = folder / 'some' / 'name'
  byte = bpe.train_bpe(['a b ' * 9], 257)
  byte.save(model)
  keys = json.loads((model / 'config.json').read_text())
  source = model / 'model.safetensors'
  wide = make_wider(source, keys, 257)
  (model / 'config.json').write_text(json.dumps(wide))

  first = run(*SAMPLE, 'some/name', **env)
  assert first.returncode == 0, first.stderr
  result = json.loads(first.stdout)
  assert len(result['tokens']) == 4 or result['finish_reason'] == 'stop'
  assert 'GET model.safetensors @' + COMMIT in asked or 'GET model.safetensors @main' in asked
  assert not any('pytorch_model.bin' in line for line in asked), 'one kind of weights is enough'

  del asked[:]
  again = run(*SAMPLE, 'some/name', **env | {'HF_HUB_OFFLINE': '1'})
  assert again.returncode == 0, again.stderr
  assert again.stdout == first.stdout and not asked

  pinned = run(*SAMPLE, f'some/name@{COMMIT}', **env)
  assert json.loads(pinned.stdout) == json.loads(first.stdout) | {
    'checkpoint': f'some/name@{COMMIT}'
  }, pinned.stderr


@pytest.mark.slow
def test_the_model_cards_example(hub):
  """https://huggingface.co/gpt2, "How to use", as docs/decoding.md has it in one command."""
  folder, env, _ = hub
  config = GPTConfig(vocab_size=257, n_positions=64, n_embd=24, n_layer=2, n_head=2)
  model = gpt2_jax.bind(config, gpt2_jax.init_params(config, 0))
  model = gpt2_jax.Pretrained(model, bpe.load('byte'))
  gpt2_jax.save_pretrained(model, folder / 'gpt2')
  page = (ROOT / 'docs' / 'decoding.md').read_text()
  [command] = re.findall(r'^gpt2-jax (sample --checkpoint gpt2 .*)$', page, re.M)
  result = run('-m', 'gpt2_jax', *shlex.split(command), '--json', **env)
  assert result.returncode == 0, result.stderr
  texts = [json.loads(line) for line in result.stdout.splitlines()]
  assert len(texts) == 5 and {text['prompt'] for text in texts} == {"Hello, I'm a language model,"}
  assert len({text['text'] for text in texts}) > 1 and texts[0]['options']['seed'] == 42


def make_wider(path, keys, vocab_size):
  """Rewrites a model for a vocabulary of another size; returns its config."""
  import numpy as np
  import safetensors.numpy

  state = safetensors.numpy.load_file(path)
  rng = np.random.default_rng(0)
  state['transformer.wte.weight'] = rng.standard_normal((vocab_size, keys['n_embd'])).astype(
    np.float32
  )
  safetensors.numpy.save_file(state, path, {'format': 'pt'})
  return keys | {
    'vocab_size': vocab_size,
    'eos_token_id': vocab_size - 1,
    'bos_token_id': vocab_size - 1,
  }


@pytest.mark.parametrize(
  'name,extra,parts',
  [
    (
      'some/name',
      {'HF_HUB_OFFLINE': '1'},
      ['config.json of', 'not in the cache', 'unset HF_HUB_OFFLINE', 'HF_ENDPOINT', 'HF_HOME'],
    ),
    pytest.param(
      'some/name',
      {'HF_ENDPOINT': 'http://127.0.0.1:9'},
      ['config.json of', 'HF_ENDPOINT'],
      marks=pytest.mark.slow,
    ),  # tries six times
    ('no/such', {}, ['neither a path nor a model', 'HF_TOKEN']),
    ('some/name@v9', {}, ['neither a path nor a model', 'revision']),
    ('some/empty', {}, ['has no config.json']),
    ('some/weightless', {}, ['has none of model.safetensors', 'pytorch_model.bin']),
    ('some/hostile', {}, ['names a file outside of its folder', '../../evil']),
  ],
)
def test_what_is_not_there_says_what_to_do(hub, name, extra, parts):
  folder, env, _ = hub
  (folder / 'some' / 'empty').mkdir()
  for other in ('weightless', 'hostile'):
    (folder / 'some' / other).mkdir()
    shutil.copy(GOLDEN / 'plain' / 'config.json', folder / 'some' / other)
  (folder / 'some' / 'hostile' / 'model.safetensors.index.json').write_text(
    json.dumps({'weight_map': {'transformer.wte.weight': '../../evil'}})
  )
  result = run(*SAMPLE, name, **env | extra)
  assert result.returncode == 1
  message = result.stderr.splitlines()[-1]
  assert message.startswith('error: ') and 'Traceback' not in result.stderr, result.stderr
  for part in parts:
    assert part in message


@pytest.mark.parametrize(
  'files',
  [
    ['adapter_config.json', 'adapter_model.safetensors'],
    ['adapter_config.json', 'adapter_model.bin'],
    ['config.json', 'adapter_config.json', 'adapter_model.safetensors'],
  ],
)
def test_adapters_of_the_hub(tmp_path, monkeypatch, files):
  """Also in the older kind of file, and beside a config.json of the base."""
  for file in files:
    (tmp_path / file).write_bytes(b'')

  def download(name, file, revision):
    if file not in files:
      raise errors.EntryNotFoundError(file)
    return str(tmp_path / file)

  monkeypatch.setattr(huggingface_hub, 'hf_hub_download', download)
  assert hub_module.fetch('some/adapters') == tmp_path

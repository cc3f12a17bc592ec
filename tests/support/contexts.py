"""Configs and recipes made small, and their runs. What they need is imported late: tests/conftest.py
imports this before it says whether the hub may be asked, which is read when its library is loaded.
"""

import importlib
import json

import jax
import numpy as np
import pytest

from support.texts import make_text


@pytest.fixture(scope='module')
def texts(tmp_path_factory):
  """A folder with many short documents, one long one, and the stores that are made of them."""
  folder = tmp_path_factory.mktemp('texts')
  rng = np.random.default_rng(0)
  (folder / 'many.jsonl').write_text(
    ''.join(json.dumps({'text': make_text(rng, 8)}) + '\n' for i in range(4000))
  )
  (folder / 'one.txt').write_text(make_text(rng, 800))
  return folder


@pytest.fixture(autouse=True, scope='module')
def one_device():
  """The mesh is no matter here, and several devices take longer to compile for."""
  first = jax.devices()[:1]
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(jax, 'devices', lambda *_: first)
    patch.setattr(jax, 'device_count', lambda *_: 1)
    yield


def shrunk(config, texts):
  """A config's own data settings on other text, with a model of nearly nothing, for two steps."""
  data, optim = config.data, config.optim
  store = f'{data.tokenizer}-{data.val_fraction}-{data.split}'.replace(':', '-')
  corpus = 'one.txt' if data.split == 'tail' else 'many.jsonl'
  data.update(corpus=f'text:{texts}/{corpus}', directory=str(texts), store=str(texts / store))
  if config.init_from is None:
    config.model.update(n_embd=16, n_layer=1, n_head=2)
  optim.update(peak_lr=1e-2, warmup_steps=1)
  rows = data.sequence_length or config.model.n_positions or 64
  config.train.update(steps=2, global_batch_tokens=rows)
  config.checkpoint.every = config.evaluate.every = 1
  config.log.update(sample_tokens=1, sample_prompt='the', to='')
  return config


def evaluated(workdir, store, tmp_path, **options):
  """What `evaluate --tasks store:…` finds."""
  from gpt2_jax.cli.evaluate import Evaluate

  Evaluate(str(workdir), f'store:{store}', json=tmp_path / 'found.json', **options).run()
  return json.loads((tmp_path / 'found.json').read_text())['results'][0]


@pytest.fixture(scope='module')
def begun(texts, tmp_path_factory):
  """The workdir of a small run by bytes, with 64 positions."""
  from gpt2_jax.training import train

  folder = tmp_path_factory.mktemp('begun')
  config = shrunk(importlib.import_module('configs.tiny').get_config('shakespeare'), texts)
  config.train.update(steps=1)
  assert train.train(config, folder / 'run') == 0
  return folder / 'run'

"""What is on the disk is as it was written, and one run at a time writes it: hashes, locks, records,
and small files that hold anything.
"""

import contextlib
import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import ROOT, environment, make_text
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import gpt2_jax
from gpt2_jax import checkpoint, files, manifest, verified
from gpt2_jax.cli import main
from gpt2_jax.data import prepare, store, verify
from gpt2_jax.errors import UserError, saving
from gpt2_jax.training import holding, metrics, record
from gpt2_jax.training.loop import train

few = settings(deadline=None, max_examples=20, suppress_health_check=list(HealthCheck))


def tiny_config(folder: Path, **train_section):
  from configs import base
  config = base.get_config()
  config.model.update(n_layer=1, n_embd=16, n_head=2, n_positions=16, dtype='float32')
  config.data.update(corpus=f'text:{folder}/*.txt', directory=str(folder / 'data'), tokenizer='byte',
                     split='tail', val_fraction=0.05)
  config.train.update(dict(steps=6, global_batch_tokens=128) | train_section)
  config.optim.warmup_steps = 1
  config.checkpoint.every = 2
  config.evaluate.every = 6
  config.log.sample_tokens = 2
  config.log.tensorboard = False
  return config


@pytest.fixture(scope='session')
def made(tmp_path_factory):
  """A folder with texts, a store of them in `data`, and a finished run of 6 steps in `run`."""
  folder = tmp_path_factory.mktemp('integrity')
  rng = np.random.default_rng(0)
  for i in range(3):
    (folder / f'{i}.txt').write_text(make_text(rng, 200))
  assert train(tiny_config(folder), folder / 'run') == 0
  return folder


@pytest.fixture
def copy(made, tmp_path):
  """The same, to be damaged."""
  shutil.copytree(made / 'run', tmp_path / 'run')
  return tmp_path / 'run'


def the_store(folder: Path) -> Path:
  return next(path.parent for path in (folder / 'data').rglob(store.MANIFEST))



# --- small files that hold anything ---------------------------------------------------------------

VALUES = st.sampled_from([None, True, -1, 0, 2**63, 10**30, 1.5, float('nan'), float('inf'), '', 'x',
                          '../x', '\0', 'ä' * 300, [], [1], {}, {'a': 1}])


def mutate_leaf(value, data):
  """One value within it, whichever, made another or removed."""
  if not isinstance(value, (dict, list)) or not value or data.draw(st.integers(0, 9)) == 0:
    return data.draw(VALUES)
  keys = list(value) if isinstance(value, dict) else range(len(value))
  key = data.draw(st.sampled_from(keys))
  if data.draw(st.integers(0, 4)) == 0:
    del value[key]
  else:
    value[key] = mutate_leaf(value[key], data)
  return value


def mutate(path: Path, data) -> None:
  """Damages a file in one of the ways that disks, editors and people have."""
  content = path.read_bytes()
  kind = data.draw(st.sampled_from(['bytes', 'cut', 'leaf', 'leaf', 'leaf', 'other', 'folder', 'gone']))
  if kind == 'bytes':
    changed = bytearray(content)
    for _ in range(data.draw(st.integers(1, 3))):
      changed[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(changed)
  elif kind == 'cut':
    path.write_bytes(content[:data.draw(st.integers(0, len(content) - 1))])
  elif kind == 'leaf':
    lines = content.decode().splitlines() if path.suffix == '.jsonl' else [content.decode()]
    at = data.draw(st.integers(0, len(lines) - 1))
    lines[at] = json.dumps(mutate_leaf(json.loads(lines[at]), data))
    path.write_text('\n'.join(lines) + '\n')
  elif kind == 'other':
    path.write_bytes(data.draw(st.sampled_from(
        [b'', b'{', b'[' * 100_000, b'{"a":' * 1000, b'\xff\xfe', b'null', b'1' * 5000, b'{}', b'[]',
         bytes(len(content)), b'"\\ud800"'])))
  else:
    path.unlink()
    if kind == 'folder':
      path.mkdir()


@contextlib.contextmanager
def or_refused():
  """What is done in it works, or ends in a short message."""
  try:
    yield
  except UserError as e:
    assert len(str(e)) < 2000


RUN = ['config.json', 'env.json', 'metrics.jsonl', 'tokenizer/vocab.json', 'tokenizer/tokenizer_config.json',
       'checkpoints/6/manifest.json', 'checkpoints/6/meta/metadata', 'checkpoints/6/_CHECKPOINT_METADATA']


@pytest.mark.parametrize('name', RUN)
@few
@given(data=st.data())
def test_readers_of_a_run_with_a_damaged_file(made, name, data):
  """read_meta, from_pretrained (sample, evaluate, convert, serve), reproduce: never a traceback."""
  from gpt2_jax.interop import card, workdir
  from gpt2_jax.training import reproduce
  with tempfile.TemporaryDirectory() as scratch:
    run = Path(scratch) / 'run'
    shutil.copytree(made / 'run', run)
    mutate(run / name, data)
    with or_refused():
      assert checkpoint.read_meta(run)['step'] in (4, 6)
    with or_refused():
      source = workdir.open_source(run)
      source.tensor('wte.weight')
      card.model_card(source)
    with or_refused():
      reproduce._recorded(run)
    with or_refused():
      record.finished(run)


@pytest.mark.parametrize('name', RUN)
@settings(few, max_examples=6)
@given(data=st.data())
def test_a_start_of_a_run_with_a_damaged_file(made, name, data):
  with tempfile.TemporaryDirectory() as scratch:
    run = Path(scratch) / 'run'
    shutil.copytree(made / 'run', run)
    shutil.rmtree(run / 'checkpoints' / '4')
    mutate(run / name, data)
    if name.startswith('checkpoints'):
      shutil.copytree(made / 'run' / 'checkpoints' / '4', run / 'checkpoints' / '4')
    with or_refused():
      assert train(tiny_config(made, steps=6), run) == 0

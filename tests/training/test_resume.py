"""What a run goes on from: whole checkpoints, the ones that are kept, nothing torn."""

import hashlib
import json
import re
import shutil
import subprocess
import sys

import jax
import pytest
from support import forked
from support.arrays import mesh_of
from support.processes import ROOT, environment, run
from support.runs import arguments, lines, plain

from benchmarks import kills
from gpt2_jax.checkpoints import manifest, saved_steps
from gpt2_jax.checkpoints.orbax_store import Checkpoints
from gpt2_jax.core.errors import UserError
from gpt2_jax.model.config import GPTConfig
from gpt2_jax.model.gpt2 import make_params
from gpt2_jax.parallel.sharding import on_devices


@pytest.fixture
def three(tmp_path):
  """A workdir with checkpoints of the steps 1, 2 and 3, and the folder that they lie in."""
  with mesh_of(1, 1, 1):
    checkpoints = Checkpoints(tmp_path, keep=3)
    for step in (1, 2, 3):
      checkpoints.save(step, {'params': {'w': jax.numpy.full((64, 64), step)}}, {})
    checkpoints.close()
  return tmp_path, tmp_path / 'checkpoints'


def biggest(folder):
  return max((p for p in folder.rglob('d/*')), key=lambda p: p.stat().st_size)


def cut(step):
  path = biggest(step / 'params')
  path.write_bytes(path.read_bytes()[:-16])


def flip(step):
  path = biggest(step / 'params')
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 1
  path.write_bytes(content)


def half_deleted(step):
  (step / manifest.FILE).unlink()
  shutil.rmtree(step / 'params' / 'd')


def of_an_older_release(step):
  """They wrote no manifest."""
  (step / manifest.FILE).unlink()
  path = step / 'meta' / 'metadata'
  path.write_text(json.dumps(json.loads(path.read_text()) | {'version': 1}))


def older_and_half_deleted(step):
  of_an_older_release(step)
  shutil.rmtree(step / 'params' / 'd')


@pytest.mark.parametrize(
  'harm,says',
  [
    (cut, 'params/.* bytes, not '),
    (flip, 'params/.* has other content'),
    (lambda step: (step / 'meta' / 'metadata').unlink(), 'meta/metadata is missing'),
    (lambda step: shutil.rmtree(step / 'params'), 'params/.* is missing'),
    (lambda step: (step / manifest.FILE).write_text('{"files": {'), 'manifest.json is damaged'),
    (lambda step: (step / manifest.FILE).write_text('[]'), 'manifest.json is damaged'),
    (lambda step: (step / manifest.FILE).write_text('[' * 1000), 'manifest.json is damaged'),
    (lambda step: (step / manifest.FILE).write_text('{"files": {}}'), 'it names no file'),
    (lambda step: (step / manifest.FILE).unlink(), 'has no manifest.json, though'),
    (half_deleted, 'has no manifest.json, though'),
    (older_and_half_deleted, "has no manifest.json and can't be read"),
  ],
)
def test_a_damaged_checkpoint_is_named_and_passed_over(three, capfd, harm, says):
  workdir, folder = three
  harm(folder / '3')
  reader = Checkpoints(workdir)
  assert reader.whole_step() == 2  # readers pass over it and leave it
  reader.close()
  assert (folder / '3').is_dir()
  capfd.readouterr()
  checkpoints = Checkpoints(workdir, keep=3)
  assert checkpoints.whole_step() == 2 == checkpoints.latest_step()
  errors = capfd.readouterr().err
  assert 'checkpoint of step 3: ' in errors and f'moved to {folder / "damaged-3"}' in errors
  assert re.search(says, errors), errors
  with mesh_of(1, 1, 1):
    checkpoints.save(3, {'params': {'w': jax.numpy.ones((64, 64))}}, {})
  checkpoints.close()
  again = Checkpoints(workdir, keep=3)
  assert again.whole_step() == 3
  again.close()
  assert sorted(p.name for p in folder.iterdir()) == ['1', '2', '3', 'damaged-3']


def test_a_checkpoint_of_before_manifests_is_read_before_it_is_used(three):
  of_an_older_release(three[1] / '3')
  checkpoints = Checkpoints(three[0])
  assert checkpoints.whole_step() == 3
  checkpoints.close()


def test_all_damaged_is_an_error_and_stays_one(three):
  for step in '123':
    cut(three[1] / step)
  for _ in range(2):
    checkpoints = Checkpoints(three[0], keep=3)
    with pytest.raises(UserError, match='all checkpoints in .* are damaged'):
      checkpoints.whole_step()
    checkpoints.close()
  assert sorted(p.name for p in three[1].iterdir()) == ['1', '2', '3']


@pytest.mark.parametrize(
  'policy,kept',
  [
    (dict(keep=2), [9, 10]),
    (dict(keep=1, keep_every=4), [4, 8, 10]),
    (dict(keep=1, keep_best=2), [3, 7, 10]),
    (dict(keep=2, keep_every=5, keep_best=1), [3, 5, 9, 10]),
  ],
)
def test_what_is_kept(tmp_path, policy, kept):
  """Losses are known of the odd steps alone, as where every second checkpoint is evaluated."""
  losses = {1: 5.0, 3: 1.0, 5: 4.0, 7: 2.0, 9: 3.0}
  with mesh_of(1, 1, 1):
    checkpoints = Checkpoints(tmp_path, **policy)
    for step in range(1, 11):
      checkpoints.save(
        step,
        {'params': {'w': jax.numpy.ones(2)}},
        {},
        {s: loss for s, loss in losses.items() if s <= step},
      )
    checkpoints.close()
  assert sorted(int(p.name) for p in (tmp_path / 'checkpoints').iterdir()) == kept


@pytest.mark.slow
def test_a_run_passes_over_a_damaged_checkpoint(finished, text_folder, tmp_path):
  """The newest one is cut short: the run makes its steps again, bitwise."""
  workdir = tmp_path / 'run'
  shutil.copytree(finished[0], workdir)
  cut(workdir / 'checkpoints' / '24')
  assert saved_steps.read_meta(workdir)['step'] == 20  # what samples and conversions read
  result = run(*arguments(text_folder, workdir))
  assert result.returncode == 0, result.stderr
  assert 'resumed from step 20' in result.stdout
  assert 'checkpoint of step 24: params/' in result.stderr
  assert plain(workdir) == plain(finished[0])
  assert (workdir / 'checkpoints' / 'damaged-24').is_dir()


def test_a_preparation_killed_at_its_first_file_goes_on(tmp_path, text_folder):
  """What it leaves is a folder with one unfinished file."""
  (tmp_path / 'store').mkdir()
  (tmp_path / 'store' / 'job.json.tmp').write_text('{"sett')
  command = [
    '-m',
    'gpt2_jax',
    'prepare',
    '--corpus',
    f'text:{text_folder}',
    '--tokenizer',
    'byte',
    '--val-fraction',
    '0.1',
    '--output',
    str(tmp_path / 'store'),
  ]
  result = run(*command)
  assert result.returncode == 0, result.stderr
  assert (tmp_path / 'store' / 'manifest.json').exists()


MEMORY = """
import sys
import numpy as np
from pathlib import Path
import jax
from gpt2_jax.data import token_batches, token_store
from gpt2_jax.parallel import sharding
from jax.sharding import NamedSharding, PartitionSpec as P
folder = Path(sys.argv[1])
np.random.default_rng(0).integers(0, 2048, 100_000).astype('<u2').tofile(folder / 'train.bin')
mesh = sharding.make_mesh(data=1, fsdp=-1, tensor=1)
own = token_batches.TokenBatches(token_store.open_store(folder).splits['train'], 256, 8, 0, 2048)
def resident():
  return int(open('/proc/self/statm').read().split()[1]) * 4096 / 2**20
for step, batch in enumerate(own.batches(0, 10_000, 1, NamedSharding(mesh, P(None, sharding.BATCH)))):
  batch.block_until_ready()
  if step + 1 in (2000, 10_000):
    print(resident())
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != 'linux', reason='reads /proc')
def test_the_loader_holds_no_more_after_10000_steps(tmp_path):
  result = run('-c', MEMORY, str(tmp_path), timeout=600)
  assert result.returncode == 0, result.stderr
  early, late = map(float, result.stdout.split())
  assert late - early < 4, f'{early:.0f} MiB after 2,000 steps, {late:.0f} MiB after 10,000'


@pytest.mark.slow
def test_kills_at_random_moments_lose_nothing(tmp_path, monkeypatch, capsys):
  """benchmarks/kills.py with fewer kills (of each aim one, of the preparation two), and fewer steps:
  a start that is killed makes about a dozen.
  """
  monkeypatch.setattr(subprocess, 'Popen', forked.Popen)
  monkeypatch.setattr(
    sys, 'argv', ['kills', '--kills=5', '--steps=80', f'--folder={tmp_path / "kills"}']
  )
  for name in ('XLA_FLAGS', 'PYTHONPATH'):
    monkeypatch.setenv(name, environment()[name])
  status, printed = kills.main(), capsys.readouterr().out
  assert status == 0, printed
  assert '5 kills' in printed and 'nothing was lost' in printed


@pytest.mark.slow
def test_a_run_of_an_early_commit_goes_on(tmp_path):
  """golden/run.tar.xz was made at f7cf32c: a run of 8 steps with dropout, a moving average and spikes
  that are skipped. Its checkpoint is that of step 4; its record has all 8 steps.
  """
  shutil.unpack_archive(ROOT / 'tests' / 'golden' / 'run.tar.xz', tmp_path, filter='data')
  workdir = tmp_path / 'run'
  before, meta = lines(workdir), saved_steps.read_meta(workdir)
  assert meta['step'] == 4 and [line['step'] for line in before] == list(range(1, 9))
  with mesh_of(1, 1, 1):
    abstract = on_devices(jax.eval_shape(lambda: make_params(GPTConfig(**meta['model']), 0)))
    checkpoints, found = Checkpoints(workdir), {}
    for name in ('params', 'ema'):
      restored = checkpoints.restore(4, {name: abstract})[name]
      content = b''.join(jax.device_get(leaf).tobytes() for leaf in jax.tree.leaves(restored))
      found[name] = hashlib.sha256(content).hexdigest()
    checkpoints.close()
  assert found == {
    'params': 'e1e77c264f27d92721adb6a0ce2b3418a98bb59f9c3817578686428a7c50ce47',
    'ema': 'ee23fa4f2369133a2eab050543e072cf862fc54a00828425ce102644ce7d477d',
  }
  code = """
import json, sys
from configs import base
from gpt2_jax.training import train
config = base.get_config()
was = json.load(open('run/config.json'))  # a knob that was not there yet has its default
was['log'].pop('tensorboard')  # log.to now
config.update(was)
train.sample = lambda run, prompt: ''  # takes as long as the rest
sys.exit(train.train(config, 'run'))"""
  result = run('-c', code, cwd=tmp_path)
  assert result.returncode == 0, result.stderr
  assert 'resumed from step 4 of 8, 256 tokens seen' in result.stdout
  starts = json.loads((workdir / 'env.json').read_text())['starts']
  assert [start['began_at'] for start in starts] == [0, 4] and starts[-1]['finished']
  for was, now in zip(before, lines(workdir), strict=True):
    for key in was.keys() & {'train/loss', 'train/learning_rate', 'train/tokens', 'eval/loss'}:
      assert now[key] == pytest.approx(was[key], rel=1e-6), f'step {was["step"]}: {key}'

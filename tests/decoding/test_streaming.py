"""Loading and converting hold little more than the parameters: measured on real processes."""

import json

import numpy as np
import pytest
from support.processes import run

from gpt2_jax.checkpoints import pretrained, tensors
from gpt2_jax.model.config import GPTConfig

CONFIG = GPTConfig(
  vocab_size=20000,
  n_positions=1024,
  n_embd=768,
  n_layer=12,
  n_head=12,
  embd_pdrop=0,
  attn_pdrop=0,
  resid_pdrop=0,
)

PROBE = """
import json, resource, sys
import jax.numpy as jnp
import gpt2_jax
from gpt2_jax.checkpoints import pretrained
from gpt2_jax.parallel.sharding import make_mesh

peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
kind, source, target, small = sys.argv[1:]
load = lambda path: gpt2_jax.from_pretrained(
    path, mesh=make_mesh(1, 4, 1) if kind == 'mesh' else None)
if kind in ('load', 'mesh'):
  load(small)  # whatever code and compilers need is there
  before = peak()
  model = load(source)
  shard = model.model.h.mlp.c_fc.weight[...].addressable_shards[0].data.nbytes
else:
  before, shard = peak(), 0
  pretrained.write(pretrained.open_source(source), target, kind)
print(json.dumps({'grown': peak() - before, 'shard': shard}))
"""


def random_source(config):
  values = np.random.default_rng(0).standard_normal(config.n_embd * config.F).astype(np.float32)
  shapes = tensors.shapes(config)
  return tensors.Source(config, lambda name: np.resize(values, shapes[name]), 'float32', 'random')


@pytest.fixture(scope='module')
def models(tmp_path_factory):
  """The same model, 404 MB, in each format; and a small one beside each."""
  folder = tmp_path_factory.mktemp('models')
  small = GPTConfig(vocab_size=20, n_positions=8, n_embd=8, n_layer=1, n_head=2)
  for size, config in (('large', CONFIG), ('small', small)):
    for to in ('hf', 'llmc', 'openai', 'flax', 'nanogpt'):
      options = {'approximate': True} if to == 'nanogpt' else {}
      pretrained.write(random_source(config), folder / size / to, to, **options)
  return folder


@pytest.mark.slow
@pytest.mark.parametrize('to', ['hf', 'llmc', 'openai', 'flax', 'nanogpt'])
def test_loading_streams(models, tmp_path, to):
  size = 4 * sum(int(np.prod(shape)) for shape in tensors.shapes(CONFIG).values())
  result = run('-c', PROBE, 'load', str(models / 'large' / to), '', str(models / 'small' / to))
  assert result.returncode == 0, result.stderr
  assert json.loads(result.stdout)['grown'] < 1.3 * size


@pytest.mark.slow
def test_loading_onto_a_mesh_streams(models):
  size = 4 * sum(int(np.prod(shape)) for shape in tensors.shapes(CONFIG).values())
  result = run('-c', PROBE, 'mesh', str(models / 'large/hf'), '', str(models / 'small/hf'), devices=4)
  assert result.returncode == 0, result.stderr
  have = json.loads(result.stdout)
  assert have['grown'] < 1.3 * size
  assert have['shard'] == 12 * 768 * 3072 * 4 / 4


@pytest.mark.slow
@pytest.mark.parametrize('to', ['hf', 'llmc', 'openai', 'flax'])
def test_converting_streams(models, tmp_path, to):
  source = models / 'large' / ('llmc' if to == 'hf' else 'hf')
  result = run('-c', PROBE, to, str(source), str(tmp_path / 'out'), '')
  assert result.returncode == 0, result.stderr
  wte = 4 * 20000 * 768
  assert json.loads(result.stdout)['grown'] < 4 * wte  # of a model of 404 MB

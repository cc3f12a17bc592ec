"""What a training step moves between GPUs, read from the program that XLA compiles for H100s.

No GPU is needed, only the CUDA plugin; attention is XLA's, since cuDNN's wants its library.
"""

import importlib.util

import pytest

from configs import base
from gpt2_jax.planning import topology
from gpt2_jax.planning.compile_ahead import plan_train

pytestmark = [
  pytest.mark.slow,
  pytest.mark.skipif(
    importlib.util.find_spec('jax_cuda12_plugin') is None,
    reason='the CUDA plugin of JAX is not installed',
  ),
]
L, D, T, V = 2, 256, 256, 1024
WEIGHTS = 12 * D**2  # of a layer
TABLES = (V + T) * D


def moved(mesh: dict, micro_batches: int = 1, **model) -> dict:
  """Kind of collective -> its traffic, of a step on eight H100s."""
  config = base.get_config()
  config.model.update(
    vocab_size=V, n_positions=T, n_embd=D, n_layer=L, n_head=4, attention='xla', **model
  )
  split = mesh.get('data', 1) * mesh.get('fsdp', 1)
  config.train.update(steps=10, global_batch_tokens=2 * split * micro_batches * T, micro_batch_rows=2)
  config.mesh.update(data=1, fsdp=1)
  config.mesh.update(mesh)
  return plan_train(config, topology.get('h100:8'), 'test').collectives


@pytest.mark.parametrize('remat', ['none', 'full'])
def test_fsdp_gathers_twice_and_scatters_once(remat):
  kinds = moved({'fsdp': 8}, remat=remat)
  # in bfloat16: each layer for the forward and for the backward pass, wte for both its uses
  gathered = kinds['all-gather']['bytes'] / 2
  assert 2 * L * WEIGHTS + TABLES <= gathered <= 2 * L * WEIGHTS + 3 * TABLES
  # in float32, once a parameter
  assert kinds['reduce-scatter']['bytes'] / 4 == L * WEIGHTS + TABLES
  # biases, layer norms and sums for the norms of gradient and parameters
  assert kinds['all-reduce']['bytes'] / 4 < L * 13 * D + 2 * D + 1000


def test_gradients_may_be_summed_in_bfloat16():
  kinds = moved({'fsdp': 8}, reduce_dtype='bfloat16')
  # the gradients of wte's two uses apart: they are added in float32
  assert kinds['reduce-scatter']['bytes'] / 2 == L * WEIGHTS + TABLES + V * D


@pytest.mark.parametrize('micro_batches', [1, 4])
def test_data_parallel_reduces_each_gradient_once(micro_batches):
  kinds = moved({'data': 8}, micro_batches)
  assert kinds.keys() == {'all-reduce'}
  parameters = L * (WEIGHTS + 13 * D) + TABLES + 2 * D
  norms = micro_batches * L * 4 * D + 100 * micro_batches  # are reduced in each micro-batch
  assert parameters <= kinds['all-reduce']['bytes'] / 4 <= parameters + norms


def test_a_program_is_compiled_again_as_it_was():
  """JAX's persistent cache, which tests have, holds no program of a GPU that is not there."""
  assert moved({'data': 8}) == moved({'data': 8})


def test_between_replicas_of_shards_shards_alone_are_reduced():
  kinds = moved({'data': 2, 'fsdp': 4}, 2)
  assert kinds['reduce-scatter']['bytes'] / 4 == 2 * (L * WEIGHTS + TABLES)  # each micro-batch
  assert kinds['all-reduce']['bytes'] / 4 < (L * WEIGHTS + TABLES) / 4 + 2 * (L * 13 * D + 1000)

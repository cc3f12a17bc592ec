"""Layouts: every mesh computes the same."""

import dataclasses
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from support.arrays import assert_close, mesh_of

from gpt2_jax.core.errors import UserError
from gpt2_jax.model.config import GPTConfig
from gpt2_jax.model.gpt2 import init_params
from gpt2_jax.parallel import sharding

MESHES = [(1, 1, 1), (8, 1, 1), (1, 8, 1), (1, 1, 2), (4, 1, 2), (1, 4, 2), (2, 2, 2), (2, 4, 1)]


def test_parameters_lie_as_the_rules_say(tiny):
  with mesh_of(2, 2, 2):
    params = init_params(tiny, 0)
  attn = params['h']['attn']
  assert attn['c_attn']['weight'].sharding.spec == P(None, 'fsdp', None, 'tensor', None)
  assert attn['c_proj']['weight'].sharding.spec == P(None, 'tensor', None, 'fsdp')
  assert params['wte']['weight'].sharding.spec == P('tensor', 'fsdp')
  shard = params['h']['mlp']['c_fc']['weight'].addressable_shards[0].data
  assert shard.shape == (3, 32 // 2, 80 // 2)


@pytest.mark.parametrize('mesh', MESHES)
def test_initial_weights_do_not_depend_on_the_mesh(tiny, mesh):
  want = init_params(tiny, 7)
  with mesh_of(*mesh):
    have = init_params(tiny, 7)
  for a, b in zip(jax.tree.leaves(want), jax.tree.leaves(have)):
    assert_close(b, a, 1e-6) if a.any() else np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
  'sizes,says',
  [
    ((3, 1, 1), 'does not cover the 8 devices'),
    ((-1, -1, 1), 'at most one may be -1'),
    ((0, 1, 8), 'sizes are positive'),
    ((-1, 1, 3), 'does not cover'),
  ],
)
def test_impossible_meshes_are_refused(sizes, says):
  with pytest.raises(UserError, match=says):
    sharding.make_mesh(*sizes)


def test_one_size_is_inferred():
  assert dict(sharding.make_mesh(2, -1, 2).shape) == {'data': 2, 'fsdp': 2, 'seq': 1, 'tensor': 2}


def test_indivisible_sizes_are_named_with_what_works():
  mesh = sharding.make_mesh(1, 2, 4)
  xl = GPTConfig(n_embd=1600, n_head=25, n_layer=48)
  with pytest.raises(UserError, match=r'n_head = 25 .* mesh.tensor = 4.*may be one of \[1\]'):
    sharding.check_divisible(mesh, xl.divisible())
  xl = dataclasses.replace(xl, vocab_multiple=640)
  with pytest.raises(UserError, match=r'may be one of \[1, 5\]'):
    sharding.check_divisible(mesh, xl.divisible())


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(MESHES), st.integers(1, 3), st.integers(1, 3))
def test_placed_rows_are_the_rows(sizes, A, per):
  M = 8 * per
  mesh = sharding.make_mesh(*sizes, devices=jax.devices()[: int(np.prod(sizes))])
  layout = NamedSharding(mesh, P(None, sharding.BATCH))
  rows = sharding.local_rows((A, M), layout)
  assert rows == list(range(A * M))  # one process has all of them
  want = np.arange(A * M * 5).reshape(A, M, 5)
  have = sharding.place({r: want.reshape(-1, 5)[r] for r in rows}, want.shape, layout)
  np.testing.assert_array_equal(have, want)


def test_unshard_gathers_fsdp_alone():
  with mesh_of(2, 2, 2):
    w = jnp.zeros((4, 4), out_sharding=P('fsdp', 'tensor'))
    assert jax.typeof(sharding.unshard(w)).sharding.spec == P(None, 'tensor')
  w = jnp.zeros((4, 4))
  assert sharding.unshard(w) is w


# --- several slices, several hosts -------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Chip:
  """A device as a mesh is made of it."""

  id: int
  slice_index: int
  process_index: int = 0
  platform: str = 'tpu'
  device_kind: str = 'TPU v5 lite'
  coords: tuple = ()
  core_on_chip: int = 0


def slices(n: int, side: int) -> list[Chip]:
  """n slices of side x side chips, in an order of no use."""
  chips = [
    Chip(id=(s * side + x) * side + y, slice_index=s, process_index=s, coords=(x, y, 0))
    for s in range(n)
    for x in range(side)
    for y in range(side)
  ]
  return list(np.random.default_rng(0).permutation(np.array(chips, object)))


@pytest.mark.parametrize(
  'sizes,over',
  [
    ((2, 8, 1, 2), 'data'),
    ((4, 4, 2, 1), 'data'),
    ((2, 8, 2, 1), 'fsdp'),
    ((32, 1, 1, 1), 'data'),
    ((8, 4, 1, 1), 'data'),
  ],
)
def test_slices_lie_along_one_axis(sizes, over):
  data, fsdp, seq, tensor = sizes
  with warnings.catch_warnings():
    warnings.simplefilter('ignore')
    mesh = sharding.make_mesh(data, fsdp, tensor, seq, devices=slices(2, 4), slices_over=over)
  where = np.vectorize(lambda chip: chip.slice_index)(mesh.devices)
  axis = sharding.AXES.index(over)
  first, second = np.split(where, 2, axis)
  assert (first == first.flat[0]).all() and (second == 1 - first.flat[0]).all()
  assert len({chip.id for chip in mesh.devices.flat}) == 32


def test_slices_that_do_not_divide_the_axis_are_refused():
  with pytest.raises(UserError, match="2 slices lie along mesh.slices_over = 'data'"):
    sharding.make_mesh(1, 32, devices=slices(2, 4))


def test_whole_rows_moves_nothing(tiny):
  with mesh_of(2, 2, 1, 2):
    params = init_params(tiny, 0)
  moved = sharding.whole_rows(params)
  assert dict(jax.tree.leaves(moved)[0].sharding.mesh.shape) == {
    'data': 4,
    'fsdp': 2,
    'seq': 1,
    'tensor': 1,
  }
  for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(moved)):
    np.testing.assert_array_equal(a, b)
    at = lambda x: {s.device: s.data.unsafe_buffer_pointer() for s in x.addressable_shards}
    assert at(a) == at(b)


def test_meshes_that_would_work_are_listed():
  with pytest.raises(UserError, match=r'of 8 devices these meshes would work: data=8; .*fsdp=4'):
    sharding.check_divisible(sharding.make_mesh(1, 8), GPTConfig(n_embd=12, n_head=3).divisible())

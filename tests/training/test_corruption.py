"""Flipped bits are found in the step that they fall in, and named; nothing else is."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from support.arrays import mesh_of
from support.configs import optim
from support.models import tiny_gpt2
from support.processes import run
from support.runs import arguments, plain

from gpt2_jax.checkpoints.orbax_store import Checkpoints
from gpt2_jax.core.errors import UserError
from gpt2_jax.parallel import checksums as library
from gpt2_jax.parallel.checksums import checksums
from gpt2_jax.training.optimizer import make_optimizer, make_schedule
from gpt2_jax.training.step import init_state, make_train_step
from gpt2_jax.training.watch.corruption import VerifiedStep


def flipped(x: jax.Array, bit: int = 0, devices=None) -> jax.Array:
  """An array with one bit flipped in its first element, on all devices that hold it or on some."""

  def part(shard):
    data = np.array(shard.data)
    if devices is None or shard.device in devices:
      data.view(f'uint{8 * data.itemsize}').flat[0] ^= 1 << bit
    return jax.device_put(data, shard.device)

  parts = [part(shard) for shard in x.addressable_shards]
  return jax.make_array_from_single_device_arrays(x.shape, x.sharding, parts)


def with_flip(tree, suffix: str, **how):
  """A tree with a bit flipped in the array whose name has this end."""
  name = lambda path: jax.tree_util.keystr(path, simple=True, separator='.')
  assert sum(name(path).endswith(suffix) for path, _ in jax.tree.leaves_with_path(tree)) == 1
  return jax.tree.map_with_path(
    lambda path, x: flipped(x, **how) if name(path).endswith(suffix) else x, tree
  )


@settings(deadline=None, max_examples=40)
@given(
  shape=st.lists(st.integers(1, 7), max_size=3),
  dtype=st.sampled_from(['float32', 'int32', 'float16', 'int8']),
  data=st.data(),
)
def test_any_flipped_bit_changes_a_checksum(shape, dtype, data):
  x = np.arange(np.prod(shape), dtype=dtype).reshape(shape)
  y = x.copy()
  bits = y.reshape(-1).view(f'uint{8 * x.itemsize}')
  bit = data.draw(st.integers(0, 8 * x.itemsize - 1))
  bits[data.draw(st.integers(0, x.size - 1))] ^= bits.dtype.type(1 << bit)
  sums = [checksums({'x': jnp.asarray(z)}).of_arrays()['x'] for z in (x, y.reshape(shape))]
  assert sums[0] != sums[1]
  if x.size > 1:  # nor is it a matter of the order
    turned = np.roll(x.reshape(-1), 1).reshape(shape)
    assert sums[0] != checksums({'x': jnp.asarray(turned)}).of_arrays()['x']


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_a_checksum_is_the_same_however_an_array_lies(dtype):
  """On one device, split and copied over eight; on a CPU as where a program makes it."""
  x = jnp.arange(8 * 6 * 4, dtype=dtype).reshape(8, 6, 4) / 7
  want = checksums({'x': x}).of_arrays()
  mesh = jax.make_mesh((4, 2), ('a', 'b'))
  for spec in (P(), P('a'), P('b', None, 'a'), P(('a', 'b'))):
    there = checksums({'x': jax.device_put(x, NamedSharding(mesh, spec))})
    assert there.of_arrays() == want and not there.torn()
    assert len(there.devices) == 8
  starts = np.zeros(3, np.uint32)
  made = np.asarray(library._on_device(x, starts, x.shape))
  np.testing.assert_array_equal(made, library._of_shard(x.addressable_shards[0], x.shape))


def test_of_three_replicas_the_odd_one_is_named_of_two_both():
  for count, odd in ((3, {1}), (2, {0, 1})):
    mesh = jax.make_mesh((count,), ('a',), devices=jax.devices()[:count])
    x = jax.device_put(jnp.ones((2, 3)), NamedSharding(mesh, P()))
    assert not checksums([x]).torn()
    [(_, devices)] = checksums([flipped(x, devices=[mesh.devices[1]])]).torn()
    assert {device.id for device in devices} == odd


class Machine:
  """A small model's training on four devices, with its replicas on pairs of them."""

  def __init__(self, workdir):
    self.config = tiny_gpt2(n_positions=8, n_layer=1, n_head=2, n_embd=8, vocab_size=16, n_inner=None)
    self.workdir, self.schedule = workdir, make_schedule(optim(clip_norm=0.0), 10)
    self.tx = make_optimizer(optim(clip_norm=0.0), self.schedule)
    self.state, self.clean = init_state(self.config, self.tx, 0, ema=False), self.compiled(self.tx)
    self.tokens = jnp.asarray(np.random.default_rng(0).integers(0, 16, (1, 4, 9)), jnp.int32)

  def compiled(self, tx):
    step = make_train_step(self.config, tx, self.schedule, seed=0, ema_decay=0)
    return jax.jit(step, donate_argnums=0)

  def steps(self, calls, every=2, replicas_every=0):
    """A verified step whose calls of the device are `calls(number, state, batch)`."""
    count = iter(range(10**6))
    return VerifiedStep(
      lambda state, batch: calls(next(count), state, batch),
      start=0,
      every=every,
      replicas_every=replicas_every,
      workdir=self.workdir,
      last_good=lambda: 7,
    )

  def run(self, step, count):
    state, values = jax.tree.map(jnp.copy, self.state), []
    for _ in range(count):
      state, found = step(state, self.tokens)
      values.append(found['train/loss'])
    return state, jax.device_get(values)


@pytest.fixture(scope='module')
def machine(tmp_path_factory):
  with mesh_of(2, 2, 1):
    yield Machine(tmp_path_factory.mktemp('run'))


def test_clean_steps_raise_nothing_and_change_nothing(machine):
  state, losses = machine.run(machine.clean, 12)
  calls = []

  def counted(number, state, batch):
    calls.append(number)
    return machine.clean(state, batch)

  again, same = machine.run(machine.steps(counted, every=4, replicas_every=3), 12)
  assert len(calls) == 12 + 12 // 4
  np.testing.assert_array_equal(losses, same)
  assert checksums(again.items()).of_arrays() == checksums(state.items()).of_arrays()


@pytest.mark.parametrize(
  'what,name,named',
  [
    ('before', 'mlp.c_fc.weight', ('params.h.mlp.c_fc.weight', 'metrics.train/loss')),
    ('before', 'mu.h.mlp.c_fc.bias', ('params.h.mlp.c_fc.bias', 'mu.h.mlp.c_fc.bias')),
    ('after', 'params.wte.weight', ('params.wte.weight',)),
    ('after', 'nu.ln_f.bias', ('nu.ln_f.bias',)),
  ],
)
def test_a_bit_of_a_parameter_or_a_moment(machine, what, name, named):
  """Flipped in what the step, or its second making, reads or writes, on one device of four."""

  def faulty(number, state, batch):
    if number != 2:  # step 2 is made by the calls 1 and 2
      return machine.clean(state, batch)
    flip = lambda tree: dataclasses.replace(
      tree,
      **{
        key: with_flip(value, name.removeprefix('params.'), bit=22)
        for key, value in dict(params=tree.params, opt_state=tree.opt_state).items()
        if (key == 'opt_state') == name.startswith(('mu', 'nu'))
      },
    )
    if what == 'before':
      return machine.clean(flip(state), batch)
    state, values = machine.clean(state, batch)
    return flip(state), values

  with pytest.raises(UserError) as error:
    machine.run(machine.steps(faulty), 4)
  said = str(error.value)
  assert said.startswith('step 2 was made twice') and 'checkpoint of step 7' in said
  assert all(each in said for each in named) or 'more' in said
  if what == 'after':
    assert said.count(' on ') >= 1 and said.count('\n  ') == 1
  with np.load(machine.workdir / 'corruption' / 'step-2-process-0.npz') as left:
    assert {key.rpartition(' ')[2] for key in left} == {'1', '2'}


@pytest.mark.slow
def test_a_bit_of_a_gradient(machine):
  """It shows in the moments, which keep it."""

  def update(grads, state, params):
    x = grads['ln_f']['bias']
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) ^ jnp.uint32(1 << 20)
    x = jnp.where(jnp.arange(x.size) == 0, jax.lax.bitcast_convert_type(bits, jnp.float32), x)
    return machine.tx.update({**grads, 'ln_f': {**grads['ln_f'], 'bias': x}}, state, params)

  tx = optax.GradientTransformation(machine.tx.init, update)
  broken = machine.compiled(tx)

  def faulty(number, state, batch):
    return (broken if number == 2 else machine.clean)(state, batch)

  with pytest.raises(UserError, match=r'step 2 was made twice(.|\n)*mu.ln_f.bias'):
    machine.run(machine.steps(faulty), 4)


def test_a_bit_of_one_replica(machine):
  """No step is made twice: the copies that must be equal are not, and two devices hold them."""
  device = jax.devices()[3]

  def faulty(number, state, batch):
    state, values = machine.clean(state, batch)
    if number == 4:
      params = with_flip(state.params, 'ln_f.bias', devices=[device])
      state = dataclasses.replace(state, params=params)
    return state, values

  step = machine.steps(faulty, every=0, replicas_every=3)
  with pytest.raises(UserError) as error:
    machine.run(step, 9)
  said = str(error.value)
  assert said.startswith('step 6 has replicas that differ')
  assert f' {device.id} of process 0' in said


def test_a_bit_of_a_checkpoint_on_its_way(machine, tmp_path, monkeypatch):
  """The files are as they were written, and not what the devices had."""
  items = {'params': machine.state.params}
  abstract = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), items
  )
  checkpoints = Checkpoints(tmp_path, keep=1)
  checkpoints.save(1, items, {})
  checkpoints.wait()
  found = checkpoints.restore(1, abstract)
  assert checksums(found).of_arrays() == checksums(items).of_arrays()
  restore = checkpoints._manager.restore

  def faulty(step, args):
    found = dict(restore(step, args=args))
    if 'params' in found:
      found['params'] = with_flip(found['params'], 'mlp.c_fc.weight', bit=3)
    return found

  monkeypatch.setattr(checkpoints._manager, 'restore', faulty)
  with pytest.raises(UserError, match='step 1 in .* is not what the devices had.*mlp.c_fc.weight'):
    checkpoints.restore(1, abstract)
  checkpoints.close()


@pytest.mark.slow
def test_a_verified_run_is_the_run(finished, text_folder, tmp_path):
  workdir, _ = finished
  also = dict(train__verify_every=5, train__verify_replicas_every=7)
  result = run(*arguments(text_folder, tmp_path / 'run', **also))
  assert result.returncode == 0, result.stdout + result.stderr
  assert plain(tmp_path / 'run') == plain(workdir)

"""The training step: the same numbers on every mesh and in every split, and it learns."""

import dataclasses
import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P
from support.arrays import assert_close, mesh_of
from support.configs import optim, tiny_config
from support.models import tiny_gpt2

from configs import base
from gpt2_jax.checkpoints import orbax_store, saved_steps
from gpt2_jax.checkpoints.orbax_store import difference
from gpt2_jax.core.chips import peak_flops
from gpt2_jax.core.errors import UserError
from gpt2_jax.model.config import GPTConfig
from gpt2_jax.model.gpt2 import bind, init_params
from gpt2_jax.parallel.sharding import BATCH, factorizations, on_devices
from gpt2_jax.training import memory_estimate, run_plan
from gpt2_jax.training.optimizer import clip_by_global_norm, make_optimizer, make_schedule
from gpt2_jax.training.optimizers.parts import decay_mask
from gpt2_jax.training.step import init_state, make_eval_step, make_train_step, nll


def run_steps(config, A, steps=4, G=8, T=16, mesh=None, **fields):
  """The losses and gradient norms of some steps on random tokens, in A micro-batches.

  AdamW with a large eps: a bias of keys changes nothing, its gradient is rounding alone, and eps 1e-8
  would make whole steps of it.
  """
  fields = {'eps': 1e-3} | fields
  schedule = make_schedule(optim(**fields), 10)
  tx = make_optimizer(optim(**fields), schedule)
  rng = np.random.default_rng(0)
  with mesh_of(*(mesh or (1, 1, 1))):
    state = init_state(config, tx, 0, ema=False)
    step = jax.jit(make_train_step(config, tx, schedule, seed=0, ema_decay=0))
    out = []
    for _ in range(steps):
      tokens = rng.integers(0, config.vocab_size, (A, G // A, T + 1)).astype(np.int32)
      state, values = step(state, jax.device_put(tokens, P(None, BATCH)))
      out.append([float(values['train/loss']), float(values['train/grad_norm'])])
    return np.array(out), jax.device_get(state.params)


@pytest.fixture(scope='module')
def dropped():
  """A small model with dropout, and its run on one device in one batch."""
  sizes = dict(n_positions=16, n_layer=2, n_head=8, n_inner=None, initializer_range=0.02)
  config = tiny_gpt2(**sizes, embd_pdrop=0.1, attn_pdrop=0.1, resid_pdrop=0.1)
  return config, *run_steps(config, 1)


@pytest.mark.parametrize('A', [pytest.param(2, marks=pytest.mark.slow), 8])
def test_micro_batches_change_nothing(dropped, A):
  config, want, params = dropped
  have, have_params = run_steps(config, A)
  assert_close(have, want)
  for a, b in zip(jax.tree.leaves(have_params), jax.tree.leaves(params)):
    np.testing.assert_allclose(a, b, atol=2e-5)


QUICK_MESHES = [(1, 2, 2, 2)]  # data, fsdp, seq, tensor
ALL_MESHES = [
  pytest.param(sizes, marks=[] if sizes in QUICK_MESHES else pytest.mark.slow)
  for sizes in [*factorizations(8), (1, 1, 1, 2), (4, 1, 1, 2)]
]  # two on fewer devices


@pytest.mark.parametrize('sizes', ALL_MESHES, ids=str)
def test_meshes_change_nothing(dropped, sizes):
  config, want, params = dropped
  data, fsdp, seq, tensor = sizes
  have, have_params = run_steps(config, 1, mesh=(data, fsdp, tensor, seq))
  assert_close(have, want)
  for a, b in zip(jax.tree.leaves(have_params), jax.tree.leaves(params), strict=True):
    np.testing.assert_allclose(a, b, atol=2e-5)


@pytest.mark.slow
def test_mesh_and_micro_batches_together(dropped, capfd):
  config, want, _ = dropped
  have, _ = run_steps(config, 2, mesh=(2, 2, 2))
  assert_close(have, want)
  # what the compiler says where a layout makes it gather whole arrays
  assert 'Involuntary full rematerialization' not in capfd.readouterr().err


def test_a_step_is_bitwise_repeatable(dropped):
  config, want, _ = dropped
  have, _ = run_steps(config, 1)
  np.testing.assert_array_equal(have, want)


@pytest.mark.parametrize('tie', [True, pytest.param(False, marks=pytest.mark.slow)])
def test_overfits_one_batch(tiny, tie):
  config = dataclasses.replace(tiny, initializer_range=0.02, tie_word_embeddings=tie)
  schedule = optax.constant_schedule(1e-2)
  tx = make_optimizer(optim(weight_decay=0.0), schedule)
  step = jax.jit(make_train_step(config, tx, schedule, seed=0, ema_decay=0), donate_argnums=0)
  tokens = np.random.default_rng(0).integers(0, 97, (1, 4, 17)).astype(np.int32)
  state, losses = init_state(config, tx, 0, ema=False), []
  for _ in range(120):
    state, values = step(state, tokens)
    losses.append(float(values['train/loss']))
  assert abs(losses[0] - math.log(97)) < 0.1
  assert losses[-1] < 0.02


def test_nll_is_optax_cross_entropy(tiny):
  params = init_params(tiny, 0)
  tokens = jnp.asarray(np.random.default_rng(0).integers(0, 97, (3, 10)))
  have, want = jax.jit(
    lambda p: (
      nll(bind(tiny, p), tokens).each,
      optax.softmax_cross_entropy_with_integer_labels(bind(tiny, p)(tokens[:, :-1]), tokens[:, 1:]),
    )
  )(params)
  assert_close(have, want)


def test_evaluation_weighs_tokens(tiny):
  params = init_params(tiny, 0)
  tokens = np.random.default_rng(0).integers(0, 97, (1, 3, 10)).astype(np.int32)
  weights = np.ones((1, 3, 9), np.float32)
  weights[0, 2, 4:] = 0
  each = np.asarray(jax.jit(lambda p: nll(bind(tiny, p), jnp.asarray(tokens[0])).each)(params))
  total, count = jax.jit(make_eval_step(tiny))(params, tokens, weights)
  assert count == 22
  assert_close(total / count, each[weights[0] == 1].mean())
  tokens[0, 2, 5:] = 0  # what does not count may be anything
  assert_close(jax.jit(make_eval_step(tiny))(params, tokens, weights)[0], total)


def test_decay_is_for_matrices_and_embeddings(tiny):
  params = jax.eval_shape(lambda: init_params(tiny, 0))
  decayed = {
    jax.tree_util.keystr(path, simple=True, separator='.')
    for path, on in jax.tree.leaves_with_path(decay_mask(params))
    if on
  }
  assert decayed == {
    'wte.weight',
    'wpe.weight',
    'h.attn.c_attn.weight',
    'h.attn.c_proj.weight',
    'h.mlp.c_fc.weight',
    'h.mlp.c_proj.weight',
  }


@pytest.mark.parametrize(
  'name,shape',
  [
    ('cosine', {0: 0.1, 9: 1, 10: 1, 55: 0.55, 100: 0.1, 150: 0.1}),
    ('linear', {0: 0.1, 9: 1, 10: 1, 55: 0.55, 100: 0.1, 150: 0.1}),
    ('wsd', {0: 0.1, 10: 1, 80: 1, 90: 0.55, 100: 0.1}),
    ('constant', {0: 0.1, 4: 0.5, 10: 1, 100: 1}),
  ],
)
def test_schedules(name, shape):
  config = optim(schedule=name, end_lr_fraction=0.1)
  config.update(peak_lr=2.0, warmup_steps=10)
  schedule = make_schedule(config, 100)
  for step, share in shape.items():
    assert float(schedule(step)) == pytest.approx(2 * share, abs=1e-5), step


def test_the_learning_rate_that_is_logged_is_the_one_applied(tiny):
  config = optim(weight_decay=0.0, clip_norm=0.0, schedule='linear')
  schedule = make_schedule(config, 10)
  tx = make_optimizer(config, schedule)
  step = jax.jit(make_train_step(tiny, tx, schedule, seed=0, ema_decay=0))
  state = init_state(tiny, tx, 0, ema=False)
  tokens = np.random.default_rng(0).integers(0, 97, (1, 2, 9)).astype(np.int32)
  after, values = step(state, tokens)
  # Adam's first step moves every weight with a gradient by lr
  moved = np.abs(after.params['ln_f']['weight'] - state.params['ln_f']['weight'])
  assert np.median(moved) == pytest.approx(float(values['train/learning_rate']), rel=1e-3)
  assert float(values['train/learning_rate']) == pytest.approx(1e-2 / 2)


@pytest.mark.parametrize('size', [1e-30, 0.01, 0.3, 1e4])
def test_clipping_is_optax_s(size):
  """Of gradients whose norm is below the limit, and above it; zero stays zero."""
  rng = np.random.default_rng(0)
  grads = {'a': size * rng.normal(size=(7, 5)).astype(np.float32), 'b': np.zeros(3, np.float32)}
  clip, theirs = clip_by_global_norm(1.0), optax.clip_by_global_norm(1.0)
  have, want = (jax.jit(f.update)(grads, f.init(grads))[0] for f in (clip, theirs))
  for a, b in zip(jax.tree.leaves(have), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(a, b, rtol=3e-7)


def test_ema_follows(tiny):
  schedule = optax.constant_schedule(1e-2)
  tx = make_optimizer(optim(), schedule)
  step = jax.jit(make_train_step(tiny, tx, schedule, seed=0, ema_decay=0.75))
  state = init_state(tiny, tx, 0, ema=True)
  tokens = np.random.default_rng(0).integers(0, 97, (1, 2, 9)).astype(np.int32)
  want = state.params['wte']['weight']
  for _ in range(3):
    state, _ = step(state, tokens)
    want = 0.75 * want + 0.25 * state.params['wte']['weight']
  assert_close(state.ema['wte']['weight'], want)


# --- plan -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  'fields,says',
  [
    (dict(data__sequence_length=64), "longer than the model's context"),
    (dict(train__global_batch_tokens=500), 'no multiple of the row length 32; the nearest is 480'),
    (dict(train__global_batch_tokens=32 * 4), r'4 rows .* split over mesh.data·mesh.fsdp = 8'),
    (dict(train__micro_batch_rows=3), r'may be one of \[1, 2\]'),
    (dict(mesh__tensor=3), 'does not cover the 8 devices'),
    (dict(mesh__fsdp=1, mesh__tensor=8), r'n_head = 4 is not divisible .*may be one of \[1, 2, 4\]'),
    (dict(optim__schedule='step'), "'step' must be one of"),
    (dict(checkpoint__every=0), 'checkpoint.every = 0 must be a whole number from 1'),
    (dict(checkpoint__keep_every=1500), 'keep_every = 1500 must be 0 or a multiple of .* = 1000'),
    (dict(checkpoint__keep_best=-1), 'keep_best = -1 must be a whole number from 0'),
    (dict(checkpoint__keep_best=1, evaluate__every=500), 'keep_best = 1 keeps the best evaluated'),
  ],
)
def test_plans_that_cannot_be(fields, says):
  with pytest.raises(UserError, match=says):
    run_plan.make_plan(tiny_config(**fields))


@pytest.mark.parametrize(
  'limit,asked,sizes',
  [
    (2**34, {}, (8, 1, 1, 1)),  # all of the state fits each device: the batch alone is split
    (4 * 16 * 4_000_000, {}, (2, 4, 1, 1)),  # 13.3 M parameters in four parts
    (1000, {}, (1, 8, 1, 1)),  # as far as it goes
    (1000, dict(mesh__tensor=2), (1, 4, 1, 2)),
    (1000, dict(mesh__seq=2, mesh__tensor=2), (1, 2, 2, 2)),
    (2**34, dict(mesh__fsdp=2), (4, 2, 1, 1)),
    (1000, dict(mesh__data=4), (4, 2, 1, 1)),
    (1000, dict(model__n_embd=36, model__n_head=6), (2, 4, 1, 1)),  # 36 does not divide by 8
  ],
)
def test_a_mesh_is_chosen_by_what_fits(monkeypatch, limit, asked, sizes):
  monkeypatch.setattr(memory_estimate, 'memory_limit', lambda _: limit)
  config = tiny_config(**{'model__n_embd': 512, 'model__n_layer': 4} | asked)
  assert run_plan.make_plan(config).mesh.devices.shape == sizes


def test_rows_divide_over_seq():
  with pytest.raises(UserError, match='data.sequence_length = 30 is not divisible by mesh.seq = 4'):
    run_plan.make_plan(
      tiny_config(mesh__seq=4, data__sequence_length=30, train__global_batch_tokens=240)
    )


def test_micro_batches_follow_the_memory(monkeypatch):
  config = tiny_config(mesh__fsdp=8)
  assert run_plan.make_plan(config).A == 1
  whole = run_plan.make_plan(config)
  need = lambda rows: memory_estimate.estimate_bytes(whole.model, whole.mesh, 32, rows, config.optim)
  monkeypatch.setattr(memory_estimate, 'memory_limit', lambda _: need(8))
  assert run_plan.make_plan(config).A == 2
  assert need(8) < need(16) < 2 * need(8)


def test_auto_computes_again_what_the_memory_does_not_hold(monkeypatch):
  config = tiny_config(train__micro_batch_rows=4)
  whole = run_plan.make_plan(config, jax.devices()[:1])
  assert whole.model.remat == 'none'
  need = lambda remat: memory_estimate.estimate_bytes(
    dataclasses.replace(whole.model, remat=remat), whole.mesh, whole.T, 4, config.optim
  )
  assert need('none') >= need('dots') > need('full')
  monkeypatch.setattr(memory_estimate, 'memory_limit', lambda _: need('full'))
  assert run_plan.make_plan(config, jax.devices()[:1]).model.remat == 'full'
  config.train.micro_batch_rows = None  # smaller micro-batches cost less than another forward pass
  assert run_plan.make_plan(config, jax.devices()[:1]).model.remat != 'full'
  config.model.remat = 'full'
  assert run_plan.make_plan(config, jax.devices()[:1]).model.remat == 'full'


@pytest.mark.parametrize('remat', ['none', 'dots', 'full'])
def test_the_memory_estimate_is_near_the_compilers(remat):
  config = base.get_config()
  config.model.update(vocab_size=1000, n_positions=256, n_embd=256, n_layer=6, n_head=4, remat=remat)
  config.train.update(global_batch_tokens=16 * 256, steps=10, micro_batch_rows=16)
  p = run_plan.make_plan(config, devices=jax.devices()[:1])
  with jax.set_mesh(p.mesh):
    memory = p.compile_train_step().memory_analysis()
  actual = memory.argument_size_in_bytes + memory.temp_size_in_bytes
  estimate = memory_estimate.estimate_bytes(p.model, p.mesh, p.T, p.G, config.optim)
  assert 0.6 < estimate / actual < 1.7, (estimate / 2**20, actual / 2**20)


@pytest.mark.slow
def test_compiler_options_reach_the_compiler():
  config = tiny_config(mesh__fsdp=8, train__compiler_options='xla_cpu_no_such_thing=1')
  made = run_plan.make_plan(config)
  with jax.set_mesh(made.mesh), pytest.raises(UserError, match='xla_cpu_no_such_thing'):
    made.compile_train_step()
  config.train.compiler_options = 'xla_backend_optimization_level=0'
  with jax.set_mesh(made.mesh):
    run_plan.make_plan(config).compile_train_step()
  config.train.compiler_options = '--fast'
  with jax.set_mesh(made.mesh), pytest.raises(UserError, match="'--fast' is not xla_NAME=VALUE"):
    run_plan.make_plan(config).compile_train_step()


def test_peak_flops_of_known_devices():
  assert peak_flops('NVIDIA H100 80GB HBM3') == 989e12
  assert peak_flops('NVIDIA H100 PCIe') == 756e12
  assert peak_flops('TPU v5 lite') == 197e12
  assert peak_flops('cpu') is None


def test_differences_are_listed():
  text = difference({'a': 1, 'b': 2}, {'a': 1, 'b': 3, 'c': 4})
  assert text.splitlines() == ['  b: 2 there, 3 here', '  c: absent there, 4 here']
  assert difference({'a': 1}, {'a': 1}) == ''


# --- checkpoints ------------------------------------------------------------------------------


def test_checkpoints_need_room_and_the_right_shape(tiny, tmp_path, monkeypatch):
  tx = make_optimizer(optim(), optax.constant_schedule(1e-2))
  state = init_state(tiny, tx, 0, ema=True)
  checkpoints = orbax_store.Checkpoints(tmp_path, keep=1)
  full = shutil.disk_usage(tmp_path)._replace(free=1000)
  with monkeypatch.context() as patched:
    patched.setattr(shutil, 'disk_usage', lambda _: full)
    with pytest.raises(UserError, match='cannot write a checkpoint .* bytes needed, 1,000 free'):
      checkpoints.save(1, state.items(), {})
  assert checkpoints.latest_step() is None
  checkpoints.save(2, state.items(), {'model': dataclasses.asdict(tiny)})
  checkpoints.wait()

  abstract = on_devices(jax.eval_shape(lambda: state))
  restored = abstract.restored(2, checkpoints.restore(2, abstract.items()))
  assert int(restored.step) == 2
  for have, want in zip(jax.tree.leaves(restored.opt_state), jax.tree.leaves(state.opt_state)):
    np.testing.assert_array_equal(have, want)
  wider = dataclasses.replace(tiny, n_inner=96)
  other = on_devices(jax.eval_shape(lambda: init_state(wider, tx, 0, ema=True)))
  with pytest.raises(UserError, match=r'h.mlp.c_fc.bias: float32\[3, 80\] there, .*\[3, 96\] here'):
    checkpoints.restore(2, other.items())
  without = dataclasses.replace(abstract, ema=None)
  assert without.restored(2, checkpoints.restore(2, without.items())).ema is None
  meta = saved_steps.read_meta(tmp_path)
  assert GPTConfig(**meta['model']) == tiny and meta['step'] == 2
  params = saved_steps.load_params(tmp_path, meta)
  np.testing.assert_array_equal(params['wte']['weight'], state.ema['wte']['weight'])
  checkpoints.close()


def test_a_workdir_without_a_checkpoint_says_so(tmp_path):
  with pytest.raises(UserError, match='holds no checkpoints'):
    saved_steps.read_meta(tmp_path)
  (tmp_path / 'checkpoints' / '5.orbax-checkpoint-tmp').mkdir(parents=True)  # killed while saving
  with pytest.raises(UserError, match='no finished checkpoint yet'):
    saved_steps.read_meta(tmp_path)

"""What holds of a run holds with every optimizer: resume to the bit, averages, spikes, durations."""

import importlib
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support.arrays import assert_close, mesh_of
from support.configs import optim
from support.contexts import shrunk, texts  # noqa: F401
from support.models import tiny_gpt2
from test_training import run_steps

from gpt2_jax.core.errors import UserError
from gpt2_jax.model.gpt2 import make_params
from gpt2_jax.parallel.sharding import on_devices
from gpt2_jax.training import run_plan, train
from gpt2_jax.training.optimizer import OPTIMIZERS, make_optimizer
from gpt2_jax.training.step import init_state, make_train_step

T = 64
KINDS = {name: {} for name in OPTIMIZERS} | {
  'schedule_free': {'schedule': 'constant'},
  'soap': {'soap_every': 2},
  'normuon': {'name': 'muon', 'muon_normalize_rows': True, 'cautious_decay': True},
}
ALL = [pytest.param(kind, marks=[] if kind == 'normuon' else pytest.mark.slow) for kind in KINDS]


def fields(kind: str) -> dict:
  return {'name': kind} | KINDS[kind]


def few_devices(monkeypatch, number):
  """As if there were no more: what is split in fewer parts is sooner compiled and saved."""
  some = jax.devices()[:number]
  monkeypatch.setattr(jax, 'devices', lambda *_: some)
  monkeypatch.setattr(jax, 'device_count', lambda *_: number)


def config_of(texts, kind, steps, **mesh):  # noqa: F811
  config = shrunk(importlib.import_module('configs.tiny').get_config('shakespeare'), texts)
  config.train.update(steps=steps, global_batch_tokens=8 * T)
  config.checkpoint.every, config.evaluate.every = 3, 6
  config.optim.update(decay_steps=6, skip_zscore=6.0, **fields(kind))
  config.optim.ema_decay = 0.0 if kind == 'schedule_free' else 0.5
  config.mesh.update(mesh)
  return config


def numbers(workdir):
  keys = ('train/loss', 'train/grad_norm', 'train/param_norm', 'eval/loss')
  lines = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
  return [[line[key] for key in keys if key in line] for line in lines]


@pytest.mark.parametrize(
  'kind,names',
  [
    ('normuon', ['same']),
    *(pytest.param(k, ['same', 'other'], marks=pytest.mark.slow) for k in KINDS),
  ],
  ids=lambda x: x if isinstance(x, str) else '+'.join(x),
)
def test_a_run_goes_on_to_the_bit_and_on_another_mesh(texts, tmp_path, monkeypatch, kind, names):  # noqa: F811
  """Killed after the third step: what came after it was seen, and is forgotten."""
  few_devices(monkeypatch, 4)
  there, here = dict(data=2, fsdp=2), dict(data=1, fsdp=2, tensor=2)
  assert train.train(config_of(texts, kind, 6, **there), tmp_path / 'whole') == 0
  want = numbers(tmp_path / 'whole')
  for name in names:
    mesh = there if name == 'same' else here
    shutil.copytree(tmp_path / 'whole', tmp_path / name)
    shutil.rmtree(tmp_path / name / 'checkpoints' / '6')
    assert train.train(config_of(texts, kind, 6, **mesh), tmp_path / name) == 0
    have = numbers(tmp_path / name)
    if name == 'same':
      assert have == want
    assert have[:3] == want[:3] and len(have) == 6
    for a, b in zip(have[3:], want[3:], strict=True):
      assert_close(a, b, 1e-4)
  if kind != 'adamw':
    with pytest.raises(UserError, match=f'optim.name: {fields(kind)["name"]} there'):
      train.train(config_of(texts, 'adamw', 9, **there), tmp_path / 'same')


@pytest.mark.slow
@pytest.mark.parametrize('kind', KINDS)
def test_micro_batches_and_meshes_change_nothing(kind):
  """A large eps: what has no gradient is rounding, which AdamW, or a sign, makes steps of."""
  sizes = dict(n_positions=16, n_layer=2, n_head=8, n_inner=None, initializer_range=0.02)
  config, knobs = tiny_gpt2(**sizes), dict(G=16, **fields(kind))
  want, _ = run_steps(config, 1, **knobs)
  have, _ = run_steps(config, 4, mesh=(2, 2, 2), **knobs)
  assert_close(have, want, 1e-4 if kind == 'lion' else 1e-5)


@pytest.mark.parametrize('kind', ALL)
def test_a_spike_changes_nothing(kind):
  """Parameters and moments keep their bits where the gradient is not finite."""
  tx = make_optimizer(optim(skip_zscore=6.0, **fields(kind)), optax.constant_schedule(1e-2))
  with mesh_of(1, 2, 1):
    like = on_devices(jax.eval_shape(lambda: make_params(tiny_gpt2(n_layer=2), 0)))
    ones = jax.tree.map(lambda x: jax.device_put(np.ones(x.shape, x.dtype), x.sharding), like)
    update = jax.jit(tx.update)
    updates, before = update(ones, tx.init(ones), ones)
    params = optax.apply_updates(ones, updates)
    updates, after = update(jax.tree.map(lambda x: x * jnp.inf, ones), before, params)
    assert int(after.in_a_row) == 1
    for a, b in zip(*(jax.tree.leaves(x.inner) for x in (before, after)), strict=True):
      if a.ndim:
        np.testing.assert_array_equal(a, b)
    for a, b in zip(jax.tree.leaves(optax.apply_updates(params, updates)), jax.tree.leaves(params)):
      np.testing.assert_array_equal(a, b)


def test_schedule_free_evaluates_its_average():
  """x, by hand: the mean of z weighted by the squares of the rates, here all alike."""
  config = tiny_gpt2(n_layer=2)
  schedule = optax.constant_schedule(1e-2)
  tx = make_optimizer(optim(name='schedule_free', schedule='constant', clip_norm=0.0), schedule)
  step = jax.jit(make_train_step(config, tx, schedule, seed=0, ema_decay=0.0))
  state = init_state(config, tx, 0, ema=True)
  tokens = np.random.default_rng(0).integers(0, 97, (1, 2, 9)).astype(np.int32)
  zs = []
  for _ in range(3):
    state, _ = step(state, tokens)
    zs.append(state.opt_state.z['wte']['weight'])
  assert_close(state.ema['wte']['weight'], np.mean(zs, 0), 1e-5)


def test_a_run_lasts_as_many_tokens_or_epochs(texts, tmp_path, monkeypatch, capsys):  # noqa: F811
  """Whatever the batches; the learning rate ends with it."""
  few_devices(monkeypatch, 1)
  config = config_of(texts, 'adamw', 100)
  config.optim.decay_steps = None
  config.train.tokens = 40 * T - 5
  ends = []
  for rows, steps in ((8, 5), (16, 3)):
    config.train.global_batch_tokens = rows * T
    plan = run_plan.make_plan(config)
    assert plan.steps == steps
    ends.append(float(plan.schedule(steps - 1)))
  assert ends[1] > ends[0] > 0.1 * config.optim.peak_lr
  assert '3 steps, 3,072 tokens' in plan.describe()
  config.train.tokens, config.train.epochs = None, 0.5
  assert train.train(config, tmp_path / 'epochs') == 0
  printed = capsys.readouterr().out
  epoch = float(printed.split(' steps an epoch')[0].split('(')[-1].replace(',', ''))
  assert '0.5 epochs' in printed
  assert len(numbers(tmp_path / 'epochs')) == int(np.ceil(0.5 * epoch))
  config.train.tokens = 1000
  with pytest.raises(UserError, match=r'train.tokens and train.epochs both'):
    train.train(config, tmp_path / 'both')

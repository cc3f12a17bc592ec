"""What is measured of layers is what the step does, whatever its mesh and micro-batches."""

import importlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict
from jax.sharding import PartitionSpec as P
from support.arrays import assert_close, mesh_of
from support.configs import optim
from support.contexts import shrunk, texts  # noqa: F401
from support.models import tiny_gpt2

from gpt2_jax.model import edits
from gpt2_jax.model.gpt2 import bind, init_params
from gpt2_jax.parallel.sharding import BATCH
from gpt2_jax.training import layer_values, train
from gpt2_jax.training.optimizer import make_optimizer
from gpt2_jax.training.step import init_state
from gpt2_jax.training.watch import layer_picture

CONFIG = tiny_gpt2(n_positions=16, n_layer=2, n_embd=16, n_head=4, n_inner=32)
TOKENS = np.random.default_rng(0).integers(0, 97, (8, 17)).astype(np.int32)


def measured(A: int, mesh) -> dict:
  """Of 8 rows in A micro-batches."""
  tx = make_optimizer(optim(eps=1e-3), optax.constant_schedule(1e-2))
  with mesh_of(*mesh):
    state = init_state(CONFIG, tx, 0, ema=False)
    batch = jax.device_put(TOKENS.reshape(A, 8 // A, 17), P(None, BATCH))
    values = jax.jit(layer_values.make_measure(CONFIG, tx, seed=0))(state, batch)
    return layer_values.flat(jax.device_get(values))


@pytest.fixture(scope='module')
def plain():
  """Parameters, and gradients of each row alone: whole logits, no scan, nothing of the step's."""
  params = init_params(CONFIG, 0)

  def nll(params, row):
    logits_TV = bind(CONFIG, params)(row[None, :-1])[0]
    return -jnp.take_along_axis(jax.nn.log_softmax(logits_TV), row[1:, None], 1).mean()

  return params, flatten_dict(jax.jit(jax.vmap(jax.grad(nll), (None, 0)))(params, TOKENS), sep='.')


@pytest.mark.parametrize(
  'A,mesh',
  [
    (1, (1, 1, 1)),
    pytest.param(1, (2, 2, 2), marks=pytest.mark.slow),
    pytest.param(2, (2, 1, 1, 2), marks=pytest.mark.slow),
  ],
  ids=str,
)
def test_what_is_measured_is_what_the_step_does(plain, A, mesh):
  params, rows = plain
  have = measured(A, mesh)
  whole = {name: np.float64(x).mean(0) for name, x in rows.items()}
  tx = make_optimizer(optim(eps=1e-3), optax.constant_schedule(1e-2))
  tree = jax.tree.map(jnp.float32, {tuple(k.split('.')): v for k, v in whole.items()})
  nested = jax.tree.unflatten(jax.tree.structure(params), [tree[k] for k in flatten_dict(params)])
  updates, _ = jax.jit(tx.update)(nested, tx.init(params), params)
  updates, values = flatten_dict(updates, sep='.'), flatten_dict(params, sep='.')
  wanted = {'wte.weight': 'wte', 'wpe.weight': 'wpe'}
  wanted |= {f'h.{n}.weight': n for n in ('attn.c_attn', 'attn.c_proj', 'mlp.c_fc', 'mlp.c_proj')}
  for name, short in wanted.items():
    for layer in (0, 1) if name.startswith('h.') else (...,):
      end = f'{short}/{layer}' if layer in (0, 1) and name.startswith('h.') else short
      p, g, u = (np.linalg.norm(np.float64(x[name][layer])) for x in (values, whole, updates))
      of = lambda what, end=end: have[f'layers/{what}/{end}']
      assert of('param_norm') == pytest.approx(p, rel=1e-5)
      assert of('grad_norm') == pytest.approx(g, rel=1e-4)
      assert of('update_norm') == pytest.approx(u, rel=1e-4)
      assert of('update_ratio') == pytest.approx(u / p, rel=1e-4)
  counts = [key for key in have if key.startswith('layers/grad_norm/')]
  assert len(counts) == 2 + 4 * 2
  model, inputs = bind(CONFIG, params), TOKENS.reshape(A, 8 // A, 17)[0, :, :-1]
  scores = jax.jit(lambda x: edits.run(model, x, record=['attn_scores'])[1]['attn_scores'])
  for layer, x in enumerate(scores(inputs)):
    assert have[f'layers/largest_logit/{layer}'] == pytest.approx(float(x.max()), rel=1e-5)
  split = (lambda x: x.reshape(2, 4, -1)) if A == 2 else (lambda x: np.stack([x[::2], x[1::2]]))
  parts = np.concatenate([split(np.float64(x)).mean(1).reshape(2, -1) for x in rows.values()], 1)
  B, b = 8 * 16, 4 * 16  # the estimators as the paper writes them
  big, small = (parts.mean(0) ** 2).sum(), (parts**2).sum(1).mean()
  square, variance = (B * big - b * small) / (B - b), (small - big) / (1 / b - 1 / B)
  assert have['layers/gradient_square'] == pytest.approx(square, rel=1e-3, abs=1e-4 * big)
  assert have['layers/gradient_variance'] == pytest.approx(variance, rel=1e-3)
  assert have['layers/noise_scale'] == pytest.approx(variance / square, rel=1e-2)


def test_the_noise_scale_is_found_from_its_definition():
  """Gradients of known mean and variance, many times."""
  rng, tokens, parts = np.random.default_rng(0), 64, 4
  true = rng.normal(size=50)
  draws = true + 3.0 * rng.normal(size=(4000, parts, 50)) / np.sqrt(tokens / parts)
  found = layer_values.noise((draws.mean(1) ** 2).sum(-1), (draws**2).sum(-1).mean(-1), parts, tokens)
  assert found['layers/gradient_square'].mean() == pytest.approx((true**2).sum(), rel=0.01)
  assert found['layers/gradient_variance'].mean() == pytest.approx(9.0 * 50, rel=0.01)


@pytest.mark.slow
def test_a_run_is_the_same_to_the_bit_and_has_a_picture(texts, tmp_path, monkeypatch):  # noqa: F811
  one = jax.devices()[:1]
  monkeypatch.setattr(jax, 'devices', lambda *_: one)
  monkeypatch.setattr(jax, 'device_count', lambda *_: 1)
  lines = {}
  for every in (0, 2):
    config = shrunk(importlib.import_module('configs.tiny').get_config('shakespeare'), texts)
    config.train.update(steps=5, global_batch_tokens=4 * 64)
    config.checkpoint.every = config.evaluate.every = 5
    config.log.layers_every = every
    workdir = tmp_path / f'{every}'
    assert train.train(config, workdir) == 0
    lines[every] = [json.loads(x) for x in (workdir / 'metrics.jsonl').read_text().splitlines()]
  train_keys = lambda line: {k: v for k, v in line.items() if k.startswith(('train/', 'eval/'))}
  assert [*map(train_keys, lines[0])] == [*map(train_keys, lines[2])]
  due = [any(key.startswith('layers/') for key in line) for line in lines[2]]
  assert due == [False, True, False, True, False]
  assert (tmp_path / '2' / layer_picture.PLOT).read_bytes()[:4] == b'\x89PNG'
  assert not (tmp_path / '0' / layer_picture.PLOT).exists()
  measured = [line for line in lines[2] if 'layers/largest_logit/0' in line]
  kinds = layer_picture.curves(measured, 'update_ratio')
  assert set(kinds) == {'wte', 'wpe', 'attn.c_attn', 'attn.c_proj', 'mlp.c_fc', 'mlp.c_proj'}
  assert all(values.shape == (2, 1) and np.isfinite(values).all() for values in kinds.values())
  assert_close(
    layer_picture.noise_scale(measured)[-1:],
    [
      np.mean([x['layers/gradient_variance'] for x in measured])
      / np.mean([x['layers/gradient_square'] for x in measured])
    ],
    1e-9,
  )

"""Maximal-update parametrization: what it keeps constant over widths, and what it may not change."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support.arrays import assert_close
from support.configs import optim

import gpt2_jax
from gpt2_jax.checkpoints import tensors
from gpt2_jax.core.errors import UserError
from gpt2_jax.model.config import GPTConfig, LoRA
from gpt2_jax.model.edits import Listening
from gpt2_jax.model.gpt2 import bind, init_params
from gpt2_jax.training.optimizer import make_optimizer
from gpt2_jax.training.step import init_state, make_train_step

BASE = 32
WIDTHS = (32, 256)


def config_of(width: int, parametrization: str, heads: int | None = None, **fields) -> GPTConfig:
  """Heads of width 16, or so many heads."""
  mup = dict(mup_base_width=BASE) | (dict(mup_base_head_width=16) if heads else {})
  return GPTConfig(
    vocab_size=97,
    n_positions=16,
    n_embd=width,
    n_layer=2,
    n_head=heads or width // 16,
    embd_pdrop=0,
    attn_pdrop=0,
    resid_pdrop=0,
    parametrization=parametrization,
    initializer_range=0.1,
    **(mup if parametrization == 'mup' else {}),
    **fields,
  )


def changes(width: int, parametrization: str, heads: int | None = None) -> np.ndarray:
  """Root mean squares, over one batch, of what four steps have changed: the first block's output, the
  second one's scores of attention, the logits.
  """
  config = config_of(width, parametrization, heads)
  schedule = optax.constant_schedule(3e-3)
  tx = make_optimizer(optim(clip_norm=0.0, weight_decay=0.0), schedule, config.width_ratio)
  step = jax.jit(make_train_step(config, tx, schedule, seed=0, ema_decay=0))
  tokens = np.random.default_rng(1).integers(0, 97, (1, 8, 17)).astype(np.int32)

  @jax.jit
  def look(params):
    model = bind(config, params)
    record = ('resid_pre', 'pattern')
    found = model.transformer(tokens[0, :, :-1], listen=Listening(record=record)).found
    weights_BNTS = found['pattern'][1]
    scores = jnp.log(weights_BNTS[..., :2])  # of two keys; their difference has no normaliser
    return (
      found['resid_pre'][1],
      (scores[..., 0] - scores[..., 1])[:, :, 1:],
      model(tokens[0, :, :-1]),
    )

  state = init_state(config, tx, 0, ema=False)
  before = look(state.params)
  for _ in range(4):
    state, _ = step(state, tokens)
  return np.array([np.sqrt(np.mean((a - b) ** 2)) for a, b in zip(look(state.params), before)])


@pytest.mark.slow
def test_coordinates_move_alike_at_every_width():
  """The coordinate check of the paper (appendix D.1): exponents, in the width, of what steps change.

  What is left of the random start in logits, and in scores of wider heads, falls as 1/sqrt(width) and
  is part of what a few steps change: they may fall a little, and not grow.
  """

  def exponents(*which):
    narrow, wide = (changes(width, *which) for width in WIDTHS)
    return np.log(wide / narrow) / np.log(WIDTHS[1] / WIDTHS[0])

  assert (exponents('standard') > 0.6).all()
  for heads in (None, 2):
    block, scores, logits = exponents('mup', heads)
    assert abs(block) < 0.15 and -0.5 < logits < 0.1
    assert abs(scores) < 0.15 if heads is None else -0.6 < scores < 0.1


@pytest.mark.slow
def test_at_the_base_width_nothing_changes():
  """The same initial weights, logits and steps, to the last bit, of the model that it starts from."""
  outcomes = []
  for name in ('standard', 'mup'):
    config = config_of(BASE, name)
    tx = make_optimizer(optim(), optax.constant_schedule(1e-2), config.width_ratio)
    params = init_params(config, 0)
    updates, _ = tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params), params)
    outcomes.append((params, updates, bind(config, params)(jnp.arange(16)[None])))
  for a, b in zip(*map(jax.tree.leaves, outcomes), strict=True):
    np.testing.assert_array_equal(a, b)


def test_matrices_get_their_own_rate_and_the_decay_of_all():
  """Against AdamW by hand, in float64: the first step is the sign of the gradient."""
  config = config_of(128, 'mup')
  assert config.width_ratio == 4
  o = optim(weight_decay=0.1, clip_norm=0.0)
  tx = make_optimizer(o, optax.constant_schedule(1e-2), config.width_ratio)
  params = init_params(config, 0)
  updates, _ = tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params), params)

  def check(path, update, param):
    names = [key.key for key in path]
    matrix = names[0] == 'h' and names[1] in ('attn', 'mlp') and names[-1] == 'weight'
    decays = matrix or names[0] in ('wte', 'wpe')
    want = -1e-2 * ((1 / 4 if matrix else 1) + 0.1 * decays * np.asarray(param, np.float64))
    np.testing.assert_allclose(update, want, rtol=2e-6)

  jax.tree_util.tree_map_with_path(check, updates, params)


def test_initial_deviations():
  wide = init_params(config_of(512, 'mup'), 0)
  std = lambda weight: float(jnp.std(weight))
  assert std(wide['wte']['weight'][:97]) == pytest.approx(0.1, rel=0.02)
  assert std(wide['h']['attn']['c_attn']['weight']) == pytest.approx(0.1 / 4, rel=0.02)
  for part in ('attn', 'mlp'):  # two layers: divided by sqrt(4) too
    assert std(wide['h'][part]['c_proj']['weight']) == pytest.approx(0.1 / 8, rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize('head', ['lm', 'sequence_classification'])
def test_what_is_written_computes_the_same(tmp_path, head):
  """Written as Hugging Face's and read again it is a standard model with the same logits."""
  config = config_of(96, 'mup', heads=2, head=head)  # a ratio of 3, heads of 48 instead of 16
  params = init_params(config, 0)
  params['h']['attn']['c_attn']['bias'] += 0.3 * jax.random.normal(jax.random.key(1), (2, 3, 2, 48))
  params['ln_f']['bias'] += 0.1
  model = bind(config, params)
  gpt2_jax.save_pretrained(model, tmp_path / 'hf')
  read = gpt2_jax.from_pretrained(tmp_path / 'hf')
  assert read.config.parametrization == 'standard' and read.config.mup_base_width is None
  assert 'mup' not in (tmp_path / 'hf' / 'config.json').read_text()
  tokens = jax.random.randint(jax.random.key(2), (2, 16), 0, 97)
  assert_close(read(tokens), model(tokens), 2e-6)
  other = bind(dataclasses.replace(read.config, parametrization='mup', mup_base_width=96), params)
  assert np.abs(other(tokens) - model(tokens)).max() > 1e-3, 'the factors matter'


@pytest.mark.slow
def test_a_cache_and_the_form_for_decoding_change_nothing(tmp_path):
  """Greedy ids of the model are those of what is written, which knows no factors."""
  config = config_of(64, 'mup', heads=2)
  model = bind(config, init_params(config, 0))
  gpt2_jax.save_pretrained(model, tmp_path / 'hf')
  greedy = lambda model: gpt2_jax.generate(model, [[1, 2, 3], [5]], max_new_tokens=8, do_sample=False)
  assert [r.tokens for r in greedy(model)] == [
    r.tokens for r in greedy(gpt2_jax.from_pretrained(tmp_path / 'hf'))
  ]
  with pytest.raises(UserError, match='no adapters'):
    gpt2_jax.save_pretrained(model, tmp_path / 'peft', to='peft')
  assert tensors.source_of(config, init_params(config, 0), 'x').config.parametrization == 'mup'


@pytest.mark.parametrize(
  'fields,says',
  [
    (dict(parametrization='mup'), 'needs model.mup_base_width'),
    (dict(mup_base_width=64), 'is of model.parametrization = mup'),
    (dict(parametrization='mup', mup_base_width=0), 'must be a whole number from 1'),
    (dict(parametrization='mup', mup_base_width=64, n_embd=256, n_head=2), 'mup_base_head_width'),
    (dict(parametrization='mup', mup_base_width=64, lora=LoRA(2, 4.0)), 'convert the model to hf'),
    (dict(parametrization='umup'), "'umup' must be one of"),
  ],
)
def test_what_makes_no_sense_is_said(fields, says):
  with pytest.raises(UserError, match=says):
    GPTConfig(**fields)

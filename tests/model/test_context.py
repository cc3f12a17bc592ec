"""A model has the context of what it was trained on, and a figure is of the rows that it says."""

import dataclasses
import importlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.contexts import evaluated, one_device, shrunk  # noqa: F401# noqa: F401

import gpt2_jax
from configs import finetune, recipes
from gpt2_jax.checkpoints import saved_steps
from gpt2_jax.checkpoints.orbax_store import Checkpoints
from gpt2_jax.core.errors import UserError
from gpt2_jax.data.token_store import open_store
from gpt2_jax.evaluation import corpus_tasks
from gpt2_jax.model.gpt2 import bind, init_params
from gpt2_jax.training import longer_context, run_plan, train

QUICK = [('tiny', 'shakespeare'), ('tiny', 'masked')]
ALL = [('tiny', 'stdlib'), ('tiny', 'shakespeare'), ('tiny', 'masked')]
ALL += [(name, recipe) for recipe in recipes.RECIPES for name in ('small', 'medium', 'large', 'xl')]


def config_of(name, recipe):
  config = importlib.import_module(f'configs.{name}').get_config(
    'shakespeare' if recipe == 'masked' else recipe
  )
  if recipe == 'masked':
    config.data.document_mask = True
    config.optim.ema_decay = 0.5
  return config


def alike(config):
  """All of a config that decides which rows are evaluated, and how."""
  data = {key: value for key, value in config.data.items() if key not in ('corpus', 'val_fraction')}
  return json.dumps(
    [data, config.model.n_positions, config.optim.ema_decay, config.evaluate.to_dict()]
  )


# configs that differ in the text and the sizes of their models alone, which are small ones here, are
# one
GROUPS = {}
for each in ALL:
  GROUPS.setdefault(alike(config_of(*each)), []).append(each)


def lines(workdir):
  return [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]


def check(config, tmp_path):
  """Trains, and compares the run's own held-out loss with evaluate's; returns evaluate's result."""
  assert train.train(config, tmp_path / 'run') == 0
  step = saved_steps.read_meta(tmp_path / 'run')['step']
  own = next(line['eval/loss'] for line in lines(tmp_path / 'run') if line['step'] == step)
  found = evaluated(tmp_path / 'run', config.data.store, tmp_path)
  assert abs(found['metrics']['loss']['value'] - own) < 1e-5, (found, own)
  return found


@pytest.mark.parametrize(
  'name,recipe',
  [
    pytest.param(
      *group[0],
      id=' '.join(map(':'.join, group)),
      marks=[] if group[0] in QUICK else pytest.mark.slow,
    )
    for group in GROUPS.values()
  ],
)
def test_evaluate_gives_the_held_out_loss_of_every_recipe(name, recipe, texts, tmp_path):
  config = shrunk(config_of(name, recipe), texts)
  found = check(config, tmp_path)
  rows = config.data.sequence_length or config.model.n_positions
  assert found['data']['rows'] == {'tokens': rows, 'document_mask': recipe == 'masked'}
  assert gpt2_jax.from_pretrained(tmp_path / 'run').config.n_positions == rows


@pytest.mark.slow
@pytest.mark.parametrize('recipe', [r for r in finetune.RECIPES if r != 'classification'])
def test_evaluate_gives_the_held_out_loss_of_a_fine_tuned_model(recipe, begun, texts, tmp_path):
  config = finetune.get_config(recipe)
  config.init_from = str(begun)
  config.data.tokenizer = 'byte'
  config = shrunk(config, texts)
  if recipe == 'full':  # rows shorter than the context, which stays; it stops early
    config.data.sequence_length = 32
    config.optim.peak_lr = 0.3
    config.train.update(steps=4, global_batch_tokens=32)
    config.evaluate.patience = 2
  found = check(config, tmp_path)
  assert found['data']['rows']['tokens'] == (32 if recipe == 'full' else 64)
  assert gpt2_jax.from_pretrained(tmp_path / 'run').config.n_positions == 64


def test_a_classifier_is_not_scored_on_a_store(begun, texts):
  config = dataclasses.replace(gpt2_jax.from_pretrained(begun).config, head='sequence_classification')
  model = bind(config, init_params(config, 0))
  with pytest.raises(UserError, match='classification head: a store has no labels'):
    corpus_tasks.held_out(model, open_store(texts / 'byte-0.1-tail'))


# --- the context itself -----------------------------------------------------------------------------

sizes = st.integers(1, 64)


@given(sizes, st.none() | sizes, st.none() | sizes, st.none() | sizes)
def test_no_position_is_there_that_nothing_trained(asked, rows, given, held):
  given = given and min(given, asked)  # fewer than there are refused elsewhere
  have = longer_context.context(asked, rows, given, held)
  if rows is None or rows > asked:
    assert have == asked
  elif held is not None and rows <= held <= asked:
    assert have == held
  else:  # each position is of a row, or was trained before
    assert have == max(rows, given or 0) <= asked


def test_a_new_model_has_the_context_of_its_rows():
  config = importlib.import_module('configs.tiny').get_config('shakespeare')
  assert config.model.n_positions == 256
  made = run_plan.make_plan(config)
  assert made.model.n_positions == made.T == 64
  said = (
    'context  64 positions, the context of its rows (data.sequence_length = 64): nothing would '
    'train the other 192 of model.n_positions = 256'
  )
  assert said in made.describe()
  config.data.sequence_length = None
  config.train.global_batch_tokens = 256
  made = run_plan.make_plan(config)
  assert made.model.n_positions == 256 and 'context ' not in made.describe()


@pytest.mark.parametrize(
  'asked,rows,have', [(None, 32, 64), (None, 64, 64), (128, 32, 64), (128, 96, 96), (128, None, 128)]
)
def test_a_context_that_is_there_is_kept(begun, asked, rows, have):
  """As fine-tuning with shorter rows has it; a longer one is of rows that train it."""
  config = finetune.get_config()
  config.init_from = str(begun)
  config.model.n_positions = asked
  config.data.sequence_length = rows
  config.train.global_batch_tokens = 2 * (rows or have)
  made = run_plan.make_plan(config)
  assert made.model.n_positions == have
  assert ('context ' in made.describe()) == (asked is not None and have < asked)


@pytest.mark.slow
def test_a_run_of_an_early_version_goes_on_as_it_is(texts, tmp_path, monkeypatch, capsys):
  """Its model has positions beyond its rows; the losses are those of a run never stopped."""

  def config(steps):
    made = shrunk(importlib.import_module('configs.tiny').get_config('shakespeare'), texts)
    made.train.update(steps=steps)
    made.optim.decay_steps = 4
    made.checkpoint.every = made.evaluate.every = 2
    return made

  save = Checkpoints.save
  monkeypatch.setattr(
    Checkpoints,
    'save',
    lambda self, step, items, meta, losses: save(
      self, step, items, {k: v for k, v in meta.items() if k not in ('tokens', 'rows')}, losses
    ),
  )
  assert train.train(config(4), tmp_path / 'whole', held=256) == 0
  assert train.train(config(2), tmp_path / 'run', held=256) == 0
  capsys.readouterr()
  assert train.train(config(4), tmp_path / 'run') == 0
  assert 'context  256 positions, as the run that goes on has' in capsys.readouterr().out
  plain = lambda folder: [
    {key: line[key] for key in line if key.startswith(('step', 'train/', 'eval/'))}
    for line in lines(folder)
  ]
  assert plain(tmp_path / 'run') == plain(tmp_path / 'whole')
  assert gpt2_jax.from_pretrained(tmp_path / 'run').config.n_positions == 256
  found = evaluated(tmp_path / 'run', texts / 'byte-0.1-tail', tmp_path)
  assert found['data']['rows'] == {'tokens': 64, 'document_mask': False}
  assert abs(found['metrics']['loss']['value'] - lines(tmp_path / 'run')[-1]['eval/loss']) < 1e-5

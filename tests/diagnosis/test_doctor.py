"""Twelve faults are planted in configs, data and runs: each is found. Healthy ones hear nothing."""

import dataclasses
import json
import os
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support.processes import ROOT, run

from gpt2_jax import configs
from gpt2_jax.cli import main as cli
from gpt2_jax.configs import base, recipes
from gpt2_jax.core.errors import UserError
from gpt2_jax.data.token_batches import TokenBatches
from gpt2_jax.diagnosis import doctor, facts, findings, recipe_checks, reference
from gpt2_jax.training import optimizer, run_data, run_plan, train

STEPS = 130
ALPHABETS = 'abcdefghij', 'klmnopqrst', 'uvwxyzABCD', 'EFGHIJKLMN'


@pytest.fixture(scope='module')
def texts(tmp_path_factory) -> Path:
  """60 files, each of its own alphabet, so that the order of the text can be seen in the losses."""
  folder, rng = tmp_path_factory.mktemp('texts'), np.random.default_rng(0)
  for i in range(60):
    letters = ALPHABETS[i // 4 % 4]
    (folder / f'{i:02d}.txt').write_text(''.join(rng.choice(list(letters), 640)))
  return folder


def small(texts: Path, **overrides):
  """A config that trains in seconds on `texts`, by knob with __ for the dot."""
  config = base.get_config()
  config.model.update(n_positions=32, n_embd=32, n_layer=1, n_head=2)
  config.data.update(corpus=f'text:{texts}', tokenizer='byte', store=f'{texts}-store')
  config.data.update(val_fraction=0.1)
  config.optim.update(peak_lr=4e-3, warmup_steps=10)
  config.train.update(steps=STEPS, global_batch_tokens=8 * 32)
  config.evaluate.every = config.checkpoint.every = STEPS
  config.log.update(to='', sample_tokens=1)
  for key, value in overrides.items():
    section, name = key.split('__')
    config[section][name] = value
  return config


def looked_at(config) -> facts.Facts:
  return facts.of_config(config, jax.devices()[:1])


def checks(known: facts.Facts) -> set[str]:
  return {found.check for found in doctor.examine(known)}


@pytest.fixture(scope='module')
def healthy(texts) -> facts.Facts:
  """A config without a fault, and its data."""
  config = small(texts)
  run_data.open_data(run_plan.make_plan(config, jax.devices()[:1]))
  return looked_at(config)


SHIPPED = [
  f'{name}:{recipe}'
  for name in configs.NAMES
  if name != 'finetune'
  for recipe in recipes.RECIPES
  if name != 'tiny' or recipe in ('stdlib', 'shakespeare')
]


@pytest.mark.parametrize('name', SHIPPED)
def test_shipped_configs_are_healthy(name, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  assert not checks(looked_at(configs.load(name)))


def test_a_config_without_a_fault_and_its_data_are_healthy(healthy):
  assert healthy.store is not None and not healthy.no_store
  assert not checks(healthy)


# --- Faults that a config shows -------------------------------------------------------------------


@pytest.mark.parametrize(
  'check,knobs',
  [
    ('vocabulary', dict(model__vocab_size=50257)),
    ('vocabulary', dict(model__vocab_size=200)),
    ('learning rate', dict(optim__peak_lr=4e-2)),
    ('learning rate', dict(optim__peak_lr=1e-4)),
    ('warm-up', dict(optim__warmup_steps=0)),
    ('warm-up', dict(optim__warmup_steps=100)),
    ('activation', dict(model__activation_function='gelu')),
    ('decay', dict(optim__decay_steps=1000)),
    ('epochs', dict(train__steps=20_000)),
    ('tail', dict(data__sequence_length=20_000, model__n_positions=20_000, train__epochs=1.0)),
  ],
)
def test_a_fault_of_a_config_is_found(check, knobs, texts, healthy):
  config = small(texts, **knobs)
  if 'data__sequence_length' in knobs:
    config.train.update(global_batch_tokens=20_000)
    config.optim.update(warmup_steps=0, schedule='constant')
  found = [str(f) for f in doctor.examine(looked_at(config)) if f.check == check]
  assert len(found) == 1 and f'[docs/doctor.md#{check.replace(" ", "-")}]' in found[0]


@pytest.mark.parametrize(
  'knobs,most',
  [
    (dict(optim__name='muon'), 1e-2),
    (dict(optim__name='lion'), 2e-3),
    (dict(optim__name='muon', optim__muon_scale='original'), None),
    (dict(optim__name='adafactor'), None),
  ],
)
def test_other_optimizers_have_other_rates(knobs, most, texts, healthy):
  found = lambda rate: (
    'learning rate' in checks(looked_at(small(texts, **knobs, optim__peak_lr=rate)))
  )
  assert found(0.1) == (most is not None)
  assert most is None or not found(most)


@pytest.mark.parametrize('name', ['tiny:stdlib', 'small:fineweb', 'xl:fineweb'])
def test_an_eighth_of_the_batch_and_ten_times_the_rate_are_found(name, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  config = configs.load(name)
  config.train.global_batch_tokens //= 8
  assert checks(looked_at(config)) == {'batch'}
  config.train.global_batch_tokens *= 8
  config.optim.peak_lr *= 10
  assert checks(looked_at(config)) == {'learning rate'}


def test_a_small_batch_of_an_unknown_text_is_found(texts):
  config = small(texts, train__steps=10**9, data__store=str(texts / 'none'))
  assert checks(looked_at(config)) == {'batch'}


def test_a_mesh_that_gathers_too_much_is_found(texts):
  config = small(texts, mesh__fsdp=8)
  assert checks(facts.of_config(config)) == {'mesh'}
  config.mesh.fsdp = -1
  whole = facts.of_config(config)
  assert whole.mesh['data'] == 8 and not checks(whole)
  # a large model, of which a device holds an eighth, is split without a word
  split = {'data': 1, 'fsdp': 8, 'seq': 1, 'tensor': 1}
  large = dataclasses.replace(whole, mesh=split, limit=9 * whole.params)
  assert not list(recipe_checks.mesh(large))
  # a chip that hides them is not blamed, one with few tokens is
  v5e = dataclasses.replace(whole, mesh=split, device='TPU v5 lite', G=8 * 1024)
  assert not list(recipe_checks.mesh(v5e))
  assert list(recipe_checks.mesh(dataclasses.replace(v5e, A=1024)))


def halved(optim, schedule, width_ratio):
  return optax.chain(
    optax.scale_by_adam(optim.b1, optim.b2, optim.eps, mu_dtype=jnp.bfloat16),
    optax.scale_by_learning_rate(schedule),
  )


def test_an_optimizer_state_of_bfloat16_is_found(texts, healthy, monkeypatch):
  monkeypatch.setitem(optimizer.OPTIMIZERS, 'adamw', optimizer.Optimizer(halved))
  assert checks(looked_at(small(texts))) == {'optimizer state'}


# --- Faults of the data ---------------------------------------------------------------------------


def of_texts(folder: Path, **knobs) -> facts.Facts:
  config = small(folder, **knobs)
  run_data.open_data(run_plan.make_plan(config, jax.devices()[:1]))
  return looked_at(config)


@pytest.mark.parametrize('copies,expected', [(4, {'held-out split', 'duplicates'}), (1, set())])
def test_documents_that_are_there_twice_are_found(copies, expected, texts, tmp_path):
  """Each in several files: some copies are held out, others are trained on."""
  folder = tmp_path / 'copied'
  folder.mkdir()
  for path in sorted(texts.glob('*.txt')):
    for copy in range(copies):
      shutil.copy(path, folder / f'{path.stem}-{copy}.txt')
  assert checks(of_texts(folder)) == expected


def test_a_leak_is_found_in_files_of_nanogpt(tmp_path, texts):
  """Whose documents are known by the id that begins them alone."""
  rng, eot = np.random.default_rng(0), 50256
  written = np.array([[eot, *rng.integers(0, 50256, 200)] for _ in range(40)], '<u2')
  for name, picked in (('train', written), ('val', written[:4])):
    picked.tofile(tmp_path / f'{name}.bin')
  config = small(texts, train__steps=60)
  config.data.update(corpus=f'bin:{tmp_path}', tokenizer='gpt2')
  known = looked_at(config)
  assert checks(known) == {'held-out split'} and known.shares == (pytest.approx(200 / 201), 0)
  written[4:].tofile(tmp_path / 'train.bin')
  assert not checks(looked_at(config))


# --- Faults of a record ---------------------------------------------------------------------------


def trained(config, workdir) -> facts.Facts:
  assert train.train(config, workdir) == 0
  return facts.of_run(workdir)


@pytest.fixture(scope='module')
def finished(texts, healthy, tmp_path_factory) -> facts.Facts:
  return trained(small(texts), tmp_path_factory.mktemp('runs') / 'a')


def test_a_run_without_a_fault_is_healthy(finished):
  assert len(finished.lines) == STEPS and finished.finished and finished.store is not None
  assert finished.state and finished.model.vocab_size == 257
  assert not doctor.examine(finished)


def test_faults_of_a_record_are_found(finished):
  lines = [dict(line) for line in finished.lines]

  def having(change, *which: int) -> set[str]:
    changed = [
      line | (change(line) if not which or i in which else {}) for i, line in enumerate(lines)
    ]
    return checks(dataclasses.replace(finished, lines=tuple(changed)))

  assert having(lambda line: {'train/loss': line['train/loss'] + 2}, 0) == {'first loss'}
  assert having(lambda line: {'perf/data_wait_seconds': line['perf/step_seconds'] / 2}) == {'loader'}
  assert having(lambda line: {'train/grad_norm': line['step'] ** 2 / 100}) == {'gradient'}
  assert having(lambda line: {'train/grad_norm': None}, 50) == {'gradient'}
  assert having(lambda line: {'perf/mfu': 0.03}) == {'speed'}
  lost = dataclasses.replace(finished, lines=(*lines[:40], *lines[44:]))
  assert checks(lost) == {'tail'}
  skipped = [
    line | {'train/tokens': line['train/tokens'] + 999 * (i > 70)} for i, line in enumerate(lines)
  ]
  assert checks(dataclasses.replace(finished, lines=tuple(skipped))) == {'tail'}
  held = {20: 3.0, 60: 2.5, 100: 2.7}
  turned = [line | ({'eval/loss': held[i]} if i in held else {}) for i, line in enumerate(lines[:-1])]
  assert checks(dataclasses.replace(finished, lines=tuple(turned))) == {'overfitting'}
  assert all(kind.startswith(('float32', 'int32')) for kind in finished.state.values())
  narrow = {name: kind.replace('float32', 'bfloat16') for name, kind in finished.state.items()}
  assert checks(dataclasses.replace(finished, state=narrow)) == {'optimizer state'}
  rate = float(np.median([line['perf/tokens_per_second'] for line in lines]))
  assert checks(dataclasses.replace(finished, plan=3 * rate)) == {'speed'}
  assert not checks(dataclasses.replace(finished, plan=rate))


@pytest.mark.slow
def test_unshuffled_data_is_found(texts, healthy, tmp_path, monkeypatch):
  monkeypatch.setattr(
    TokenBatches, 'number', lambda self, step, row: (step * self.G + row) % self.windows
  )
  known = trained(small(texts, train__steps=200), tmp_path / 'run')
  assert 'order' in checks(known)


@pytest.mark.slow
def test_a_loader_that_repeats_itself_is_found(texts, healthy, tmp_path, monkeypatch):
  monkeypatch.setattr(TokenBatches, 'number', lambda self, step, row: row)
  assert 'loader' in checks(trained(small(texts), tmp_path / 'run'))


# --- Bands ----------------------------------------------------------------------------------------


def test_bands_are_of_shipped_configs_and_name_their_source():
  names = {r.name for r in reference.known()}
  assert {'tiny:stdlib', 'tiny:shakespeare', 'small:fineweb', 'small:openwebtext'} <= names
  for known in reference.known():
    assert reference.of(configs.load(known.name)) is known
    assert all(point['source'] for point in known.published)
    if made := known.made:
      assert (
        len(made['step']) == len(made['mean']) == len(made['deviation'])
        and made['from']['git_commit']
      )


@pytest.mark.parametrize('name', ['tiny:stdlib', 'tiny:shakespeare'])
def test_losses_beside_the_band_are_found(name):
  band = reference.of(configs.load(name))
  assert band is not None
  update = band.made['update']
  losses = list(enumerate(np.repeat(band.made['mean'], reference.EVERY), 1))
  assert band.outside(losses, [], update) is None
  assert 'training loss' in str(
    band.outside([(s, x + 0.5 * (s > 100)) for s, x in losses], [], update)
  )
  # the same tokens in steps twice as large are compared at half the step
  halves = [(s, losses[2 * s - 1][1]) for s in range(1, len(losses) // 2)]
  assert 'training loss' in str(band.outside([(s, x - 1) for s, x in halves], [], 2 * update))


def test_published_losses_are_compared_where_a_run_is():
  band = reference.of(configs.load('small:fineweb'))
  assert band is not None
  (point,) = band.published
  step = round(point['tokens'] / 2**19)
  assert band.outside([], [(step, point['loss'])], 2**19) is None
  assert point['source'] in str(band.outside([], [(step, point['loss'] + 0.3)], 2**19))
  assert band.outside([], [(step // 2, point['loss'] + 0.3)], 2**19) is None


@pytest.mark.slow
def test_a_shipped_config_is_healthy_as_it_runs(tmp_path):
  """The first 120 steps of tiny:shakespeare, as its config has them."""
  if (data := os.environ.get('GPT2_JAX_TEST_DATA')) is None:
    pytest.skip('GPT2_JAX_TEST_DATA names no folder')
  corpus = Path(data) / 'tinyshakespeare.txt'
  ran = run(
    'launch.py', '--config=configs/tiny.py:shakespeare', f'--workdir={tmp_path / "run"}',
    f'--config.data.corpus=text:{corpus}', f'--config.data.directory={tmp_path}', '--config.log.to=',
    '--config.train.steps=120', '--config.optim.decay_steps=2000', '--config.evaluate.every=60',
    '--config.data.val_fraction=0.01', '--config.log.sample_tokens=1',
  )  # fmt: skip
  assert ran.returncode == 0, ran.stderr
  known = facts.of_run(tmp_path / 'run')
  known.config.train.steps = 2000  # it was stopped
  known.config.data.corpus = 'text:data/shakespeare.txt'
  assert reference.of(known.config) is not None and len(known.lines) == 120
  assert not doctor.examine(known)
  with_ten = [
    line | {'train/loss': line['train/loss'] + 0.4 * (i > 60)} for i, line in enumerate(known.lines)
  ]
  assert 'curve' in checks(dataclasses.replace(known, lines=tuple(with_ten)))


# --- The verb -------------------------------------------------------------------------------------


def test_the_verb_says_what_it_found(tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  cli.main(['doctor', 'small:fineweb', '--config.train.micro_batch_rows=8'])
  assert capsys.readouterr().out.endswith(f'{len(doctor.CHECKS)} checks, no findings\n')
  (tmp_path / 'plan.json').write_text(json.dumps({'results': {'tokens_per_second': 1e5}}))
  with pytest.raises(SystemExit) as left:
    cli.main(['doctor', 'tiny', '--config.optim.warmup_steps=0', '--plan', 'plan.json'])
  said = capsys.readouterr().out
  assert left.value.code == 1 and 'warm-up: the learning rate' in said and '1 finding\n' in said
  cli.main(['doctor', '--env'])
  said = capsys.readouterr().out
  for name in ('commit', 'python', 'jax', 'devices', 'processor'):
    assert re.search(rf'^{name} +\S', said, re.M), name
  assert str(Path.home()) not in said


@pytest.mark.parametrize('words,way_out', [
  ([], 'name its folder'),
  (['nothing-there'], 'neither the folder of a run nor a config'),
  (['.'], 'no config.json'),
  (['.', '--config.train.steps=3'], 'leave --config.train.steps=3 out'),
  (['tiny:nope'], 'nope'),
  (['tiny', '--plan', 'none.json'], 'none.json'),
])  # fmt: skip
def test_what_is_no_run_is_said(words, way_out, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(SystemExit) as left:
    cli.main(['doctor', *words])
  assert way_out in str(left.value.code) and '\n' not in str(left.value.code)


def test_an_unfinished_folder_is_said(tmp_path, finished):
  config = json.loads(finished.config.to_json_best_effort())
  (tmp_path / 'config.json').write_text(json.dumps(config))
  with pytest.raises(UserError, match='has not begun'):
    facts.of_run(tmp_path)


def test_each_check_has_its_place_on_the_page():
  page = (ROOT / findings.PAGE).read_text()
  assert set(re.findall(r'^### (.*)$', page, re.M)) == set(doctor.CHECKS)

"""`gpt2-jax train`, `gpt2-jax config` and `gpt2_jax.train`: training without a checkout."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.processes import ROOT, environment

import gpt2_jax
from gpt2_jax import configs
from gpt2_jax.cli import config as config_verb
from gpt2_jax.cli import main, train
from gpt2_jax.training import knobs


def test_the_configs_of_the_package_are_those_of_a_checkout():
  assert (ROOT / 'configs').resolve() == configs.FOLDER
  files = {path.stem for path in configs.FOLDER.glob('*.py')}
  assert files == {*configs.NAMES, 'base', 'recipes', '__init__'}
  for name in configs.NAMES:
    knobs.check(configs.load(name))
  with pytest.raises(ValueError, match='none of: tiny, small'):
    configs.load('tny')


@pytest.mark.parametrize(
  'words',
  [['--config=small:fineweb', '--workdir=x'], ['--config', 'small:fineweb', '--workdir', 'x']],
)
def test_a_config_is_found_by_its_name(words):
  joined = '='.join(train.with_paths(['train', *words]))
  assert f'--config={configs.FOLDER}/small.py:fineweb' in joined
  own = ['train', '--config=mine/small.py', '--config.model.n_layer=2']
  assert train.with_paths(own) == own


def test_every_knob_is_printed_with_what_it_does(capsys):
  main.main(['config', 'small:fineweb'])
  lines = capsys.readouterr().out.splitlines()
  printed = [line.removeprefix('--config.').partition('=')[0] for line in lines]
  named = {*knobs.TOP, *(f'{s}.{name}' for s, table in knobs.SECTIONS.items() for name in table)}
  assert sorted(printed) == sorted(named)
  assert '--config.train.steps=18865' in lines
  steps = next(line for line in lines if line.startswith('--config.evaluate.every='))
  assert steps.endswith('# steps; always the whole held-out split')
  said = config_verb.comments()
  assert said['optim.skip_zscore'].endswith('6 is rare without a cause; 0: off')
  assert len(said) > len(named) / 2


@pytest.mark.parametrize('words', [['train', '--config=tin'], ['train', '--config=tiny.py']])
def test_a_config_that_is_not_there(words):
  done = subprocess.run(
    [sys.executable, '-m', 'gpt2_jax', *words], capture_output=True, text=True, env=environment()
  )
  assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
  assert 'is neither a file nor one of the configs tiny, small' in done.stderr


def test_training_from_python(text_folder, tmp_path):
  config = configs.load('tiny')
  config.data.update(
    corpus=f'text:{text_folder}', directory=str(tmp_path / 'data'), tokenizer='byte', val_fraction=0.2
  )
  config.model.update(n_embd=16, n_layer=1, n_head=2, n_positions=32)
  config.train.update(global_batch_tokens=64 * 8)
  config.log.update(sample_tokens=4, to='')
  run = gpt2_jax.train(config, tmp_path / 'run', train={'steps': 2})
  assert run.finished and [line['step'] for line in run.metrics] == [1, 2]
  assert repr(run).startswith(f"TrainedRun('{tmp_path}/run', finished=True, step=2, train/loss=")
  again = gpt2_jax.train(config, tmp_path / 'run', train={'steps': 3})  # goes on, in one process
  assert [line['step'] for line in again.metrics] == [1, 2, 3]
  assert again.metrics[:2] == run.metrics[:2] and config.train.steps != 3
  assert again.plot().axes[0].get_title() == 'run' and '<table>' in again._repr_html_()
  assert again.model.config.n_embd == 16
  with pytest.raises(TypeError, match='workdir'):
    gpt2_jax.train(config)


@pytest.mark.slow
def test_a_wheel_trains_outside_of_a_checkout(tmp_path):
  pip, source = [sys.executable, '-m', 'pip'], tmp_path / 'source'  # a build leaves files there
  shutil.copytree(ROOT / 'gpt2_jax', source / 'gpt2_jax')
  for name in ('setup.cfg', 'pyproject.toml', 'README.md', 'LICENSE'):
    shutil.copy(ROOT / name, source)
  for words in (
    ['wheel', '--quiet', '--no-deps', '--wheel-dir', str(tmp_path / 'dist'), str(source)],
    ['install', '--quiet', '--no-deps', '--target', str(tmp_path / 'site')],
  ):
    wheels = (
      [str(path) for path in (tmp_path / 'dist').glob('*.whl')] if words[0] == 'install' else []
    )
    subprocess.run([*pip, *words, *wheels], check=True, capture_output=True)
  env = environment() | {'PYTHONPATH': str(tmp_path / 'site')}

  def ask(*words: str) -> str:
    done = subprocess.run(
      [sys.executable, *words], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    return done.stdout

  assert str(tmp_path / 'site') in ask('-c', 'import gpt2_jax; print(gpt2_jax.__file__)')
  said = ask('-m', 'gpt2_jax', 'train', '--config=tiny', '--config.train.steps=3')
  assert 'gpt2-jax sample --checkpoint runs/tiny' in said
  assert Path(tmp_path / 'runs' / 'tiny' / 'loss.png').exists()
  assert '--config.train.steps=600' in ask('-m', 'gpt2_jax', 'config', 'tiny')
  assert os.listdir(tmp_path / 'site' / 'gpt2_jax' / 'configs')

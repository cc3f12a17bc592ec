"""One kept step of a run: DIR@STEP, DIR@best, DIR@latest, by every door."""

import json
import shutil

import numpy as np
import pytest

import gpt2_jax
from configs import tiny
from gpt2_jax.checkpoints import pretrained, saved_steps
from gpt2_jax.checkpoints.workdir import split_step
from gpt2_jax.cli import main
from gpt2_jax.cli.evaluate import Evaluate
from gpt2_jax.cli.serve import model_names
from gpt2_jax.core.errors import UserError
from gpt2_jax.training import run_plan, train


def config_of(text_folder, data):
  config = tiny.get_config()
  config.model.update(n_positions=32, n_embd=16, n_layer=1, n_head=2)
  config.data.update(
    corpus=f'text:{text_folder}', tokenizer='byte', val_fraction=0.05, directory=str(data)
  )
  config.train.update(steps=6, global_batch_tokens=256)
  config.evaluate.every = config.checkpoint.every = 2
  config.checkpoint.keep = 10
  config.log.update(sample_tokens=1, to='')
  return config


@pytest.fixture(scope='module')
def made(text_folder, tmp_path_factory):
  """A run with checkpoints of the steps 2, 4 and 6, of which by its record 4 is the best."""
  folder = tmp_path_factory.mktemp('steps')
  assert train.train(config_of(text_folder, folder / 'data'), folder / 'run') == 0
  metrics = folder / 'run' / 'metrics.jsonl'
  lines = [json.loads(line) for line in metrics.read_text().splitlines()]
  losses = {line['step']: line['eval/loss'] for line in lines if 'eval/loss' in line}
  assert {2, 4, 6} <= losses.keys() and losses[4] > losses[6]
  metrics.write_text(
    ''.join(
      json.dumps(line | ({'eval/loss': 1.0} if line['step'] == 4 else {})) + '\n' for line in lines
    )
  )
  return folder / 'run'


@pytest.fixture
def copied(made, tmp_path):
  shutil.copytree(made, tmp_path / 'run')
  return tmp_path / 'run'


def weight(model):
  return np.asarray(model.model.ln_f.bias[...])


def test_which_step_is_opened(made):
  want = {}
  for step in (2, 4, 6):
    want[step] = weight(gpt2_jax.from_pretrained(f'{made}@{step}'))
    assert pretrained.open_source(f'{made}@{step}').where == f'{made}@{step}'
    np.testing.assert_array_equal(weight(gpt2_jax.from_pretrained(made, step=step)), want[step])
  assert not any(np.array_equal(want[a], want[b]) for a, b in ((2, 4), (4, 6), (2, 6)))
  for which, step in (('best', 4), ('latest', 6)):
    np.testing.assert_array_equal(weight(gpt2_jax.from_pretrained(f'{made}@{which}')), want[step])
    np.testing.assert_array_equal(weight(gpt2_jax.from_pretrained(made, step=which)), want[step])
  np.testing.assert_array_equal(weight(gpt2_jax.from_pretrained(made)), want[6])
  record = pretrained.open_source(f'{made}@4').record
  assert record['step'] == 4 and max(line['step'] for line in record['losses']) == 4


@pytest.mark.parametrize(
  'which,says',
  [
    ('3', 'no checkpoint of step 3; kept are 2, 4, 6'),
    ('9' * 18, 'kept are 2, 4, 6'),
    ('newest', "step of the run .* best or latest, not 'newest'; kept are 2, 4, 6"),
    ('-2', "not '-2'"),
    ('', "not ''"),
  ],
)
def test_a_step_that_is_not_there(made, which, says):
  with pytest.raises(UserError, match=says):
    pretrained.open_source(f'{made}@{which}')


@pytest.mark.parametrize('step', [True, 2.0, 'x', -1])
def test_a_step_that_is_none(made, step):
  with pytest.raises(UserError, match='neither a number|no checkpoint of step -1'):
    gpt2_jax.from_pretrained(made, step=step)


def test_a_step_said_twice_or_of_something_else(made, tmp_path):
  gpt2_jax.from_pretrained(f'{made}@2', step=2)
  with pytest.raises(UserError, match='say it once'):
    gpt2_jax.from_pretrained(f'{made}@2', step=4)
  gpt2_jax.save_pretrained(gpt2_jax.from_pretrained(f'{made}@2'), tmp_path / 'hf')
  for call in (
    lambda: gpt2_jax.from_pretrained(tmp_path / 'hf', step=2),
    lambda: gpt2_jax.from_pretrained(f'{tmp_path}/hf@2'),
  ):
    with pytest.raises(UserError, match='no workdir of a run'):
      call()
  with pytest.raises(UserError, match="no folder of PEFT's adapters"):
    gpt2_jax.from_pretrained(tmp_path / 'hf', base='gpt2')


def test_a_damaged_step_is_an_error_and_no_other_is_taken(copied):
  file = max((copied / 'checkpoints' / '4' / 'params').rglob('d/*'), key=lambda p: p.stat().st_size)
  file.write_bytes(file.read_bytes()[:-8])
  for source in (f'{copied}@4', f'{copied}@best'):
    with pytest.raises(UserError, match=r'checkpoint of step 4 in .*bytes, not .*Name another step'):
      pretrained.open_source(source)
  assert pretrained.open_source(f'{copied}@2').record['step'] == 2


def test_best_is_of_what_is_kept(copied):
  shutil.rmtree(copied / 'checkpoints' / '4')
  assert pretrained.open_source(f'{copied}@best').record['step'] == 6
  metrics = copied / 'metrics.jsonl'
  lines = [json.loads(line) for line in metrics.read_text().splitlines()]
  metrics.write_text(
    ''.join(
      json.dumps({key: value for key, value in line.items() if key != 'eval/loss'}) + '\n'
      for line in lines
    )
  )
  with pytest.raises(UserError, match='no kept step has a held-out loss.* Kept are 2, 6'):
    pretrained.open_source(f'{copied}@best')
  assert pretrained.open_source(f'{copied}@latest').record['step'] == 6


def test_paths_and_names_with_an_at(copied, monkeypatch):
  copied.rename(copied.parent / 'run@4')
  monkeypatch.chdir(copied.parent)
  assert split_step('run@4') == (pretrained.Path('run@4'), None)  # it exists
  assert pretrained.open_source('run@4').record['step'] == 6
  assert pretrained.open_source('run@4@2').record['step'] == 2
  assert split_step('gpt2@main')[1] is None and split_step('someone/name@v1.0')[1] is None
  (copied.parent / 'gpt2').mkdir()
  assert split_step('gpt2@main')[1] is None  # a revision, though there is such a folder


def test_every_verb_and_init_from(made, text_folder, tmp_path, capsys):
  source = f'{made}@2'
  main.main(['convert', source, str(tmp_path / 'hf'), '--to', 'hf'])
  assert f'from {source}' in capsys.readouterr().out
  assert '| 2 | 512 |' in (tmp_path / 'hf' / 'README.md').read_text()
  texts = []
  for checkpoint_ in (source, str(tmp_path / 'hf'), str(made)):
    main.main(
      [
        'sample',
        '--checkpoint',
        checkpoint_,
        '--prompt',
        'the',
        '--greedy',
        '--json',
        '--max-new-tokens',
        '8',
      ]
    )
    texts.append(json.loads(capsys.readouterr().out)['logprobs'])
  assert texts[0] == texts[1] != texts[2]
  assert model_names((source, str(made), 'gpt2@main')) == ['run@2', 'run', 'gpt2@main']
  assert Evaluate(source, 'lambada').scores() == made / 'evaluate.scores'
  config = config_of(text_folder, made.parent / 'data')
  config.init_from = source
  begins = run_plan.make_plan(config).load_source()
  np.testing.assert_array_equal(begins['ln_f']['bias'], weight(gpt2_jax.from_pretrained(source)))
  assert saved_steps.kept_steps(made) == [2, 4, 6]

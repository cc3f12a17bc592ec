"""What trackers are told: each step once, in order, whatever fails, hangs or is killed; and the real
ones, without a network.
"""

import importlib.util
import json
import re
import subprocess
import sys
import time

import pytest
from support.configs import tiny_config
from support.processes import ROOT, environment, run
from support.runs import arguments, lines

from gpt2_jax.core.errors import UserError
from gpt2_jax.training import knobs
from gpt2_jax.training.trackers import feeds, wandb_run
from gpt2_jax.training.trackers.protocol import Start
from gpt2_jax.training.watch import metrics_file

STEPS = 100


class Plain:
  """A tracker that keeps what it is told."""

  needs, where = '', 'nowhere'

  def __init__(self, start):
    self.start, self.run, self.sent = start, start.run or 'one', start.sent if start.run else 0
    self.got, self.closed = [], None
    self.fails = 0

  def log(self, lines):
    if self.fails:
      self.fails -= 1
      raise OSError('no route\nto host')
    self.got += lines

  def close(self, *words):
    self.closed = words


@pytest.fixture
def plain(monkeypatch):
  """The plain trackers that are opened, in order."""
  made = []
  monkeypatch.setitem(feeds.TRACKERS, 'plain', lambda start: made.append(Plain(start)) or made[-1])
  monkeypatch.setattr(feeds, 'GATHER_S', 0.01)
  monkeypatch.setattr(feeds, 'RETRY_S', 0.05)
  return made


def told_by(to, workdir, config, step, say=print):
  read = lambda: metrics_file.read(workdir)
  return feeds.Trackers(to, Start(workdir, config, step), read, say)


def until(holds, seconds=10.0):
  last = time.monotonic() + seconds
  while not holds():
    assert time.monotonic() < last
    time.sleep(0.005)


def write(workdir, first, last, told=None):
  """Lines of the record, handed to the trackers as a run does it."""
  with metrics_file.MetricsWriter(workdir, first - 1) as writer:
    for step in range(first, last + 1):
      writer.write(line := {'step': step, 'train/loss': 1.0 / step})
      if told:
        told.put(line)


def steps(tracker):
  return [line['step'] for line in tracker.got]


def test_each_step_once_in_order_also_of_a_queue_too_small(plain, tmp_path, monkeypatch):
  monkeypatch.setattr(feeds, 'QUEUE', 3)
  said = []
  with told_by('plain', tmp_path, {'a': 1}, 0, say=said.append) as told:
    write(tmp_path, 1, 500, told)
    told.end('finished', {'steps': 500}, None)
  assert steps(plain[0]) == list(range(1, 501)) and plain[0].start.config == {'a': 1}
  assert plain[0].closed == ('finished', {'steps': 500}, None) and said == ['plain    nowhere']


def test_a_failure_is_said_in_a_line_and_made_good(plain, tmp_path):
  said = []
  told = told_by('plain', tmp_path, {}, 0, say=said.append)
  write(tmp_path, 1, 3, told)
  until(lambda: plain and len(plain[0].got) == 3)
  plain[0].fails = 3
  write(tmp_path, 4, 6, told)
  until(lambda: len(said) == 3)
  assert said[1].startswith('tracker plain: no route to host. The run goes on without it')
  assert said[2] == 'tracker plain is back, and has all steps up to 6'
  told.end('stopped')
  assert steps(plain[0]) == [1, 2, 3, 4, 5, 6] and plain[0].closed[0] == 'stopped'


def test_one_that_cannot_be_opened_or_hangs_keeps_nobody(plain, tmp_path, monkeypatch):
  said = []

  def refuse(start):
    raise SystemExit('no key')

  def hang(start):
    time.sleep(5)
    raise OSError

  monkeypatch.setitem(feeds.TRACKERS, 'refuse', refuse)
  monkeypatch.setitem(feeds.TRACKERS, 'hang', hang)
  monkeypatch.setitem(feeds.PATIENCE_S, 'finished', 0.5)
  began = time.monotonic()
  told = told_by('refuse,hang,plain', tmp_path, {}, 0, say=said.append)
  write(tmp_path, 1, 3, told)
  told.end('finished')
  assert time.monotonic() - began < 4 and steps(plain[0]) == [1, 2, 3]
  assert 'tracker refuse: no key' in ' '.join(said)
  assert [line for line in said if 'nothing after step 0' in line and 'hang' in line]


def test_the_next_start_goes_on_behind_what_was_sent(plain, tmp_path):
  def start(step, first, last, outcome='stopped'):
    told = told_by('plain', tmp_path, {}, step, say=print)
    write(tmp_path, first, last, told)
    told.end(outcome)
    return plain[-1]

  assert steps(start(0, 1, 8)) == list(range(1, 9))
  again = start(5, 6, 12)  # killed behind its checkpoint of step 5
  assert again.run == 'one' and steps(again) == [9, 10, 11, 12]
  (tmp_path / 'trackers' / 'plain.json').unlink()  # it was not told before: of all that there is
  assert steps(start(12, 13, 14)) == list(range(1, 15))
  (tmp_path / 'trackers' / 'plain.json').write_text('{"run": "on')  # what a broken disk left
  assert steps(start(14, 15, 15)) == list(range(1, 16))
  assert steps(start(0, 1, 2)) == [1, 2]  # all was lost: this is another run


def test_an_evaluation_that_was_cut_short_is_told_later(plain, tmp_path):
  with metrics_file.MetricsWriter(tmp_path, 0) as writer:
    writer.write({'step': 1, 'train/loss': 2.0})
    (tmp_path / 'trackers').mkdir()
    (tmp_path / 'trackers' / 'plain.json').write_text('{"run": "one", "sent": 1}')
    told = told_by('plain', tmp_path, {}, 1, say=print)
    writer.amend_last({'eval/loss': 3.0})
    told.amend({'step': 1, 'eval/loss': 3.0})
    told.end('finished')
  assert plain[0].got == [{'step': 1, 'eval/loss': 3.0}]


def test_a_run_that_fails_says_so(plain, tmp_path):
  with pytest.raises(KeyError), told_by('plain', tmp_path, {}, 0, say=print):
    raise KeyError
  assert plain[0].closed[0] == 'failed'


def test_names_and_packages_are_checked_before_anything_is_made(monkeypatch):
  for to in ('', 'tensorboard', 'wandb, mlflow'):
    knobs.check(tiny_config(log__to=to))
  with pytest.raises(UserError, match="log.to = 'wandbb' must be of tensorboard, wandb, mlflow"):
    knobs.check(tiny_config(log__to='wandbb'))
  assert feeds.names(' wandb,mlflow,wandb,') == ['wandb', 'mlflow']
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(UserError, match=r'pip install "gpt2_jax\[wandb\]", or leave wandb out'):
    feeds.require('wandb')


# --- the real ones --------------------------------------------------------------------------------


def tensorboard_steps(workdir):
  """Each step that TensorBoard shows, and its loss: later files hide what they begin anew."""
  from tensorboardX.proto import event_pb2

  shown = {}
  for path in sorted((workdir / 'tensorboard').glob('events.*'), key=lambda p: p.stat().st_mtime_ns):
    data, at = path.read_bytes(), 0
    while at + 12 <= len(data):
      size = int.from_bytes(data[at : at + 8], 'little')
      event = event_pb2.Event.FromString(data[at + 12 : at + 12 + size])
      at += size + 16
      if event.session_log.status == event_pb2.SessionLog.START:
        shown = {step: loss for step, loss in shown.items() if step < event.step}
      for value in event.summary.value:
        if value.tag == 'train/loss':
          assert event.step not in shown
          shown[event.step] = value.simple_value
  return shown


def wandb_steps(workdir):
  from wandb.proto import wandb_internal_pb2

  shown, ids = [], set()
  for path in sorted((workdir / 'wandb').glob('offline-run-*/*.wandb')):
    for data in wandb_run.records(path):
      record = wandb_internal_pb2.Record.FromString(data)
      if record.WhichOneof('record_type') == 'run':
        ids.add(record.run.run_id)
      if record.WhichOneof('record_type') == 'history':
        row = {'/'.join(i.nested_key) or i.key: i.value_json for i in record.history.item}
        if 'train/loss' in row:
          shown.append((record.history.step.num, json.loads(row['train/loss'])))
  assert len(ids) == 1
  assert len(dict(shown)) == len(shown), 'a step was sent twice'
  return dict(shown)


def mlflow_steps(uri):
  from mlflow import MlflowClient

  client = MlflowClient(uri)
  experiment = client.get_experiment_by_name('gpt2_jax')
  (found,) = client.search_runs([experiment.experiment_id])
  points = client.get_metric_history(found.info.run_id, 'train/loss')
  shown = {point.step: point.value for point in points}
  assert len(shown) == len(points) and found.info.status == 'FINISHED'
  assert found.data.params['train.steps'] == str(STEPS)
  assert float(found.data.tags['summary.eval_loss']) > 0 and found.data.tags['summary.sample']
  assert [f.path for f in client.list_artifacts(found.info.run_id) if f.path == 'loss.png']
  return shown


@pytest.mark.slow
@pytest.mark.filterwarnings('ignore')  # of mlflow's own
@pytest.mark.parametrize('name', ['tensorboard', 'wandb', 'mlflow'])
def test_a_killed_run_is_one_run_in_a_real_tracker(name, text_folder, tmp_path, monkeypatch):
  """By real processes: SIGKILL behind a checkpoint, and on to the end: each step once."""
  if name != 'tensorboard':
    pytest.importorskip(name)
  uri = f'sqlite:///{tmp_path}/mlflow.db'
  monkeypatch.setenv('WANDB_MODE', 'offline')
  monkeypatch.setenv('MLFLOW_TRACKING_URI', uri)
  monkeypatch.setenv('MLFLOW_EXPERIMENT_NAME', 'gpt2_jax')
  workdir, mark = tmp_path / 'run', tmp_path / 'run' / 'trackers' / f'{name}.json'
  if name == 'mlflow':
    import mlflow

    mlflow.MlflowClient(uri).create_experiment('gpt2_jax', tmp_path.as_uri())
  larger = dict(model__n_embd=64, train__global_batch_tokens=64 * 16, train__steps=STEPS)
  rare = dict(checkpoint__every=20, evaluate__every=50)
  command = arguments(text_folder, workdir, log__to=name, **larger, **rare)
  sent = lambda: json.loads(mark.read_text())['sent'] if mark.exists() else 0
  process = subprocess.Popen([sys.executable, *command], cwd=ROOT, env=environment())
  until(lambda: sent() > 20, 120)
  process.kill()
  process.wait()
  killed = sent()
  result = run(*command)
  assert result.returncode == 0, result.stdout + result.stderr
  assert 'tracker' not in result.stdout
  start = int(re.search(r'resumed from step (\d+)', result.stdout)[1])
  assert start < killed < STEPS and sent() == STEPS  # beyond its checkpoint
  shown = {
    'tensorboard': lambda: tensorboard_steps(workdir),
    'wandb': lambda: wandb_steps(workdir),
    'mlflow': lambda: mlflow_steps(uri),
  }[name]()
  record = {line['step']: line['train/loss'] for line in lines(workdir)}
  assert shown.keys() == record.keys() == set(range(1, STEPS + 1))
  assert all(shown[step] == pytest.approx(loss, rel=1e-6) for step, loss in record.items())


@pytest.mark.slow
def test_wandb_without_a_key_does_not_ask_at_the_keyboard(text_folder, tmp_path, monkeypatch):
  pytest.importorskip('wandb')
  for name in ('WANDB_API_KEY', 'WANDB_MODE'):
    monkeypatch.delenv(name, raising=False)
  monkeypatch.setenv('HOME', str(tmp_path))
  command = arguments(text_folder, tmp_path / 'run', log__to='wandb', train__steps=4)
  result = run(*command, HOME=str(tmp_path))
  assert result.returncode == 0, result.stderr
  assert 'tracker wandb: there is no API key' in result.stdout

"""Runs that are the same each time, and a run made again from its record."""

import json
import shutil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.processes import ROOT, run
from support.runs import arguments

from gpt2_jax.configs import base
from gpt2_jax.core import determinism
from gpt2_jax.core.errors import UserError
from gpt2_jax.training import knobs
from gpt2_jax.training.reproduce import Difference, as_config, differences, report
from gpt2_jax.training.watch import metrics_file, run_record

LINE = {'step': 1, 'train/loss': 2.0, 'eval/loss': 3.0, 'perf/step_seconds': 0.5, 'time/step': 1.0}


def test_the_flags_of_determinism_are_set_once_and_contradictions_refused(monkeypatch):
  monkeypatch.setattr(determinism.jax.config, 'update', lambda *_: None)
  monkeypatch.setenv('XLA_FLAGS', '--xla_one=1 --xla_gpu_autotune_level=0')
  assert determinism.describe() == {}
  with pytest.raises(UserError, match=r'launch\.py'):
    determinism.check()
  determinism.require()
  determinism.check()
  once = determinism.os.environ['XLA_FLAGS']
  determinism.require()
  assert determinism.os.environ['XLA_FLAGS'] == once and once.startswith('--xla_one=1 ')
  assert determinism.describe().items() > determinism.FLAGS.items()
  monkeypatch.setenv('XLA_FLAGS', '--xla_gpu_deterministic_ops=false')
  with pytest.raises(UserError, match='--xla_gpu_deterministic_ops=false: take it out'):
    determinism.require()


values = st.floats(allow_nan=True, width=32) | st.just(1.0)
records = st.lists(
  st.fixed_dictionaries(
    {'train/loss': values, 'perf/step_seconds': values}, optional={'eval/loss': values}
  ),
  max_size=5,
)


@settings(max_examples=50, deadline=None)
@given(records, records)
def test_differences_are_all_that_json_would_show(left, right):
  """Against the plain way: the two records as text, measured keys aside."""
  number = lambda lines: [{'step': i + 1} | line for i, line in enumerate(lines)]
  left, right = number(left), number(right)
  text = lambda lines, step: {
    key: json.dumps(value)
    for line in lines
    if line['step'] == step
    for key, value in line.items()
    if not key.startswith('perf/')
  }
  want = {
    (step, key)
    for step in range(1, 6)
    for key in (text(left, step).keys() | text(right, step).keys()) - {'step'}
    if text(left, step).get(key) != text(right, step).get(key)
  }
  found = list(differences(left, right))
  assert {(d.step, d.key) for d in found} == want
  assert [d.step for d in found] == sorted(d.step for d in found)


def test_a_report_names_the_first_step_and_by_how_much(capsys):
  there = [LINE | {'step': step} for step in (1, 2, 3)]
  here = [dict(line) for line in there]
  here[0]['perf/step_seconds'] = 9.0
  assert report(there, here) == 0 and 'to the last bit: 3 steps' in capsys.readouterr().out
  here[1]['train/loss'], here[2]['train/loss'] = 2.5, 4.0
  assert report(there, here) == 1
  shown = capsys.readouterr().out
  assert 'first step that differs is 2 of 3' in shown and 'relative 2.0e-01' in shown
  assert 'step 3: train/loss: 2.0 there, 4.0 here (relative 5.0e-01)' in shown
  assert str(Difference(3, 'eval/loss', 3.0, None)) == 'eval/loss: 3.0 there, absent here'
  assert report(there, here[:1]) == 1


def test_the_config_of_an_early_run_has_all_knobs(tmp_path):
  """Its own values, and the defaults of what there was not at f7cf32c."""
  shutil.unpack_archive(ROOT / 'tests' / 'golden' / 'run.tar.xz', tmp_path, filter='data')
  read = json.loads((tmp_path / 'run' / 'config.json').read_text())
  made = as_config(read).to_dict()
  knobs.check(as_config(read))
  usual = base.get_config().to_dict()
  for section, values in usual.items():
    for key, value in values.items() if isinstance(values, dict) else ():
      assert made[section].keys() == values.keys()
      assert made[section][key] == read[section].get(key, value), (section, key)


def test_measured_keys_stand_apart_and_come_back(tmp_path):
  """In one file, in two, in one again: what is read is the same."""
  lines = [LINE | {'step': step, 'time/step': 1.5 * step} for step in (1, 2, 3)]
  for apart in (False, True, True, False):
    writer = metrics_file.MetricsWriter(tmp_path, 3, apart)
    for line in lines[len(metrics_file.read(tmp_path)) :]:
      writer.write(line)
    writer.close()
    assert metrics_file.read(tmp_path) == lines
    plain = (tmp_path / metrics_file.FILE).read_text()
    assert ('perf/' in plain, (tmp_path / metrics_file.TIMING).exists()) == (not apart, apart)
  writer = metrics_file.MetricsWriter(tmp_path, 2, True)
  writer.amend_last({'eval/loss': 1.0})
  writer.close()
  assert metrics_file.read(tmp_path) == [lines[0], lines[1] | {'eval/loss': 1.0}]


@pytest.mark.slow
def test_a_run_repeats_itself_and_reproduce_says_so(text_folder, tmp_path):
  """Once more from its record: the same bytes. From a record that was changed: not."""
  command = arguments(text_folder, tmp_path / 'a', train__steps=10, mesh__fsdp=2)
  result = run(*command, '--config.deterministic=True', devices=2)
  assert result.returncode == 0, result.stderr
  a = (tmp_path / 'a' / metrics_file.FILE).read_bytes()
  assert b'perf/' not in a and a.count(b'\n') == 10
  (start,) = run_record.starts(tmp_path / 'a')
  assert start['finished'] and start['determinism']['--xla_gpu_deterministic_ops'] == 'true'
  assert '--xla_gpu_autotune_level=0' in start['env']['XLA_FLAGS']
  assert metrics_file.read(tmp_path / 'a')[-1]['perf/step_seconds'] > 0

  # one device here: the run's two come from its record
  result = run('-m', 'gpt2_jax', 'reproduce', str(tmp_path / 'a'))
  assert result.returncode == 0, result.stdout + result.stderr
  assert 'the same to the last bit: 10 steps' in result.stdout
  assert 'XLA_FLAGS' in result.stdout, 'it differed, and is said'
  assert (tmp_path / 'a-again' / metrics_file.FILE).read_bytes() == a

  shutil.copytree(tmp_path / 'a', tmp_path / 'c')
  path = tmp_path / 'c' / 'config.json'
  config = json.loads(path.read_text())
  config['optim']['eps'] = 1e-4
  path.write_text(json.dumps(config))
  result = run('-m', 'gpt2_jax', 'reproduce', str(tmp_path / 'c'), '--output', str(tmp_path / 'd'))
  assert result.returncode == 1 and 'Traceback' not in result.stderr
  assert 'the first step that differs is 1 of 10' in result.stdout, result.stdout
  assert 'train/param_norm' in result.stdout

  result = run('-m', 'gpt2_jax', 'reproduce', str(tmp_path / 'c'), '--output', str(tmp_path / 'a'))
  assert result.returncode == 1 and 'is there already' in result.stderr

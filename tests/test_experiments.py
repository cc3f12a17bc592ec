"""The experiments: their statistics, their runs' names, and a sweep that is stopped and goes on."""

import importlib
import json
import math
import types

import jax
import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from support.processes import QUICK, ROOT

from experiments import results, run, stats, sweeps
from gpt2_jax.core import determinism
from gpt2_jax.core.errors import UserError
from gpt2_jax.training import run_plan
from gpt2_jax.training.watch import metrics_file, run_record

NAMES = sorted(path.parent.name for path in (ROOT / 'experiments').glob('*/sweep.py'))
losses = st.floats(0.5, 8, width=32)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(losses, losses), min_size=2, max_size=8))
def test_statistics_are_scipys(pairs):
  a, b = np.array(pairs, np.float64).T
  summary = stats.Summary.of(a.tolist())
  assert summary.deviation == pytest.approx(np.std(a, ddof=1))
  if summary.deviation > 1e-6:
    low, high = scipy.stats.t.interval(0.95, len(a) - 1, np.mean(a), scipy.stats.sem(a))
    assert (summary.mean - summary.half_width, summary.mean + summary.half_width) == pytest.approx(
      (low, high)
    )
  compared = stats.paired(a.tolist(), b.tolist())
  assert compared.difference.mean == pytest.approx(np.mean(a - b))
  if np.std(a - b) > 1e-6:
    assert compared.p == pytest.approx(scipy.stats.ttest_rel(a, b).pvalue, abs=1e-9)
  elif np.array_equal(a, b):
    assert compared.p == 1


def test_an_interval_covers_the_mean_as_often_as_it_says():
  rng = np.random.default_rng(0)
  covered = [
    abs(s.mean - 3) <= s.half_width
    for s in (stats.Summary.of(rng.normal(3, 0.1, 4).tolist()) for _ in range(2000))
  ]
  assert 0.93 < np.mean(covered) < 0.97


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=6))
def test_holm_rejects_what_stepping_down_rejects(p_values):
  """At each level, by the definition: from the smallest on, as long as p <= level / those left."""
  adjusted = stats.holm(p_values)
  for level in (0.01, 0.05, 0.3):
    rejected = set()
    for i in sorted(range(len(p_values)), key=p_values.__getitem__):
      if p_values[i] * (len(p_values) - len(rejected)) > level:
        break
      rejected.add(i)
    assert {p_values[i] for i in rejected} == {p for p, a in zip(p_values, adjusted) if a <= level}


def test_a_power_law_is_found_with_its_error():
  x = np.array([1e3, 2e3, 5e3, 2e4])
  exact = stats.power_law(x, 7 * x**-0.3)
  assert (exact.exponent, exact.scale) == pytest.approx((0.3, 7)) and exact.half_width < 1e-6
  rng = np.random.default_rng(0)
  fits = [stats.power_law(x, 7 * x**-0.3 * np.exp(rng.normal(0, 0.02, 4))) for _ in range(1000)]
  assert 0.93 < np.mean([abs(fit.exponent - 0.3) <= fit.half_width for fit in fits]) < 0.97
  assert math.isnan(stats.power_law([1, 2], [3, 2]).half_width)


values = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
points = st.dictionaries(st.text(max_size=5), values | st.lists(values, max_size=2), max_size=5)


@settings(max_examples=50, deadline=None)
@given(points, points, st.randoms())
def test_a_name_is_that_of_the_overrides(a, b, random_):
  mixed = list(a.items())
  random_.shuffle(mixed)
  assert sweeps.key('x', dict(mixed)) == sweeps.key('x', a) != sweeps.key('y', a)
  same = json.dumps(a, sort_keys=True) == json.dumps(b, sort_keys=True)
  assert (sweeps.key('x', a) == sweeps.key('x', b)) == same


def test_names_stay():
  """Else finished runs would be run again."""
  assert sweeps.key('c.py', {'b': 1e-3, 'a': [1, True]}) == 'a0dfc5b30c07'


def test_combinators():
  product = sweeps.grid({'a': [1, 2], 'b': ['x', 'y']})
  assert product == [{'a': 1, 'b': 'x'}, {'a': 1, 'b': 'y'}, {'a': 2, 'b': 'x'}, {'a': 2, 'b': 'y'}]
  assert sweeps.grid({}) == [{}]
  assert sweeps.zip({'a': [1, 2], 'b': ['x', 'y']}) == [product[0], product[3]]
  with pytest.raises(UserError, match='2 of a, 1 of b'):
    sweeps.zip({'a': [1, 2], 'b': ['x']})
  seeded = sweeps.seeds(product[:2], 2)
  assert [point['train.seed'] for point in seeded] == [0, 1, 0, 1]
  assert sweeps.varied(seeded) == ['b'] and sweeps.varied([{}, {'c': 0.0}]) == ['c']


def test_tokens_to_a_loss_are_where_the_curve_first_comes_to_it():
  """Between evaluations straight; a loss that is left again was reached, one below all was not."""
  lines = [
    {'train/tokens': n, 'eval/loss': x} for n, x in ((10, 4.0), (20, 3.0), (30, 3.2), (40, 2.0))
  ]
  held = types.SimpleNamespace(lines=[{'train/tokens': 5}, *lines])
  tokens_to = run.load('optimizers').tokens_to
  assert [tokens_to(loss, held) for loss in (3.5, 3.0, 2.6, 2.0)] == [15, 20, 35, 40]
  assert math.isnan(tokens_to(1.9, held))


@pytest.mark.parametrize('name', NAMES)
def test_every_point_of_a_sweep_is_a_run(name, monkeypatch):
  """Its overrides are knobs, of the right type, that make a plan."""
  monkeypatch.setattr(determinism, 'check', lambda: None)
  tasks = run.tasks(run.load(name))
  module = tasks[0].config.removesuffix('.py').replace('/', '.')
  seen = set()
  for task in tasks:
    shape = sweeps.canonical(task.point | {'train.seed': 0, 'optim.peak_lr': 0.0})
    if shape not in seen:
      seen.add(shape)
      config = importlib.import_module(module).get_config()
      config.update_from_flattened_dict(
        {key: value for key, value in task.point.items() if key not in sweeps.HOW}
      )
      made = run_plan.make_plan(config, devices=jax.devices()[: task.point.get('run.devices', 1)])
      assert made.model.n_embd <= 256, 'small enough for two cores'
  readme = (ROOT / 'experiments' / name / 'README.md').read_text()
  assert f'python experiments/run.py {name}' in readme
  for part in ('**Question.**', '**Method.**', '**Seen.**', f'![{name}]({name}.png)', 'commit'):
    assert part in readme, part
  assert (ROOT / 'experiments' / name / f'{name}.png').is_file()
  assert f'[{name}]({name}/README.md)' in (ROOT / 'experiments' / 'README.md').read_text()


def made_up(point: dict, folder, loss: float) -> results.Run:
  start = {
    'seconds': {'step': 30.0},
    'time': '2020-01-02T00:00:00Z',
    'processor': '2 x CPU',
    'python': '3.11',
    'versions': {'jax': '1.0'},
    'git_commit': 'c0ffee' * 4,
  }
  lines = [{'step': 1, 'eval/loss': loss + 1}, {'step': 2, 'eval/loss': loss}, {'step': 3}]
  return results.Run(point, folder, lines, [start])


def test_the_collector_writes_what_the_numbers_say(tmp_path):
  rng = np.random.default_rng(0)
  loss = {
    (rate, seed): 3 - 10 * rate + 0.01 * rng.normal() for rate in (0.1, 0.2) for seed in range(4)
  }
  runs = [
    made_up({'optim.peak_lr': rate, 'train.seed': seed}, tmp_path, value)
    for (rate, seed), value in loss.items()
  ]
  readme = tmp_path / 'README.md'
  readme.write_text(f'before\n{results.BEGIN}\nold\n{results.END}\nafter\n')

  def report(runs, axes):
    axes.plot([1, 2], [3, 4], label='a line')
    return [results.table(results.groups(runs), {'optim.peak_lr': 0.1})]

  results.write(tmp_path, 'name', runs, report)
  text = readme.read_text()
  assert text.startswith(f'before\n{results.BEGIN}\n') and text.endswith(f'{results.END}\nafter\n')
  assert 'old' not in text and '![name](name.png)' in text and '8 runs, 4.0 minutes' in text
  assert 'on 2 x CPU' in text and 'c0ffeec0ffee' in text
  assert (tmp_path / 'name.png').read_bytes()[:8] == b'\x89PNG\r\n\x1a\n'
  low, high = ([loss[rate, seed] for seed in range(4)] for rate in (0.1, 0.2))
  assert f'| 0.1 | 4 | {np.mean(low):.4f} | {np.std(low, ddof=1):.4f} |' in text
  p = scipy.stats.ttest_rel(high, low).pvalue
  assert f'| {np.mean(high) - np.mean(low):+.4f} ± ' in text
  assert (f'| {p:.3f} |' if p >= 0.001 else '| < 0.001 |') in text
  results.write(tmp_path, 'name', runs, report)
  assert readme.read_text() == text

  readme.write_text('nothing')
  with pytest.raises(UserError, match='needs the two lines'):
    results.write(tmp_path, 'name', runs, report)
  with pytest.raises(UserError, match='Pairs need the same'):
    results.table(results.groups(runs[:-1]), {'optim.peak_lr': 0.1})


def test_wrong_names_and_points_are_said(monkeypatch):
  with pytest.raises(UserError, match='none of: exact_resume'):
    run.load('nothing')
  with pytest.raises(UserError, match='one point twice'):
    run.tasks(types.SimpleNamespace(sweep=lambda: [{'a': 1}, {'a': 1}]))
  with pytest.raises(UserError, match='no points'):
    run.tasks(types.SimpleNamespace(sweep=list))
  monkeypatch.setitem(run.sys.modules, 'submitit', None)
  with pytest.raises(UserError, match=r'gpt2_jax\[sweep\]'):
    run.Submitted('local')


SMALL = {
  'model.n_positions': 32,
  'model.n_embd': 32,
  'model.n_layer': 2,
  'model.n_head': 2,
  'data.tokenizer': 'byte',
  'data.val_fraction': 0.05,
  'data.split': 'tail',
  'train.steps': 12,
  'train.global_batch_tokens': 32 * 4,
  'optim.warmup_steps': 2,
  'checkpoint.every': 4,
  'evaluate.every': 12,
  'log.to': '',
  'log.sample_tokens': 1,
}


@pytest.fixture
def sweep(text_folder, tmp_path, monkeypatch):
  """Three runs of a few steps: one is killed on its way, one can't be trained."""
  monkeypatch.setenv('XLA_FLAGS', QUICK)
  monkeypatch.setenv('PYTHONPATH', str(ROOT))
  base = SMALL | {
    'data.corpus': f'text:{text_folder}',
    'data.store': str(text_folder.parent / 'sweep'),
  }
  made = [base, base | {'run.kill_at': [6]}, base | {'optim.peak_lr': 1e25, 'optim.clip_norm': 0.0}]
  return run.tasks(types.SimpleNamespace(CONFIG='configs/tiny.py', sweep=lambda: made), tmp_path)


@pytest.mark.slow
def test_a_sweep_goes_on_where_it_was_stopped(sweep):
  whole, killed, bad = sweep
  failures = run.run_all('test', sweep, 3, 2)
  assert len(failures) == 1 and failures[0].startswith(f'{bad.folder} (status 1)')
  assert 'Nothing of it was saved' in (bad.folder / run.LOG).read_text()
  assert [task.done for task in sweep] == [True, True, False]
  assert len(run_record.starts(killed.folder)) == 2
  plain = lambda task: [metrics_file.plain(line) for line in metrics_file.read(task.folder)]
  assert plain(whole) == plain(killed) and len(plain(whole)) == 12
  read = results.Run.read(whole.point, whole.folder)
  assert read.seconds > 0 and read.last('eval/loss') > 0

  times = lambda: [(task.folder / 'env.json').stat().st_mtime_ns for task in sweep[:2]]
  before = times()
  assert len(run.run_all('test', [task for task in sweep if not task.done], 3, 2)) == 1
  assert times() == before


@pytest.mark.slow
def test_submitit_runs_the_same(sweep, tmp_path, monkeypatch):
  pytest.importorskip('submitit')
  monkeypatch.setattr(run, 'RUNS', tmp_path / 'runs')
  with pytest.raises(UserError, match='is not KEY=VALUE'):
    run.Submitted('local', 'timeout')
  execute = run.Submitted('local', 'timeout_min=5')
  assert run.run_all('test', sweep[:1], 1, 1, execute) == []
  assert sweep[0].done and len(metrics_file.read(sweep[0].folder)) == 12

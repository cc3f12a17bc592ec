"""Watching a run: where its time goes, steps that are not taken, traces, memory, kept programs."""

import json
import random
import re
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import optax
import pytest
from support import forked
from support.configs import optim, tiny_config
from support.processes import ROOT, USUAL, environment, run
from support.runs import arguments, lines, plain, start_and_send

from gpt2_jax.core.errors import UserError
from gpt2_jax.training import compile_cache, memory_estimate, out_of_memory, run_plan, skip_spikes
from gpt2_jax.training.optimizer import make_optimizer, make_schedule
from gpt2_jax.training.step import init_state, make_train_step
from gpt2_jax.training.watch import goodput, metrics_file, profiling, step_record
from gpt2_jax.training.watch.stragglers import judge

# --- spikes -----------------------------------------------------------------------------------


def same(have, want) -> bool:
  """Whether two trees have the same bits."""
  return all(
    np.asarray(a).tobytes() == np.asarray(b).tobytes()
    for a, b in zip(jax.tree.leaves(have), jax.tree.leaves(want), strict=True)
  )


def gradients(params, steps: int, seed: int = 0):
  """Random gradients of about the same norm."""
  rng = np.random.default_rng(seed)
  return [jax.tree.map(lambda p: np.float32(rng.normal(size=p.shape)), params) for _ in range(steps)]


PARAMS = {
  'ln_f': {'weight': np.ones(7, np.float32)},
  'wte': {'weight': np.random.default_rng(1).normal(size=(11, 7)).astype(np.float32)},
}


@pytest.mark.slow
def test_the_policy_changes_no_bit_where_nothing_is_skipped(tiny):
  """A whole training step, with clipping, decay and moments."""
  out = []
  for fields in ({}, dict(skip_zscore=100.0, skip_warmup=2)):
    config = optim(**fields)
    schedule = make_schedule(config, 10)
    tx = make_optimizer(config, schedule)
    step = jax.jit(
      make_train_step(tiny, tx, schedule, seed=0, ema_decay=0.5),
      donate_argnums=0,
      compiler_options=USUAL,
    )
    state, rng = init_state(tiny, tx, 0, ema=True), np.random.default_rng(0)
    for _ in range(6):
      state, values = step(state, rng.integers(0, 97, (2, 2, 9)).astype(np.int32))
    out.append((state, {k: v for k, v in values.items() if 'z' not in k and 'skipped' not in k}))
  (off, off_values), (on, on_values) = out
  assert isinstance(on.opt_state, skip_spikes.SpikeState) and int(on.opt_state.count) == 6
  assert not isinstance(off.opt_state, skip_spikes.SpikeState)
  assert same((off.params, off.ema, off.opt_state), (on.params, on.ema, on.opt_state.inner))
  assert same(off_values, on_values)


@pytest.mark.parametrize('bad', [30.0, np.inf, np.nan])
def test_a_spike_leaves_parameters_and_moments_as_if_it_had_not_been(bad):
  """With a constant rate, the run with the spike has the bits of the run without it."""
  tx = make_optimizer(
    optim(skip_zscore=6.0, skip_warmup=10, schedule='constant'), optax.constant_schedule(1e-2)
  )
  update = jax.jit(
    lambda g, state, params: (lambda u, s: (optax.apply_updates(params, u), s))(
      *tx.update(g, state, params)
    )
  )
  usual = gradients(PARAMS, 20)
  spike = jax.tree.map(lambda g: bad * g, usual[15])
  negative_zero = jax.tree.map(lambda p: p * np.float32(-0.0), PARAMS)

  def go(grads):
    params, state = PARAMS, tx.init(PARAMS)
    for g in grads:
      params, state = update(g, state, params)
    return params, state

  params, state = go([*usual[:15], spike])
  assert int(state.in_a_row) == 1 and float(skip_spikes.metrics(state)['train/skipped']) == 1
  assert not float(state.zscore) < 6
  want, at = go(usual[:15])
  assert int(at.in_a_row) == 0
  assert same(params, want)
  moments = lambda s: [optax.tree.get(s.inner, name) for name in ('mu', 'nu')]
  assert same(moments(state), moments(at))
  assert same((state.count, state.mean, state.variance), (at.count, at.mean, at.variance))
  assert same(update(spike, at, negative_zero)[0], negative_zero)  # -0.0 too stays as it is
  # and goes on as if it had not been
  have, want = go([*usual[:15], spike, *usual[15:]]), go(usual)
  assert same(have[0], want[0]) and same(moments(have[1]), moments(want[1]))


def test_a_skipped_step_is_consumed_by_the_schedule():
  """The rate that is applied stays that of the step, which is what the record says."""
  schedule = optax.linear_schedule(1.0, 0.0, 10)
  config = optim(skip_zscore=6.0, skip_warmup=2, weight_decay=0.0, clip_norm=0.0)
  tx = make_optimizer(config, schedule)
  params, state = PARAMS, tx.init(PARAMS)
  nan = jax.tree.map(lambda p: np.full_like(p, np.nan), PARAMS)
  for _ in range(4):
    _, state = tx.update(nan, state, params)
  assert int(state.in_a_row) == 4
  updates, state = tx.update(gradients(params, 1)[0], state, params)
  # Adam's first step moves every weight by the rate: its bias correction has not counted the others
  np.testing.assert_allclose(np.abs(updates['wte']['weight']), schedule(4), rtol=1e-4)
  assert int(state.in_a_row) == 0


def test_the_running_mean_and_variance_are_those_of_the_norms():
  tx = skip_spikes.skip_spikes(optax.identity(), 50.0, 2)
  norms, state = np.exp(np.random.default_rng(0).normal(size=400)), tx.init(np.zeros(1))
  for i, norm in enumerate(norms, 1):
    _, state = tx.update(np.array([norm], np.float32), state)
    if i <= skip_spikes.WINDOW:
      x = np.log(norms[:i])
      np.testing.assert_allclose(
        [state.mean, state.variance], [x.mean(), x.var()], rtol=1e-3, atol=1e-6
      )
  assert abs(float(state.mean)) < 0.4 and 0.6 < float(state.variance) < 1.5  # of N(0, 1)


def test_small_norms_and_small_changes_are_no_spikes():
  tx = skip_spikes.skip_spikes(optax.identity(), 6.0, 5)
  state = tx.init(np.zeros(1))
  for norm in (*[1.0] * 20, 1e-6, 1.05, 1.0):
    _, state = tx.update(np.array([norm], np.float32), state)
    assert int(state.in_a_row) == 0, norm


def test_a_policy_without_sense_is_refused():
  for fields in (dict(skip_zscore=-1.0), dict(skip_zscore=6.0, skip_warmup=0)):
    with pytest.raises(UserError, match='skip_zscore'):
      run_plan.make_plan(tiny_config(**{f'optim__{k}': v for k, v in fields.items()}))


# --- goodput ----------------------------------------------------------------------------------


def test_every_second_is_of_one_kind(monkeypatch):
  now = [0.0]
  monkeypatch.setattr(time, 'monotonic', lambda: now[0])
  wait = lambda seconds: now.__setitem__(0, now[0] + seconds)
  clock = goodput.Clock(began=-2.0)
  clock.before = goodput.seconds_before([], [], 0) | {'step': 10.0}
  wait(1)
  with clock('step'):
    wait(4)
    with clock('data'):
      wait(2)
    with clock('evaluate'), clock('profile'):
      wait(8)
    with pytest.raises(KeyError), clock('device'):
      wait(16)
      raise KeyError
  assert clock.now()['device'] == 16
  totals = clock.totals()
  assert {k: v for k, v in totals.items() if v} == dict(step=30, data=2, profile=8, start=3)
  assert tuple(totals) == goodput.KINDS
  assert goodput.goodput(totals) == 30 / 43 and clock.line()['time/profile'] == 8


def test_what_was_done_twice_is_lost_once():
  line = lambda step: {
    'step': step,
    'perf/step_seconds': 3.0,
    'perf/data_wait_seconds': 1.0,
    'time/start': 5.0,
    'time/step': 2.0 * step,
    'time/data': 1.0 * step,
  }
  record = [line(step) for step in range(1, 6)]
  first = {'step': 0, 'seconds': {'start': 4.0}}
  want = {**dict.fromkeys(goodput.KINDS, 0.0), 'start': 5, 'step': 4, 'data': 2, 'lost': 9}
  assert goodput.seconds_before(record, [first], 2) == want
  # a start that was killed before it wrote a line, whether it had dropped those behind 2 or not
  second = {'step': 2, 'seconds': want | {'start': 9.0}}
  for left in (record, record[:2]):
    assert goodput.seconds_before(left, [first, second], 2) == want | {'start': 9.0}
  # an end in order, whose last checkpoint was deleted
  ended = {'step': 5, 'seconds': {'start': 5, 'step': 10, 'data': 5, 'evaluate': 1}}
  assert goodput.seconds_before(record, [ended], 2) == want | {'evaluate': 1}
  assert sum(goodput.seconds_before([], [], 0).values()) == 0


@pytest.fixture(scope='module')
def watched(text_folder, tmp_path_factory):
  """A run that was killed at step 8, behind its checkpoint of step 5, and went on; with a trace and
  the policy on: (its record when it was killed, workdir, what it printed, its seconds).
  """
  workdir = tmp_path_factory.mktemp('watched') / 'run'
  extra = dict(profile__steps='(10,13)', optim__skip_zscore=50.0, optim__skip_warmup=3)
  command = arguments(text_folder, workdir, **extra)
  assert start_and_send(signal.SIGKILL, 8, command, workdir) == -signal.SIGKILL
  killed = lines(workdir)
  timed = (
    f'import runpy, sys, time; sys.argv, began = {command!r}, time.monotonic()\n'
    'try:\n  runpy.run_path("launch.py", run_name="__main__")\n'
    'finally:\n  print("seconds", time.monotonic() - began)'
  )
  result = run('-c', timed)
  assert result.returncode == 0, result.stderr
  return killed, workdir, result.stdout, float(result.stdout.split()[-1])


@pytest.mark.slow
def test_lost_is_what_the_killed_steps_took(watched):
  killed, workdir, printed, _ = watched
  found = re.search(r'resumed from step (\d+)', printed)
  start = int(found[1]) if found else 0  # killed before its checkpoint was whole
  lost = sum(line['perf/step_seconds'] for line in killed if line['step'] > start)
  record = lines(workdir)
  assert lost > 0 and record[-1]['time/lost'] == pytest.approx(lost, abs=2e-3)
  after = [line for line in record if line['step'] > start]
  assert all(line['time/lost'] == record[-1]['time/lost'] for line in after)
  # what counts is what the lines that stand there took
  counted = sum(line['perf/step_seconds'] for line in record)
  steps = record[-1]['time/step'] + record[-1]['time/data']
  assert counted == pytest.approx(steps, rel=0.02)
  assert all(0 < line['perf/goodput'] < 1 for line in record)


@pytest.mark.slow
def test_the_kinds_add_up_to_the_time_of_the_run(watched):
  _, workdir, printed, seconds = watched
  first, second = json.loads((workdir / 'env.json').read_text())['starts']
  assert first['step'] == 0 and second['step'] == 24
  times = lambda line: {k: v for k, v in line.items() if k.startswith('time/')}
  killed = sum(times(watched[0][-1]).values())
  assert sum(second['seconds'].values()) - killed == pytest.approx(seconds, rel=0.03)
  for kind in ('step', 'compile', 'evaluate', 'start', 'lost'):
    assert second['seconds'][kind] > 0
    assert re.search(rf'^{kind} +[\d.]+ s +[\d.]+%$', printed, re.M) or second['seconds'][kind] < 0.05


# --- profiles ---------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.filterwarnings('ignore:builtin type:DeprecationWarning')  # an error aborts jaxlib 0.12
def test_a_trace_holds_the_steps_of_its_window(watched):
  _, workdir, printed, _ = watched
  (path,) = (workdir / 'profile').rglob('*.xplane.pb')
  assert path.parent.parent == workdir / 'profile' / 'plugins' / 'profile'  # where TensorBoard looks
  profile = jax.profiler.ProfileData.from_file(str(path))
  found = [
    dict(event.stats)['step_num']
    for plane in profile.planes
    for line in plane.lines
    for event in line.events
    if event.name == 'train'
  ]
  assert sorted(found) == [10, 11, 12]
  assert f'tensorboard --logdir {workdir / "profile"}' in printed


def test_a_trace_that_began_ends(tmp_path):
  said = []
  make = lambda steps: profiling.Profile(steps, tmp_path, goodput.Clock(), said.append)
  with pytest.raises(KeyError), make((2, 5)) as profile:
    profile.before(3, None)  # a run that goes on within the window
    raise KeyError
  assert len(said) == 1 and list((tmp_path / 'profile').rglob('*.xplane.pb'))
  with make((0, 0)) as profile:
    profile.before(1, None)
  assert len(said) == 1
  for steps in ((3, 3), (0, 3), (5, 2), (1, 2, 3), (1.5, 2), (-1, 3)):
    with pytest.raises(UserError, match='is no window'):
      make(steps)


# --- stragglers -------------------------------------------------------------------------------


def test_the_straggler_is_the_host_that_is_busy_not_the_one_that_waits():
  hosts = np.array([0.20, 0.21, 0.19, 0.50])
  text = judge(hosts, ['a', 'b', 'c', 'd'], 1.2)
  assert text == 'slowest host 3 (d): 0.5 s a step on its own, median 0.205 s'
  assert not judge(np.array([0.20, 0.21, 0.20, 0.21]), list('abcd'), 1.2)
  assert not judge(np.array([0.002, 0.004]), ['a', 'b'], 1.2)  # twice as slow, and hidden


@pytest.mark.slow
def test_a_host_with_slow_data_is_named(text_folder, tmp_path):
  """Two processes on a mesh across both, of which the second takes its time to read its rows."""
  command = arguments(
    text_folder,
    tmp_path / 'run',
    train__micro_batch_rows=1,
    train__steps=12,
    log__straggler_every=4,
    evaluate__every=100,
    checkpoint__every=100,
  )
  code = f"""
import os, runpy, sys, time
from gpt2_jax.data.token_batches import TokenBatches
rows = TokenBatches.rows
def slow(self, step, numbers):
  time.sleep(0.4 * len(numbers) * int(os.environ['OMPI_COMM_WORLD_RANK']))
  return rows(self, step, numbers)
TokenBatches.rows = slow
sys.argv = {command!r}
runpy.run_path('launch.py', run_name='__main__')"""
  job = random.randrange(1, 4000) << 16
  processes = [
    forked.Popen(
      [sys.executable, '-c', code],
      cwd=ROOT,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
      env=environment(
        2,
        OMPI_COMM_WORLD_SIZE='2',
        OMPI_COMM_WORLD_RANK=str(i),
        OMPI_COMM_WORLD_LOCAL_RANK=str(i),
        OMPI_MCA_orte_hnp_uri=f'{job}.0;tcp://127.0.0.1:34911',
      ),
    )
    for i in range(2)
  ]
  outputs = [process.communicate(timeout=300) for process in processes]
  assert [process.returncode for process in processes] == [0, 0], outputs
  assert re.search(r'step 8: slowest host 1 \(\S+\): [\d.]+ s a step on its own', outputs[0][0])
  record = lines(tmp_path / 'run')
  assert [line['step'] for line in record if 'perf/host_seconds_max' in line] == [4, 8, 12]
  slowest, both = record[7]['perf/host_seconds_max'], 2 * record[7]['perf/host_seconds_median']
  # the other's wait for it, within the collectives, is not the other's own
  assert slowest > 0.3 and both - slowest < 0.1 * slowest


# --- out of memory ----------------------------------------------------------------------------


def test_out_of_memory_says_what_each_knob_would_give(tmp_path):
  made = run_plan.make_plan(tiny_config(mesh__fsdp=8))
  with pytest.raises(UserError) as e, run_plan.out_of_memory_advice(made, tmp_path):
    raise jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes')
  text = str(e.value)
  rows = dict(re.findall(r'^  (\S.*?) +([\d.]+ +[\d.]+ +[\d.]+ +[\d.]+)$', text, re.M))
  assert list(rows) == [
    'as it is',
    '--config.train.micro_batch_rows=1',
    '--config.model.remat=dots',
    '--config.model.remat=full',
    '--config.mesh.fsdp=16',
  ]
  assert 'micro-batches of 16 rows x 32 tokens' in text and 'Three knobs' in text
  assert f'pprof -top {tmp_path / out_of_memory.PROFILE}' in text
  assert (tmp_path / out_of_memory.PROFILE).read_bytes()[:2] == b'\x1f\x8b'  # gzip, as pprof reads it


def test_the_parts_of_the_estimate_do_what_the_knobs_promise():
  made = run_plan.make_plan(tiny_config(mesh__fsdp=8))
  parts = lambda rows=16, remat='none': memory_estimate.estimate_parts(
    run_plan.dataclasses.replace(made.model, remat=remat), made.mesh, 32, rows, made.config.optim
  )
  whole, half = parts(), parts(8)
  assert half['state'] == whole['state'] and 2 * half['activations'] == whole['activations']
  assert half['logits'] < whole['logits']
  full, dots, none = (parts(remat=remat)['activations'] for remat in ('full', 'dots', 'none'))
  assert full < dots < none
  assert memory_estimate.estimate_bytes(made.model, made.mesh, 32, 16, made.config.optim) == int(
    sum(whole.values())
  )


def test_a_profile_that_cannot_be_written_hides_no_error(tmp_path):
  made = run_plan.make_plan(tiny_config(mesh__fsdp=8))
  with pytest.raises(UserError, match='(?s)Three knobs.*No memory profile'):
    with run_plan.out_of_memory_advice(made, tmp_path / 'nowhere'):
      raise jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: Out of memory')
  with pytest.raises(jax.errors.JaxRuntimeError), run_plan.out_of_memory_advice(made, tmp_path):
    raise jax.errors.JaxRuntimeError('INTERNAL: something else')
  assert not list(tmp_path.iterdir())


# --- kept programs ----------------------------------------------------------------------------


def test_compiled_programs_are_kept_beside_the_runs(tmp_path, monkeypatch):
  monkeypatch.setattr(jax.config, 'update', lambda name, value: said.append((name, value)))
  said = []
  assert (
    compile_cache.keep_compiled(tmp_path / 'runs' / 'a') == '' and not said
  )  # it is set, by conftest
  before = jax.config.jax_compilation_cache_dir
  monkeypatch.undo()
  try:
    jax.config.update('jax_compilation_cache_dir', None)
    (tmp_path / 'file').write_text('')
    assert 'are not kept' in compile_cache.keep_compiled(tmp_path / 'file' / 'run')
    assert jax.config.jax_compilation_cache_dir is None
    assert compile_cache.keep_compiled(tmp_path / 'runs' / 'a') == ''
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / 'runs' / '.jax_cache')
  finally:
    jax.config.update('jax_compilation_cache_dir', before)


# --- the line of a step -----------------------------------------------------------------------


def test_spikes_that_do_not_end_stop_the_run(tmp_path):
  class Around:  # a loader and checkpoints
    documents = lambda self, step: [['train-00000:7']]
    wait = latest_step = lambda self: 3

  said = []
  made = run_plan.make_plan(tiny_config(mesh__fsdp=8))
  made_recorder = step_record.Recorder(
    made, goodput.Clock(), tmp_path, Around(), Around(), said.append
  )
  step = lambda n: {
    'train/loss': np.nan,
    'train/grad_norm': np.nan,
    'train/learning_rate': 0.1,
    'train/grad_norm_zscore': np.nan,
    'train/skipped': 1,
    'train/skipped_in_a_row': n,
  }
  line = made_recorder.line(1, step(skip_spikes.LIMIT - 1))
  assert line['train/skipped'] == 1 and 'step 1: skipped' in said[0]
  assert 'train/skipped_in_a_row' not in line
  writer = metrics_file.MetricsWriter(tmp_path, 0)
  writer.write(line)
  writer.close()
  text, refuse = (tmp_path / metrics_file.FILE).read_text(), lambda constant: pytest.fail(constant)
  assert json.loads(text, parse_constant=refuse)['train/loss'] is None  # JSON has no NaN
  with pytest.raises(UserError, match='(?s)as were the 9 steps before.*train-00000:7.*of step 3'):
    made_recorder.line(2, step(skip_spikes.LIMIT))
  with pytest.raises(UserError, match='loss nan'):
    made_recorder.line(2, {'train/loss': np.nan, 'train/grad_norm': 1.0})


def test_tensorboard_brings_no_torch_along(tmp_path):
  """Where there is a torch, importing it takes seconds; it can be imported later."""
  (tmp_path / 'torch.py').write_text('class Tensor:\n  pass\n')
  result = run(
    '-c',
    f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
from pathlib import Path
from gpt2_jax.training.trackers import feeds, protocol
told = feeds.Trackers('tensorboard', protocol.Start(Path({str(tmp_path)!r}), {{}}, 0), list, print)
told.put({{'step': 1, 'train/loss': 2.0}})
told.end('finished')
assert 'torch' not in sys.modules
import torch
assert torch.Tensor""",
  )
  assert result.returncode == 0, result.stderr
  assert list((tmp_path / 'tensorboard').glob('events.*'))


@pytest.mark.slow
def test_the_policy_can_be_turned_on_and_off_between_starts(text_folder, tmp_path):
  """On: moments and all go on, and the averages begin. Off again: as if it had never been on."""

  def go(name, steps, **extra):
    result = run(
      *arguments(
        text_folder,
        tmp_path / name,
        train__steps=steps,
        log__sample_tokens=1,
        evaluate__every=100,
        optim__decay_steps=24,
        **extra,
      ),
      XLA_FLAGS='--xla_backend_optimization_level=0',  # bits that two programs share, as by USUAL
    )
    assert result.returncode == 0, result.stderr
    return lines(tmp_path / name)

  go('turned', 4)
  go('turned', 8, optim__skip_zscore=90.0)
  have, want = go('turned', 12), go('never', 12)
  assert [line['step'] for line in have if 'train/skipped' in line] == [5, 6, 7, 8]
  keys = ('train/loss', 'train/grad_norm', 'train/param_norm', 'train/learning_rate')
  assert [[line[key] for key in keys] for line in have] == [
    [line[key] for key in keys] for line in want
  ]


@pytest.mark.slow
def test_resume_with_the_policy_is_bitwise(watched):
  """The averages are part of the checkpoint: the killed run judges as one that was never killed."""
  killed, workdir, _, _ = watched
  keys = ('train/loss', 'train/grad_norm_zscore', 'train/skipped')
  have = {line['step']: [line[key] for key in keys] for line in lines(workdir)}
  assert have.keys() == set(range(1, 25))
  for line in killed:
    assert have[line['step']] == [line[key] for key in keys]
  assert any(have[step][1] for step in have) and plain(workdir)[-1]['eval/loss']

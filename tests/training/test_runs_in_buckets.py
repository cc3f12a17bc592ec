"""Runs in a bucket, of real processes that share no folder: as on a disk, whatever happens."""

import json
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest
from support import bucket, forked, runs
from support.processes import ROOT, environment, run
from support.runs import PLAIN, arguments

import gpt2_jax
from benchmarks import kills
from gpt2_jax.checkpoints import saved_steps
from gpt2_jax.checkpoints.workdir import find_step
from gpt2_jax.core import buckets
from gpt2_jax.core.errors import UserError
from gpt2_jax.training import lease, run_folder, workdir_lock

pytest.importorskip('gcsfs')


@pytest.fixture(scope='module')
def cloud(tmp_path_factory):
  with bucket.emulated(tmp_path_factory.mktemp('cloud')) as there:
    yield there


def plain(workdir: str) -> list[dict]:
  text = (buckets.place(workdir) / 'metrics.jsonl').read_text()
  return [
    {key: line[key] for key in ('step', *PLAIN) if key in line}
    for line in map(json.loads, text.splitlines())
  ]


# --- one at a time --------------------------------------------------------------------------------


def test_one_run_at_a_time_holds_a_workdir(cloud, monkeypatch, capfd):
  workdir = f'{cloud.url}/held'
  monkeypatch.setattr(lease, 'RENEW_S', 0.2)
  with (
    workdir_lock.held(workdir),
    pytest.raises(UserError, match=r'gs://bucket/held is held by a run that goes on \(process \d+'),
    workdir_lock.held(workdir),
  ):
    pass
  assert not (buckets.place(workdir) / lease.FILE).exists()


@pytest.mark.parametrize('age_s,host', [(0, 'same'), (1000, 'other')])
def test_the_lease_of_a_dead_run_is_taken_over(cloud, monkeypatch, age_s, host):
  """At once where its process is known to be gone; else when it has not been renewed for long."""
  workdir = f'{cloud.url}/dead-{host}'
  machine = lease.machine() if host == 'same' else 'other'
  said = {'host': 'localhost', 'machine': machine, 'pid': 2**22 + 1, 'since': 'then', 'id': 'x'}
  (buckets.place(workdir) / lease.FILE).write_text(json.dumps(said))
  monkeypatch.setattr(lease, 'STALE_S', lease.STALE_S - age_s)
  with workdir_lock.held(workdir) as held:
    assert held is not None and json.loads((buckets.place(workdir) / lease.FILE).read_text())['pid']
    held.check()


def test_a_run_whose_lease_was_taken_over_saves_nothing(cloud, monkeypatch):
  monkeypatch.setattr(lease, 'RENEW_S', 0.1)
  workdir = f'{cloud.url}/lost'
  with pytest.raises(UserError, match='taken over by another run.*process 7 on elsewhere'):
    with run_folder.opened(workdir) as folder:
      said = {'host': 'elsewhere', 'machine': '', 'pid': 7, 'since': 'now', 'id': 'y'}
      (folder.place / lease.FILE).write_text(json.dumps(said))
      (folder.record / 'metrics.jsonl').write_text('{"step": 1}\n')
      deadline = time.monotonic() + 20
      while time.monotonic() < deadline:
        folder.keep()
        time.sleep(0.05)
  assert json.loads((buckets.place(workdir) / lease.FILE).read_text())['pid'] == 7


def test_a_living_run_on_another_machine_of_the_same_name_is_left_alone(cloud, monkeypatch, capfd):
  """Its process is not to be seen here, and the clock of this machine is an hour ahead."""
  workdir = f'{cloud.url}/namesake'
  there = buckets.place(workdir) / lease.FILE
  name = lease.socket.gethostname()
  said = {'host': name, 'machine': 'another', 'pid': 2**22 + 1, 'since': 'now', 'id': 'z'}
  there.write_text(json.dumps(said))
  real = time.time
  monkeypatch.setattr(time, 'time', lambda: real() + 3600)
  renewing = threading.Timer(1, lambda: there.write_text(json.dumps(said)))
  renewing.start()
  with pytest.raises(UserError, match='held by a run that goes on'), workdir_lock.held(workdir):
    pass
  renewing.join()
  assert 'waiting to see whether that run goes on' in capfd.readouterr().err
  assert sorted(buckets.listing(buckets.place(workdir))) == [lease.FILE]


def test_the_record_is_copied_as_it_changes(cloud):
  with run_folder.opened(f'{cloud.url}/record') as folder:
    (folder.record / 'metrics.jsonl').write_text('a\n')
    (folder.record / 'old.json').write_text('{}')
    (folder.record / 'profile').mkdir()
    (folder.record / 'profile' / 'trace').write_text('t')
    folder.keep()
    (folder.record / 'old.json').unlink()
    with open(folder.record / 'metrics.jsonl', 'a') as file:
      file.write('b\n')
    folder.keep()
    asked = len(cloud.asked())
    folder.keep()
    assert len(cloud.asked()) == asked  # nothing has changed
  there = buckets.listing(buckets.place(f'{cloud.url}/record'))
  assert sorted(there) == ['metrics.jsonl', 'profile/trace']
  with run_folder.opened(f'{cloud.url}/record') as folder:
    assert [path.name for path in folder.record.iterdir()] == ['metrics.jsonl']
    assert (folder.record / 'metrics.jsonl').read_text() == 'a\nb\n'


@pytest.mark.parametrize(
  'workdir,says',
  [
    ('s3://bucket/x', 'Orbax keeps checkpoints on disks and in gs://'),
    ('gs://bucket', 'a whole bucket'),
  ],
)
def test_a_place_where_no_run_can_lie_is_refused(workdir, says):
  with pytest.raises(UserError, match=says):
    run_folder.checked(workdir)


# --- whole runs -----------------------------------------------------------------------------------


def start(cloud, n: int, command: list[str], homes) -> list[subprocess.Popen]:
  """Starts n processes, each with a home, a cache and data of its own."""
  with bucket.socket.socket() as free:
    free.bind(('127.0.0.1', 0))
    port = free.getsockname()[1]
  processes = []
  for i in range(n):
    home = homes / f'home-{i}'
    home.mkdir(parents=True, exist_ok=True)
    flags = [f'--coordinator=127.0.0.1:{port}', f'--num_processes={n}', f'--process_id={i}']
    own = [f'--config.data.store={home / "store"}']
    extra = cloud.env | {'HOME': str(home), 'XDG_CACHE_HOME': str(home / 'cache')}
    processes.append(
      forked.Popen(
        [sys.executable, *command, *own, *(flags if n > 1 else [])],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(4 // n, **extra),
      )
    )
  return processes


def finish(processes) -> list[tuple[int, str, str]]:
  try:
    return [(p.returncode, *said) for p in processes for said in [p.communicate(timeout=300)]]
  finally:
    for process in processes:
      process.kill()


def committed(workdir: str) -> list[int]:
  names = buckets.listing(buckets.place(workdir) / 'checkpoints')
  ends = '/commit_success.txt'
  return sorted(
    int(name[: -len(ends)]) for name in names if name.endswith(ends) and name.count('/') == 1
  )


@pytest.mark.slow
@pytest.mark.parametrize('n,victims,m', [(2, [0, 1], 4), (4, [1], 1)])
def test_processes_without_a_common_folder(cloud, finished, text_folder, tmp_path, n, victims, m):
  """Trained by n, killed (one, or all), gone on with by m elsewhere: each step once, as on a disk."""
  workdir = f'{cloud.url}/several-{n}-{m}'
  command = arguments(text_folder, workdir, train__micro_batch_rows=1)
  processes = start(cloud, n, command, tmp_path)
  deadline = time.monotonic() + 200
  while not committed(workdir):
    assert time.monotonic() < deadline and all(p.poll() is None for p in processes), finish(processes)
    time.sleep(0.05)
  for victim in victims:
    processes[victim].send_signal(signal.SIGKILL)
  assert all(status != 0 for status, _, _ in finish(processes))
  shutil.rmtree(tmp_path / 'home-0')  # another machine goes on
  last = committed(workdir)[-1]
  results = finish(start(cloud, m, command, tmp_path))
  for status, _, errors in results:
    assert status == 0, errors
  assert f'resumed from step {last} ' in results[0][1]
  assert [line['step'] for line in plain(workdir)] == list(range(1, len(plain(workdir)) + 1))
  for have, want in zip(plain(workdir), runs.plain(finished[0]), strict=True):
    assert have == pytest.approx(want, rel=2e-5)


@pytest.mark.slow
def test_a_run_in_a_bucket_is_that_on_a_disk(cloud, finished, text_folder, tmp_path):
  """To the last bit, with a bucket that answers late, fails now and then, and is gone for a while."""
  workdir = f'{cloud.url}/faulty'
  command = arguments(text_folder, workdir, data__store=text_folder.parent / 'store')
  cloud.faults(latency_s=0.02, failing=0.02)
  processes = [
    forked.Popen(
      [sys.executable, *command],
      cwd=ROOT,
      text=True,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      env=environment(**cloud.env),
    )
  ]
  deadline = time.monotonic() + 200
  while not committed(workdir):
    assert time.monotonic() < deadline and processes[0].poll() is None, finish(processes)
    time.sleep(0.1)
  cloud.stop()
  threading.Timer(120, cloud.start).start()
  ((status, printed, errors),) = finish(processes)
  cloud.faults()
  assert status == 0, errors
  assert "can't be reached" in errors and 'the bucket is there again' in errors
  assert 'record     gs://bucket/faulty/metrics.jsonl' in printed
  whole = [
    {key: line[key] for key in have} for have, line in zip(plain(workdir), kills.plain(finished[0]))
  ]
  assert plain(workdir) == whole and len(whole) == 24

  # what can be done with it from elsewhere
  place = buckets.place(workdir)
  assert saved_steps.kept_steps(place) == committed(workdir) and find_step(place, 'latest') == 24
  ours, theirs = gpt2_jax.from_pretrained(workdir), gpt2_jax.from_pretrained(finished[0])
  assert ours.tokenizer.sha256 == theirs.tokenizer.sha256
  for verb in (
    ['convert', workdir, f'{cloud.url}/hf', '--to', 'hf'],
    ['sample', '--checkpoint', f'{cloud.url}/hf', '--prompt', 'a', '--max-new-tokens', '3'],
    ['sample', '--checkpoint', f'{workdir}@20', '--prompt', 'a', '--max-new-tokens', '3'],
  ):
    done = run('-m', 'gpt2_jax', *verb, **cloud.env)
    assert done.returncode == 0, done.stderr
  again = run(*command, **cloud.env)
  assert again.returncode == 0 and f'{workdir}: step 24 of 24 is done already' in again.stdout


@pytest.mark.slow
def test_compiled_programs_lie_beside_a_run_in_a_bucket(cloud, text_folder, tmp_path):
  """Where no variable of the environment names another place; and nothing is left on this disk."""
  command = arguments(
    text_folder, f'{cloud.url}/cached/run', data__store=tmp_path / 'store', train__steps=2
  )
  command[0] = str(ROOT / 'launch.py')
  command[1] = f'--config={ROOT / "configs" / "tiny.py"}'
  here = tmp_path / 'here'
  here.mkdir()
  env = environment(**cloud.env)
  del env['JAX_COMPILATION_CACHE_DIR']
  for name in ('run', 'other'):
    command[2] = f'--workdir={cloud.url}/cached/{name}'
    done = subprocess.run(
      [sys.executable, *command], cwd=here, env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert ('from the cache' in done.stdout) == (name == 'other')
  assert any(
    name.startswith('.jax_cache/') for name in buckets.listing(buckets.place(f'{cloud.url}/cached'))
  )
  assert not list(here.iterdir())


@pytest.mark.slow
def test_kills_at_random_moments_lose_nothing_in_a_bucket(cloud, tmp_path, monkeypatch, capsys):
  """benchmarks/kills.py with fewer kills."""
  monkeypatch.setattr(subprocess, 'Popen', forked.Popen)
  argv = [
    'kills',
    '--kills=3',
    '--steps=120',
    f'--folder={tmp_path / "kills"}',
    f'--workdir={cloud.url}/kills/run',
  ]
  monkeypatch.setattr(sys, 'argv', argv)
  for name in ('XLA_FLAGS', 'PYTHONPATH'):
    monkeypatch.setenv(name, environment()[name])
  status, printed = kills.main(), capsys.readouterr().out
  assert status == 0, printed
  assert '3 kills' in printed and 'nothing was lost' in printed

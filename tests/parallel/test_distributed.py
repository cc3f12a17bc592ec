"""Several real processes on one machine: the same run, the same checkpoints, the same end."""

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support import forked
from support.processes import ROOT, environment, run
from support.runs import arguments, lines, plain

from gpt2_jax.core.errors import UserError
from gpt2_jax.parallel import multihost


def start(
  n: int,
  command: list[str],
  devices: int = 1,
  mpi: bool = False,
  more: dict[int, list[str]] | None = None,
) -> list[subprocess.Popen]:
  """Starts n processes of a run, by launch.py's flags or as Open MPI would.

  `more`: process -> arguments that it alone is given.
  """
  with socket.socket() as free:
    free.bind(('127.0.0.1', 0))
    port = free.getsockname()[1]
  job, processes = random.randrange(1, 4000) << 16, []
  for i in range(n):
    flags, extra = [], {}
    if mpi:
      extra = {
        'OMPI_COMM_WORLD_SIZE': str(n),
        'OMPI_COMM_WORLD_RANK': str(i),
        'OMPI_COMM_WORLD_LOCAL_RANK': str(i),
        'OMPI_MCA_orte_hnp_uri': f'{job}.0;tcp://127.0.0.1:34911',
      }
    else:
      flags = [f'--coordinator=127.0.0.1:{port}', f'--num_processes={n}', f'--process_id={i}']
    processes.append(
      forked.Popen(
        [sys.executable, *command, *flags, *(more or {}).get(i, [])],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(devices, **extra),
      )
    )
  return processes


def finish(processes: list[subprocess.Popen], timeout: float = 300) -> list[tuple[int, str, str]]:
  """(exit status, stdout, stderr) of each; none is left behind."""
  try:
    return [
      (process.returncode, *output)
      for process in processes
      for output in [process.communicate(timeout=timeout)]
    ]
  finally:
    for process in processes:
      process.kill()


def train(n: int, command: list[str], **how) -> str:
  """Runs n processes to their end; what process 0 printed."""
  results = finish(start(n, command, **how))
  for status, _, errors in results:
    assert status == 0, errors
    assert 'Involuntary' not in errors
  return results[0][1]


def committed(workdir: Path) -> list[int]:
  folder = workdir / 'checkpoints'
  return sorted(int(p.name) for p in folder.iterdir() if p.name.isdecimal())


WORKER = """
import json, sys
import jax, numpy as np
from pathlib import Path
from gpt2_jax.checkpoints import orbax_store
from gpt2_jax.data import token_batches, token_store
from gpt2_jax.parallel import multihost, sharding
from jax.sharding import NamedSharding, PartitionSpec as P
folder, *flags = sys.argv[1:]
address, n, i = (flag.split('=')[1] for flag in flags)
multihost.initialize('auto', address, int(n), int(i))
folder = Path(folder)

(folder / f'data{i}').mkdir()
np.arange(4000, dtype='<u2').tofile(folder / f'data{i}' / 'train.bin')
mesh = sharding.make_mesh(data=2, fsdp=-1, tensor=1)
split = token_store.open_store(folder / f'data{i}').splits['train']
read, own = [], token_batches.TokenBatches(split, 8, 8, 0, 4000)
rows = own.rows
own.rows = lambda step, numbers: read.extend((step, r) for r in numbers) or rows(step, numbers)
sums = [int(jax.jit(lambda x: x.sum(), out_shardings=NamedSharding(mesh, P()))(batch))
        for batch in own.batches(0, 20, 2, NamedSharding(mesh, P(None, sharding.BATCH)))]

with jax.set_mesh(mesh):
  array = jax.make_array_from_callback(
      (8, 4), NamedSharding(mesh, P(sharding.BATCH)), lambda at: np.ones((8, 4), np.float32)[at])
  checkpoints = orbax_store.Checkpoints(folder, keep=3)
  for step in (1, 2, 3):
    checkpoints.save(step, {'params': {'w': step * array}}, {})
  checkpoints.wait()
  if i == '0':
    path = next((folder / 'checkpoints' / '3' / 'params').rglob('d/*'))
    path.write_bytes(path.read_bytes()[:-1])
    (folder / 'checkpoints' / '2' / 'manifest.json').unlink()  # as of an older release
    path = folder / 'checkpoints' / '2' / 'meta' / 'metadata'
    path.write_text(json.dumps(json.loads(path.read_text()) | {'version': 1}))
  jax.experimental.multihost_utils.sync_global_devices('damaged')
  step = checkpoints.whole_step()
  restored = checkpoints.restore(step, {'params': {'w': array}})['params']['w']
  checkpoints.save(3, {'params': {'w': array}}, {})
  checkpoints.wait()
  value = float(np.asarray(restored.addressable_shards[0].data)[0, 0])
  print(json.dumps([sorted(read), sums, step, value, checkpoints.whole_step()]))
  checkpoints.close()
"""


@pytest.mark.slow
def test_two_processes_share_batches_and_agree_on_a_checkpoint(tmp_path):
  """Each row of a global batch is read by one of them; a damaged checkpoint is none for both."""
  results = finish(start(2, ['-c', WORKER, str(tmp_path)], devices=2), timeout=120)
  assert [status for status, *_ in results] == [0, 0], results[0][2] + results[1][2]
  found = [json.loads(printed.splitlines()[-1]) for _, printed, _ in results]
  rows = [[tuple(row) for row in each[0]] for each in found]
  assert sorted(rows[0] + rows[1]) == [(step, row) for step in range(20) for row in range(8)]
  assert len(rows[0]) == len(rows[1])
  assert found[0][1:] == found[1][1:]
  assert found[0][2:] == [2, 2.0, 3]
  assert 'checkpoint of step 3: params/' in results[0][2] and 'skipped and moved to' in results[0][2]
  assert sorted(p.name for p in (tmp_path / 'checkpoints').iterdir()) == ['1', '2', '3', 'damaged-3']


@pytest.mark.parametrize(
  'mode,given,says',
  [
    ('auto', ('host:1', 2, None), '--process_id is missing'),
    ('on', (None, 2, None), '--coordinator and --process_id is missing'),
    ('off', ('host:1', 2, 0), '--distributed=off contradicts --coordinator'),
    ('auto', ('host', 2, 0), 'must be HOST:PORT'),
    ('auto', ('host:1', 2, 2), 'one of 0 to 1'),
  ],
)
def test_flags_of_a_start_that_contradict_each_other(mode, given, says):
  with pytest.raises(UserError, match=says):
    multihost.initialize(mode, *given)


@pytest.mark.parametrize(
  'env,cause',
  [
    ({}, None),
    ({'SLURM_NTASKS': '1'}, None),
    ({'SLURM_NTASKS': '4'}, 'SLURM_NTASKS'),
    ({'OMPI_COMM_WORLD_SIZE': '2'}, 'OMPI_COMM_WORLD_SIZE'),
    ({'MEGASCALE_NUM_SLICES': '1'}, None),
    ({'MEGASCALE_NUM_SLICES': '2'}, 'MEGASCALE_NUM_SLICES'),
    ({'TPU_WORKER_HOSTNAMES': 'a'}, None),
    ({'TPU_WORKER_HOSTNAMES': 'a,b'}, 'TPU_WORKER_HOSTNAMES'),
    ({'TPU_WORKER_HOSTNAMES': 'WARNING: none, set it'}, None),
    ({'KUBERNETES_SERVICE_HOST': 'k'}, None),
    ({'KUBERNETES_SERVICE_HOST': 'k', 'JOB_COMPLETION_INDEX': '0'}, 'Kubernetes'),
    ({'JAX_COORDINATOR_ADDRESS': 'a:1'}, 'JAX_COORDINATOR_ADDRESS'),
  ],
)
def test_a_cluster_is_found_and_never_left_in_silence(monkeypatch, env, cause):
  """What shows a cluster leads to a start; one that fails is an error, not a run on one host."""

  def fail(*_, **__):
    raise RuntimeError('no answer')

  for name in list(os.environ):
    if name.startswith(('SLURM_', 'OMPI_', 'TPU_', 'MEGASCALE_', 'KUBERNETES_', 'JAX_COORD')):
      monkeypatch.delenv(name)
  for name, value in env.items():
    monkeypatch.setenv(name, value)
  monkeypatch.setattr(multihost.jax.distributed, 'initialize', fail)
  if cause is None:
    multihost.initialize('auto')
  else:
    with pytest.raises(UserError, match=f'could not be joined .*{cause}.*no answer.*=off'):
      multihost.initialize('auto')
    multihost.initialize('off')


def test_a_coordinator_that_cannot_listen_is_an_error(text_folder, tmp_path):
  with socket.socket(socket.AF_INET6) as taken:
    taken.bind(('::', 0))
    taken.listen()
    result = run(
      *arguments(text_folder, tmp_path),
      '--num_processes=2',
      '--process_id=0',
      f'--coordinator=127.0.0.1:{taken.getsockname()[1]}',
    )
  assert result.returncode == 1, result.stderr
  assert 'could not be joined (--coordinator): [Errno 98]' in result.stderr
  assert 'Traceback' not in result.stderr


# --- whole runs ---------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def saved(text_folder, tmp_path_factory):
  """n -> the finished run of n processes, with two devices each for n = 2."""
  runs = {}

  def of(n: int) -> Path:
    if n not in runs:
      runs[n] = tmp_path_factory.mktemp('runs') / f'by-{n}'
      command = arguments(text_folder, runs[n], train__micro_batch_rows=1)
      printed = train(n, command, devices=4 // n, mpi=True)
      assert f'process 0/{n} on {socket.gethostname()}: devices {4 // n}/4' in printed
    return runs[n]

  return of


@pytest.mark.slow
@pytest.mark.parametrize('n', [2, 4])
def test_processes_make_the_same_run(finished, saved, n):
  """Started as Open MPI would start them: found by --distributed=auto, on a mesh across all."""
  for have, want in zip(plain(saved(n)), plain(finished[0]), strict=True):
    assert have == pytest.approx(want, rel=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
  'n,m,mesh',
  [
    (2, 2, {}),
    (2, 4, {'mesh.tensor': 2}),
    (4, 4, {}),
    (4, 1, {'mesh.data': 2, 'mesh.tensor': 2}),
    (4, 2, {'mesh.data': 2}),
  ],
)
def test_a_run_goes_on_with_other_processes_and_meshes(
  finished, saved, text_folder, tmp_path, n, m, mesh
):
  """Saved by n, continued by m: bitwise with the same processes and mesh, else to rounding."""
  workdir = tmp_path / 'moved'
  shutil.copytree(saved(n), workdir)
  for step in committed(workdir):
    if step != 20:
      shutil.rmtree(workdir / 'checkpoints' / str(step))
  command = arguments(text_folder, workdir, train__micro_batch_rows=1, **mesh)
  printed = train(m, command, devices=4 // m)
  assert 'resumed from step 20' in printed
  if n == m and not mesh:
    assert plain(workdir) == plain(saved(n))
  for have, want in zip(plain(workdir), plain(finished[0]), strict=True):
    assert have == pytest.approx(want, rel=2e-5)


def until(condition, processes, seconds: float = 120) -> None:
  """Waits, at short intervals, until a condition holds."""
  deadline = time.monotonic() + seconds
  while not condition():
    assert time.monotonic() < deadline and all(p.poll() is None for p in processes), finish(processes)
    time.sleep(0.0005)


@pytest.mark.slow
@pytest.mark.parametrize('victim', [0, 1])
def test_a_process_killed_within_a_save(finished, text_folder, tmp_path, victim):
  """The other one ends by itself, with an error; the run goes on from the last whole checkpoint."""
  workdir = tmp_path / 'run'
  command = arguments(text_folder, workdir, train__micro_batch_rows=2)
  processes = start(2, command)
  folder = workdir / 'checkpoints'
  until(
    lambda: folder.exists() and committed(workdir) and list(folder.glob('*.orbax-checkpoint-tmp*')),
    processes,
  )
  processes[victim].kill()
  began = time.monotonic()
  results = finish(processes, timeout=3 * multihost.SILENCE_S)
  assert results[victim][0] == -signal.SIGKILL and results[1 - victim][0] != 0
  print(f'the other process ended after {time.monotonic() - began:.0f} s')
  last = committed(workdir)[-1]
  printed = train(2, command)
  assert f'resumed from step {last} ' in printed
  assert [p.name for p in folder.iterdir() if not p.name.isdecimal()] == []
  for have, want in zip(plain(workdir), plain(finished[0]), strict=True):
    assert have == pytest.approx(want, rel=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize('alone', [0, 1])
def test_an_error_of_one_process_ends_all(text_folder, tmp_path, alone):
  """Its message is the last thing that it says."""
  began = time.monotonic()
  results = finish(
    start(
      2,
      arguments(text_folder, tmp_path / 'run', train__micro_batch_rows=2),
      more={alone: ['--config.data.corpus=text:/nowhere']},
    ),
    timeout=3 * multihost.SILENCE_S,
  )
  assert results[alone][0] == 1 and results[1 - alone][0] != 0
  assert results[alone][2].splitlines()[-1].startswith('error: '), results[alone][2]
  print(f'both ended after {time.monotonic() - began:.0f} s')


@pytest.mark.slow
@pytest.mark.parametrize(
  'number,to,evaluating',
  [(signal.SIGTERM, 1, False), (signal.SIGINT, 0, False), (signal.SIGTERM, 0, True)],
)
def test_one_process_told_to_stop_stops_all(text_folder, tmp_path, number, to, evaluating):
  """At the same step, which is saved once, within training as within an evaluation."""
  workdir = tmp_path / 'run'
  more = {'train.steps': 2000, 'checkpoint.every': 2000, 'evaluate.every': 2000}
  if evaluating:  # an evaluation takes far longer than a notice
    more |= {
      'evaluate.every': 6,
      'evaluate.batch_rows': 2,
      'data.val_fraction': 0.5,
      'data.store': tmp_path / 'store',
      'data.sequence_length': 2,
      'train.global_batch_tokens': 16,
    }
  command = arguments(text_folder, workdir, train__micro_batch_rows=2, **more)
  processes, path = start(2, command), workdir / 'metrics.jsonl'
  count = 5 if evaluating else 8
  until(lambda: path.exists() and path.read_bytes().count(b'\n') >= count, processes)
  processes[to].send_signal(number)
  results = finish(processes, timeout=120)
  for status, _, errors in results:
    assert status == 128 + signal.SIGTERM, errors
    assert 'one of the processes was told to stop' in errors
  steps = [line['step'] for line in lines(workdir)]
  assert steps == list(range(1, steps[-1] + 1)) and committed(workdir) == [steps[-1]]
  if evaluating:
    assert steps[-1] == 6 and 'eval/loss' not in lines(workdir)[-1]
    return
  command = arguments(
    text_folder, workdir, train__micro_batch_rows=2, **more | {'train.steps': steps[-1] + 2}
  )
  assert f'resumed from step {steps[-1]} ' in train(2, command)
  assert len(lines(workdir)) == steps[-1] + 2


@pytest.mark.slow
def test_a_workdir_that_is_not_shared_is_refused(text_folder, tmp_path):
  command = arguments(text_folder, tmp_path / 'one', train__micro_batch_rows=4)
  processes = start(2, command, more={1: [f'--workdir={tmp_path / "other"}']})
  for status, _, errors in finish(processes):
    assert status == 1 and 'Traceback' not in errors
    assert 'is another folder on process 1 than on process 0' in errors
  assert not list(tmp_path.glob('*/checkpoints'))

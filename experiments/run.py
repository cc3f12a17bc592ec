"""Runs an experiment, and writes what came out into its README.

    python experiments/run.py NAME [--k K] [--dry] [--submitit CLUSTER [KEY=VALUE …]]

experiments/NAME/sweep.py says which runs there are. Each is a `launch.py` with a folder of its own in
runs/experiments, named by a hash of its overrides; experiments share runs that they have in common.
The same command again goes on where it was stopped: what is finished is not run again.
"""

import concurrent.futures
import dataclasses
import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import ModuleType
from typing import Annotated

ROOT = Path(__file__).resolve().parent.parent
if __name__ == '__main__':
  sys.path[0] = str(ROOT)  # as python -m experiments.run would

import tyro  # noqa: E402

from experiments import results, sweeps  # noqa: E402
from gpt2_jax.core import bounds  # noqa: E402
from gpt2_jax.core.errors import UserError  # noqa: E402
from gpt2_jax.core.progress import track  # noqa: E402
from gpt2_jax.training.watch import metrics_file, run_record  # noqa: E402

CONFIG = 'experiments/config.py'  # of a sweep that names no other
RUNS = ROOT / 'runs' / 'experiments'
LOG = 'log.txt'  # in a run's folder: what launch.py printed
POLL_S = 0.02


def load(name: str, folder: Path | None = None) -> ModuleType:
  """The sweep of an experiment: `sweep() -> points`, `report(runs, axes) -> Markdown`, and perhaps
  `CONFIG`, the config file.
  """
  folder = folder or ROOT / 'experiments'
  path = folder / name / 'sweep.py'
  if not path.is_file():
    known = sorted(found.parent.name for found in folder.glob('*/sweep.py'))
    raise UserError(f'experiment {name!r} is none of: {", ".join(known)}.')
  spec = importlib.util.spec_from_file_location(f'experiments.{name}.sweep', path)
  assert spec and spec.loader
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


@dataclasses.dataclass(frozen=True)
class Task:
  """One run of a sweep."""

  config: str
  point: sweeps.Point
  folder: Path

  @property
  def done(self) -> bool:
    return run_record.finished(self.folder)

  @property
  def command(self) -> list[str]:
    knobs = [f'--config.{key}={value}' for key, value in self.point.items() if key not in sweeps.HOW]
    return [
      sys.executable,
      'launch.py',
      f'--config={self.config}',
      f'--workdir={self.folder}',
      *knobs,
    ]

  def execute(self) -> int:
    """Runs it to its end; returns an exit status."""
    self.folder.mkdir(parents=True, exist_ok=True)
    run_record.write_json(self.folder / 'overrides.json', self.point | {'config': self.config})
    env = dict(os.environ)
    if devices := self.point.get('run.devices'):
      env['XLA_FLAGS'] = (
        f'{env.get("XLA_FLAGS", "")} --xla_force_host_platform_device_count={devices}'
      ).strip()
    status = 0
    for step in [*self.point.get('run.kill_at', ()), None]:
      if step is None or len(metrics_file.read(self.folder)) < step:
        with open(self.folder / LOG, 'a') as log:
          process = subprocess.Popen(self.command, cwd=ROOT, env=env, stdout=log, stderr=log)
          status = process.wait() if step is None else self._killed(process, step)
        if step is None or status != -signal.SIGKILL:
          break
    return status

  def _killed(self, process: subprocess.Popen, step: int) -> int:
    """Kills it once its record has so many lines."""
    path = self.folder / metrics_file.FILE
    while process.poll() is None:
      if path.exists() and path.read_bytes().count(b'\n') >= step:
        process.kill()
      time.sleep(POLL_S)
    return process.returncode

  def failure(self, status: int) -> str:
    text = (self.folder / LOG).read_text().strip().splitlines()
    shown = '\n  '.join(text[-6:])
    return f'{self.folder} (status {status}): {json.dumps(self.point)}\n  {shown}'


def tasks(sweep: ModuleType, runs: Path = RUNS) -> list[Task]:
  """The runs of a sweep.

  Raises:
    UserError: two of them are the same.
  """
  config = getattr(sweep, 'CONFIG', CONFIG)
  made = [Task(config, point, runs / sweeps.key(config, point)) for point in sweep.sweep()]
  if not made:
    raise UserError('the sweep has no points.')
  for i, task in enumerate(made):
    if task.folder in [other.folder for other in made[:i]]:
      raise UserError(f'the sweep has one point twice: {json.dumps(task.point)}.')
  return made


class Submitted:
  """Runs tasks as jobs of a cluster, through submitit."""

  def __init__(self, cluster: str, *parameters: str):
    """
    Args:
      cluster: slurm; local: a process each; debug: in this process.
      *parameters: KEY=VALUE of submitit's `update_parameters`, such as slurm_partition=gpu.
    """
    try:
      import submitit
    except ImportError as e:
      raise UserError('--submitit needs the package submitit: pip install "gpt2_jax[sweep]".') from e
    os.environ['PYTHONPATH'] = os.pathsep.join(
      [str(ROOT), *filter(None, [os.environ.get('PYTHONPATH')])]
    )  # jobs import this module
    known = {}
    for parameter in parameters:
      name, equals, value = parameter.partition('=')
      if not equals:
        raise UserError(f'--submitit: {parameter!r} is not KEY=VALUE.')
      known[name] = int(value) if value.isdecimal() else value
    try:
      self.executor = submitit.AutoExecutor(folder=RUNS / 'submitit', cluster=cluster)
      self.executor.update_parameters(**{'timeout_min': 24 * 60} | known)
    except (ValueError, NameError, RuntimeError) as e:
      raise UserError(f'--submitit {cluster} {" ".join(parameters)}: {e}') from e
    self._lock = threading.Lock()

  def __call__(self, task: Task) -> int:
    with self._lock:
      job = self.executor.submit(task.execute)
    return job.result()


def run_all(name: str, todo: list[Task], total: int, k: int, execute=Task.execute) -> list[str]:
  """Runs tasks, k at once; returns what is to be said of those that failed."""
  failures = []
  with (
    track(name, total, 'runs', done=total - len(todo)) as advance,
    concurrent.futures.ThreadPoolExecutor(k) as pool,
  ):
    futures = {pool.submit(execute, task): task for task in todo}
    try:
      for future in concurrent.futures.as_completed(futures):
        task, status = futures[future], future.result()
        if status or not task.done:
          failures.append(task.failure(status))
        advance(1, f'{task.folder.name} {"failed" if status else "done"}')
    except BaseException:
      pool.shutdown(wait=False, cancel_futures=True)  # those that run are told by the terminal
      raise
  return failures


@dataclasses.dataclass
class Run:
  """Runs an experiment, and writes what came out into its README."""

  name: tyro.conf.Positional[str]
  """Folder in experiments/."""
  k: int = 1
  """Runs at once."""
  dry: bool = False
  """Only say which runs there are, and which of them are done."""
  submitit: Annotated[tuple[str, ...], tyro.conf.arg(metavar='CLUSTER [KEY=VALUE …]')] = ()
  """Run them as jobs: slurm, local or debug, with parameters such as slurm_partition=gpu."""

  def run(self) -> None:
    bounds.check_flags({'name': bounds.Place(), 'k': bounds.Int(1, 1024)}, self)
    sweep = load(self.name)
    all_tasks = tasks(sweep)
    keys = sweeps.varied([task.point for task in all_tasks]) + [sweeps.SEED]
    todo = [task for task in all_tasks if not task.done]
    if self.dry:
      for task in all_tasks:
        shown = ' '.join(f'{key}={task.point[key]}' for key in keys if key in task.point)
        print(f'{task.folder.name}  {"done" if task.done else "to do"}  {shown}')
      print(f'{len(todo)} of {len(all_tasks)} to do')
      return
    execute = Submitted(*self.submitit) if self.submitit else Task.execute
    if failures := run_all(self.name, todo, len(all_tasks), self.k, execute):
      raise UserError(
        f'{len(failures)} of {len(all_tasks)} runs failed; the same command tries them '
        'again. The ends of their logs:\n' + '\n'.join(failures)
      )
    folder = ROOT / 'experiments' / self.name
    runs = [results.Run.read(task.point, task.folder) for task in all_tasks]
    results.write(folder, self.name, runs, sweep.report)
    print(f'{folder / "README.md"}: {len(all_tasks)} runs')


if __name__ == '__main__':
  try:
    tyro.cli(Run, prog='experiments/run.py').run()
  except UserError as e:
    sys.exit(f'error: {e}')
  except KeyboardInterrupt:
    sys.exit(130)

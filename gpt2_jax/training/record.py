"""What a run says about itself: which run it is, where and on what it ran."""

import contextlib
import dataclasses
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax

from gpt2_jax import determinism, hardware, tokenizer
from gpt2_jax.checkpoint import difference
from gpt2_jax.errors import UserError, saving
from gpt2_jax.files import misfit, read_json, whole_number, write_whole
from gpt2_jax.interop import mup
from gpt2_jax.interop.workdir import LABELS
from gpt2_jax.training.plan import Plan
from gpt2_jax.training.run_model import FREE

ENV = 'env.json'
ENVIRONMENT = ('XLA_FLAGS', 'JAX_PLATFORMS')  # variables that have a say in the numbers


def versions() -> dict[str, str]:
  """Of the packages that have a say in the numbers."""
  packages = ('gpt2_jax', 'jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'grain', 'numpy')
  return {name: importlib.metadata.version(name) for name in packages}


def commit() -> str | None:
  """Of the code that runs, with `-dirty` behind it where it was changed since."""
  try:
    found = subprocess.run(
      ['git', 'describe', '--always', '--dirty', '--abbrev=40', '--exclude=*'],
      cwd=Path(__file__).parent,
      capture_output=True,
      text=True,
      timeout=10,
    ).stdout.strip()
  except (OSError, subprocess.TimeoutExpired):
    return None
  return found or None


def environment(plan: Plan, data: Any) -> dict:
  return {
    'time': time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime()),
    'command': sys.argv,
    'python': platform.python_version(),
    'platform': platform.platform(),
    'versions': versions(),
    'git_commit': commit(),
    'processes': jax.process_count(),
    'processor': hardware.processor(),
    'devices': f'{plan.mesh.size} x {plan.mesh.devices.flat[0].device_kind}',
    'mesh': dict(plan.mesh.shape),
    'micro_batches': plan.A,
    'rows': plan.G,
    'row_tokens': plan.T,
    'data': {
      'corpus': plan.config.data.corpus,
      'tokens': len(data.splits['train']),
      'sha256': data.sha256,
      'licence': data.manifest['source']['licence'],
    },
    'determinism': determinism.describe() if plan.config.deterministic else {},
    'env': {k: os.environ[k] for k in ENVIRONMENT if k in os.environ},
  }


def identity(plan: Plan, data: Any) -> dict:
  """What must not change between two starts of a run, flat and as JSON gives it back."""
  free = FREE if plan.model.parametrization == 'mup' else (*FREE, *mup.FIELDS)  # older runs lack them
  model = {f'model.{k}': v for k, v in dataclasses.asdict(plan.model).items() if k not in free}
  rest = {'data.sha256': data.sha256, 'init_from': plan.config.init_from}
  return json.loads(json.dumps(model | rest))


def starts(workdir: Path) -> list[dict]:
  """What each start of a run left, the oldest first.

  Raises:
    UserError: it can't be read.
  """
  path = workdir / ENV
  return read_json(path, {'starts': [_is_start]})['starts'] if path.exists() else []


def _is_start(value: Any) -> bool:
  shape = {'step': whole_number, 'seconds': {str: (int, float)}}
  return isinstance(value, dict) and misfit({'step': 0, 'seconds': {}} | value, shape) is None


def set_aside(workdir: Path) -> list[str]:
  """Gives what can't be read of a run's record another name, so that the run goes on without it.

  Returns a line for each file.
  """
  said = []
  for name, read in (
    ('config.json', lambda: read_json(workdir / 'config.json')),
    (ENV, lambda: starts(workdir)),
  ):
    if not (workdir / name).exists():
      continue
    try:
      read()
    except UserError as e:
      names = (workdir / f'{name}.damaged-{n}' for n in range(1, 1000))
      kept = next(path for path in names if not path.exists())
      with saving(name, workdir):
        (workdir / name).rename(kept)
      said.append(f'{e} It is now {kept.name}, and the run goes on without it.')
  return said


def begin(workdir: Path, plan: Plan, data: Any, step: int, seconds: dict[str, float]) -> str:
  """Leaves the record of this start; returns what changed in the config since the last one.

  Args:
    workdir: of the run.
    plan, data: as they are now.
    step: where it goes on.
    seconds: that the run took so far, by kind.
  """
  config = json.loads(plan.config.to_json_best_effort())
  path = workdir / 'config.json'
  flat = lambda c: (
    {f'{s}.{k}': v for s, keys in c.items() if isinstance(keys, dict) for k, v in keys.items()}
    | {'init_from': c.get('init_from')}
  )
  changed = difference(flat(read_json(path)), flat(config)) if path.exists() else ''
  write_json(path, config)
  this = environment(plan, data) | {'began_at': step, 'step': step, 'seconds': seconds}
  write_json(workdir / ENV, {'starts': starts(workdir) + [this]})
  save_tokenizer(data.tokenizer, workdir / 'tokenizer')
  if plan.model.head != 'lm':
    write_json(workdir / LABELS, data.labels)
  return changed


def save_tokenizer(own: tokenizer.Tokenizer, folder: Path) -> None:
  """Leaves a tokenizer in a folder: never half of it, and not again what is there."""
  with contextlib.suppress(UserError):  # there is none, or what a kill has left of one
    if tokenizer.load(folder).sha256 == own.sha256:
      return
  scratch = folder.with_name(folder.name + '.tmp')
  with saving('the tokenizer', folder):
    shutil.rmtree(scratch, ignore_errors=True)
    own.save(scratch)
    shutil.rmtree(folder, ignore_errors=True)
    scratch.rename(folder)


def end(workdir: Path, step: int, seconds: dict[str, float], finished: bool) -> None:
  """Notes in the record of this start where it ended, in order, the seconds until then, and whether
  the run is finished.
  """
  *earlier, this = starts(workdir)
  this |= {'step': step, 'seconds': seconds, 'finished': finished}
  write_json(workdir / ENV, {'starts': [*earlier, this]})


def mark_finished(workdir: Path) -> None:
  """Notes that a run has come to its end, where a kill just then kept it from doing so."""
  if jax.process_index() == 0 and starts(workdir) and not finished(workdir):
    *earlier, last = starts(workdir)
    write_json(workdir / ENV, {'starts': [*earlier, last | {'finished': True}]})


def finished(workdir: Path) -> bool:
  """Whether a run has come to its end, by its own record."""
  return bool(found := starts(workdir)) and found[-1].get('finished', False)


def write_json(path: Path, value: Any) -> None:
  with saving(path.name, path):
    write_whole(path, json.dumps(value, indent=2) + '\n')

"""The record of a run, beside its metrics: its config, and of each start the machine and versions."""

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

from gpt2_jax.checkpoints.formats import mup
from gpt2_jax.checkpoints.orbax_store import difference
from gpt2_jax.checkpoints.workdir import LABELS
from gpt2_jax.core import chips, determinism
from gpt2_jax.core.errors import UserError, saving
from gpt2_jax.core.files import misfit, read_json, whole_number, write_whole
from gpt2_jax.data.training_data import TrainingData
from gpt2_jax.tokenizer import bpe
from gpt2_jax.training.run_model import FREE
from gpt2_jax.training.run_plan import Plan

ENV = 'env.json'
ENVIRONMENT = ('XLA_FLAGS', 'JAX_PLATFORMS')  # variables that the figures may depend on


def versions() -> dict[str, str]:
  """Returns the versions of the packages that the figures may depend on."""
  packages = ('gpt2_jax', 'jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'grain', 'numpy')
  return {name: importlib.metadata.version(name) for name in packages}


def commit() -> str | None:
  """Returns the commit of the code that runs, with `-dirty` after it if the code has changes."""
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


def environment(plan: Plan, data: TrainingData) -> dict:
  """Returns where this start runs, and on what."""
  return {
    'time': time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime()),
    'command': sys.argv,
    'python': platform.python_version(),
    'platform': platform.platform(),
    'versions': versions(),
    'git_commit': commit(),
    'processes': jax.process_count(),
    'processor': chips.processor(),
    'devices': f'{plan.mesh.size} x {plan.mesh.devices.flat[0].device_kind}',
    'mesh': dict(plan.mesh.shape),
    'micro_batches': plan.A,
    'rows': plan.G,
    'row_tokens': plan.T,
    'goal': plan.goal,
    'data': {
      'corpus': plan.config.data.corpus,
      'tokens': len(data.splits['train']),
      'sha256': data.sha256,
      'licence': data.manifest['source']['licence'],
    },
    'determinism': determinism.describe() if plan.config.deterministic else {},
    'env': {k: os.environ[k] for k in ENVIRONMENT if k in os.environ},
  }


def identity(plan: Plan, data: TrainingData) -> dict:
  """Returns what must not change between two starts of a run: a flat dict, as JSON gives it back."""
  free = FREE if plan.model.parametrization == 'mup' else (*FREE, *mup.FIELDS)  # older runs lack them
  model = {f'model.{k}': v for k, v in dataclasses.asdict(plan.model).items() if k not in free}
  rest = {'data.sha256': data.sha256, 'init_from': plan.config.init_from}
  if (name := plan.config.optim.name) != 'adamw':  # which older runs had, and do not say
    rest['optim.name'] = name
  return json.loads(json.dumps(model | rest))


def starts(workdir: Path) -> list[dict]:
  """Returns the records of all starts of a run, the oldest first.

  Raises:
    UserError: it can't be read.
  """
  path = workdir / ENV
  return read_json(path, {'starts': [_is_start]})['starts'] if path.exists() else []


def _is_start(value: Any) -> bool:
  shape = {'step': whole_number, 'seconds': {str: (int, float)}}
  if not isinstance(value, dict) or ('step' in value) != ('seconds' in value):
    return False
  return misfit({'step': 0, 'seconds': {}} | value, shape) is None  # the first version noted neither


def set_aside(workdir: Path) -> list[str]:
  """Renames those files of a run's record that can't be read, so that it goes on without them.

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


def begin(workdir: Path, plan: Plan, data: TrainingData, step: int, seconds: dict[str, float]) -> str:
  """Leaves the record of this start; returns what changed in the config since the last one.

  Args:
    workdir: of the run.
    plan, data: as they are now.
    step: where it goes on.
    seconds: that the run took so far, by kind.
  """
  config = json.loads(plan.config.to_json_best_effort())
  path = workdir / 'config.json'
  changed = difference(_knobs(read_json(path)), _knobs(config)) if path.exists() else ''
  write_json(path, config)
  this = environment(plan, data) | {'began_at': step, 'step': step, 'seconds': seconds}
  write_json(workdir / ENV, {'starts': starts(workdir) + [this]})
  save_tokenizer(data.tokenizer, workdir / 'tokenizer')
  if data.labels:
    write_json(workdir / LABELS, data.labels)
  return changed


def _knobs(read: dict) -> dict:
  """Returns the knobs of a config's sections, and init_from, as a flat dict."""
  sections = ((name, section) for name, section in read.items() if isinstance(section, dict))
  flat = {f'{name}.{key}': value for name, section in sections for key, value in section.items()}
  return flat | {'init_from': read.get('init_from')}


def save_tokenizer(own: bpe.Tokenizer, folder: Path) -> None:
  """Saves a tokenizer in a folder, whole or not at all, unless it is there already."""
  with contextlib.suppress(UserError):  # there is none, or what a kill has left of one
    if bpe.load(folder).sha256 == own.sha256:
      return
  scratch = folder.with_name(folder.name + '.tmp')
  with saving('the tokenizer', folder):
    shutil.rmtree(scratch, ignore_errors=True)
    own.save(scratch)
    shutil.rmtree(folder, ignore_errors=True)
    scratch.rename(folder)


def end(workdir: Path, step: int, seconds: dict[str, float], finished: bool) -> None:
  """Adds to the record of this start its last step, its seconds, and whether the run is finished."""
  *earlier, this = starts(workdir)
  this |= {'step': step, 'seconds': seconds, 'finished': finished}
  write_json(workdir / ENV, {'starts': [*earlier, this]})


def mark_finished(workdir: Path) -> None:
  """Notes that a run is finished, if a kill at its very end left that out."""
  if jax.process_index() == 0 and starts(workdir) and not finished(workdir):
    *earlier, last = starts(workdir)
    write_json(workdir / ENV, {'starts': [*earlier, last | {'finished': True}]})


def finished(workdir: Path) -> bool:
  """Whether a run is finished, by its own record."""
  return bool(found := starts(workdir)) and found[-1].get('finished', False)


def write_json(path: Path, value: Any) -> None:
  with saving(path.name, path):
    write_whole(path, json.dumps(value, indent=2) + '\n')

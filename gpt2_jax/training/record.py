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

from gpt2_jax import tokenizer
from gpt2_jax.checkpoint import difference
from gpt2_jax.data.store import write_whole
from gpt2_jax.errors import UserError, saving
from gpt2_jax.interop.workdir import LABELS
from gpt2_jax.training.plan import FREE, Plan

ENV = 'env.json'


def environment(plan: Plan, data: Any) -> dict:
  packages = ('gpt2_jax', 'jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'grain', 'numpy')
  try:
    commit = subprocess.run(
        ['git', 'describe', '--always', '--dirty', '--abbrev=40', '--exclude=*'],
        cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10).stdout.strip()
  except (OSError, subprocess.TimeoutExpired):
    commit = ''
  return {
      'time': time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime()),
      'command': sys.argv, 'python': platform.python_version(), 'platform': platform.platform(),
      'versions': {name: importlib.metadata.version(name) for name in packages},
      'git_commit': commit or None, 'processes': jax.process_count(),
      'devices': f'{plan.mesh.size} x {plan.mesh.devices.flat[0].device_kind}',
      'mesh': dict(plan.mesh.shape), 'micro_batches': plan.A,
      'data': {'corpus': plan.config.data.corpus, 'tokens': len(data.splits['train']),
               'sha256': data.sha256, 'licence': data.manifest['source']['licence']},
      'env': {k: os.environ[k] for k in ('XLA_FLAGS', 'JAX_PLATFORMS') if k in os.environ},
  }


def identity(plan: Plan, data: Any) -> dict:
  """What must not change between two starts of a run, flat and as JSON gives it back."""
  model = {f'model.{k}': v for k, v in dataclasses.asdict(plan.model).items() if k not in FREE}
  rest = {'data.sha256': data.sha256, 'init_from': plan.config.init_from}
  return json.loads(json.dumps(model | rest))


def starts(workdir: Path) -> list[dict]:
  """What each start of a run left, the oldest first."""
  path = workdir / ENV
  return json.loads(path.read_text())['starts'] if path.exists() else []


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
  flat = lambda c: {f'{s}.{k}': v for s, keys in c.items() if isinstance(keys, dict)
                    for k, v in keys.items()} | {'init_from': c.get('init_from')}
  changed = difference(flat(json.loads(path.read_text())), flat(config)) if path.exists() else ''
  write_json(path, config)
  this = environment(plan, data) | {'step': step, 'seconds': seconds}
  write_json(workdir / ENV, {'starts': starts(workdir) + [this]})
  save_tokenizer(data.tokenizer(), workdir / 'tokenizer')
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


def end(workdir: Path, step: int, seconds: dict[str, float]) -> None:
  """Notes in the record of this start where it ended, in order, and the seconds until then."""
  *earlier, this = starts(workdir)
  write_json(workdir / ENV, {'starts': [*earlier, this | {'step': step, 'seconds': seconds}]})


def write_json(path: Path, value: Any) -> None:
  with saving(path.name, path):
    write_whole(path, json.dumps(value, indent=2) + '\n')

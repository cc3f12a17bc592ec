"""Runs of `launch.py` in processes of their own, and what they leave."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from support.processes import ROOT, environment, run

STEPS = 24


PLAIN = ('train/loss', 'train/grad_norm', 'train/param_norm', 'eval/loss')  # no clock in them


def arguments(text: Path, workdir: Path, **overrides) -> list[str]:
  values = {
    'model.n_positions': 64,
    'model.n_embd': 32,
    'model.n_layer': 2,
    'model.n_head': 2,
    'model.resid_pdrop': 0.1,
    'model.attn_pdrop': 0.1,
    'data.corpus': f'text:{text}',
    'data.tokenizer': 'byte',
    'data.val_fraction': 0.05,
    'data.store': text.parent / 'store',
    'train.steps': STEPS,
    'train.global_batch_tokens': 64 * 8,
    'train.micro_batch_rows': 4,
    'optim.warmup_steps': 4,
    'checkpoint.every': 5,
    'evaluate.every': 8,
    'log.sample_tokens': 20,
    'log.to': '',
  } | {key.replace('__', '.'): value for key, value in overrides.items()}
  return [
    'launch.py',
    '--config=configs/tiny.py',
    f'--workdir={workdir}',
    *(f'--config.{key}={value}' for key, value in values.items()),
  ]


def lines(workdir: Path) -> list[dict]:
  return [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]


def plain(workdir: Path) -> list[dict]:
  return [{key: line[key] for key in ('step', *PLAIN) if key in line} for line in lines(workdir)]


@pytest.fixture(scope='module')
def finished(text_folder, tmp_path_factory):
  """An uninterrupted run: (workdir, what it printed)."""
  workdir = tmp_path_factory.mktemp('runs') / 'whole'
  result = run(*arguments(text_folder, workdir, log__to='tensorboard'))
  assert result.returncode == 0, result.stdout + result.stderr
  return workdir, result.stdout


def start_and_send(number: int, at_step: int, command: list[str], workdir: Path) -> int:
  """Starts a run and sends it a signal once its record has `at_step` lines; its exit status."""
  process = subprocess.Popen(
    [sys.executable, *command],
    cwd=ROOT,
    env=environment(),
    stdout=subprocess.DEVNULL,
    stderr=subprocess.PIPE,
  )
  path, deadline = workdir / 'metrics.jsonl', time.monotonic() + 120
  while process.poll() is None and time.monotonic() < deadline:
    if path.exists() and path.read_bytes().count(b'\n') >= at_step:
      process.send_signal(number)
      break
    time.sleep(0.001)
  _, errors = process.communicate(timeout=60)
  assert process.returncode != 0, f'ended before step {at_step}: {errors.decode()}'
  return process.returncode

"""SIGKILL at random moments of a tiny run, again and again: nothing may be lost or torn.

    python -m benchmarks.kills [--kills 20] [--steps 200] [--seed N] [--folder DIR]
        [--workdir gs://BUCKET/DIR]

The run prepares its data (a BPE tokenizer, several parts), trains, saves every 5 steps and evaluates
every 8. In turns a kill is aimed at the preparation, at a save, at an evaluation, or at any moment.
After each one all files that are there must be whole, and the next start must go on from no earlier
step than had been committed. At the end the record must be bitwise that of a run that was left alone.
Exit status 1 where anything was lost. With --workdir the run that is killed lies there, in a bucket
perhaps; the one that is left alone lies on this disk.
"""

import argparse
import collections
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from gpt2_jax.checkpoints import manifest
from gpt2_jax.core import buckets
from gpt2_jax.core.buckets import AnyPath
from gpt2_jax.data.token_store import open_store

ROOT = Path(__file__).resolve().parent.parent
SAVE, EVALUATE = 5, 8
PLAIN = ('step', 'train/loss', 'train/grad_norm', 'train/param_norm', 'eval/loss')
AIMS = ('preparation', 'save', 'evaluation', 'any moment')
PREPARATIONS = 0.25  # of the kills: they come first, while there is something to prepare


def make_corpus(folder: Path, rng: random.Random) -> None:
  """About 21 MB in 40 files: five parts of a preparation."""
  folder.mkdir(parents=True)
  words = [''.join(rng.choices('abcdefghij', k=rng.randint(2, 7))) for _ in range(500)]
  for n in range(40):
    (folder / f'{n:02d}.txt').write_text(
      '\n'.join(' '.join(rng.choices(words, k=12)) for _ in range(8000))
    )


def command(folder: Path, name: str, workdir: AnyPath, steps: int) -> list[str]:
  knobs = {
    'model.n_positions': 64,
    'model.n_embd': 32,
    'model.n_layer': 2,
    'model.n_head': 2,
    'model.resid_pdrop': 0.1,
    'data.corpus': f'text:{folder / "text"}',
    'data.tokenizer': 'bpe:400',
    'data.val_fraction': 0.003,
    'data.split': 'tail',
    'data.store': folder / f'store-{name}',
    'train.steps': steps,
    'train.global_batch_tokens': 64 * 8,
    'optim.warmup_steps': 4,
    'checkpoint.every': SAVE,
    'evaluate.every': EVALUATE,
    'log.to': '',
  }
  return [
    sys.executable,
    'launch.py',
    '--config=configs/tiny.py',
    f'--workdir={workdir}',
    *(f'--config.{key}={value}' for key, value in knobs.items()),
  ]


class Run:
  """The files of the run that is killed, as they are at this moment."""

  def __init__(self, folder: Path, workdir: AnyPath, steps: int):
    self.argv = command(folder, 'killed', workdir, steps)
    self.folder, self.workdir, self.store = folder, workdir, folder / 'store-killed'
    self.log = folder / 'log.txt'
    self.record = workdir  # where it is written, on this disk
    if not isinstance(workdir, Path):
      self.record = buckets.kept(workdir) / 'process-0' / workdir.name

  def lines(self) -> int:
    path = self.record / 'metrics.jsonl'
    return path.read_bytes().count(b'\n') if path.exists() else 0

  def saved(self) -> dict[str, bool]:
    """The folders of checkpoints, and whether they count."""
    folder = self.workdir / 'checkpoints'
    if isinstance(self.workdir, Path):
      return {path.name: path.name.isdecimal() for path in folder.glob('*')}
    found = set(buckets.listing(folder))
    steps = {name.partition('/')[0] for name in found}
    return {step: f'{step}/commit_success.txt' in found for step in steps}

  def committed(self) -> int:
    return max((int(name) for name, counts in self.saved().items() if counts), default=0)

  def phase(self) -> str:
    """What the run is at, as its files tell."""
    if not (self.store / 'manifest.json').exists():
      return 'preparation' if self.store.exists() else 'start'
    if not all(self.saved().values()):
      return 'save'
    if '\nstep ' not in self.log.read_text():  # it is said of the first one
      return 'start'
    return 'evaluation' if self.lines() % EVALUATE == EVALUATE - 1 else 'training'

  def torn(self) -> list[str]:
    """The files that are not whole, unfinished ones under temporary names aside."""
    bad = []
    for path in self.folder.rglob('*.json'):
      if '.orbax-checkpoint-tmp' not in str(path) and '.tmp' not in str(path):
        try:
          json.loads(path.read_text())
        except FileNotFoundError:
          pass  # a worker that outlived the kill for a moment
        except ValueError:
          bad.append(str(path))
    path = self.record / 'metrics.jsonl'
    for line in path.read_text().split('\n')[:-1] if path.exists() else ():
      try:
        json.loads(line)
      except ValueError:
        bad.append(f'{path}: {line!r}')
    if last := self.committed():
      step = self.workdir / 'checkpoints' / str(last)
      damage = manifest.damage(step) if (step / manifest.FILE).exists() else 'it has no manifest'
      if damage:
        bad.append(f'{step}: {damage}')
    if (self.store / 'manifest.json').exists():
      store = open_store(self.store)
      for split in store.manifest['splits'].values():
        for shard in split['shards']:
          content = b''.join((self.store / shard[key]).read_bytes() for key in ('file', 'index'))
          if hashlib.sha256(content).hexdigest() != shard['sha256']:
            bad.append(str(self.store / shard['file']))
    return bad


def aimed(run: Run, process: subprocess.Popen, aim: str, rng: random.Random, since: int) -> None:
  """Returns at the moment to kill, or when the run has ended."""
  ends = time.monotonic() + 120
  skip = rng.randint(0, 1) if aim in ('save', 'evaluation') else 0  # not always the first one
  was, wait_lines = False, since + rng.randint(1, 12)
  started = time.monotonic()
  delay = rng.uniform(0, 12)
  while process.poll() is None and time.monotonic() < ends:
    if aim == 'any moment':
      if time.monotonic() - started > delay or run.lines() > wait_lines:
        return
    else:
      at = run.phase() == aim
      if at and not was:
        if skip == 0:
          time.sleep(rng.uniform(0, 1.5 if aim == 'preparation' else 0.08))
          return
        skip -= 1
      was = at
    time.sleep(0.001)


def plain(workdir: AnyPath) -> list[dict]:
  lines = map(json.loads, (workdir / 'metrics.jsonl').read_text().splitlines())
  return [{key: line[key] for key in PLAIN if key in line} for line in lines]


def check(run: Run, kills: int, rng: random.Random) -> list[str]:
  """Kills the run so many times, then lets it end. What was lost or torn, a line each."""
  counts, lost, killed = collections.Counter(), [], 0
  while True:
    before, since = run.committed(), run.lines()
    with open(run.log, 'w') as out:
      process = subprocess.Popen(run.argv, cwd=ROOT, stdout=out, stderr=out)
    if killed < kills:
      preparing = killed < PREPARATIONS * kills
      aimed(run, process, 'preparation' if preparing else AIMS[1 + killed % 3], rng, since)
      phase = run.phase()
      process.kill()
    status = process.wait()
    printed = run.log.read_text()
    found = [line for line in printed.splitlines() if line.startswith('resumed from step ')]
    if found and int(found[0].split()[3].replace(',', '')) < before:
      lost.append(f'{found[0]}, though step {before} was committed')
    if 'checkpoint of step' in printed:
      lost.append(printed[printed.index('checkpoint of step') :].splitlines()[0])
    lost += [f'torn: {path}' for path in run.torn()]
    if killed == kills or status == 0:
      break
    if status != -9:
      lost.append(f'exit status {status}: {printed[-2000:]}')
      break
    killed += 1
    counts[phase] += 1
    print(f'kill {killed:3d} within {phase}: step {run.committed()} is saved', flush=True)
  if killed < kills:
    lost.append(f'the run ended after {killed} of {kills} kills, with status {status}')
  elif status:
    lost.append(f'exit status {status} at the end: {printed[-2000:]}')
  table = ', '.join(f'{n} within {phase}' for phase, n in counts.most_common())
  print(f'{killed} kills: {table}')
  return lost


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
  parser.add_argument('--kills', type=int, default=20)
  parser.add_argument('--steps', type=int, default=200, help='of the run')
  parser.add_argument('--seed', type=int, help='of the moments; default: another each time')
  parser.add_argument('--folder', type=Path, help='to work in; default: a temporary one')
  parser.add_argument('--workdir', help='of the run that is killed; default: in --folder')
  args = parser.parse_args()
  os.environ.setdefault('JAX_PLATFORMS', 'cpu')
  seed = args.seed if args.seed is not None else int(np.random.SeedSequence().entropy % 10**6)
  folder = args.folder or Path(tempfile.mkdtemp())
  rng = random.Random(seed)
  make_corpus(folder / 'text', random.Random(0))
  with open(folder / 'log-whole.txt', 'w') as out:
    argv = command(folder, 'whole', folder / 'whole', args.steps)
    whole = subprocess.run(argv, cwd=ROOT, stdout=out, stderr=out)
  if whole.returncode:
    print((folder / 'log-whole.txt').read_text())
    return 1
  run = Run(folder, buckets.place(args.workdir or folder / 'killed'), args.steps)
  lost = check(run, args.kills, rng)
  have, want = plain(run.workdir), plain(folder / 'whole')
  if have != want:
    differ = next((n for n, pair in enumerate(zip(have, want), 1) if pair[0] != pair[1]), len(have))
    lost.append(
      f'the record differs from that of the run left alone at step {differ} '
      f'({len(have)} and {len(want)} lines)'
    )
  print(
    '\n'.join(lost)
    or f'nothing was lost or torn: {len(have)} steps, bitwise those of a run '
    f'that was left alone (seed {seed})'
  )
  if not lost and args.folder is None:
    shutil.rmtree(folder)
  return bool(lost)


if __name__ == '__main__':
  sys.exit(main())

"""Time and memory that loading and converting a checkpoint take: random weights, real files.

    python -m benchmarks.conversion --size xl --scratch /tmp

Each line is a process of its own. `peak` is its maximum resident set; `ratio` that by the bytes of
the checkpoint. `copy` is what copying the same bytes takes, as a limit.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from configs import large, medium, small, xl
from gpt2_jax.checkpoints import pretrained, tensors
from gpt2_jax.model.config import GPTConfig

SIZES = {'small': small, 'medium': medium, 'large': large, 'xl': xl}
FORMATS = ('hf', 'llmc', 'openai', 'flax')
WORK = """
import json, resource, sys, time
import gpt2_jax
from gpt2_jax.checkpoints import pretrained
what, source, target = sys.argv[1:]
began = time.monotonic()
if what == 'load':
  gpt2_jax.from_pretrained(source)
else:
  pretrained.write(pretrained.open_source(source), target, what)
print(json.dumps({'seconds': time.monotonic() - began,
                  'peak': resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}))
"""


def random_source(config: GPTConfig) -> tensors.Source:
  shapes = tensors.shapes(config)
  values = np.random.default_rng(0).standard_normal(config.n_embd * config.F).astype(np.float32)
  return tensors.Source(
    config, lambda name: np.resize(0.02 * values, shapes[name]), 'float32', 'random'
  )


def measure(name: str, size: int, what: str, source: Path, target: Path | str = '') -> None:
  result = subprocess.run(
    [sys.executable, '-c', WORK, what, str(source), str(target)],
    capture_output=True,
    text=True,
    check=True,
  )
  found = json.loads(result.stdout)
  print(
    f'{name:16s} {found["seconds"]:8.1f} s  peak {found["peak"] / 1e9:6.2f} GB  '
    f'ratio {found["peak"] / size:5.2f}',
    flush=True,
  )


def copy(source: Path, target: Path) -> None:
  began = time.monotonic()
  (shutil.copytree if source.is_dir() else shutil.copy)(source, target)
  print(f'{"copy":16s} {time.monotonic() - began:8.1f} s', flush=True)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--size', choices=SIZES, default='small')
  parser.add_argument('--scratch', default=None, help='a folder with room for three checkpoints')
  arguments = parser.parse_args()
  sizes = dict(SIZES[arguments.size].get_config().model, vocab_size=50257, dtype='float32')
  config = GPTConfig(**sizes)
  size = 4 * sum(int(np.prod(shape)) for shape in tensors.shapes(config).values())
  print(f'{arguments.size}: {size:,} bytes of float32')
  with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
    first, other = Path(scratch) / 'hf', Path(scratch) / 'other'
    pretrained.write(random_source(config), first, 'hf')
    copy(first, other)
    shutil.rmtree(other)
    measure('load hf', size, 'load', first)
    for to in FORMATS[1:]:
      measure(f'hf -> {to}', size, to, first, other)
      measure(f'load {to}', size, 'load', other)
      measure(f'{to} -> hf', size, 'hf', other, Path(scratch) / 'again')
      for path in (other, Path(scratch) / 'again'):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


if __name__ == '__main__':
  main()

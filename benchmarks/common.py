"""What the benchmarks share: peers that take turns, the machine's own limits, and the record.

A figure is a ratio of two sides measured in one run on one machine. Each side is a process of its own
that waits while another one works; they take turns (A B A B …), so that a machine that drifts
drifts for both. What counts is the median; the spread stands beside it.
"""

import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from gpt2_jax.core import chips

PACKAGES = ('jax', 'jaxlib', 'flax', 'optax', 'numpy', 'torch', 'transformers', 'tiktoken')
THREADS = len(os.sched_getaffinity(0))
RESULTS = Path(__file__).parent / 'results'
HUGE_PAGES = {'GLIBC_TUNABLES': 'glibc.malloc.hugetlb=1'}  # as launch.py sets it
SERVE = """
import json, os, sys, time
threads = len(os.sched_getaffinity(0))
%s
for line in sys.stdin:
  try:
    answer = run(**json.loads(line))
  except Exception as e:
    answer = {'error': f'{type(e).__name__}: {e}'[:500]}
  print(json.dumps(answer), file=out, flush=True)
"""


def byte_model() -> Any:
  """Returns a model of bytes of the size of configs/tiny.py, with its initial weights."""
  import gpt2_jax
  from configs import tiny
  from gpt2_jax.tokenizer import bpe

  names = ('n_positions', 'n_embd', 'n_layer', 'n_head')
  sizes = {name: getattr(tiny.get_config().model, name) for name in names}
  config = gpt2_jax.GPTConfig(vocab_size=257, **sizes)
  model = gpt2_jax.bind(config, gpt2_jax.init_params(config, 0))
  return gpt2_jax.Pretrained(model, bpe.load('byte'))


class Failed(Exception):
  """A worker could not do what it was asked."""


class Worker:
  """A process that does what it is asked to, when it is asked to.

  Its code defines `run(**request)`, which returns what JSON can hold. What it prints goes to
  stderr. Use as a context, so that it ends.
  """

  def __init__(self, code: str, **variables: str):
    """`variables`: of its environment, beside those of this process."""
    keep = 'import os, sys\nout = os.fdopen(os.dup(1), "w")\nos.dup2(2, 1)\n'
    self.process = subprocess.Popen(
      [sys.executable, '-c', keep + SERVE % code],
      text=True,
      env=os.environ | variables,
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=subprocess.DEVNULL,
    )

  def ask(self, **request) -> Any:
    """What `run` returns.

    Raises:
      Failed: it raised an error, or the process ended.
    """
    assert self.process.stdin and self.process.stdout
    try:
      print(json.dumps(request), file=self.process.stdin, flush=True)
      line = self.process.stdout.readline()
    except BrokenPipeError:
      line = ''
    if not line:
      raise Failed(f'the process ended with status {self.process.wait()}')
    answer = json.loads(line)
    if isinstance(answer, dict) and 'error' in answer:
      raise Failed(answer['error'])
    return answer

  def peak_bytes(self) -> int:
    """The largest resident memory it has had."""
    return self._memory('VmHWM')

  def resident_bytes(self) -> int:
    """The resident memory that it has now."""
    return self._memory('VmRSS')

  def _memory(self, kind: str) -> int:
    status = Path(f'/proc/{self.process.pid}/status').read_text()
    return 1024 * int(status.partition(f'{kind}:')[2].split()[0])

  def __enter__(self) -> 'Worker':
    return self

  def stop(self) -> None:
    self.process.kill()
    self.process.wait()

  def __exit__(self, *_) -> None:
    self.stop()


def take_turns(sides: dict[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
  """What each side returns, `repeats` times, in turns."""
  found: dict[str, list[float]] = {name: [] for name in sides}
  for _ in range(repeats):
    for name, side in sides.items():
      found[name].append(side())
  return found


def ratio(theirs: Sequence[float], ours: Sequence[float]) -> list[float]:
  """[median, lowest, highest] of theirs / ours, turn by turn."""
  each = sorted(a / b for a, b in zip(theirs, ours))
  return [statistics.median(each), each[0], each[-1]]


def copy_rate(threads: int = THREADS, size: int = 1 << 29) -> float:
  """Bytes read and written a second by copying `size` bytes of the host's memory, all threads
  together, at best.
  """
  parts = [
    (np.ones(size // threads, np.uint8), np.empty(size // threads, np.uint8)) for _ in range(threads)
  ]
  best = float('inf')
  for _ in range(5):
    work = [threading.Thread(target=np.copyto, args=(new, old)) for old, new in parts]
    began = time.perf_counter()
    for thread in work:
      thread.start()
    for thread in work:
      thread.join()
    best = min(best, time.perf_counter() - began)
  return 2 * size / best


def gemm_rate(dtype: str, n: int = 2048, repeats: int = 8) -> float:
  """FLOP/s of a product of two n x n matrices by JAX on its first device, at best."""
  import jax
  import jax.numpy as jnp

  a, b = (jax.random.normal(jax.random.key(i), (n, n), jnp.dtype(dtype)) for i in (0, 1))
  multiply = jax.jit(lambda a, b: jnp.matmul(a, b, preferred_element_type=jnp.float32))
  jax.block_until_ready(multiply(a, b))
  best = float('inf')
  for _ in range(repeats):
    began = time.perf_counter()
    jax.block_until_ready(multiply(a, b))
    best = min(best, time.perf_counter() - began)
  return 2 * n**3 / best


def device_copy_rate(size: int = 1 << 30, repeats: int = 8) -> float:
  """Bytes read and written a second by copying `size` bytes on JAX's first device, at best."""
  import jax
  import jax.numpy as jnp

  x = jnp.zeros(size // 4, jnp.float32)
  add = jax.jit(lambda x: x + 1)
  jax.block_until_ready(add(x))
  best = float('inf')
  for _ in range(repeats):
    began = time.perf_counter()
    jax.block_until_ready(add(x))
    best = min(best, time.perf_counter() - began)
  return 2 * size / best


def circumstances() -> dict:
  """Hardware, versions, commit and command: what a figure must be read with."""
  from gpt2_jax.training.watch import run_record

  versions = {}
  for name in PACKAGES:
    with contextlib.suppress(metadata.PackageNotFoundError):
      versions[name] = metadata.version(name)
  command = ['python', '-m', f'benchmarks.{Path(sys.argv[0]).stem}', *sys.argv[1:]]
  return {
    'time': time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime()),
    'command': command,
    'processor': chips.processor(),
    'threads': THREADS,
    'python': platform.python_version(),
    'versions': versions,
    'commit': run_record.commit(),
    'environment': {
      k: v for k, v in os.environ.items() if k in ('XLA_FLAGS', 'JAX_PLATFORMS', 'GLIBC_TUNABLES')
    },
  }


@contextlib.contextmanager
def report(path: str | Path | None) -> Iterator[list[dict]]:
  """Yields a list for rows; writes it to `path` with the circumstances, also what an error left."""
  rows: list[dict] = []
  try:
    yield rows
  finally:
    if path:
      Path(path).parent.mkdir(parents=True, exist_ok=True)
      Path(path).write_text(json.dumps(circumstances() | {'rows': rows}, indent=1) + '\n')

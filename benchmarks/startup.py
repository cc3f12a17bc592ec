"""How long it takes until something happens: imports, the first training step, the first token.

    python -m benchmarks.startup [--parts imports train sample] [--json FILE]

imports: of a process of its own, over what an empty Python takes; `jax` and the libraries that a part
can't do without stand beside it.

train: `python launch.py` with a token store that is there already, twice: with an empty cache of
compiled programs, and with the one that the first start has left. When each line is there, from the
start of the process on: `model` (imports, the plan), `data` (the store is open), `compiled`,
`dispatch` (the first step begins), `step` (its loss is there). Of these, by JAX's own clocks:
tracing and lowering, compiling, reading from the cache. The configs' own batch ends with the
dispatch, since its step alone takes a minute on two cores; a small one, 4 x 256 tokens, goes to the
end.

sample: `gpt2-jax sample` on a checkpoint of 124M, to the first token, both ways too.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.common import HUGE_PAGES, report

ROOT = Path(__file__).resolve().parent.parent
IMPORTS = (
  'jax',
  'gpt2_jax',
  'grain, optax, orbax.checkpoint',
  'gpt2_jax.training.train',
  'gpt2_jax.cli.main',
  'gpt2_jax.checkpoints.pretrained, gpt2_jax.decoding.generate',
)
# launch.py as it is, which also says when the first step is dispatched, and what JAX's clocks say
LAUNCH = """
import runpy, sys
import jax
sys.argv = sys.argv[1:]
seconds = {'trace': 0.0, 'compile': 0.0, 'cache': 0.0}
KINDS = {'/jax/core/compile/jaxpr_trace_duration': 'trace',
         '/jax/core/compile/jaxpr_to_mlir_module_duration': 'trace',
         '/jax/core/compile/backend_compile_duration': 'compile',
         '/jax/compilation_cache/cache_retrieval_time_sec': 'cache'}
def listen(event, duration, **_):
  if event in KINDS:
    seconds[KINDS[event]] += duration
jax.monitoring.register_event_duration_secs_listener(listen)
class Dispatch(jax.profiler.StepTraceAnnotation):
  def __enter__(self):
    print('dispatch', *(f'{name}={value}' for name, value in seconds.items()), flush=True)
    return super().__enter__()
jax.profiler.StepTraceAnnotation = Dispatch
runpy.run_path(sys.argv[0], run_name='__main__')
"""
MARKS = ('model', 'data', 'compiled', 'dispatch', 'step')
SMALL_BATCH = ('--config.train.global_batch_tokens=1024', '--config.data.sequence_length=256')


def python(*arguments: str, cache: Path | None = None) -> subprocess.Popen:
  env = os.environ | HUGE_PAGES | {'PYTHONPATH': str(ROOT)}
  if cache:
    env['JAX_COMPILATION_CACHE_DIR'] = str(cache)
  return subprocess.Popen(
    [sys.executable, *arguments],
    env=env,
    text=True,
    cwd=ROOT,
    stdout=subprocess.PIPE,
    stderr=subprocess.DEVNULL,
  )


def importing(modules: str, repeats: int) -> list[float]:
  """Seconds of processes that do nothing else."""
  seconds = []
  for _ in range(repeats):
    began = time.perf_counter()
    if python('-c', f'import {modules}').wait():
      raise RuntimeError(f'import {modules} fails')
    seconds.append(time.perf_counter() - began)
  return seconds


def start(config: str, flags: tuple[str, ...], cache: Path, folder: str, last: str) -> dict:
  """Seconds until each of MARKS up to `last` is printed, and of JAX's clocks until the dispatch."""
  with tempfile.TemporaryDirectory(dir=folder) as workdir:
    began, found = time.perf_counter(), {}
    process = python(
      '-c',
      LAUNCH,
      'launch.py',
      f'--config={config}',
      f'--workdir={workdir}/run',
      f'--config.data.directory={folder}/data',
      '--config.train.steps=2',
      *flags,
      cache=cache,
    )
    assert process.stdout
    try:
      for line in process.stdout:
        mark, *rest = line.split()[:4] or ['']
        if mark in MARKS:
          found.setdefault(mark, time.perf_counter() - began)
        if mark == 'dispatch':
          found |= {name: float(value) for name, value in (each.split('=') for each in rest)}
        if mark == last:
          return found
    finally:
      process.kill()
      process.wait()
  raise RuntimeError(f'launch.py --config={config} ended before it printed {last!r}')


def first_token(checkpoint: str, cache: Path) -> float:
  began = time.perf_counter()
  process = python(
    '-m',
    'gpt2_jax',
    'sample',
    '--checkpoint',
    checkpoint,
    '--prompt',
    'Hello',
    '--max-new-tokens',
    '1',
    cache=cache,
  )
  assert process.stdout
  process.stdout.readline()
  seconds = time.perf_counter() - began
  if process.wait():
    raise RuntimeError('gpt2-jax sample fails')
  return seconds


def save_model(folder: str, size: str) -> None:
  """A checkpoint with random weights, in Hugging Face's format, and GPT-2's tokenizer."""
  import importlib

  import gpt2_jax
  from gpt2_jax.tokenizer import bpe

  sizes = importlib.import_module(f'configs.{size}').get_config().model
  config = gpt2_jax.GPTConfig(
    n_positions=sizes.n_positions, n_embd=sizes.n_embd, n_layer=sizes.n_layer, n_head=sizes.n_head
  )
  model = gpt2_jax.bind(config, gpt2_jax.init_params(config, 0))
  model = gpt2_jax.Pretrained(model, bpe.load('gpt2'))
  gpt2_jax.save_pretrained(model, folder)


def main() -> None:
  flags = argparse.ArgumentParser(description=(__doc__ or '').splitlines()[0])
  flags.add_argument(
    '--parts',
    nargs='+',
    default=['imports', 'train', 'sample'],
    choices=['imports', 'train', 'sample'],
  )
  flags.add_argument('--config', default='small', help='of configs/; tiny, small, …')
  flags.add_argument('--repeats', type=int, default=3, help='of each import and second start')
  flags.add_argument('--json')
  args = flags.parse_args()
  with report(args.json) as rows, tempfile.TemporaryDirectory() as folder:
    if 'imports' in args.parts:
      empty = statistics.median(importing('sys', args.repeats))
      print(f'an empty Python takes {empty:.2f} s; on top of it takes the import of', flush=True)
      for modules in IMPORTS:
        seconds = importing(modules, args.repeats)
        rows.append(dict(what='import', modules=modules, empty=empty, seconds=seconds))
        print(f'{statistics.median(seconds) - empty:8.2f} s  {modules}', flush=True)
    if 'train' in args.parts:
      config = f'configs/{args.config}.py'
      start(config, SMALL_BATCH, Path(folder, 'unused'), folder, 'data')  # makes the store
      print(
        f'\n{config:20s}'
        + ''.join(f'{mark:>10s}' for mark in MARKS)
        + '   until the dispatch: trace, compile (or read)',
        flush=True,
      )
      for batch, extra, last in (('4 x 256', SMALL_BATCH, 'step'), ('its own', (), 'dispatch')):
        cache = Path(folder, f'cache-{last}')
        for n in range(1 + args.repeats):
          found = start(config, extra, cache, folder, last)
          which = 'second' if n else 'first'
          rows.append(dict(what='train', config=config, batch=batch, start=which, seconds=found))
          print(
            f'{batch:9s}{which:11s}'
            + ''.join(f'{found[mark]:10.2f}' if mark in found else f'{"":10s}' for mark in MARKS)
            + f'{found["trace"]:10.2f}{found["compile"]:10.2f} ({found["cache"]:.2f})',
            flush=True,
          )
    if 'sample' in args.parts:
      save_model(f'{folder}/model', args.config)
      for n in range(1 + args.repeats):
        seconds = first_token(f'{folder}/model', Path(folder, 'cache-sample'))
        rows.append(
          dict(what='sample', config=args.config, start='second' if n else 'first', seconds=seconds)
        )
        print(
          f'{"" if n else chr(10)}gpt2-jax sample: {seconds:.2f} s to the first token, '
          f'{rows[-1]["start"]} start',
          flush=True,
        )


if __name__ == '__main__':
  main()

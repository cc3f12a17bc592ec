"""How costs grow: with depth, length, batch, the position in the cache, and the number of devices.

    python -m benchmarks.scaling [--parts depth length batch decode devices] [--json FILE]

A small width, since the slope is the point, not the speed. Layers are scanned, so that the compiler
sees one whatever their number: compiling should take as long at 48 layers as at 12, and a step should
grow by the same time with each. A batch's rows and a row's tokens should cost what their FLOPs do
(6·P + 12·L·D·T a token), or less where a small batch doesn't fill the machine. A decoding step reads
the cache up to its position, rounded up, and all weights. Compiling for several devices (simulated
ones, `fsdp`) adds the collectives, once.

`flatness`: the largest of what should be flat by the smallest.
"""

import argparse
import contextlib
import os
import statistics

from benchmarks.common import Worker, report, take_turns

TRAIN = """
import jax, numpy as np
from configs import tiny
from gpt2_jax.model.sizes import flops_per_token
from gpt2_jax.training.run_plan import make_plan
plan = step = state = tokens = None
def setup(layers, rows, T, width):
  global plan, tokens, state, step
  config = tiny.get_config()
  config.data.update(tokenizer='byte', sequence_length=T)
  config.model.update(n_layer=layers, n_embd=width, n_head=width // 64, vocab_size=2048,
                      n_positions=T, remat='none')
  config.train.update(global_batch_tokens=rows * T)
  if len(jax.devices()) == 1:
    config.train.micro_batch_rows = rows
  config.mesh.fsdp = len(jax.devices())
  plan = make_plan(config)
  jax.set_mesh(plan.mesh)
def compile():
  global step
  began = time.perf_counter()
  step = plan.compile_train_step()
  return time.perf_counter() - began
def run(what, **asked):
  global tokens, state, step
  if what == 'setup':
    setup(**asked)
    return flops_per_token(plan.model, plan.T)
  if what == 'compile':
    return compile()
  if state is None:
    state = plan.init_state()
    tokens = jax.device_put(np.random.default_rng(0).integers(
        0, 2048, (plan.A, plan.G // plan.A, plan.T + 1)).astype(np.int32), plan.batch_sharding)
    state, _ = step(state, tokens)
    jax.block_until_ready(state)
  began = time.perf_counter()
  for _ in range(3):
    state, _ = step(state, tokens)
  jax.block_until_ready(state)
  return (time.perf_counter() - began) / 3
"""
DECODE = """
import gpt2_jax
config = gpt2_jax.GPTConfig(vocab_size=2048, n_positions=1024, n_embd=256, n_layer=6, n_head=4)
model = gpt2_jax.bind(config, gpt2_jax.init_params(config, 0))
def seconds(position, new):
  began = time.perf_counter()
  gpt2_jax.generate(model, [[1] * position], max_new_tokens=new, do_sample=False, eos_token_id=())
  return time.perf_counter() - began
def run(position, new):
  return (seconds(position, new) - seconds(position, 1)) / (new - 1)
"""
UNCACHED = {'JAX_ENABLE_COMPILATION_CACHE': 'false'}


def train(sizes: list[dict], repeats: int, steps: bool = True) -> list[dict]:
  """Per size: FLOPs a token, seconds of compiling, and of a step; in turns."""
  with contextlib.ExitStack() as stack:
    workers, flops = [], []
    for size in sizes:
      extra = {}
      if count := size.get('devices'):
        extra = {
          'JAX_PLATFORMS': 'cpu',
          'XLA_FLAGS': f'{os.environ.get("XLA_FLAGS", "")} '
          f'--xla_force_host_platform_device_count={count}',
        }
      worker = stack.enter_context(Worker(TRAIN, **UNCACHED, **extra))
      flops.append(worker.ask(what='setup', **{k: v for k, v in size.items() if k != 'devices'}))
      workers.append(worker)
    turns = lambda what: list(
      take_turns(
        {str(i): lambda worker=worker: worker.ask(what=what) for i, worker in enumerate(workers)},
        repeats,
      ).values()
    )
    turns('compile')  # the first one in a process loads the compiler
    compiling = turns('compile')
    stepping = turns('step') if steps else [[]] * len(sizes)
  return [
    {**size, 'flops_per_token': f, 'compile_seconds': c, 'step_seconds': s}
    for size, f, c, s in zip(sizes, flops, compiling, stepping)
  ]


def flatness(values) -> float:
  return max(values) / min(values)


def row(rows: list[dict], part: str, label: str, each: dict, **more) -> None:
  rows.append({'part': part, **each, **more})
  compiled = each.get('compile_seconds')
  step = statistics.median(each['step_seconds']) * 1e3 if each.get('step_seconds') else None
  print(
    f'{part:9s}{label:>12s}'
    + (f'{statistics.median(compiled):11.2f}' if compiled else f'{"":11s}')
    + (f'{step:11.2f}' if step else f'{"":11s}')
    + ''.join(f'  {name} {value:.4g}' for name, value in more.items()),
    flush=True,
  )


def summary(rows: list[dict], part: str, what: str, values: list[float]) -> None:
  rows.append({'part': part, 'what': what, 'flatness': flatness(values)})
  print(f'{part:9s}  {what}: flatness {flatness(values):.2f}', flush=True)


def depth(rows, args) -> None:
  sizes = [dict(layers=L, rows=4, T=128, width=args.width) for L in args.layers]
  found = train(sizes, args.repeats)
  steps = [statistics.median(each['step_seconds']) for each in found]
  for i, (each, s) in enumerate(zip(found, steps)):
    more = {}
    if i:
      between = args.layers[i] - args.layers[i - 1]
      more['ms_a_layer'] = (s - steps[i - 1]) / between * 1e3
    row(rows, 'depth', f'{each["layers"]} layers', each, **more)
  compiling = [statistics.median(each['compile_seconds']) for each in found]
  summary(rows, 'depth', 'compiling', compiling)


def length(rows, args) -> None:
  sizes = [dict(layers=4, rows=4096 // T, T=T, width=args.width) for T in args.lengths]
  found = train(sizes, args.repeats)
  rates = [each['flops_per_token'] * 4096 / statistics.median(each['step_seconds']) for each in found]
  for each, rate in zip(found, rates):
    row(rows, 'length', f'{each["rows"]}x{each["T"]}', each, gflops_per_second=rate / 1e9)
  summary(rows, 'length', 'FLOP/s', rates)


def batch(rows, args) -> None:
  sizes = [dict(layers=4, rows=R, T=128, width=args.width) for R in args.batches]
  found = train(sizes, args.repeats)
  each_row = [statistics.median(each['step_seconds']) / each['rows'] for each in found]
  for each, s in zip(found, each_row):
    row(rows, 'batch', f'{each["rows"]}x128', each, ms_a_row=s * 1e3)
  summary(rows, 'batch', 'a row', each_row)


def decode(rows, args) -> None:
  with Worker(DECODE) as worker:
    sides = {str(p): lambda p=p: worker.ask(position=p, new=32) for p in args.positions}
    take_turns(sides, 1)
    seconds = take_turns(sides, args.repeats)
  for position, each in seconds.items():
    row(rows, 'decode', f'at {position}', {'position': int(position), 'step_seconds': each})
  summary(rows, 'decode', 'a step', [statistics.median(each) for each in seconds.values()])


def devices(rows, args) -> None:
  sizes = [dict(layers=4, rows=8, T=128, width=args.width, devices=n) for n in args.devices]
  found = train(sizes, args.repeats, steps=False)
  for each in found:
    row(rows, 'devices', f'{each["devices"]} devices', each)
  several = [statistics.median(e['compile_seconds']) for e in found if e['devices'] > 1]
  if len(several) > 1:
    summary(rows, 'devices', 'compiling for more than one', several)


PARTS = {'depth': depth, 'length': length, 'batch': batch, 'decode': decode, 'devices': devices}


def main() -> None:
  flags = argparse.ArgumentParser(description=(__doc__ or '').splitlines()[0])
  flags.add_argument('--parts', nargs='+', default=list(PARTS), choices=list(PARTS))
  flags.add_argument('--layers', nargs='+', type=int, default=[12, 24, 48])
  flags.add_argument('--lengths', nargs='+', type=int, default=[128, 256, 512, 1024])
  flags.add_argument('--batches', nargs='+', type=int, default=[1, 2, 4, 8, 16])
  flags.add_argument('--positions', nargs='+', type=int, default=[16, 200, 450, 960])
  flags.add_argument('--devices', nargs='+', type=int, default=[1, 2, 8])
  flags.add_argument('--width', type=int, default=128)
  flags.add_argument('--repeats', type=int, default=3, help='turns of each')
  flags.add_argument('--json')
  args = flags.parse_args()
  print(f'{"":9s}{"":>12s}{"compile, s":>11s}{"step, ms":>11s}', flush=True)
  with report(args.json) as rows:
    for part in args.parts:
      PARTS[part](rows, args)


if __name__ == '__main__':
  main()

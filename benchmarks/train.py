"""Training beside transformers: tokens a second, memory, share of the machine's own GEMM rate.

    python -m benchmarks.train [--sizes small] [--shapes 4x256 1x1024] [--dtypes float32]

needs torch and transformers (extra `parity`). One side is our training step as `launch.py` compiles
it, the others are `GPT2LMHeadModel` with eager and sdpa attention, and with `torch.compile` where a
compiler is there; all with AdamW (theirs fused), clipping, no dropout, random tokens. Processes take
turns. A turn begins with a step that doesn't count: while a process waits, a virtual machine may take
free memory back, and the next step pays for it (a fifth of one, on either side).

`of GEMM`: the share of the step that its FLOPs (6·P + 12·L·D·T a token, the causal half not taken
off) would take at the rate of one large product, measured in the same run. MFU is that by the
vendor's peak, where it is known.
"""

import argparse
import contextlib
import itertools
import statistics

from benchmarks.common import HUGE_PAGES, Failed, Worker, gemm_rate, ratio, report, take_turns

OURS = """
import importlib, jax, numpy as np
from gpt2_jax.training.run_plan import make_plan
state = step = tokens = None
def setup(size, rows, T, dtype, **levers):
  global state, step, tokens
  config = importlib.import_module(f'configs.{size}').get_config()
  config.data.update(tokenizer='byte', sequence_length=T)
  config.model.update({'vocab_size': 50257, 'dtype': dtype, 'remat': 'none'} | levers)
  config.train.update(global_batch_tokens=rows * T, micro_batch_rows=rows)
  plan = make_plan(config, devices=jax.devices()[:1])
  jax.set_mesh(plan.mesh)
  step, state = plan.compile_train_step(), plan.init_state()
  rng = np.random.default_rng(0)
  tokens = jax.device_put(rng.integers(0, 50257, (1, rows, T + 1)).astype(np.int32),
                          plan.batch_sharding)
def run(steps, **asked):
  global state
  if asked:
    setup(**asked)
  began = time.perf_counter()
  for _ in range(steps):
    state, metrics = step(state, tokens)
  loss = float(metrics['train/loss'])
  jax.block_until_ready(state)
  memory = jax.devices()[0].memory_stats() or {}
  return {'seconds': (time.perf_counter() - began) / steps, 'loss': loss,
          'bytes': memory.get('peak_bytes_in_use')}
"""
THEIRS = """
import torch, transformers
torch.set_num_threads(threads)
transformers.logging.set_verbosity_error()
device = 'cuda' if torch.cuda.is_available() else 'cpu'
model = optimizer = tokens = scope = None
def setup(size, rows, T, dtype, attention, compiled):
  global model, optimizer, tokens, scope
  torch.manual_seed(0)
  config = transformers.GPT2Config(
      **size, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, use_cache=False,
      attn_implementation=attention)
  model = transformers.GPT2LMHeadModel(config).train().to(device)
  optimizer = torch.optim.AdamW(
      model.parameters(), lr=6e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
  tokens = torch.randint(0, 50257, (rows, T), device=device)
  scope = lambda: torch.autocast(device, dtype=torch.bfloat16, enabled=dtype == 'bfloat16')
  if compiled:
    model = torch.compile(model)
def run(steps, **asked):
  if asked:
    setup(**asked)
  sync = torch.cuda.synchronize if device == 'cuda' else lambda: None
  sync()
  began = time.perf_counter()
  for _ in range(steps):
    with scope():
      loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
  loss = loss.item()
  sync()
  return {'seconds': (time.perf_counter() - began) / steps, 'loss': loss,
          'bytes': torch.cuda.max_memory_allocated() if device == 'cuda' else None}
"""
MODES = {'eager': ('eager', False), 'sdpa': ('sdpa', False), 'sdpa+compile': ('sdpa', True)}


def sizes_of(name: str) -> dict:
  from configs import large, medium, small, xl

  model = {'small': small, 'medium': medium, 'large': large, 'xl': xl}[name].get_config().model
  return {key: model[key] for key in ('n_positions', 'n_embd', 'n_layer', 'n_head')}


def measure(
  size: str, R: int, T: int, dtype: str, modes, levers, repeats: int, steps: int, limit: float
):
  """Yields (side, seconds of each turn, peak bytes), or (side, why not, None)."""
  asked = {'rows': R, 'T': T, 'dtype': dtype}
  sides, peak = {}, {}
  with contextlib.ExitStack() as stack:

    def add(name: str, code: str, **setup):
      worker = stack.enter_context(Worker(code, **HUGE_PAGES, XLA_PYTHON_CLIENT_PREALLOCATE='false'))
      worker.ask(steps=1, **asked, **setup)  # compiles
      if (first := worker.ask(steps=1)['seconds']) > limit:
        worker.stop()
        raise Failed(f'a step takes {first:.0f} s')

      def turn() -> float:
        worker.ask(steps=1)
        answer = worker.ask(steps=steps)
        peak[name] = answer['bytes'] or worker.peak_bytes()
        return answer['seconds']

      sides[name] = turn

    ours = {f'ours, {lever}': lever.split('=') for lever in levers}
    for name in ('gpt2_jax', *ours, *modes):
      try:
        if name in ours:
          knob, value = ours[name]
          add(name, OURS, size=size, **{knob: {'True': True, 'False': False}.get(value, value)})
        elif name == 'gpt2_jax':
          add(name, OURS, size=size)
        else:
          attention, compiled = MODES[name]
          add(name, THEIRS, size=sizes_of(size), attention=attention, compiled=compiled)
      except Failed as why:
        yield name, str(why), None
    for name, seconds in take_turns(sides, repeats).items():
      yield name, seconds, peak[name]


def main() -> None:
  flags = argparse.ArgumentParser(description=(__doc__ or '').splitlines()[0])
  flags.add_argument('--sizes', nargs='+', default=['small'])
  flags.add_argument('--shapes', nargs='+', default=['4x256', '1x1024'], help='rows x tokens')
  flags.add_argument('--dtypes', nargs='+', default=['float32', 'bfloat16'])
  flags.add_argument('--modes', nargs='*', default=list(MODES), choices=list(MODES))
  flags.add_argument('--levers', nargs='*', default=[], help='sides of ours with a knob: remat=full')
  flags.add_argument('--repeats', type=int, default=5, help='turns of each side')
  flags.add_argument('--steps', type=int, default=1, help='steps a turn')
  flags.add_argument('--limit', type=float, default=60, help='seconds a step may take')
  flags.add_argument('--json')
  args = flags.parse_args()
  import jax

  from gpt2_jax.core.chips import peak_flops
  from gpt2_jax.model.config import GPTConfig
  from gpt2_jax.model.sizes import flops_per_token

  device = jax.devices()[0].device_kind
  peak_rate = peak_flops(device)
  print(
    f'{"size":7s}{"shape":>8s} {"dtype":9s}{"side":24s}{"tokens/s":>10s}{"step, ms":>10s}'
    f'{"spread":>16s}{"GB":>7s}{"of GEMM":>9s}{"MFU":>7s}  ours is faster by',
    flush=True,
  )
  with report(args.json) as rows:
    for size, shape, dtype in itertools.product(args.sizes, args.shapes, args.dtypes):
      R, T = map(int, shape.split('x'))
      flops = R * T * flops_per_token(GPTConfig(**sizes_of(size)), T)
      rate, ours = gemm_rate(dtype), None
      for side, seconds, peak in measure(
        size, R, T, dtype, args.modes, args.levers, args.repeats, args.steps, args.limit
      ):
        row = {
          'size': size,
          'rows': R,
          'T': T,
          'dtype': dtype,
          'side': side,
          'device': device,
          'gemm_flops_per_second': rate,
        }
        rows.append(row)
        line = f'{size:7s}{shape:>8s} {dtype:9s}{side:24s}'
        if isinstance(seconds, str):
          row['failed'] = seconds
          print(line + seconds, flush=True)
          continue
        s = statistics.median(seconds)
        row |= {
          'seconds': seconds,
          'tokens_per_second': R * T / s,
          'peak_bytes': peak,
          'of_gemm_rate': flops / s / rate,
          'mfu': peak_rate and flops / s / peak_rate,
        }
        line += (
          f'{R * T / s:10,.0f}{s * 1e3:10,.0f}'
          f'{f"{min(seconds) * 1e3:,.0f}–{max(seconds) * 1e3:,.0f}":>16s}{peak / 1e9:7.1f}'
          f'{row["of_gemm_rate"]:9.1%}' + (f'{row["mfu"]:7.1%}' if peak_rate else '      –')
        )
        if side == 'gpt2_jax':
          ours = seconds
        elif ours:
          row['ours_is_faster_by'] = ratio(seconds, ours)
          line += '  {:.2f} ({:.2f}–{:.2f})'.format(*row['ours_is_faster_by'])
        print(line, flush=True)


if __name__ == '__main__':
  main()

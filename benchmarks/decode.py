"""Decoding beside transformers' `generate`: the first token, tokens a second, share of a floor.

    python -m benchmarks.decode [--dtypes float32 bfloat16] [--batches 1 8 64] [--prompts 16 256 960]

needs torch and transformers (extra `parity`). All sides get the same random weights of GPT-2 124M, in
processes of their own that take turns; the median of the turns counts, the first one, which compiles,
does not. In float32 the tokens must be the same. `first` is the time to one token: the prompt's
prefill. A step is what each token after it takes. `floor` is what a step can't be faster than: the
bytes of weights and cache that it reads, by the rate at which this machine copies (bytes read and
written a second), measured in the same run.
"""

import argparse
import contextlib
import itertools
import statistics
import sys
import tempfile
import time

import numpy as np

from benchmarks.common import (
  HUGE_PAGES,
  Failed,
  Worker,
  byte_model,
  copy_rate,
  device_copy_rate,
  ratio,
  report,
  take_turns,
)
from gpt2_jax.model.config import GPTConfig

TIMED = """
def run(dtype, prompts, new):
  seconds, tokens = [], None
  for n in (1, new):
    began = time.perf_counter()
    tokens = write(dtype, prompts, n)
    seconds.append(time.perf_counter() - began)
  return {'first': seconds[0], 'all': seconds[1], 'tokens': tokens}
"""
OURS = (
  """
import gpt2_jax
loaded = {}
def model_of(dtype):
  base, _, int8 = dtype.partition('+')
  if dtype not in loaded:
    loaded.clear()
    model = gpt2_jax.from_pretrained(folder, dtype=base)
    loaded[dtype] = gpt2_jax.quantize(model) if int8 else model
  return loaded[dtype]
def write(dtype, prompts, new):
  return [r.tokens for r in gpt2_jax.generate(
      model_of(dtype), prompts, max_new_tokens=new, do_sample=False, eos_token_id=())]
"""
  + TIMED
)
THEIRS = (
  """
import torch, transformers
torch.set_num_threads(threads)
transformers.logging.set_verbosity_error()
device = 'cuda' if torch.cuda.is_available() else 'cpu'
loaded = {}
def write(dtype, prompts, new):
  if dtype not in loaded:
    loaded.clear()
    loaded[dtype] = transformers.GPT2LMHeadModel.from_pretrained(
        folder, dtype=getattr(torch, dtype)).eval().to(device)
    loaded[dtype].generation_config.eos_token_id = None
  ids = torch.tensor(prompts, device=device)
  with torch.inference_mode():
    out = loaded[dtype].generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new,
                                 do_sample=False, pad_token_id=0)
  return out[:, ids.shape[1]:].tolist()
"""
  + TIMED
)


def floor(
  config: GPTConfig, weight_bytes: float, item: int, B: int, length: float, rate: float
) -> float:
  """Seconds that reading weights and cache takes for one token of each of B rows."""
  per_layer = 4 * config.n_embd**2 + 2 * config.n_embd * config.F
  weights = weight_bytes * (config.n_layer * per_layer + config.vocab_size * config.n_embd)
  return (weights + 2 * config.n_layer * config.n_embd * length * item * B) / rate


def first_piece() -> float:
  """Seconds to the first piece of a second request: other prompt, length, temperature and seed."""
  import gpt2_jax

  model = byte_model()
  seconds = 0.0
  for prompt, temperature, seed in (('def ', 0.9, 1), ('import os', 0.7, 2)):
    began = time.perf_counter()
    pieces = gpt2_jax.stream(model, prompt, temperature=temperature, seed=seed, max_new_tokens=20)
    next(pieces)
    seconds = time.perf_counter() - began
    list(pieces)
  return seconds


def measure(ours: Worker, theirs: Worker, dtype: str, B: int, length: int, new: int, repeats: int):
  """A row of the table. Raises: Failed."""
  config, rng = GPTConfig(), np.random.default_rng(length)
  asked = dict(prompts=rng.integers(0, config.vocab_size, (B, length)).tolist(), new=new)
  base = dtype.partition('+')[0]  # int8 is compared with their float32
  answers: dict[str, list[dict]] = {'theirs': [], 'ours': []}

  def turn(name, worker, dtype):
    def ask() -> float:
      answers[name].append(worker.ask(dtype=dtype, **asked))
      return answers[name][-1]['all']

    return ask

  sides = {'theirs': turn('theirs', theirs, base), 'ours': turn('ours', ours, dtype)}
  take_turns(sides, 1)
  for each in answers.values():
    each.clear()
  seconds = take_turns(sides, repeats)
  same = all(a['tokens'] == b['tokens'] for a, b in zip(*answers.values()))
  if dtype == 'float32' and not same:
    sys.exit(f'batch {B}, prompt {length}: the tokens differ')
  import jax

  rate = copy_rate() if jax.default_backend() == 'cpu' else device_copy_rate()
  item = 2 if base == 'bfloat16' else 4
  least = floor(config, 1 if 'int8' in dtype else item, item, B, length + new / 2, rate)
  first = {name: statistics.median(a['first'] for a in each) for name, each in answers.items()}
  step = {
    name: statistics.median((a['all'] - a['first']) / (new - 1) for a in each)
    for name, each in answers.items()
  }
  return dict(
    dtype=dtype,
    batch=B,
    prompt=length,
    new=new,
    same_tokens=same,
    seconds=seconds,
    hf_first_ms=first['theirs'] * 1e3,
    first_ms=first['ours'] * 1e3,
    hf_tokens_per_second=B / step['theirs'],
    tokens_per_second=B / step['ours'],
    ratio=ratio(
      [a['all'] - a['first'] for a in answers['theirs']],
      [a['all'] - a['first'] for a in answers['ours']],
    ),
    first_ratio=ratio(*([a['first'] for a in each] for each in answers.values())),
    floor_ms=least * 1e3,
    step_ms=step['ours'] * 1e3,
    of_floor=least / step['ours'],
    copy_bytes_per_second=rate,
  )


def main() -> None:
  flags = argparse.ArgumentParser(description=(__doc__ or '').splitlines()[0])
  flags.add_argument('--dtypes', nargs='+', default=['float32', 'bfloat16', 'float32+int8'])
  flags.add_argument('--batches', nargs='+', type=int, default=[1, 8, 64])
  flags.add_argument('--prompts', nargs='+', type=int, default=[16, 256, 960])
  flags.add_argument('--repeats', type=int, default=3)
  flags.add_argument('--new', type=int, default=32, help='new tokens')
  flags.add_argument('--json')
  flags.add_argument('--no-stream', action='store_true', help='leave the first piece out')
  args = flags.parse_args()

  import gpt2_jax

  with contextlib.ExitStack() as stack:
    rows = stack.enter_context(report(args.json))
    folder = f'{stack.enter_context(tempfile.TemporaryDirectory())}/model'
    gpt2_jax.save_pretrained(gpt2_jax.bind(GPTConfig(), gpt2_jax.init_params(GPTConfig(), 0)), folder)
    ours, theirs = (
      stack.enter_context(
        Worker(f'folder = {folder!r}' + code, **HUGE_PAGES, XLA_PYTHON_CLIENT_PREALLOCATE='false')
      )
      for code in (OURS, THEIRS)
    )
    print(
      f'{"dtype":14s}{"batch":>5s}{"prompt":>7s}{"first, ms: HF":>14s}{"ours":>7s}{"ratio":>7s}'
      f'{"tok/s: HF":>11s}{"ours":>9s}{"ratio":>7s}{"spread":>12s}{"floor ms":>9s}'
      f'{"step ms":>9s}{"of floor":>9s}  same tokens',
      flush=True,
    )
    for dtype, B, length in itertools.product(args.dtypes, args.batches, args.prompts):
      head = f'{dtype:14s}{B:5d}{length:7d}'
      try:
        row = measure(ours, theirs, dtype, B, length, args.new, args.repeats)
      except Failed as why:
        rows.append(dict(dtype=dtype, batch=B, prompt=length, failed=str(why)))
        print(head + f'  {why}', flush=True)
        continue
      rows.append(row)
      middle, low, high = row['ratio']
      print(
        f'{head}{row["hf_first_ms"]:14.0f}{row["first_ms"]:7.0f}{row["first_ratio"][0]:7.2f}'
        f'{row["hf_tokens_per_second"]:11.1f}{row["tokens_per_second"]:9.1f}{middle:7.2f}'
        f'{f"{low:.2f}–{high:.2f}":>12s}{row["floor_ms"]:9.1f}{row["step_ms"]:9.1f}'
        f'{row["of_floor"]:9.2f}  {"yes" if row["same_tokens"] else "no"}',
        flush=True,
      )
  if not args.no_stream:
    print(f'first piece of a second request, tiny model: {first_piece() * 1e3:.1f} ms')


if __name__ == '__main__':
  main()

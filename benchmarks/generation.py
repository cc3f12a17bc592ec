"""Greedy decoding beside Hugging Face's `generate`, on this CPU: tokens a second of both.

    python -m benchmarks.generation

needs the extra `parity` (torch, transformers). Both get the same random weights of GPT-2 124M, in
processes of their own that take turns; the middle of `--repeats` turns counts, the first one, which
compiles, does not. In float32 the tokens must be the same. `floor` is what a token can't be
faster than: the bytes of weights and cache that it reads, by the rate at which this machine copies
(bytes read and written a second), measured in the same run.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

from gpt2_jax.config import GPTConfig

OURS = '''
import dataclasses, jax, gpt2_jax
from gpt2_jax.decoding import generate
loaded = {}
def model_of(dtype):
  base, _, int8 = dtype.partition('+')
  if dtype not in loaded:
    model = gpt2_jax.from_pretrained(folder, dtype=base)
    loaded[dtype] = gpt2_jax.quantize(model) if int8 else model
  return loaded[dtype]
def run(dtype, prompts, new):
  return [r.tokens for r in gpt2_jax.generate(
      model_of(dtype), prompts, max_new_tokens=new, do_sample=False, eos_token_id=())]
'''
THEIRS = '''
import torch, transformers
torch.set_num_threads(threads)
transformers.logging.set_verbosity_error()
loaded = {}
def run(dtype, prompts, new):
  if dtype not in loaded:
    loaded[dtype] = transformers.GPT2LMHeadModel.from_pretrained(
        folder, dtype=getattr(torch, dtype)).eval()
    loaded[dtype].generation_config.eos_token_id = None
  ids = torch.tensor(prompts)
  with torch.inference_mode():
    out = loaded[dtype].generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new,
                                 do_sample=False, pad_token_id=0)
  return out[:, ids.shape[1]:].tolist()
'''
SERVE = '''
import json, os, sys, time
folder, threads = sys.argv[1], len(os.sched_getaffinity(0))
%s
for line in sys.stdin:
  asked = json.loads(line)
  began = time.perf_counter()
  tokens = run(**asked)
  print(json.dumps({'seconds': time.perf_counter() - began, 'tokens': tokens}), flush=True)
'''


class Worker:
  """A process that generates when asked to."""

  def __init__(self, code: str, folder: str):
    self.process = subprocess.Popen([sys.executable, '-c', SERVE % code, folder], text=True,
                                    stdin=subprocess.PIPE, stdout=subprocess.PIPE)

  def ask(self, **request) -> dict:
    assert self.process.stdin and self.process.stdout
    print(json.dumps(request), file=self.process.stdin, flush=True)
    return json.loads(self.process.stdout.readline())


def copy_rate(threads: int, size: int = 1 << 29) -> float:
  """Bytes read and written a second by copying `size` bytes, all threads together, at best."""
  parts = [(np.ones(size // threads, np.uint8), np.empty(size // threads, np.uint8))
           for _ in range(threads)]
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


def floor(
    config: GPTConfig, weight_bytes: float, item: int, B: int, length: float, rate: float) -> float:
  """Seconds that reading weights and cache takes for one token of each of B rows."""
  per_layer = 4 * config.n_embd**2 + 2 * config.n_embd * config.F
  weights = weight_bytes * (config.n_layer * per_layer + config.vocab_size * config.n_embd)
  return (weights + 2 * config.n_layer * config.n_embd * length * item * B) / rate


def first_token() -> float:
  """Seconds to the first piece of a second request: other prompt, length, temperature and seed."""
  import gpt2_jax
  from configs import tiny
  from gpt2_jax import tokenizer
  sizes = tiny.get_config().model
  config = GPTConfig(vocab_size=257, n_positions=sizes.n_positions, n_embd=sizes.n_embd,
                     n_layer=sizes.n_layer, n_head=sizes.n_head)
  model = gpt2_jax.bind(config, gpt2_jax.init_params(config, 0))
  model.tokenizer = tokenizer.load('byte')
  seconds = 0.0
  for prompt, temperature, seed in (('def ', 0.9, 1), ('import os', 0.7, 2)):
    began = time.perf_counter()
    pieces = gpt2_jax.stream(model, prompt, temperature=temperature, seed=seed, max_new_tokens=20)
    next(pieces)
    seconds = time.perf_counter() - began
    list(pieces)
  return seconds


def main() -> None:
  flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  flags.add_argument('--repeats', type=int, default=5)
  flags.add_argument('--new', type=int, default=64, help='new tokens')
  flags.add_argument('--json', type=Path, help='write the rows here as well')
  flags = flags.parse_args()

  import gpt2_jax
  config, threads = GPTConfig(), len(os.sched_getaffinity(0))
  rows = []
  with tempfile.TemporaryDirectory() as folder:
    params = gpt2_jax.init_params(config, 0)
    gpt2_jax.save_pretrained(gpt2_jax.bind(config, params), f'{folder}/model')
    del params
    ours, theirs = (Worker(code, f'{folder}/model') for code in (OURS, THEIRS))
    print(f'{"dtype":14s}{"batch":>6s}{"prompt":>7s}{"HF tok/s":>10s}{"ours":>8s}{"ratio":>7s}'
          f'{"floor ms":>10s}{"ours ms":>9s}{"of floor":>9s}  same tokens', flush=True)
    for dtype in ('float32', 'bfloat16', 'float32+int8'):
      for B in (1, 8):
        for length in (16, 256):
          rng = np.random.default_rng(length)
          prompts = rng.integers(0, config.vocab_size, (B, length)).tolist()
          asked = dict(prompts=prompts, new=flags.new)
          peer = {'dtype': dtype.partition('+')[0]}  # int8 is compared with their float32
          pairs = [(theirs.ask(**peer, **asked), ours.ask(dtype=dtype, **asked))
                   for _ in range(flags.repeats + 1)][1:]
          their_s, our_s = (statistics.median(pair[i]['seconds'] for pair in pairs) for i in (0, 1))
          same = all(a['tokens'] == b['tokens'] for a, b in pairs)
          if dtype == 'float32' and not same:
            sys.exit(f'batch {B}, prompt {length}: the tokens differ')
          rate, item = copy_rate(threads), 2 if dtype == 'bfloat16' else 4
          least = floor(config, 1 if 'int8' in dtype else item, item, B, length + flags.new / 2, rate)
          step = our_s / flags.new
          rows.append(dict(dtype=dtype, batch=B, prompt=length, new=flags.new,
                           hf_tokens_per_second=B * flags.new / their_s,
                           tokens_per_second=B * flags.new / our_s, ratio=their_s / our_s,
                           floor_ms=least * 1e3, step_ms=step * 1e3, copy_gb_per_second=rate / 1e9,
                           same_tokens=same,
                           seconds=[[p['seconds'] for p in pair] for pair in pairs]))
          print(f'{dtype:14s}{B:6d}{length:7d}{B * flags.new / their_s:10.1f}'
                f'{B * flags.new / our_s:8.1f}{their_s / our_s:7.2f}{least * 1e3:10.1f}'
                f'{step * 1e3:9.1f}{least / step:9.2f}  {"yes" if same else "no"}', flush=True)
  print(f'first piece of a second request, tiny model: {first_token() * 1e3:.1f} ms')
  if flags.json:
    flags.json.write_text(json.dumps(rows, indent=1))


if __name__ == '__main__':
  main()

"""What a save costs the loop, in units of steps, and how long a restore takes.

    python -m benchmarks.checkpoint_stall [tiny] [30m] [--saves N] [--gap STEPS]

The loop is that of training: a step is dispatched, then the metrics of the one before are fetched, so
that a save finds the device one step behind. `blocked`: how long `Checkpoints.save` keeps the loop
from dispatching. `all`: how much longer than without saves the loop took, a save; on a CPU this
contains the work of writing, which runs on the cores that train.
"""

import argparse
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

from configs import tiny
from gpt2_jax.checkpoint import Checkpoints
from gpt2_jax.counts import num_params
from gpt2_jax.training.plan import make_plan


def config_of(name: str):
  config = tiny.get_config()
  config.data.tokenizer = 'byte'
  config.model.vocab_size = 2048
  if name == '30m':
    config.model.update(n_embd=384, n_layer=6, n_head=6, vocab_size=50257)
    config.train.global_batch_tokens = 4 * 256
  return config


def measure(name: str, saves: int, gap: int) -> None:
  plan = make_plan(config_of(name), devices=jax.devices()[:1])
  rng = np.random.default_rng(0)
  folder = Path(tempfile.mkdtemp())
  with jax.set_mesh(plan.mesh):
    step, state = plan.compile_train_step(), plan.init_state()
    tokens = jax.device_put(rng.integers(
        0, 2048, (plan.A, plan.G // plan.A, plan.T + 1)).astype(np.int32), plan.batch_sharding)
    checkpoints = Checkpoints(folder, keep=2)

    def loop(state, first: int, count: int, save: bool):
      """Seconds of `count` steps, and of the blocking part of a save in their middle."""
      blocked, began, pending = 0.0, time.monotonic(), None
      for n in range(count):
        state, values = step(state, tokens)
        if pending is not None:
          jax.device_get(pending)
        pending = values
        if save and n == 0:
          jax.device_get(values)  # as in training: recorded before it is saved
          pending, start = None, time.monotonic()
          checkpoints.save(first, state.items(), {})
          blocked = time.monotonic() - start
      jax.device_get(pending)
      return state, time.monotonic() - began, blocked

    for n in range(2):  # the first save also makes the folder and the threads
      state, *_ = loop(state, n + 1, gap, True)
      checkpoints.wait()
    plain, with_save, blocked = [], [], []
    for n in range(saves):  # in turns, since a shared machine drifts
      state, seconds, _ = loop(state, 0, gap, False)
      plain.append(seconds / gap)
      state, seconds, stall = loop(state, 10 + n, gap, True)
      with_save.append(seconds)
      blocked.append(stall)
      checkpoints.wait()
    one = statistics.median(plain)
    more = statistics.median(with_save) - gap * one
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state.items()))
    began = time.monotonic()
    last = checkpoints.whole_step()
    checked = time.monotonic() - began
    began, abstract = time.monotonic(), plan.abstract_state()
    jax.block_until_ready(checkpoints.restore(last, abstract.items()))
    restored = time.monotonic() - began
    checkpoints.close()
  shutil.rmtree(folder)
  stall = statistics.median(blocked)
  print(f'{name}: {num_params(plan.model):,} parameters, {size / 2**20:,.0f} MiB a checkpoint, '
        f'{jax.devices()[0].device_kind}')
  print(f'  step {one * 1e3:,.0f} ms (median of {saves} x {gap})')
  print(f'  save: blocked {stall * 1e3:,.0f} ms = {stall / one:.2f} steps (worst '
        f'{max(blocked) / one:.2f}); all {more * 1e3:,.0f} ms = {more / one:.2f} steps')
  print(f'  resume: check {checked * 1e3:,.0f} ms, restore {restored * 1e3:,.0f} ms', flush=True)


if __name__ == '__main__':
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
  parser.add_argument('names', nargs='*', default=['tiny', '30m'])
  parser.add_argument('--saves', type=int, default=7)
  parser.add_argument('--gap', type=int, default=4)
  args = parser.parse_args()
  for each in args.names:
    measure(each, args.saves, args.gap)

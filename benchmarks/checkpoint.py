"""What a save costs the loop, in units of steps; how long a restore takes; the memory of both.

    python -m benchmarks.checkpoint [tiny] [30m] [--saves N] [--gap STEPS] [--json FILE]
        [--workdir gs://BUCKET/DIR]

The loop is that of training: a step is dispatched, then the metrics of the one before are fetched, so
that a save finds the device one step behind. `blocked`: how long `Checkpoints.save` keeps the loop
from dispatching. `all`: how much longer than without saves the loop took, a save; on a CPU this
contains the work of writing, which runs on the cores that train.

Beside them a plain copy: the same bytes written to one file and synced, and read from it. Both
reads find the files in memory. `extra`: the largest resident memory of the process meanwhile, beyond
what it had before, in units of the checkpoint (Linux only); a restore has the state itself in it.
With --workdir the checkpoints lie there; the plain copies stay on this disk.
"""

import argparse
import contextlib
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np

from benchmarks.common import report
from configs import tiny
from gpt2_jax.checkpoints.orbax_store import Checkpoints
from gpt2_jax.model.sizes import num_params
from gpt2_jax.training.run_plan import make_plan


def config_of(name: str):
  config = tiny.get_config()
  config.data.tokenizer = 'byte'
  config.model.vocab_size = 2048
  if name == '30m':
    config.model.update(n_embd=384, n_layer=6, n_head=6, vocab_size=50257)
    config.train.global_batch_tokens = 4 * 256
  return config


def resident(key: str) -> int:
  """VmRSS: bytes of resident memory; VmHWM: the most since the last `extra_memory` began."""
  with contextlib.suppress(OSError):
    return 1024 * int(Path('/proc/self/status').read_text().partition(f'{key}:')[2].split()[0])
  return 0


@contextlib.contextmanager
def extra_memory() -> Iterator[list[int]]:
  """Yields a list that afterwards holds the most bytes there were within, beyond those before."""
  with contextlib.suppress(OSError):
    Path('/proc/self/clear_refs').write_text('5')  # begins a new peak
  before, found = resident('VmRSS'), []
  yield found
  found.append(resident('VmHWM') - before)


def plain_copy(leaves: list, path: Path) -> tuple[float, float]:
  """Seconds to write arrays to a file, synced, and to read them again."""
  began = time.monotonic()
  with open(path, 'wb', buffering=0) as f:
    for leaf in leaves:
      f.write(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8))
    os.fsync(f.fileno())
  written = time.monotonic()
  path.read_bytes()
  return written - began, time.monotonic() - written


def measure(name: str, saves: int, gap: int, folder: Path, workdir: str | None = None) -> dict:
  plan = make_plan(config_of(name), devices=jax.devices()[:1])
  rng = np.random.default_rng(0)
  with jax.set_mesh(plan.mesh):
    step, state = plan.compile_train_step(), plan.init_state()
    tokens = jax.device_put(
      rng.integers(0, 2048, (plan.A, plan.G // plan.A, plan.T + 1)).astype(np.int32),
      plan.batch_sharding,
    )
    checkpoints = Checkpoints(folder if workdir is None else f'{workdir}/{name}', keep=2)

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
    plain, with_save, blocked, copies = [], [], [], []
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state.items()))
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(state.items())]
    for n in range(saves):  # in turns, since a shared machine drifts
      copies.append(plain_copy(leaves, folder / 'plain'))
      state, seconds, _ = loop(state, 0, gap, False)
      plain.append(seconds / gap)
      state, seconds, stall = loop(state, 10 + n, gap, True)
      with_save.append(seconds)
      blocked.append(stall)
      checkpoints.wait()
    del leaves
    with extra_memory() as saving:
      began = time.monotonic()
      checkpoints.save(10 + saves, state.items(), {})
      checkpoints.wait()
      saved = time.monotonic() - began
    abstract = plan.abstract_state()
    restored, checked = [], []
    for _ in range(saves):
      began = time.monotonic()
      last = checkpoints.whole_step()
      checked.append(time.monotonic() - began)
      began = time.monotonic()
      with extra_memory() as restoring:
        jax.block_until_ready(checkpoints.restore(last, abstract.items()))
      restored.append(time.monotonic() - began)
    checkpoints.close()
  one = statistics.median(plain)
  more = statistics.median(with_save) - gap * one
  write, read = map(statistics.median, zip(*copies))
  row = dict(
    name=name,
    parameters=num_params(plan.model),
    bytes=size,
    device=jax.devices()[0].device_kind,
    step_seconds=plain,
    blocked_seconds=blocked,
    blocked_steps=statistics.median(blocked) / one,
    all_seconds=more,
    save_seconds=saved,
    save_extra=saving[0] / size,
    write_seconds=write,
    check_seconds=statistics.median(checked),
    restore_seconds=statistics.median(restored),
    restore_extra=restoring[0] / size,
    read_seconds=read,
  )
  print(
    f'{name}: {row["parameters"]:,} parameters, {size / 2**20:,.0f} MiB a checkpoint, {row["device"]}'
  )
  print(f'  step {one * 1e3:,.0f} ms (median of {saves} x {gap})')
  print(
    f'  save: blocked {statistics.median(blocked) * 1e3:,.0f} ms = {row["blocked_steps"]:.2f} '
    f'steps (worst {max(blocked) / one:.2f}); all {more * 1e3:,.0f} ms = {more / one:.2f} steps; '
    f'alone {saved * 1e3:,.0f} ms, plain copy {write * 1e3:,.0f} ms; '
    f'extra {row["save_extra"]:.2f}'
  )
  print(
    f'  resume: check {row["check_seconds"] * 1e3:,.0f} ms, restore '
    f'{row["restore_seconds"] * 1e3:,.0f} ms, plain read {read * 1e3:,.0f} ms; '
    f'extra {row["restore_extra"]:.2f}',
    flush=True,
  )
  return row


def main() -> None:
  flags = argparse.ArgumentParser(description=(__doc__ or '').splitlines()[0])
  flags.add_argument('names', nargs='*', default=['tiny', '30m'])
  flags.add_argument('--saves', type=int, default=7)
  flags.add_argument('--gap', type=int, default=4, help='steps from one save to the next')
  flags.add_argument('--workdir', help='of the checkpoints; default: a temporary folder')
  flags.add_argument('--json')
  args = flags.parse_args()
  with report(args.json) as rows:
    for name in args.names:
      with tempfile.TemporaryDirectory() as folder:
        rows.append(measure(name, args.saves, args.gap, Path(folder), args.workdir))


if __name__ == '__main__':
  main()

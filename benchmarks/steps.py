"""A served step beside a token of `generate` with as many rows, by dtype, size and number of slots.

    python -m benchmarks.steps [--sizes tiny 124M] [--dtypes float32 bfloat16 int8] [--slots 1 8 32]
                               [--steps 16] [--repeats 3] [--json FILE]

In one process, in turns, on random weights, prompts of 16 ids, greedy. `served` is the program that a
server runs for one token of every slot, with its cache for the model's whole context; `generate` the
difference of a call of many tokens and one of a single one. Seconds are the clock's and the
processor's of all threads: on a machine that others use, the latter say more. `prefill` reads the
prompt of one row.
"""

import argparse
import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax

import gpt2_jax
from benchmarks.common import ratio, report, take_turns
from gpt2_jax.decoding.text_stream import Pieces
from gpt2_jax.serving.device_batch import DeviceBatch
from gpt2_jax.serving.requests import Prompt, Row
from gpt2_jax.serving.slot_state import choice_of
from gpt2_jax.tokenizer import bpe

SIZES: dict[str, dict[str, Any]] = {
  'tiny': dict(n_layer=6, n_embd=384, n_head=6, n_positions=256, vocab_size=257),
  '124M': dict(n_layer=12, n_embd=768, n_head=12, n_positions=1024, vocab_size=50257),
}
PROMPT = [*range(16)]


def random_model(size: str, dtype: str) -> gpt2_jax.Pretrained:
  """`dtype`: of parameters; `int8`: float32 in 8 bits, `bfloat16+int8`: activations in bfloat16."""
  wide = dtype.removesuffix('int8').removesuffix('+') or 'float32'
  config = gpt2_jax.GPTConfig(**SIZES[size], dtype=wide)
  model = gpt2_jax.bind(config, gpt2_jax.init_params(config, 0))
  if dtype.endswith('int8'):
    model = gpt2_jax.quantize(model)
  return gpt2_jax.Pretrained(model, bpe.load('byte'))


def timed(f: Callable[[], Any]) -> tuple[float, float]:
  """Seconds of the clock and of the processor that a call takes."""
  began, used = time.perf_counter(), time.process_time()
  f()
  return time.perf_counter() - began, time.process_time() - used


class Generated:
  """Tokens of `generate` for so many rows."""

  def __init__(self, model: gpt2_jax.Pretrained, rows: int, steps: int):
    self.model, self.rows, self.steps = model.model, rows, steps
    for tokens in (1, 1 + steps):  # they compile
      self._write(tokens)

  def _write(self, tokens: int) -> None:
    gpt2_jax.generate(
      self.model, [PROMPT] * self.rows, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False
    )

  def turn(self) -> tuple[float, float]:
    one, all_ = (timed(functools.partial(self._write, n)) for n in (1, 1 + self.steps))
    return (all_[0] - one[0]) / self.steps, (all_[1] - one[1]) / self.steps


class Served:
  """Steps of a server whose slots are all in use."""

  def __init__(self, model: gpt2_jax.Pretrained, slots: int, steps: int):
    self.batch, self.steps = DeviceBatch('model', model, slots), steps
    pieces, greedy = Pieces(model.tokenizer), choice_of(model.config.vocab_size, {}, greedy=True)
    self.batch.warm(pieces)
    rows = [Row(Prompt(PROMPT, 1), 10**6, i, 0, greedy, pieces) for i in range(slots)]
    self.batch.place(rows)
    self.prefills = [timed(functools.partial(self._read, row)) for row in rows]
    for row in rows:
      self.batch.admit(row)
      row.admitted = True

  def _read(self, row: Row) -> None:
    self.batch.read_chunk(row)
    jax.block_until_ready(row.prompt.cache)

  def _step(self) -> None:
    pending = self.batch.step()
    assert pending is not None
    jax.block_until_ready(pending.result.tokens_B)

  def turn(self) -> tuple[float, float]:
    each = [timed(self._step) for _ in range(self.steps)]
    clock, processor = zip(*each)
    return statistics.median(clock), statistics.median(processor)


def measured(served: Served, generated: Generated, repeats: int) -> dict:
  """What the two take, in turns."""
  sides: dict = {'generate': generated.turn, 'served': served.turn}
  turns: dict = take_turns(sides, repeats)
  row: dict = dict(blocks=len(served.batch.slots.cache.layers[0][0]))
  for i, kind in enumerate(('clock', 'processor')):
    theirs, ours = ([turn[i] for turn in turns[name]] for name in sides)
    row |= {f'generate_{kind}_s': theirs, f'served_{kind}_s': ours}
    row[f'times_{kind}'] = ratio(ours, theirs)
    row[f'prefill_{kind}_s'] = statistics.median(read[i] for read in served.prefills)
  return row


def line(row: dict) -> str:
  parts = [f'{row["size"]:5s} {row["dtype"]:14s}{row["slots"]:4d} slots']
  for kind in ('clock', 'processor'):
    generate, served = (
      1e3 * statistics.median(row[f'{side}_{kind}_s']) for side in ('generate', 'served')
    )
    times = row[f'times_{kind}'][0]
    parts.append(f'{kind}: generate {generate:.1f} ms, served {served:.1f}, times {times:.2f}')
  return '; '.join(parts) + f'; prefill {1e3 * row["prefill_processor_s"]:.0f}'


def main() -> None:
  flags = argparse.ArgumentParser(description=(__doc__ or '').splitlines()[0])
  flags.add_argument('--sizes', nargs='+', choices=SIZES, default=[*SIZES])
  flags.add_argument('--dtypes', nargs='+', default=['float32', 'bfloat16', 'int8'])
  flags.add_argument('--slots', nargs='+', type=int, default=[1, 8, 32])
  flags.add_argument('--steps', type=int, default=16, help='of a turn')
  flags.add_argument('--repeats', type=int, default=3, help='turns of each')
  flags.add_argument('--json')
  args = flags.parse_args()
  with report(args.json) as rows:
    for size, dtype in ((size, dtype) for size in args.sizes for dtype in args.dtypes):
      model = random_model(size, dtype)
      for slots in args.slots:
        served = Served(model, slots, args.steps)
        found = measured(served, Generated(model, slots, args.steps), args.repeats)
        rows.append(dict(size=size, dtype=dtype, slots=slots) | found)
        print(line(rows[-1]), flush=True)


if __name__ == '__main__':
  main()

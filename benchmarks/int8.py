"""What weights in int8 cost: the held-out loss of a model as it is, in bfloat16 and in int8.

    python -m benchmarks.int8 --checkpoint runs/tiny --store data/stdlib-3.11.7-bpe-2048

Windows of the model's whole context, each held-out token predicted once.
"""

import argparse
import json
import math
import os
from pathlib import Path

import jax
import numpy as np

import gpt2_jax
from gpt2_jax.data.token_store import Split, open_store
from gpt2_jax.model.gpt2 import bind
from gpt2_jax.model.pretrained_model import params_of
from gpt2_jax.training.step import nll

ROWS = 8


def held_out_loss(model: gpt2_jax.GPT2, split: Split, tokens: int | None) -> tuple[float, int]:
  """Mean loss in nats, and over how many tokens."""
  config, T = model.config, model.config.n_positions
  params = params_of(model)
  losses = jax.jit(lambda params, tokens_BT1: nll(bind(config, params), tokens_BT1).each)
  count = min(len(split) - 1, tokens or len(split))
  total, seen = 0.0, 0
  for first in range(0, count, ROWS * T):
    rows = np.zeros((ROWS, T + 1), np.int32)
    real = np.zeros((ROWS, T), bool)
    for row, start in enumerate(range(first, min(first + ROWS * T, count), T)):
      window = split.read(start, min(start + T, count) + 1)
      rows[row, : len(window)], real[row, : len(window) - 1] = window, True
    total += float(np.asarray(losses(params, rows), np.float64)[real].sum())
    seen += int(real.sum())
  return total / seen, seen


def main() -> None:
  flags = argparse.ArgumentParser(description=(__doc__ or '').splitlines()[0])
  flags.add_argument('--checkpoint', required=True)
  flags.add_argument('--store', required=True, help='folder of a token store (gpt2-jax prepare)')
  flags.add_argument('--split', default='val')
  flags.add_argument('--tokens', type=int, help='the most tokens to predict')
  flags.add_argument('--json', type=Path, help='write the rows here as well')
  args = flags.parse_args()
  store = open_store(args.store)
  model = gpt2_jax.from_pretrained(args.checkpoint)
  forms = {
    'float32': model,
    'bfloat16': gpt2_jax.from_pretrained(args.checkpoint, dtype='bfloat16'),
    'int8': gpt2_jax.quantize(model),
  }
  rows = []
  for name, form in forms.items():
    loss, tokens = held_out_loss(form, store.splits[args.split], args.tokens)
    size = sum(x.nbytes for x in jax.tree.leaves(params_of(form)))
    rows.append(
      dict(
        form=name,
        bytes=size,
        tokens=tokens,
        loss=loss,
        perplexity=math.exp(loss),
        store_sha256=store.sha256,
      )
    )
    print(
      f'{name:10s}{size:>14,} bytes  loss {loss:.5f}  perplexity {math.exp(loss):.4f}  '
      f'{math.exp(loss - rows[0]["loss"]):.5f} of float32  ({tokens:,} tokens)',
      flush=True,
    )
  if args.json:
    os.makedirs(args.json.parent, exist_ok=True)
    args.json.write_text(json.dumps(rows, indent=1))


if __name__ == '__main__':
  main()

"""Times of recording and patching on a CPU, beside that of a forward pass.

    python benchmarks/interventions.py

GPT-2 small with random weights, float32, 8 rows of 16 tokens. Prints one JSON object a line: seconds,
the median of a few, of a forward pass, one that records everything, all residual patches (layer x
position), all head patches (layer x head), and of one prompt of 15 tokens all 2,160 (layer, head,
position).
"""

import json
import statistics
import time

import jax
import numpy as np

from gpt2_jax.interpretation.patching import patch
from gpt2_jax.model.config import GPTConfig
from gpt2_jax.model.edits import run
from gpt2_jax.model.gpt2 import bind, init_params
from gpt2_jax.model.sites import SITES

B, T, V = 8, 16, 50257
RIGHT, WRONG = 464, 262


def put(what: str, f, repeats: int) -> None:
  """Prints the median of some timed calls, after one that isn't."""
  f()
  times = []
  for _ in range(repeats):
    begun = time.monotonic()
    f()
    times.append(time.monotonic() - begun)
  print(json.dumps({'what': what, 'seconds': round(statistics.median(times), 3)}), flush=True)


def tokens() -> tuple[np.ndarray, np.ndarray]:
  """Clean and corrupted ids, [B, T] both."""
  clean, corrupted = np.random.default_rng(0).integers(0, V, (2, B, T))
  return clean, corrupted


def main() -> None:
  config = GPTConfig(embd_pdrop=0, attn_pdrop=0, resid_pdrop=0, dtype='float32')
  model, (clean, corrupted) = bind(config, init_params(config, 0)), tokens()
  every = tuple(name for name in SITES if name != 'result')
  metric = lambda logits_BV: (logits_BV[:, RIGHT] - logits_BV[:, WRONG]).mean()
  put('forward', lambda: jax.block_until_ready(run(model, clean)), 5)
  put('record everything', lambda: jax.block_until_ready(run(model, clean, record=every)), 5)
  put('192 residual patches', lambda: patch(model, clean, corrupted, metric), 3)
  put('144 head patches', lambda: patch(model, clean, corrupted, metric, over='z'), 3)
  one = (clean[:1, :15], corrupted[:1, :15])
  by = ('head', 'position')
  put('2,160 patches', lambda: patch(model, *one, metric, over='z', by=by), 2)


if __name__ == '__main__':
  main()

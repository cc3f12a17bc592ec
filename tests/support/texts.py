"""Made-up text."""

import numpy as np

WORDS = (
  'the a of model token layer head width loss data mesh batch step seed cache key value query '
  'norm scale gate sum mean train test held out big small red green'
).split()


def make_text(rng: np.random.Generator, words: int) -> str:
  lines = [' '.join(rng.choice(WORDS, 8)) for _ in range(max(1, words // 8))]
  return '\n'.join(lines) + '\n'

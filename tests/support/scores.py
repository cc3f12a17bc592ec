"""Made-up scores and histories for processors."""

import dataclasses
import functools
import math

import jax
import numpy as np

from gpt2_jax.decoding.row_state import History

INF = math.inf


EOS, STOP = 2, 7


@jax.jit
def apply(processors, scores_BV, history):
  return functools.reduce(lambda x, processor: processor(x, history), processors, scores_BV)


def make_history(tokens_BS, lengths_B, prompt_B, limits_B=100, **more) -> History:
  B = len(tokens_BS)
  fields = {field.name: 0 for field in dataclasses.fields(History)}
  fields |= (
    dict(
      lengths_B=lengths_B, prompt_B=prompt_B, limits_B=limits_B, context_B=1000, which_B=np.arange(B)
    )
    | more
  )
  fields = {name: np.zeros(B, np.int32) + np.asarray(x, np.int32) for name, x in fields.items()}
  return History(**fields | dict(tokens_BS=np.asarray(tokens_BS, np.int32)))


def random_history(rng, B, S, V, **more) -> History:
  """Rows of few different ids, so that much occurs twice; what lies beyond them means nothing."""
  lengths_B = rng.integers(1, S + 1, B)
  tokens_BS = rng.integers(0, rng.integers(1, 5), (B, S))
  beyond_BS = np.arange(S) >= lengths_B[:, None]
  tokens_BS = np.where(beyond_BS, rng.integers(0, V, (B, S)), tokens_BS)
  prompt_B = rng.integers(1, lengths_B + 1)
  limits_B = lengths_B - prompt_B + rng.integers(1, 3, B)
  return make_history(tokens_BS, lengths_B, prompt_B, limits_B, **more)


def random_scores(rng, B, V, forbidden=0.3):
  scores_BV = rng.normal(size=(B, V)) * 3
  scores_BV[rng.random((B, V)) < forbidden] = -INF
  scores_BV[:, V // 2] = 1  # never all of them
  return scores_BV.astype(np.float32)

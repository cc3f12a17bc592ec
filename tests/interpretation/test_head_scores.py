"""Scores of heads on texts that come twice, and composition, by plain products in float64."""

import itertools

import jax
import numpy as np
import pytest
from support.arrays import assert_close
from support.models import tiny_gpt2

from gpt2_jax.core.errors import UserError
from gpt2_jax.interpretation.head_scores import (
  circuits,
  composition,
  head_scores,
  pattern_scores,
  repeated_tokens,
)
from gpt2_jax.model.edits import run
from gpt2_jax.model.gpt2 import bind, init_params

CONFIG = tiny_gpt2()


def test_tokens_come_twice():
  tokens = repeated_tokens(11, 40, 10, bos=3)
  assert tokens.shape == (40, 21) and (tokens[:, 0] == 3).all()
  np.testing.assert_array_equal(tokens[:, 1:11], tokens[:, 11:])
  assert all(set(row) == set(range(11)) - {3} for row in tokens[:, 1:11])
  with pytest.raises(UserError, match='1 … 10'):
    repeated_tokens(11, 2, 11, bos=3)


def test_heads_made_to_attend_somewhere():
  """Four heads, each of which attends to one key alone: 1 in its score, and 0 in the others."""
  length, T = 5, 11
  keys = np.stack(
    [np.arange(T) - 1, np.arange(T) - length, np.arange(T) - length + 1, 0 * np.arange(T)]
  )
  pattern = np.zeros((1, 2, 4, T, T), np.float32)
  for head, t in itertools.product(range(4), range(T)):
    pattern[0, :, head, t, max(keys[head, t], 0)] = 1
  have = np.stack(pattern_scores(pattern, length))[:, 0]
  np.testing.assert_array_equal(have, np.eye(4))


def test_scores_of_a_model_are_loops_over_its_pattern():
  model = bind(CONFIG, init_params(CONFIG, 0))
  scores = head_scores(model, rows=2, length=4, seed=1, bos=0)
  tokens = repeated_tokens(97, 2, 4, seed=1, bos=0)
  pattern = np.asarray(run(model, tokens, record=('pattern',))[1]['pattern'])
  for have, key in zip(scores, [lambda t: t - 1, lambda t: t - 4, lambda t: t - 3, lambda t: 0]):
    want = np.mean([pattern[:, :, :, t, key(t)] for t in range(5, 9)], (0, 2))
    assert_close(have, want)
  with pytest.raises(UserError, match='at most 16'):
    head_scores(model, length=17)


def test_composition_is_that_of_whole_matrices():
  params = init_params(CONFIG, 0)
  have, (ov, qk) = composition(CONFIG, params), circuits(CONFIG, params)
  attn = jax.tree.map(lambda x: np.asarray(x, np.float64), params['h']['attn'])
  w, o = attn['c_attn']['weight'], attn['c_proj']['weight']
  L, N = CONFIG.n_layer, CONFIG.n_head
  OV = {(i, j): w[i, :, 2, j] @ o[i, j] for i in range(L) for j in range(N)}
  QK = {(i, j): w[i, :, 0, j] @ w[i, :, 1, j].T for i in range(L) for j in range(N)}
  assert_close(ov, np.reshape(list(OV.values()), ov.shape))
  assert_close(qk, np.reshape(list(QK.values()), qk.shape))
  norm = np.linalg.norm
  for name, reader in dict(q=QK, k={i: m.T for i, m in QK.items()}, v=OV).items():
    score = lambda a, b: norm(OV[a] @ reader[b]) / norm(OV[a]) / norm(reader[b])
    want = [score(a, b) if a[0] < b[0] else 0 for a in OV for b in OV]
    assert_close(getattr(have, f'{name}_LNMP'), np.reshape(want, (L, N, L, N)))

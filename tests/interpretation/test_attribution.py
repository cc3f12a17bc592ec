"""Shares of a logit add up to it, and each is what it would be without the part."""

import dataclasses

import numpy as np
import pytest
from support.arrays import assert_close
from support.models import noisy_params, tiny_gpt2

from gpt2_jax.core.errors import UserError
from gpt2_jax.interpretation.attribution import logit_shares
from gpt2_jax.model.edits import run
from gpt2_jax.model.gpt2 import bind, init_params

X = np.random.default_rng(0).integers(0, 97, (3, 7))


@pytest.mark.parametrize('tied', [True, False])
def test_shares_add_up_to_the_logits(tied):
  config = dataclasses.replace(tiny_gpt2(), tie_word_embeddings=tied)
  model = bind(config, noisy_params(config))
  rows, read, right, wrong = np.arange(3), np.array([6, 2, 0]), np.array([1, 2, 96]), 5
  logits, found = run(model, X, record=('result', 'ln_final.scale'))
  logits = np.asarray(logits)[rows, read]
  assert_close(logit_shares(model, X, right, read=read).total_B, logits[rows, right])
  shares = logit_shares(model, X, right, wrong, read=read)
  assert_close(shares.total_B, logits[rows, right] - logits[:, wrong])

  # a head's share, by hand
  result_BD = np.asarray(found['result'])[1, rows, read, 2]
  normed_BD = (result_BD - result_BD.mean(-1, keepdims=True)) * np.asarray(model.ln_f.weight[...])
  normed_BD /= np.asarray(found['ln_final.scale'])[rows, read]
  table = np.asarray(model.output_table.weight[...])
  assert_close(shares.heads_LNB[1, 2], (normed_BD * (table[right] - table[wrong])).sum(-1))


def test_what_does_not_exist_is_an_error():
  config = tiny_gpt2()
  model = bind(config, init_params(config, 0))
  with pytest.raises(UserError, match='vocabulary of 97'):
    logit_shares(model, X, 97)
  with pytest.raises(UserError, match='0 … 6'):
    logit_shares(model, X, 1, read=7)

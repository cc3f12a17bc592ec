"""What a model would say next without some of its heads."""

from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
from scipy.special import log_softmax

from gpt2_jax.core.errors import UserError, brief
from gpt2_jax.model import text_batches
from gpt2_jax.model.edits import Edit, run
from gpt2_jax.model.pretrained_model import Pretrained


def without_heads(model: Any, heads: Iterable[tuple[int, int]]) -> Edit:
  """The edit in which these heads, (layer, head) each, write nothing. One program serves any of them.

  Raises:
    UserError: there is no such head.
  """
  L, N = model.config.n_layer, model.config.n_head
  keep_L11N1 = np.ones((L, 1, 1, N, 1), np.float32)
  for layer, head in heads:
    if not (0 <= layer < L and 0 <= head < N):
      raise UserError(
        f'there is no head {brief([layer, head])}: layers are 0 … {L - 1}, heads 0 … {N - 1}.'
      )
    keep_L11N1[layer, 0, 0, head] = 0
  return Edit('z', 'scale', keep_L11N1)


def next_logprobs(
  model: Pretrained, texts: Any, edit: Edit, *, allow_special: bool = False
) -> np.ndarray:
  """Log-probabilities of what comes after each text, under an edit that is of no position, [B, V]."""
  rows = text_batches.encode(texts, model.tokenizer, model.config, allow_special=allow_special)
  tokens_BT, lengths_B = text_batches.pad(rows, model.config.n_positions)
  logits_BTV, _ = run(model, tokens_BT, edit)
  logits_BV = jax.device_get(logits_BTV[np.arange(len(rows)), lengths_B - 1])
  return log_softmax(logits_BV.astype(np.float64), axis=-1)

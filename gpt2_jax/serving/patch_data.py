"""What the patching page shows: what patches restore, and what comes next without some heads."""

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from gpt2_jax.core.errors import UserError
from gpt2_jax.interpretation.ablated_heads import next_logprobs, without_heads
from gpt2_jax.interpretation.patching import axes_of, check_over
from gpt2_jax.interpretation.prompt_pairs import answer_ids, pair_ids, patch_texts
from gpt2_jax.model.edits import AXES, sizes_of
from gpt2_jax.model.pretrained_model import Pretrained
from gpt2_jax.serving.attention_data import token_text
from gpt2_jax.serving.schemas import AblateRequest, ApiError, Limits, PatchRequest


@contextlib.contextmanager
def naming(param: str) -> Iterator[None]:
  """Turns a `UserError` into an answer that names a field of the request."""
  try:
    yield
  except UserError as e:
    raise ApiError(400, f'{param}: {e}', param=param) from None


def patch_data(model: Pretrained, asked: PatchRequest, limits: Limits) -> dict[str, Any]:
  """What patches between two texts restore, as JSON can hold it.

  Raises:
    ApiError: a text or an answer can't be used, or there would be too many patches.
  """
  special = bool(asked.allow_special)
  with naming('over'):
    check_over(asked.over)
  with naming('answers'):
    answer_ids(model, asked.answers)
  with naming('clean'):
    rows = pair_ids(model, asked.clean, asked.corrupted, allow_special=special).tolist()
  T = len(rows[0])
  with naming('by'):
    by = axes_of(asked.over, asked.by)
  sizes = {AXES[a]: n for a, n in sizes_of(model.config, 1, T).items() if a in 'LTN'}
  tokens = T * sizes['layer'] * int(np.prod([sizes[name] for name in by]))
  if tokens > limits.patched_tokens:
    raise ApiError(
      400,
      f'clean: patches by {", ".join(["layer", *by])} of {T} tokens are {tokens:,} tokens, more than '
      f'the {limits.patched_tokens:,} that this server patches at a time: shorten the texts.',
      param='clean',
      code='context_length_exceeded',
    )
  with naming('by'):
    texts = asked.clean, asked.corrupted, asked.answers
    found = patch_texts(model, *texts, over=asked.over, by=by, allow_special=special)
  clean, corrupted = ([token_text(model.tokenizer, i) for i in row] for row in rows)
  return {
    'over': found.over,
    'by': list(found.by),
    'clean': clean,
    'corrupted': corrupted,
    'answers': list(found.answers),
    'layers': model.config.n_layer,
    'heads': model.config.n_head,
    'clean_difference': found.clean_difference,
    'corrupted_difference': found.corrupted_difference,
    'differences': found.differences.tolist(),
    'restored': found.restored.tolist(),
  }


def ablate_data(model: Pretrained, asked: AblateRequest) -> dict[str, Any]:
  """What comes after texts, and what would without some heads, as JSON can hold it.

  Raises:
    ApiError: there is no such head, or a text can't be used.
  """
  texts = [asked.input] if isinstance(asked.input, str) else asked.input
  heads, special = [(layer, head) for layer, head in asked.heads], bool(asked.allow_special)
  with naming('heads'):
    edits = [without_heads(model, some) for some in ((), heads)]
  with naming('input'):
    logprobs = [next_logprobs(model, texts, edit, allow_special=special) for edit in edits]
  whole, ablated = map(np.exp, logprobs)
  if not (np.isfinite(whole).all() and np.isfinite(ablated).all()):
    raise UserError('the logits are NaN: the weights or the dtype are at fault.')
  told = []
  for before_V, after_V in zip(whole, ablated):
    likely = lambda p_V: np.argsort(-p_V)[: asked.top].tolist()
    ids = list(dict.fromkeys(likely(before_V) + likely(after_V)))
    told.append(
      [[token_text(model.tokenizer, i), float(before_V[i]), float(after_V[i])] for i in ids]
    )
  return {'heads': [list(head) for head in heads], 'next': told}

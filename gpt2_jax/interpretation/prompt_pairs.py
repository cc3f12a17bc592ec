"""Patches between two texts: how much of an answer each activation of the clean one restores.

    clean, corrupted = 'John and Mary went, and John said to', 'John and Mary went, and Mary said to'
    found = patch_texts(model, clean, corrupted, (' Mary', ' John'), over='resid_pre')
    found.figure().savefig('map.png')

A patch's share is (its difference - the corrupted run's) / (the clean run's - the corrupted run's) of
the two answers' logits (Wang et al. 2022, arXiv:2211.00593): 1 is the clean run, 0 the corrupted one.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from gpt2_jax.core.errors import UserError, brief
from gpt2_jax.interpretation.patching import axes_of, check_over, patch
from gpt2_jax.interpretation.pictures import heat_map, shown
from gpt2_jax.model import text_batches
from gpt2_jax.model.edits import run
from gpt2_jax.model.pretrained_model import Pretrained


@dataclasses.dataclass(frozen=True)
class PatchMap:
  """What patches between two texts of T tokens restore.

  Attributes:
    over: the site.
    by: the axes of the sweep after the layer.
    clean, corrupted: the tokens of each, as texts.
    answers: the two answers.
    clean_difference, corrupted_difference: the first answer's logit less the second one's, after each
      text as it is.
    differences: the same of each patch, [L, *by].
  """

  over: str
  by: tuple[str, ...]
  clean: list[str]
  corrupted: list[str]
  answers: tuple[str, str]
  clean_difference: float
  corrupted_difference: float
  differences: np.ndarray

  @property
  def restored(self) -> np.ndarray:
    """Each patch's share of the way from the corrupted difference to the clean one, [L, *by]."""
    whole = self.clean_difference - self.corrupted_difference
    return (self.differences - self.corrupted_difference) / whole

  def figure(self) -> Any:
    """A heat map of what is restored, a matplotlib Figure."""
    pairs = zip(self.clean, self.corrupted)
    tokens = [shown(a) if a == b else f'{shown(a)}|{shown(b)}' for a, b in pairs]
    labels = {'position': [f'{i} {token}' for i, token in enumerate(tokens)]}
    return heat_map(
      self.restored,
      axes=('layer', *self.by),
      labels=labels,
      title=f'{self.over}: {shown(self.answers[0])} over {shown(self.answers[1])}',
      says='share restored',
    )


def difference(right: Any, wrong: Any, logits_BV: jax.Array) -> jax.Array:
  """One id's logit less another's, [B]."""
  return logits_BV[:, right] - logits_BV[:, wrong]


def answer_ids(model: Pretrained, answers: Sequence[str]) -> list[int]:
  """The ids of two answers.

  Raises:
    UserError: one is not a single token, or both are the same.
  """
  if len(answers) != 2 or answers[0] == answers[1]:
    raise UserError(f'answers are two different tokens, not {brief(list(answers))}.')
  found = []
  for answer in answers:
    ids = model.tokenizer.encode(answer)
    if len(ids) != 1:
      spaced = model.tokenizer.encode(f' {answer.lstrip()}')
      hint = f'; with a blank before it, {brief(" " + answer.lstrip())}, it is' * (len(spaced) == 1)
      raise UserError(f'the answer {brief(answer)} is {len(ids)} tokens, not one{hint}.')
    found += ids
  return found


def pair_ids(
  model: Pretrained, clean: str, corrupted: str, *, allow_special: bool = False
) -> np.ndarray:
  """The ids of two texts, [2, T].

  Raises:
    UserError: they are of different length, the same, or too long.
  """
  rows = text_batches.encode(
    [clean, corrupted], model.tokenizer, model.config, allow_special=allow_special
  )
  if len(rows[0]) != len(rows[1]):
    tokens = (' '.join(shown(model.tokenizer.decode([i])) for i in row) for row in rows)
    raise UserError(
      f'the clean text has {len(rows[0])} tokens and the corrupted one {len(rows[1])}; a patch needs '
      f'as many: {" / ".join(brief(text) for text in tokens)}'
    )
  if rows[0] == rows[1]:
    raise UserError(
      'the clean text and the corrupted one are the same: a patch would change nothing.'
    )
  return np.array(rows)


def patch_texts(
  model: Pretrained,
  clean: str,
  corrupted: str,
  answers: Sequence[str],
  *,
  over: str = 'resid_pre',
  by: Sequence[str] | None = None,
  allow_special: bool = False,
) -> PatchMap:
  """Patches each activation of the clean text into the corrupted one.

  Args:
    model: with its tokenizer, in the form 'train', on one device.
    clean, corrupted: texts of as many tokens.
    answers: what the clean text and what the corrupted one is followed by; a token each.
    over, by: as of `patch`.
    allow_special: whether special tokens count in a text.

  Raises:
    UserError: a text or an answer can't be used, or there is no such site or axis.
  """
  check_over(over)
  if model.tokenizer is None:
    raise UserError('texts need a tokenizer, and this model has none.')
  right, wrong = answer_ids(model, answers)
  ids_2T = pair_ids(model, clean, corrupted, allow_special=allow_special)
  logits_2TV, _ = run(model, ids_2T)
  whole = np.asarray(difference(right, wrong, logits_2TV[:, -1]), np.float64)
  if whole[0] == whole[1] or not np.isfinite(whole).all():
    raise UserError(
      f"the answers' logits differ by {whole[0]:g} and {whole[1]:g} after the two texts: there is "
      'nothing to restore.'
    )
  metric = jax.tree_util.Partial(difference, np.int32(right), np.int32(wrong))
  by = axes_of(over, by)
  table = patch(model, ids_2T[:1], ids_2T[1:], metric, over=over, by=by)[..., 0]
  tokens = [[model.tokenizer.decode([i]) for i in row] for row in ids_2T.tolist()]
  return PatchMap(
    over=over,
    by=by,
    clean=tokens[0],
    corrupted=tokens[1],
    answers=(answers[0], answers[1]),
    clean_difference=float(whole[0]),
    corrupted_difference=float(whole[1]),
    differences=table.astype(np.float64),
  )

"""Linear probes: what can be read off an activation by a linear classifier (Alain & Bengio 2016,
arXiv:1610.01644), fitted by scikit-learn (the extra `probes`).

    [probe] = fit_probes(model, texts, labels, layers=[6])
    probe.held_out, probe.chance, probe.predict(model, ['Another text'])
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from gpt2_jax.core.bounds import POSITIVE, Float
from gpt2_jax.core.errors import UserError
from gpt2_jax.interpretation.activations import Tokens, activations, check_place
from gpt2_jax.model import text_batches
from gpt2_jax.model.pretrained_model import Model, Pretrained


@dataclasses.dataclass(frozen=True)
class Probe:
  """A linear classifier of the activations at a site of a layer.

  Attributes:
    site, layer, tokens: what it reads, as of `activations`.
    classes: the labels.
    direction: [K, …the site's axes after T], of each class the slope of its logit; one alone, that of
      the second class, where there are two.
    bias: [K], or [1]: its logit where the activation is 0.
    fitted, held_out: share of right labels among what it was fitted on, and among the rest.
    chance: share of the commonest label among the rest.
    counts: how many rows it was fitted on, and how many are the rest.
  """

  site: str
  layer: int
  tokens: Tokens
  classes: np.ndarray
  direction: np.ndarray
  bias: np.ndarray
  fitted: float
  held_out: float
  chance: float
  counts: tuple[int, int]

  def predict(self, model: Model, texts: text_batches.Texts) -> np.ndarray:
    """The label of each text; where each token has one, of all tokens."""
    rows = activations(model, texts, site=self.site, layer=self.layer, tokens=self.tokens)
    scores = _flat(rows) @ _flat(self.direction).T + self.bias
    best = (scores[:, 0] > 0).astype(int) if scores.shape[1] == 1 else scores.argmax(-1)
    return self.classes[best]


def fit_probes(
  model: Model,
  texts: text_batches.Texts,
  labels: Sequence[Any],
  *,
  layers: Sequence[int] | None = None,
  site: str = 'resid_post',
  tokens: Tokens = 'last',
  held_out: float = 0.25,
  seed: int = 0,
  C: float = 1.0,
) -> list[Probe]:
  """Fits a probe of each layer: a logistic regression on activations of mean 0 and deviation 1.

  Args:
    model: a model that brings its tokenizer along, as `gpt2_jax.from_pretrained` gives it.
    texts, site: as of `activations`.
    labels: of each text; where `tokens` is 'all', of each token: a list a text.
    layers: from 0, or negative from the end; None: all.
    tokens: which activations.
    held_out: share of the texts that it is not fitted on; all tokens of a text are on one side, and
      labels of texts as frequent on both. All layers have the same split.
    seed: of the split.
    C: inverse of the penalty on its squared weights.

  Raises:
    UserError: scikit-learn is not there, labels are not as many as they should be, or too few.
  """
  Float(0, 1, open_low=True, open_high=True).check('held_out', held_out)
  POSITIVE.check('C', C)
  numbers = range(model.config.n_layer) if layers is None else layers
  numbers = [check_place(model, site, number) for number in numbers]
  ids = text_batches.encode(texts, Pretrained.of(model).tokenizer, model.config)
  each = tokens == 'all'
  lengths = [len(row) for row in ids] if each else [1] * len(ids)
  given = [list(label) if each else [label] for label in labels]
  if [len(label) for label in given] != lengths:
    wanted = 'one for each token of each text' if each else f'one for each of {len(ids)} texts'
    raise UserError(f'labels are {len(given)}, and not {wanted}.')
  left, right = _split(given, held_out, seed, each)
  alone = numbers[0] if len(numbers) == 1 else None  # so that others are not kept
  found = activations(model, ids, site=site, layer=alone, tokens=tokens)
  x_all = found if alone is None else {alone: found}
  y, text_of = np.concatenate(given), np.repeat(np.arange(len(ids)), lengths)
  sides = np.isin(text_of, left), np.isin(text_of, right)
  return [_one(x_all[number], y, sides, C, (site, number, tokens)) for number in numbers]


def _split(given: list[list], share: float, seed: int, each: bool) -> tuple[Any, Any]:
  """Numbers of the texts to fit on, and of those held out."""
  try:
    from sklearn.model_selection import train_test_split  # pyright: ignore[reportMissingImports]
  except ModuleNotFoundError:
    raise UserError('probes need scikit-learn: pip install "gpt2_jax[probes]".') from None
  try:
    stratify = None if each else [label for [label] in given]
    left, right = train_test_split(
      np.arange(len(given)), test_size=share, random_state=seed, stratify=stratify
    )
  except ValueError as e:  # it says how many of a class there are
    raise UserError(f'the labels can not be split: {e}') from None
  if len({label for i in left for label in given[i]}) < 2:
    raise UserError('what a probe is fitted on has one label alone: give texts of two, at least.')
  return left, right


def _one(x: np.ndarray, y: np.ndarray, sides: Any, C: float, where: Any) -> Probe:
  from sklearn.linear_model import LogisticRegression  # pyright: ignore[reportMissingImports]

  (fit, rest), flat = sides, _flat(x).astype(np.float64)
  mean, scale = flat[fit].mean(0), flat[fit].std(0)
  scale[scale == 0] = 1
  made = LogisticRegression(C=C, max_iter=2000).fit((flat[fit] - mean) / scale, y[fit])
  direction = made.coef_ / scale
  score = lambda side: float(made.score((flat[side] - mean) / scale, y[side]))
  return Probe(
    *where,
    classes=made.classes_,
    direction=direction.reshape(-1, *x.shape[1:]),
    bias=made.intercept_ - direction @ mean,
    fitted=score(fit),
    held_out=score(rest),
    chance=float(np.unique(y[rest], return_counts=True)[1].max() / rest.sum()),
    counts=(int(fit.sum()), int(rest.sum())),
  )


def _flat(x: np.ndarray) -> np.ndarray:
  return x.reshape(len(x), -1)

"""Asks a model, and makes figures of its answers."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from gpt2_jax.evaluation import token_scores
from gpt2_jax.evaluation.protocols import WINDOW
from gpt2_jax.evaluation.score_cache import Kept
from gpt2_jax.evaluation.token_scores import Request, Scored
from gpt2_jax.model.pretrained_model import Pretrained


@dataclasses.dataclass(frozen=True)
class Value:
  """A figure.

  Attributes:
    value: the figure.
    stderr: its standard error over examples, None where a corpus is one example.
    n: how many units it is the mean of.
    unit: 'examples', or the unit that a corpus is counted in.
  """

  value: float
  stderr: float | None
  n: int
  unit: str = 'examples'


@dataclasses.dataclass(frozen=True)
class Scorer:
  """A model, and the results that are kept of it."""

  model: Pretrained
  kept: Kept

  @property
  def window(self) -> int:
    return min(WINDOW, self.model.config.n_positions)

  def encode(self, text: str) -> np.ndarray:
    return self.model.tokenizer.encode_array(text)

  @property
  def eot(self) -> int:
    return self.model.tokenizer.eot

  def score(self, requests: Sequence[Request], what: str) -> list[Scored]:
    return token_scores.score(self.model, requests, progress=what, kept=self.kept)

  def pair(self, context: str, continuation: str) -> Request:
    """Returns a request for a continuation, cut from the ids of both, as lm-evaluation-harness does.

    Blanks at the end of the context count as the continuation's; an empty context is a document's
    beginning.
    """
    bare = context.rstrip()
    continuation = context[len(bare) :] + continuation
    whole, n = self.encode(bare + continuation), len(self.encode(bare))
    if not n:
      whole, n = np.concatenate([[self.eot], whole]), 1
    return Request(whole[:n], whole[n:])


Values = dict[str, Value]


def mean(values: Sequence[float] | np.ndarray) -> Value:
  """Returns the mean of examples, with its standard error."""
  x = np.asarray(values, np.float64)
  stderr = float(x.std(ddof=1)) / math.sqrt(len(x)) if len(x) > 1 else None
  return Value(float(x.mean()), stderr, len(x))


def perplexity(nlls: Sequence[float]) -> Value:
  """Returns exp of the mean of examples; the standard error is carried over to first order."""
  of = mean(nlls)
  value = math.exp(of.value)
  return Value(value, None if of.stderr is None else value * of.stderr, of.n)


def total(scored: Sequence[Scored]) -> float:
  """Returns minus the log-likelihood of all targets, in nats, added up in float64."""
  return -float(sum(s.logprobs.sum(dtype=np.float64) for s in scored))


def per_unit(metric: str, nll: float, n: int, unit: str) -> Value:
  """Returns a figure of a corpus, by the name of its metric; `nll` is in nats."""
  each = nll / n
  return Value(each / math.log(2) if metric.startswith('bits') else math.exp(each), None, n, unit)

"""What can be said from a few seeds."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from scipy import stats

LEVEL = 0.95  # of the intervals


def t_quantile(n: int) -> float:
  """Half the width of the 95 % interval of a mean of n values, in standard errors of the mean."""
  return float(stats.t.ppf((1 + LEVEL) / 2, n - 1))


@dataclasses.dataclass(frozen=True)
class Summary:
  """Of n values: their mean, standard deviation (n - 1) and the half width of the mean's interval."""

  n: int
  mean: float
  deviation: float  # NaN of one value, as is the next
  half_width: float

  @classmethod
  def of(cls, values: Sequence[float]) -> 'Summary':
    """By Student's t: mean ± half width covers the true mean in 95 of 100 cases, if it is normal."""
    n = len(values)
    mean = float(np.mean(values))
    if n < 2:
      return cls(n, mean, math.nan, math.nan)
    deviation = float(np.std(values, ddof=1))
    return cls(n, mean, deviation, t_quantile(n) * deviation / n**0.5)


@dataclasses.dataclass(frozen=True)
class Paired:
  """A comparison of two groups of runs, seed by seed."""

  difference: Summary  # of the first from the second
  p: float  # two-sided, of Student's paired test


def paired(values: Sequence[float], baseline: Sequence[float]) -> Paired:
  """Whether the means differ; the i-th values of both are of one seed.

  Where all differences are the same there is no spread to judge by: p is 1 if they are 0, else 0.
  """
  summary = Summary.of(np.subtract(values, baseline).tolist())
  if not summary.deviation > 0:
    p = math.nan if summary.n < 2 else float(summary.mean == 0)
  else:
    t = summary.mean / (summary.deviation / summary.n**0.5)
    p = float(2 * stats.t.sf(abs(t), summary.n - 1))
  return Paired(summary, p)


def holm(p_values: Sequence[float]) -> list[float]:
  """p-values for several comparisons at once (Holm 1979, Scand. J. Statist. 6:65): so many of them
  that one is small by chance is accounted for.
  """
  order = np.argsort(p_values)
  adjusted = np.empty(len(p_values))
  adjusted[order] = np.minimum(
    1, np.maximum.accumulate(np.asarray(p_values)[order] * np.arange(len(p_values), 0, -1))
  )
  return adjusted.tolist()


@dataclasses.dataclass(frozen=True)
class PowerLaw:
  """y = scale · x^-exponent, by least squares of logarithms."""

  exponent: float
  half_width: float  # of its 95 % interval; NaN of two points
  scale: float

  def __call__(self, x):
    return self.scale * np.asarray(x, float) ** -self.exponent


def power_law(x: Sequence[float], y: Sequence[float]) -> PowerLaw:
  fit = stats.linregress(np.log(x), np.log(y))
  half = math.nan
  if len(x) > 2:
    half = t_quantile(len(x) - 1) * float(fit.stderr)  # two are fitted, not one
  return PowerLaw(float(-fit.slope), half, float(np.exp(fit.intercept)))

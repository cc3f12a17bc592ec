"""Attribution patching: all patches of a sweep at once, to first order, from one backward pass.

    nodes = estimate(model, clean, corrupted, metric, over='z')  # `patch` less its base

A patch replaces an activation `a` of the corrupted run by the clean one's `a'`. The metric then
changes by about (a' - a) · dmetric/da, whose gradients for all layers, positions and heads come
together (Nanda 2023, "Attribution Patching: Activation Patching At Industrial Scale"; Kramár et al.
2024, arXiv:2403.00745, for where it fails: saturated attention). With `steps` the gradient is a mean
along the line between the two runs' embeddings (Hanna et al. 2024, arXiv:2403.17806, "EAP-IG").
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gpt2_jax.core.errors import UserError, brief
from gpt2_jax.interpretation.patching import (
  PLACES,
  Metric,
  as_pair,
  axes_of,
  check_over,
  patch,
  reads_of,
  traced,
)
from gpt2_jax.model.edits import AXES, Edit, check_site, run
from gpt2_jax.model.gpt2 import Params, bind
from gpt2_jax.model.pretrained_model import Model, params_of
from gpt2_jax.model.sites import SITES, site


class Checked(NamedTuple):
  """Estimates beside what is so, both as changes of the metric, [L, *by]."""

  estimate: np.ndarray
  exact: np.ndarray

  @property
  def error(self) -> float:
    """The mean absolute error, by the mean absolute exact change."""
    return float(np.abs(self.estimate - self.exact).mean() / np.abs(self.exact).mean())


def estimate(
  model: Model,
  clean: Any,
  corrupted: Any,
  metric: Metric,
  *,
  over: str = 'z',
  by: Sequence[str] | None = None,
  read: Any = -1,
  steps: int = 0,
) -> np.ndarray:
  """What each patch would change of the metric, to first order.

  Args:
    model, clean, corrupted, over, by: as of `patching.patch`.
    metric: a function of the logits [B, V] at `read`, to one number; to be traced. A
      `jax.tree_util.Partial` compiles once.
    read: the position that the metric reads, or one for each row, [B].
    steps: 0: the gradient of the corrupted run; else the mean of so many runs, whose embeddings lie
      between those of the two at 1/steps … 1 (the clean one's).

  Returns:
    Changes of the metric, [L, *by].

  Raises:
    UserError: as of `patch`; or the metric is not one number.
  """
  pair = pair_of(model, clean, corrupted, metric, read, steps)
  check_over(over)
  check_site(site(over), model.config)
  how = (model.config, over, axes_of(over, by), steps)
  return np.asarray(_estimate(how, params_of(model), *pair))


def checked(model: Model, clean: Any, corrupted: Any, metric: Metric, **options: Any) -> Checked:
  """`estimate` beside the exact sweep; options are those of `estimate`."""
  guess = estimate(model, clean, corrupted, metric, **options)
  exact = {name: value for name, value in options.items() if name != 'steps'}
  patched = patch(model, clean, corrupted, metric, **exact)
  rows, read = np.arange(len(corrupted)), np.asarray(options.get('read', -1))
  return Checked(guess, patched - float(metric(run(model, corrupted)[0][rows, read])))


def integrated_gradients(
  model: Model, tokens: Any, baseline: Any, metric: Metric, *, read: Any = -1, steps: int = 32
) -> np.ndarray:
  """What each token's embedding adds to the metric, on the way from a baseline's to the text's.

  Sundararajan et al. 2017, arXiv:1703.01365, by the midpoint rule. The parts add up to the metric of
  `tokens` less that of `baseline`, the nearer the more steps.

  Args:
    model: a language model, on one device.
    tokens, baseline: ids, [B, T] both.
    metric, read: as of `estimate`.
    steps: points on the way.

  Returns:
    [B, T].

  Raises:
    UserError: as of `estimate`.
  """
  if steps == 0:
    raise UserError('steps = 0: the way is to have one point at least.')
  pair = pair_of(model, tokens, baseline, metric, read, steps)
  return np.asarray(_integrated((model.config, steps), params_of(model), *pair))


def pair_of(model: Model, clean, corrupted, metric, read, steps) -> tuple[Any, ...]:
  """What is traced of an estimate: both runs' ids, the positions that are read, and the metric."""
  clean, corrupted = as_pair(clean, corrupted)
  if read is None:
    raise UserError('read = None: an estimate is of one position of each row.')
  reads_B = reads_of(read, *clean.shape)[:, 0]
  if not isinstance(steps, int) or steps < 0:
    raise UserError(f'steps = {brief(steps)} is no count.')
  if any(len(x.sharding.device_set) > 1 for x in jax.tree.leaves(params_of(model))[:1]):
    raise UserError('an estimate wants a model on one device; see `edits.run`.')
  return jnp.asarray(clean), jnp.asarray(corrupted), jnp.asarray(reads_B), traced(metric)


def read_metric(metric: Metric, logits_BTV: jax.Array, reads_B: jax.Array) -> jax.Array:
  """The metric of the logits at these positions, which is to be one number."""
  value = metric(logits_BTV[jnp.arange(len(reads_B)), reads_B])
  if jnp.shape(value) != ():
    raise UserError(f'the metric is to be one number here; it has shape {jnp.shape(value)}.')
  return value


def mean_over(gradient: Callable[[jax.Array], Any], shares: jax.Array) -> Any:
  """The mean of a tree of gradients over points between two runs, one at a time."""
  first = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(gradient, shares[0]))
  add = lambda total, share: (jax.tree.map(jnp.add, total, gradient(share)), None)
  total, _ = jax.lax.scan(add, first, shares)
  return jax.tree.map(lambda x: x / len(shares), total)


def shares_of(steps: int) -> jax.Array:
  """How far from the corrupted run's embeddings to the clean one's: 0, or 1/steps … 1."""
  return jnp.arange(1, steps + 1) / steps if steps else jnp.zeros(1)


@functools.partial(jax.jit, static_argnums=0)
def _estimate(how, params: Params, clean, corrupted, reads_B, metric: Metric) -> jax.Array:
  config, over, by, steps = how
  model = bind(config, params)
  (_, theirs), (_, ours) = (run(model, x, record=(over, 'embed')) for x in (clean, corrupted))
  zeros = jnp.zeros_like(ours[over])

  def score(change, share):
    embed_BTD = ours['embed'] + share * (theirs['embed'] - ours['embed'])
    edits = [Edit(over, 'add', change), Edit('embed', value=embed_BTD)]
    return read_metric(metric, run(model, corrupted, edits)[0], reads_B)

  slope = mean_over(lambda share: jax.grad(score)(zeros, share), shares_of(steps))
  effect = ((theirs[over] - ours[over]) * slope).astype(jnp.float32)
  letters = 'L' + SITES[over].letters
  keep = {AXES[a]: axis for axis, a in enumerate(letters) if AXES.get(a) in PLACES}
  others = [axis for axis in range(1, effect.ndim) if axis not in [keep[name] for name in by]]
  order = (0, *(keep[name] for name in by), *others)
  return effect.transpose(order).sum(tuple(range(len(by) + 1, effect.ndim)))


@functools.partial(jax.jit, static_argnums=0)
def _integrated(how, params: Params, tokens, baseline, reads_B, metric: Metric) -> jax.Array:
  config, steps = how
  model = bind(config, params)
  there, here = (run(model, x, record=('embed',))[1]['embed'] for x in (tokens, baseline))

  def score(embed_BTD):
    return read_metric(metric, run(model, tokens, Edit('embed', value=embed_BTD))[0], reads_B)

  gradient = lambda share: jax.grad(score)(here + share * (there - here))
  slope = mean_over(gradient, (jnp.arange(steps) + 0.5) / steps)
  return ((there - here) * slope).sum(-1)

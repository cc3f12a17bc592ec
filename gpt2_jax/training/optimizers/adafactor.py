"""Adafactor (Shazeer & Stern 2018, arXiv:1804.04235): a second moment by rows and columns, no first.

Each matrix of each layer is one of its own: optax 0.2.8 takes the two largest axes of a stacked
parameter, be they layers and heads, and clips and scales by all layers together.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gpt2_jax.model.config import Config
from gpt2_jax.model.parameters import map_rows
from gpt2_jax.training.optimizers import parts
from gpt2_jax.training.optimizers.orthogonal import Stack

FORGET = 0.8  # after t steps the second moment forgets t^-0.8 of itself
LEAST = 1e-3  # root mean square of a parameter by which its steps are scaled at least
MOST = 1.0  # root mean square of a step, before the rate and that scale


class AdafactorState(NamedTuple):
  """The number of updates, and mean squares of gradients: over a matrix's outputs and its inputs; of
  vectors the squares themselves, and zeros.
  """

  count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
  rows: Any
  columns: Any


def _mean(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
  return jnp.mean(x, axes, keepdims=True) if axes else x


def scale_by_adafactor(optim: Config) -> optax.GradientTransformation:
  """Steps of a root mean square of 1 at most, times that of the parameter, matrix by matrix."""

  def moments(row, square):
    """Of a vector all of `square`, and its mean in place of columns."""
    stack = Stack(row)
    if row.decays:
      return _mean(square, stack.outs), _mean(square, stack.ins)
    return square, _mean(0 * square, stack.all)

  def both(tree):
    pairs = map_rows(moments, tree)
    is_pair = lambda node: isinstance(node, tuple)
    return [jax.tree.map(lambda pair, i=i: pair[i], pairs, is_leaf=is_pair) for i in (0, 1)]

  def init(params):
    return AdafactorState(jnp.zeros((), jnp.int32), *both(optax.tree.zeros_like(params)))

  def scaled(row, args):
    g, rows, columns, p = args
    stack, least = Stack(row), optim.eps
    square = rows
    if row.decays:
      square = rows * columns / jnp.maximum(_mean(rows, stack.ins), least)
    u = g * jax.lax.rsqrt(jnp.maximum(square, least**2))
    rms = lambda x: jnp.sqrt(_mean(x * x, stack.all))
    return u * jnp.maximum(rms(p), LEAST) / jnp.maximum(1, rms(u) / MOST)

  def update(updates, state: AdafactorState, params=None):
    count: Any = optax.safe_increment(state.count)
    share = count.astype(float) ** -FORGET
    new = both(jax.tree.map(jnp.square, updates))
    mix = lambda old, x: old + share.astype(x.dtype) * (x - old)
    rows, columns = (jax.tree.map(mix, *each) for each in zip((state.rows, state.columns), new))
    together = jax.tree.map(lambda *leaves: leaves, updates, rows, columns, params)
    leaves, tree = jax.tree.flatten(updates)
    del leaves
    each = tree.flatten_up_to(together)
    table = tree.flatten_up_to(map_rows(lambda row, _: row, updates))
    made = tree.unflatten([scaled(row, args) for row, args in zip(table, each)])
    return made, AdafactorState(count, rows, columns)

  return optax.GradientTransformation(init, update)  # pyright: ignore[reportArgumentType]


def adafactor(
  optim: Config, schedule: optax.Schedule, width_ratio: float
) -> optax.GradientTransformation:
  """Adafactor; the rate is a share of each matrix's root mean square. It is of no width."""
  del width_ratio
  return optax.chain(
    scale_by_adafactor(optim), parts.decay(optim, schedule), optax.scale_by_learning_rate(schedule)
  )

"""Muon: the momentum of each matrix within a block, made orthogonal; AdamW for all else.

Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/; with decay and a rate by shape: Liu et
al. 2025, arXiv:2502.16982; with rows of one norm, NorMuon: Li et al. 2025, arXiv:2510.05491.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gpt2_jax.core.errors import UserError
from gpt2_jax.model.config import Config
from gpt2_jax.model.parameters import map_rows
from gpt2_jax.parallel.sharding import platform
from gpt2_jax.training.optimizers import parts
from gpt2_jax.training.optimizers.orthogonal import ITERATIONS, Stack, each_matrix, orthogonalized

# The axes along which there are several matrices, by `optim.muon_apart`: q, k and v are one, or
# three, or three for each head, with the rows of c_proj by head too.
APART = {'none': '', 'qkv': 'C', 'heads': 'CN'}


def _original(ins: int, outs: int, width_ratio: float) -> float:
  del width_ratio  # the spectral norm of steps is the same at every width: muP's rule already
  return math.sqrt(max(1, outs / ins))


def _match_rms_adamw(ins: int, outs: int, width_ratio: float) -> float:
  return 0.2 * math.sqrt(max(ins, outs)) / math.sqrt(width_ratio)


# The factor of an orthogonal step, by `optim.muon_scale`: a function of the numbers of a matrix's
# inputs and outputs and of muP's width ratio. original: Jordan's, whose rate is one of its own.
# match_rms_adamw: Liu et al.'s, the size of AdamW's steps, whose rate and decay then hold.
SCALES: dict[str, Callable[[int, int, float], float]] = {
  'original': _original,
  'match_rms_adamw': _match_rms_adamw,
}


class MuonState(NamedTuple):
  """Moments of the matrices: of their gradients, and of the rows of steps where those are scaled."""

  momentum: Any
  rows: Any


def _size(x: jax.Array, axes: tuple[int, ...]) -> int:
  return math.prod(x.shape[i] for i in axes)


def scale_by_muon(optim: Config, width_ratio: float = 1.0) -> optax.GradientTransformation:
  """Momentum, made orthogonal, each row (of an output) scaled where that is on, times `SCALES`."""
  iteration, apart = ITERATIONS[optim.muon_iteration], APART[optim.muon_apart]
  scale, dtype = SCALES[optim.muon_scale], optim.muon_dtype
  stacks = lambda tree: map_rows(lambda row, _: Stack(row, apart), tree)

  def init(params):
    zeros = optax.tree.zeros_like(params)
    if not optim.muon_normalize_rows:
      return MuonState(zeros, ())
    rows = jax.tree.map(lambda s, x: jnp.mean(x, s.ins, keepdims=True), stacks(zeros), zeros)
    return MuonState(zeros, rows)

  def orthogonal(updates):
    leaves, tree = jax.tree.flatten(updates)
    inner = dtype
    if dtype == 'auto':
      inner = leaves[0].dtype if platform() == 'cpu' else jnp.bfloat16
    f = lambda x: orthogonalized(x, iteration, optim.muon_steps)
    made = each_matrix(f, [x.astype(inner) for x in leaves], jax.tree.leaves(stacks(updates)))
    return tree.unflatten([x.astype(like.dtype) for x, like in zip(made, leaves)])

  def by_rows(s: Stack, o: jax.Array, v: jax.Array) -> jax.Array:
    """Rows divided by their usual size, the whole as large as an orthogonal matrix."""
    o = o / (jnp.sqrt(v) + optim.eps)
    norm = jnp.sqrt(jnp.sum(o * o, (*s.ins, *s.outs), keepdims=True))
    whole = math.sqrt(min(_size(o, s.ins), _size(o, s.outs)))
    return o * (whole / jnp.maximum(norm, 1e-30))

  def update(updates, state: MuonState, params=None):
    del params
    shapes, rows = stacks(updates), state.rows
    momentum = optax.tree.update_moment(updates, state.momentum, optim.muon_momentum, 1)
    if optim.muon_nesterov:
      steps = optax.tree.update_moment(updates, momentum, optim.muon_momentum, 1)
    else:
      steps = momentum
    steps = orthogonal(steps)
    if optim.muon_normalize_rows:
      square = lambda s, o, v: optim.b2 * v + (1 - optim.b2) * jnp.mean(o * o, s.ins, keepdims=True)
      rows = jax.tree.map(square, shapes, steps, rows)
      steps = jax.tree.map(by_rows, shapes, steps, rows)
    scaled = lambda s, o: scale(_size(o, s.ins), _size(o, s.outs), width_ratio) * o
    return jax.tree.map(scaled, shapes, steps), MuonState(momentum, rows)

  return optax.GradientTransformation(init, update)  # pyright: ignore[reportArgumentType]


def muon(optim: Config, schedule: optax.Schedule, width_ratio: float) -> optax.GradientTransformation:
  """Muon for the matrices within blocks, AdamW for the rest, the decay of `parts.decay` for both.
  Matrices' steps and decay are multiplied by `muon_lr_factor`.

  Raises:
    UserError: muP is asked for with matrices of heads, for which no rule is known.
  """
  if width_ratio != 1 and optim.muon_apart == 'heads':
    raise UserError(
      'optim.muon_apart = heads has no rule for model.parametrization = mup: take qkv or none.'
    )
  factor = float(optim.muon_lr_factor)
  more = [] if factor == 1 else [parts.scale_matrices(factor)]
  return parts.for_matrices(scale_by_muon(optim, width_ratio), optim, schedule, *more)

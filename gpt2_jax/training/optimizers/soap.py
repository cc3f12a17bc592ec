"""SOAP: Adam in the eigenbases of Shampoo's two matrices; AdamW for all but matrices within blocks.

Vyas et al. 2024, arXiv:2409.11321, algorithm 3. Each matrix of each layer is one of its own, q, k and
v too. Matrices of one shape are one stack, in the state as well, which lies on the mesh as they do;
in a step each device has some of them whole (`orthogonal.gathered`).
"""

import collections
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec as P

from gpt2_jax.core.errors import UserError
from gpt2_jax.model.config import Config
from gpt2_jax.model.parameters import map_rows
from gpt2_jax.parallel.sharding import in_mesh, reshard, spec_of
from gpt2_jax.training.optimizers import parts
from gpt2_jax.training.optimizers.orthogonal import Stack, gathered, returned

APART = 'C'  # q, k and v


class Side(NamedTuple):
  """Of the rows of each matrix of a stack, or of its columns: the mean of G·Gᵀ, and its eigenvectors,
  both [K, n, n].
  """

  gram: jax.Array
  basis: jax.Array


class Moments(NamedTuple):
  """Of a stack of matrices: the mean of gradients, that of their squares in the bases, both
  [K, m, n], and the sides by which they are turned, 'rows' and 'columns' or one of the two.
  """

  mean: jax.Array
  square: jax.Array
  sides: dict[str, Side]


class SoapState(NamedTuple):
  """The number of gradients seen, and the moments of each shape of matrices."""

  count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
  moments: dict[str, Moments]


def _multiply(*matrices: jax.Array) -> jax.Array:
  product = matrices[0]
  for matrix in matrices[1:]:
    product = jnp.matmul(product, matrix, precision='highest')
  return product


def _turned(x: jax.Array, sides: dict[str, Side], back: bool = False) -> jax.Array:
  """Matrices in the bases, or back from there."""
  if 'rows' in sides:
    basis = sides['rows'].basis
    x = _multiply(basis if back else basis.mT, x)
  if 'columns' in sides:
    basis = sides['columns'].basis
    x = _multiply(x, basis.mT if back else basis)
  return x


def _first_bases(square: jax.Array, sides: dict[str, Side]) -> tuple[jax.Array, dict[str, Side]]:
  """The eigenvectors, the largest eigenvalue's first."""
  vectors = lambda side: side._replace(basis=jnp.linalg.eigh(side.gram)[1][..., ::-1])
  return square, {name: vectors(side) for name, side in sides.items()}


def _next_bases(square: jax.Array, sides: dict[str, Side]) -> tuple[jax.Array, dict[str, Side]]:
  """One step of the power iteration, from the bases in the order of their eigenvalues, which the
  second moments follow.
  """
  out = {}
  for name, (gram, basis) in sides.items():
    grown = _multiply(gram, basis)
    order = jnp.argsort(-jnp.sum(basis * grown, 1), axis=1)
    out[name] = Side(gram, jnp.linalg.qr(jnp.take_along_axis(grown, order[:, None], 2))[0])
    along = order[:, :, None] if name == 'rows' else order[:, None]
    square = jnp.take_along_axis(square, along, 1 if name == 'rows' else 2)
  return square, out


def _step(optim: Config, count: jax.Array, g: jax.Array, old: Moments) -> tuple[jax.Array, Moments]:
  """The steps [K, m, n] of whole matrices, from their gradients, and what is kept of them. `old` has
  the new mean.
  """
  first, t = count == 0, jnp.maximum(count, 1).astype(g.dtype)
  mean, square, sides = old
  seen = optim.b2 * square + (1 - optim.b2) * jnp.square(_turned(g, sides))
  square = jnp.where(first, square, seen)
  adam = _turned(mean, sides) / (1 - optim.b1**t)
  adam /= jnp.sqrt(square / (1 - optim.b2**t)) + optim.eps
  step = jnp.where(first, 0, _turned(adam, sides, back=True))
  products = {'rows': lambda: _multiply(g, g.mT), 'columns': lambda: _multiply(g.mT, g)}
  mix = lambda gram, name: optim.b2 * gram + (1 - optim.b2) * products[name]()
  sides = {name: side._replace(gram=mix(side.gram, name)) for name, side in sides.items()}
  kind = jnp.where(first, 0, jnp.where(count % optim.soap_every == 0, 1, 2))
  same = lambda square, sides: (square, sides)
  square, sides = jax.lax.switch(kind, [_first_bases, _next_bases, same], square, sides)
  return step, Moments(mean, square, sides)


def _sides(optim: Config, m: int, n: int) -> dict[str, int]:
  """The sides that matrices [m, n] are turned by, and their lengths."""
  sides, shorter = {'rows': m, 'columns': n}, min(m, n)
  return {name: x for name, x in sides.items() if x == shorter or optim.soap_wide}


def _stacks(tree: Any) -> dict[str, list[tuple[int, Stack]]]:
  """The leaves of `tree` by the shape of their matrices: their numbers, and how they are stacks."""
  leaves, structure = jax.tree.flatten(tree)
  stacks = structure.flatten_up_to(map_rows(lambda row, _: Stack(row, APART), tree))
  found = collections.defaultdict(list)
  for i, (x, stack) in enumerate(zip(leaves, stacks, strict=True)):
    m, n, _ = stack.kind(x)
    found[f'{m}x{n}'].append((i, stack))
  return found


def _laid_out(split) -> P:
  return P(None, *(axes[0] if axes else None for axes in split[1:]))


def scale_by_soap(optim: Config) -> optax.GradientTransformation:
  """Adam's steps, of moments in the bases. The first gradient makes the bases, and no step."""

  def init(params):
    leaves, moments = jax.tree.leaves(params), {}
    for name, members in _stacks(params).items():
      m, n, split = members[0][1].kind(leaves[members[0][0]])
      K = sum(leaves[i].size // (m * n) for i, _ in members)
      dtype, shape = leaves[members[0][0]].dtype, jax.sharding.get_abstract_mesh().shape
      for length in _sides(optim, m, n).values() if in_mesh() else ():
        if any(length % shape[axis] for axes in split[1:] for axis in axes):
          raise UserError(
            f'optim.soap_wide = True: a side of {length} is no multiple of the sizes of mesh.fsdp '
            'and mesh.tensor, which split it. Leave it False, or change one of them.'
          )
      zeros = lambda *sizes, K=K, dtype=dtype, split=split: reshard(
        jnp.zeros((K, *sizes), dtype), _laid_out(split)
      )
      sides = {s: Side(zeros(x, x), zeros(x, x)) for s, x in _sides(optim, m, n).items()}
      moments[name] = Moments(zeros(m, n), zeros(m, n), sides)
    return SoapState(jnp.zeros((), jnp.int32), moments)

  def update_stack(count, leaves: list, stacks: list[Stack], old: Moments):
    split = stacks[0].kind(leaves[0])[2]

    def local(count, parts, old: Moments):
      stacked = [stack.stacked(x) for stack, x in zip(stacks, parts, strict=True)]
      sizes = [x.shape[0] for x in stacked]
      g, K = jnp.concatenate(stacked), sum(sizes)
      mean = jnp.where(count == 0, old.mean, optim.b1 * old.mean + (1 - optim.b1) * g)
      g, whole = jax.tree.map(lambda x: gathered(x, split), (g, old._replace(mean=mean)))
      step, new = _step(optim, count, g, whole)
      kept = new._replace(mean=())  # it is here
      step, kept = jax.tree.map(lambda x: returned(x, K, split), (step, kept))
      ends = [sum(sizes[:i]) for i in range(1, len(sizes))]
      steps = [
        stack.unstacked(x, p.shape) for stack, x, p in zip(stacks, jnp.split(step, ends), parts)
      ]
      return steps, kept._replace(mean=mean)

    if not in_mesh():
      return local(count, leaves, old)
    specs, lies = list(map(spec_of, leaves)), jax.tree.map(lambda _: _laid_out(split), old)
    return jax.shard_map(
      local, in_specs=(P(), specs, lies), out_specs=(specs, lies), check_vma=False
    )(count, leaves, old)

  def update(updates, state: SoapState, params=None):
    del params
    leaves, structure = jax.tree.flatten(updates)
    count: Any = optax.safe_increment(state.count)
    moments = {}
    for name, members in _stacks(updates).items():
      numbers, stacks = zip(*members)
      grads = [leaves[i] for i in numbers]
      made, moments[name] = update_stack(state.count, grads, list(stacks), state.moments[name])
      for i, x in zip(numbers, made, strict=True):
        leaves[i] = x
    return structure.unflatten(leaves), SoapState(count, moments)

  return optax.GradientTransformation(init, update)  # pyright: ignore[reportArgumentType]


def soap(optim: Config, schedule: optax.Schedule, width_ratio: float) -> optax.GradientTransformation:
  """SOAP for the matrices within blocks, AdamW for the rest, the decay of `parts.decay` for both; muP
  is refused (`optimizer.check`).
  """
  del width_ratio
  return parts.for_matrices(scale_by_soap(optim), optim, schedule)

"""Matrices made orthogonal, U·Vᵀ of a singular value decomposition, by products alone; over a mesh.

A parameter of the blocks holds a stack of matrices. Those of one shape, of all such parameters, are
one stack, and it is split over all devices: each has some matrices whole and iterates over them
without a word to the others. They come to it by one all-to-all, and go back by another; over axes of
the mesh that hold copies they go back by an all-gather and come for nothing. Left to the compiler,
products of split matrices are gathered in each iteration.
"""

import collections
import dataclasses
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from gpt2_jax.model.parameters import Row
from gpt2_jax.parallel.sharding import AXES, in_mesh, spec_of

Coefficients = tuple[tuple[float, float, float], ...]  # of x, x³ and x⁵ in each iteration

# Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/: the same in all iterations.
JORDAN: Coefficients = ((3.4445, -4.7750, 2.0315),)
# Amsel et al. 2025, arXiv:2505.16932, algorithm 1, before its safety factor; the last one repeats.
POLAR_EXPRESS: Coefficients = (
  (8.28721201814563, -23.595886519098837, 17.300387312530933),
  (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
  (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
  (3.3184196573706015, -2.488488024314874, 0.51004894012372),
  (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
  (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
  (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
  (1.875, -1.25, 0.375),
)
SAFETY = 1.01  # of the polar express: room for rounding
SMALLEST = 1e-7  # a matrix of a smaller norm than this is not brought to norm 1


def _safe(coefficients: Coefficients) -> Coefficients:
  safe = [(a / SAFETY, b / SAFETY**3, c / SAFETY**5) for a, b, c in coefficients[:-1]]
  return *safe, coefficients[-1]


@dataclasses.dataclass(frozen=True)
class Iteration:
  """Polynomials that bring singular values in (0, 1] near 1, one after the other.

  Attributes:
    coefficients: the last ones are used again where there are more steps.
    margin: the Frobenius norm that matrices begin with is 1 / margin.
  """

  coefficients: Coefficients
  margin: float = 1.0

  def steps(self, number: int) -> Coefficients:
    """The coefficients of so many steps."""
    more = number - len(self.coefficients)
    return (*self.coefficients[:number], *self.coefficients[-1:] * more)


ITERATIONS = {
  'newton_schulz': Iteration(JORDAN),
  'polar_express': Iteration(_safe(POLAR_EXPRESS), SAFETY),
}


def orthogonalized(x_Kmn: jax.Array, iteration: Iteration, steps: int) -> jax.Array:
  """Matrices that are about orthogonal, from whole ones; each on its own."""
  wide = x_Kmn.shape[1] <= x_Kmn.shape[2]
  x = x_Kmn if wide else x_Kmn.mT  # the smaller Gram matrix
  exact = 'highest' if x.dtype != jnp.bfloat16 else None
  multiply = lambda a, b: jnp.matmul(a, b, precision=exact)
  norm = jnp.sqrt(jnp.sum(jnp.square(x.astype(jnp.promote_types(x.dtype, 'float32'))), (1, 2)))
  scale = 1 / jnp.maximum(iteration.margin * norm, SMALLEST)
  x = x * scale[:, None, None].astype(x.dtype)
  for a, b, c in iteration.steps(steps):
    gram = multiply(x, x.mT)
    x = a * x + multiply(b * gram + c * multiply(gram, gram), x)
  return x if wide else x.mT


@dataclasses.dataclass(frozen=True)
class Stack:
  """How a parameter is a stack of matrices: one for each layer, or for some of them.

  Attributes:
    row: of the parameter.
    apart: letters of axes along which there are several matrices, beside L: 'C' for q, k and v.
  """

  row: Row
  apart: str = ''

  def axes(self, letters: str) -> tuple[int, ...]:
    """The axes of these letters that are of one matrix."""
    named = enumerate(self.row.letters, start=int(self.row.stacked))
    return tuple(i for i, letter in named if letter in letters and letter not in self.apart)

  @property
  def all(self) -> tuple[int, ...]:
    """All axes of one matrix, or vector."""
    return self.axes(self.row.letters)

  @property
  def ins(self) -> tuple[int, ...]:
    """The axes that the product sums over."""
    return self.axes(self.row.contracted)

  @property
  def outs(self) -> tuple[int, ...]:
    """The axes that come out of it: those of neurons."""
    return tuple(axis for axis in self.all if axis not in self.ins)

  def order(self) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Axes of the stack, of the rows, and of the columns. Rows are those of D, which `fsdp` splits:
    so matrices and transposed ones of one shape can be together.
    """
    rows = self.axes('D')
    columns = tuple(axis for axis in (*self.ins, *self.outs) if axis not in rows)
    inside = {*rows, *columns}
    ndim = len(self.row.letters) + self.row.stacked
    return tuple(i for i in range(ndim) if i not in inside), rows, columns

  def stacked(self, x: jax.Array) -> jax.Array:
    """[stack, rows, columns] of the parameter, or of a device's part of it."""
    order = self.order()
    sizes = [math.prod(x.shape[i] for i in axes) for axes in order]
    return x.transpose(sum(order, ())).reshape(sizes)

  def unstacked(self, x_Kmn: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The parameter, of this shape, of its stack."""
    axes = sum(self.order(), ())
    whole = x_Kmn.reshape([shape[i] for i in axes])
    return whole.transpose(sorted(range(len(axes)), key=axes.__getitem__))

  def kind(self, x: jax.Array) -> tuple:
    """Its matrices' rows and columns, and the mesh's axes that split stack, rows and columns: what is
    equal can be one stack.
    """
    spec = spec_of(x) if in_mesh() else P(*(None,) * x.ndim)
    split = tuple(tuple(spec[i] for i in axes if spec[i]) for axes in self.order())
    _, rows, columns = ([x.shape[i] for i in axes] for axes in self.order())
    return math.prod(rows), math.prod(columns), split


def each_matrix(
  f: Callable[[jax.Array], jax.Array], leaves: Sequence[jax.Array], stacks: Sequence[Stack]
) -> list[jax.Array]:
  """`f` of all matrices of some parameters, [K, m, n] whole ones at a time, spread over the devices.

  `f` maps each matrix on its own, transposed ones to transposed ones, columns in another order to
  those in that order, and zeros to anything.
  """
  together = collections.defaultdict(list)
  for i, (x, stack) in enumerate(zip(leaves, stacks, strict=True)):
    together[stack.kind(x)].append(i)
  out = list(leaves)
  for (_, _, split), members in together.items():
    made = _spread(f, [leaves[i] for i in members], [stacks[i] for i in members], split)
    for i, x in zip(members, made, strict=True):
      out[i] = x
  return out


def _spread(f, leaves: list[jax.Array], stacks: list[Stack], split) -> Sequence[jax.Array]:
  """`each_matrix` of what is of one kind."""

  def local(*parts):
    stacked = [stack.stacked(x) for stack, x in zip(stacks, parts)]
    sizes = [x.shape[0] for x in stacked]
    x = _whole(f, jnp.concatenate(stacked), split)
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    made = [x[end - size : end] for size, end in zip(sizes, ends)]
    return tuple(stack.unstacked(x, p.shape) for stack, x, p in zip(stacks, made, parts))

  if not in_mesh():
    return local(*leaves)
  specs = tuple(map(spec_of, leaves))
  return jax.shard_map(local, in_specs=specs, out_specs=specs, check_vma=False)(*leaves)


def _whole(f, x_Kmn: jax.Array, split) -> jax.Array:
  """`f` of a stack whose matrices the axes `split` of the mesh split, each device's share of them."""
  return returned(f(gathered(x_Kmn, split)), x_Kmn.shape[0], split)


def _travels(split) -> tuple[list[tuple[str, int]], tuple[str, ...]]:
  """The mesh's axes that split matrices, with the dimension that each one splits, and those over
  which there are copies.
  """
  size = jax.sharding.get_abstract_mesh().shape
  exchanged = [(a, 1 + i) for i, axes in enumerate(split[1:]) for a in axes if size[a] > 1]
  return exchanged, tuple(a for a in AXES if size[a] > 1 and a not in sum(split, ()))


def gathered(x_Kmn: jax.Array, split) -> jax.Array:
  """A device's share of the matrices of a stack, whole, from its part of all: within a `shard_map`.
  Zeros fill up the last shares. `split`: axes of the mesh that split stack, rows and columns.
  """
  if not in_mesh():
    return x_Kmn
  size, (exchanged, copied) = jax.sharding.get_abstract_mesh().shape, _travels(split)
  parts, copies = math.prod(size[a] for a, _ in exchanged), math.prod(size[a] for a in copied)
  x = jnp.pad(x_Kmn, ((0, -x_Kmn.shape[0] % (parts * copies)), (0, 0), (0, 0)))
  # as one array: XLA takes an all-to-all apart, and refuses parts of several layouts (jax 0.10.2)
  x = jax.lax.optimization_barrier(x) if exchanged else x
  for axis, dim in exchanged:
    x = jax.lax.all_to_all(x, axis, split_axis=0, concat_axis=dim, tiled=True)
  if copied:
    own = x.shape[0] // copies
    x = jax.lax.dynamic_slice_in_dim(x, own * jax.lax.axis_index(copied), own)
  return x


def returned(x_kmn: jax.Array, K: int, split) -> jax.Array:
  """What `gathered` undoes: a device's part of all K matrices."""
  if not in_mesh():
    return x_kmn
  x, (exchanged, copied) = x_kmn, _travels(split)
  if copied:
    x = jax.lax.all_gather(x, copied, tiled=True)
  x = jax.lax.optimization_barrier(x) if exchanged else x
  for axis, dim in reversed(exchanged):
    x = jax.lax.all_to_all(x, axis, split_axis=dim, concat_axis=0, tiled=True)
  return x[:K]

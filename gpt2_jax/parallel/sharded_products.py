"""Products with parameters that are split over the mesh, and their gradients.

A parameter that `fsdp` splits is gathered where it is used, in the activations' dtype, once for the
forward and once more for the backward pass: blocks run under `jax.checkpoint`, with policies that
never keep what was gathered (`remat.REMAT_POLICIES`). Its gradient is summed over the devices in
`reduce_dtype` by a reduce-scatter: each device receives the sum of its own shard alone. Left to the
compiler it is often an all-reduce of whole gradients, twice the bytes, in the activations' dtype.
(ZeRO stage 3: Rajbhandari et al. 2019, arXiv:1910.02054.)
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import PartitionSpec as P

from gpt2_jax.parallel import cpu_matmul
from gpt2_jax.parallel.sharding import in_mesh, layout, platform, reshard, spec_of, unshard

MANY = 128  # rows: of fewer, the time of a product is that of reading its weight


@dataclasses.dataclass(frozen=True)
class Product:
  """How `einsum` multiplies."""

  equation: str  # 'BTD,DF->BTF': the weight's first axes are contracted, its last ones come out
  out_spec: P
  precision: str | None  # as `jax.lax.Precision` names it
  reduce_dtype: str  # of the weight's gradient while it is summed over devices
  wide: str  # dtype of the result


def einsum(how: Product, x: jax.Array, w: jax.Array, b: jax.Array | None = None) -> jax.Array:
  """`x · w + b` in the dtype `how.wide`, from operands in `x`'s dtype."""
  return (_einsum if in_mesh() else _forward)(how, x, w, b)


def _forward(how: Product, x, w, b):
  return _multiply(how, x, unshard(w.astype(x.dtype)), b)


def _multiply(how: Product, x, gathered, b):
  y = cpu_matmul.kept(_product(how, x, gathered))
  if b is None:
    return y
  return y + unshard(b.astype(how.wide)).reshape(_over_rows(how, b.shape))


def _product(how: Product, x, gathered):
  axes = cpu_matmul.parse_einsum(how.equation)
  parts, rows = axes.out[0], x.size // x.shape[-1]
  if platform() != 'gpu' or parts not in axes.columns or rows < MANY:
    return cpu_matmul.einsum(how.equation, x, gathered, how.out_spec, how.precision, how.wide)
  # a product for each of query, key and value: one product would be transposed, and then taken apart
  equation, at = how.equation.replace(parts, ''), axes.y.index(parts)
  return jnp.stack(
    [
      cpu_matmul.einsum(equation, x, w, P(*how.out_spec[1:]), how.precision, how.wide)
      for w in (jax.lax.index_in_dim(gathered, c, at, False) for c in range(gathered.shape[at]))
    ]
  )


def _over_rows(how: Product, shape: tuple[int, ...]) -> tuple[int, ...]:
  """A bias's shape, with 1 for each axis of rows: 'CNH' against 'CBTNH'."""
  axes = cpu_matmul.parse_einsum(how.equation)
  return tuple(shape[axes.columns.index(a)] if a in axes.columns else 1 for a in axes.out)


_einsum = jax.custom_vjp(_forward, nondiff_argnums=(0,))


def _einsum_fwd(how, x, w, b):
  gathered = unshard(w.astype(x.dtype))
  return _multiply(how, x, gathered, b), (x, w, gathered, b)


def _einsum_bwd(how, kept, dy):
  x, w, gathered, b = kept
  axes, dtype = cpu_matmul.parse_einsum(how.equation), jnp.promote_types(how.reduce_dtype, x.dtype)
  dy = dy.astype(x.dtype)
  if platform() == 'gpu' and axes.out == axes.rows + axes.columns:
    dy = jax.lax.optimization_barrier(dy)  # else it is written in float32 too, for the bias's sum
  to_x = f'{axes.out},{axes.y}->{axes.x}'
  dx = cpu_matmul.einsum(to_x, dy, gathered, spec_of(x), how.precision, x.dtype)

  def local_dw(x, dy):
    return cpu_matmul.einsum(f'{axes.x},{axes.out}->{axes.y}', x, dy, None, how.precision, dtype)

  def local_db(dy):
    return jnp.einsum(f'{axes.out}->{axes.columns}', dy, preferred_element_type=dtype)

  dw = summed(local_dw, x, dy, like=w)
  return dx, dw, None if b is None else summed(local_db, dy, like=b)


_einsum.defvjp(_einsum_fwd, _einsum_bwd)


def summed(f, *rows: jax.Array, like: jax.Array) -> jax.Array:
  """The gradient of a parameter: `f` of each device's own rows, summed over the devices.

  Args:
    f: from the local parts of `rows` to the local part of a gradient, whole along `fsdp`.
    rows: arrays that are split over the batch (and `seq`).
    like: the parameter; the result lies like it.
  """
  gradient_sum = GradientSum(like)
  return jax.shard_map(
    lambda *rows: gradient_sum.local(f(*rows)),
    in_specs=tuple(map(spec_of, rows)),
    out_specs=gradient_sum.spec,
    check_vma=gradient_sum.check_vma,
  )(*rows)


class GradientSum:
  """The sum over the devices of their parts of a parameter's gradient, inside a `jax.shard_map`.

  `spec` is for the map's `out_specs`, `check_vma` for its argument of that name, which the sums over
  `deferred` axes need: those are left to `DeferredGradients.sum`.
  """

  def __init__(self, parameter: jax.Array):
    spec, self.dtype = spec_of(parameter), parameter.dtype
    self.split = spec.index('fsdp') if 'fsdp' in spec else None
    self.deferred = jax.typeof(parameter).sharding.spec.reduced
    self.check_vma = bool(self.deferred)
    self.spec = P(*spec, unreduced=self.deferred) if self.deferred else spec
    self.now = [axis for axis in summed_over(spec) if axis not in self.deferred]

  def local(self, part: jax.Array) -> jax.Array:
    """A device's share of the sum, from its part, which is whole along `fsdp`, its first or last
    axis.
    """
    mesh, shape = jax.sharding.get_abstract_mesh(), list(part.shape)
    if self.split is not None and mesh.shape['fsdp'] > 1:
      # as a matrix until it is summed: else a TPU's compiler makes a sum of whole gradients of it
      axis = 0 if self.split == 0 else 1
      part = part.reshape(shape[0], -1) if axis == 0 else part.reshape(-1, shape[-1])
      if platform() == 'tpu':
        part = with_layout_constraint(part, Layout((axis, 1 - axis)))
      part = jax.lax.psum_scatter(part, 'fsdp', scatter_dimension=axis, tiled=True)
      shape[self.split] //= mesh.shape['fsdp']
    # a sum over one device would be a copy; `check_vma` wants it all the same
    if now := [axis for axis in self.now if mesh.shape[axis] > 1 or self.check_vma]:
      part = jax.lax.psum(part, now)
    part = part.reshape(shape)
    if self.deferred:
      part = jax.lax.pcast(part, tuple(self.deferred), to='unreduced')
    return part.astype(self.dtype)


def summed_over(spec: P) -> tuple[str, ...]:
  """The axes over which a gradient is summed whole, since they do not split its parameter."""
  return ('data', 'seq') if 'fsdp' in spec else ('data', 'fsdp', 'seq')


class DeferredGradients:
  """Gradients that stay apart on each device, to be added up over micro-batches and then summed over
  the devices once; those that don't wait are summed in each micro-batch.
  """

  def __init__(self, params, waits):
    """`self.params` are `params`, marked so that the gradients by them are deferred where `waits`, a
    tree as `params`, says so.
    """

    def marked(x, wait):
      if not wait:
        return x
      spec = spec_of(x)
      axes = frozenset(axis for axis in summed_over(spec) if mesh.shape[axis] > 1)
      return reshard(x, P(*spec, reduced=axes)) if axes else x

    mesh = jax.sharding.get_abstract_mesh()
    self.params = jax.tree.map(marked, params, waits) if in_mesh() else params

  def zeros(self):
    """Zeros for the gradients to be added to."""

    def zeros(x):
      spec, deferred = spec_of(x), jax.typeof(x).sharding.spec.reduced
      if not deferred:
        return jnp.zeros_like(x)
      return reshard(jnp.zeros(x.shape, x.dtype, out_sharding=spec), P(*spec, unreduced=deferred))

    return jax.tree.map(zeros, self.params)

  def sum(self, grads):
    """The gradients, summed over the devices; they lie as the parameters do."""
    return jax.tree.map(lambda g, x: reshard(g, spec_of(x)), grads, self.params)


def take(table: jax.Array, indices: jax.Array, dtype, spec: P, reduce_dtype: str, B: int):
  """Rows of a table [V, D] at indices [B, T], or [1, T] for all B rows; NaN beyond the table.

  Args:
    spec: layout of the result, [B, T, D].
  """
  indices = reshard(indices, P(spec[0] if indices.shape[0] == B else None, spec[1]))
  return (_take if in_mesh() else _lookup)(jnp.dtype(dtype), spec, reduce_dtype, B, table, indices)


def _lookup(dtype, spec, reduce_dtype, B, table, indices):
  del reduce_dtype
  once = P(*(spec[:-1] if indices.shape[0] == B else (None, *spec[1:-1])), None)
  gathered = unshard(table.astype(dtype))
  found = gathered.at[indices].get(out_sharding=layout(once), mode='fill', fill_value=jnp.nan)
  return jnp.broadcast_to(found, (B, *found.shape[1:]), out_sharding=layout(spec))


_take = jax.custom_vjp(_lookup, nondiff_argnums=(0, 1, 2, 3))


def _take_fwd(dtype, spec, reduce_dtype, B, table, indices):
  return _lookup(dtype, spec, reduce_dtype, B, table, indices), (table, indices)


def _take_bwd(dtype, spec, reduce_dtype, B, kept, dy):
  table, indices = kept
  wide, tensor = jnp.promote_types(reduce_dtype, dtype), spec_of(table)[0]
  mesh = jax.sharding.get_abstract_mesh()
  rows = table.shape[0] // (mesh.shape[tensor] if tensor else 1)

  def local(dy, indices):
    dy = dy.astype(wide)
    if indices.shape[0] < dy.shape[0]:
      dy = dy.sum(0, keepdims=True)
    first = rows * jax.lax.axis_index(tensor) if tensor else 0
    indices = jnp.where(indices >= first, indices - first, rows)  # elsewhere: dropped
    return jnp.zeros((rows, table.shape[1]), wide).at[indices].add(dy, mode='drop')

  return summed(local, dy, indices, like=table), None


_take.defvjp(_take_fwd, _take_bwd)

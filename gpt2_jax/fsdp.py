"""Products with parameters that are split over the mesh, and their gradients.

A parameter that `fsdp` splits is gathered where it is used, in the activations' dtype, once for the
forward and once more for the backward pass: blocks run under `jax.checkpoint`, with policies that
never keep what was gathered (`config.REMAT_POLICIES`). Its gradient is summed over the devices in
`reduce_dtype` by a reduce-scatter: each device receives the sum of its own shard alone. Left to the
compiler it is often an all-reduce of whole gradients, twice the bytes, in the activations' dtype.
(ZeRO stage 3: Rajbhandari et al. 2019, arXiv:1910.02054.)
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from gpt2_jax import matmul
from gpt2_jax.sharding import in_mesh, layout, spec_of, unshard


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
  y = matmul.kept(matmul.einsum(how.equation, x, gathered, how.out_spec, how.precision, how.wide))
  if b is None:
    return y
  return y + unshard(b.astype(how.wide)).reshape(_over_rows(how, b.shape))


def _over_rows(how: Product, shape: tuple[int, ...]) -> tuple[int, ...]:
  """A bias's shape, with 1 for each axis of rows: 'CNH' against 'CBTNH'."""
  _, w, out = matmul.letters(how.equation)
  sizes = iter(shape)
  return tuple(next(sizes) if letter in w else 1 for letter in out)


_einsum = jax.custom_vjp(_forward, nondiff_argnums=(0,))


def _einsum_fwd(how, x, w, b):
  gathered = unshard(w.astype(x.dtype))
  return _multiply(how, x, gathered, b), (x, w, gathered, b)


def _einsum_bwd(how, kept, dy):
  x, w, gathered, b = kept
  x_axes, w_axes, out = matmul.letters(how.equation)
  dy = dy.astype(x.dtype)
  dx = matmul.einsum(f'{out},{w_axes}->{x_axes}', dy, gathered, spec_of(x), how.precision, x.dtype)
  dtype = jnp.promote_types(how.reduce_dtype, x.dtype)
  local = functools.partial(
    matmul.einsum, f'{x_axes},{out}->{w_axes}', out_spec=None, precision=how.precision, wide=dtype
  )
  dw = summed(local, x, dy, like=w)
  if b is None:
    return dx, dw, None
  b_axes = ''.join(letter for letter in out if letter in w_axes)
  return (
    dx,
    dw,
    summed(lambda dy: jnp.einsum(f'{out}->{b_axes}', dy, preferred_element_type=dtype), dy, like=b),
  )


_einsum.defvjp(_einsum_fwd, _einsum_bwd)


def summed(f, *rows: jax.Array, like: jax.Array) -> jax.Array:
  """The gradient of a parameter: `f` of each device's own rows, summed over the devices.

  Args:
    f: from the local parts of `rows` to the local part of a gradient, whole along `fsdp`.
    rows: arrays that are split over the batch (and `seq`).
    like: the parameter; the result lies like it.
  """
  total, spec, apart = sum_of(like)
  return jax.shard_map(
    lambda *rows: total(f(*rows)), in_specs=tuple(map(spec_of, rows)), out_specs=spec, check_vma=apart
  )(*rows)


def sum_of(like: jax.Array) -> tuple[Callable[[jax.Array], jax.Array], P, bool]:
  """How the devices' parts of a parameter's gradient are summed inside a `jax.shard_map`.

  Args:
    like: the parameter.

  Returns:
    a function from a device's part, whole along `fsdp`, to its share of the sum; the `out_specs` of
    that; and whether sums over some axes wait (`sum_later`), which needs the map's `check_vma`.
  """
  mesh, spec = jax.sharding.get_abstract_mesh(), spec_of(like)
  split = next((i for i, axis in enumerate(spec) if axis == 'fsdp'), None)
  later = jax.typeof(like).sharding.spec.reduced

  def total(part):
    if split is not None and mesh.shape['fsdp'] > 1:
      part = jax.lax.psum_scatter(part, 'fsdp', scatter_dimension=split, tiled=True)
    now = [axis for axis in summed_over(spec) if axis not in later]
    if not later:  # a sum over one device would be a copy; `check_vma` wants it all the same
      now = [axis for axis in now if mesh.shape[axis] > 1]
    if now:
      part = jax.lax.psum(part, now)
    if later:
      part = jax.lax.pcast(part, tuple(later), to='unreduced')
    return part.astype(like.dtype)

  return total, P(*spec, unreduced=later) if later else spec, bool(later)


def summed_over(spec: P) -> tuple[str, ...]:
  """The axes over which a gradient is summed whole, since they do not split its parameter."""
  return ('data', 'seq') if 'fsdp' in spec else ('data', 'fsdp', 'seq')


def sum_later(params, waits):
  """Parameters whose gradients stay apart on each device, to be added up over micro-batches and then
  summed over the devices once, by `sum_now`; those that don't wait are summed at once.

  Args:
    params: the parameters.
    waits: whether each one's gradient waits, in the same nested dict.
  """
  mesh = jax.sharding.get_abstract_mesh()

  def later(x, wait):
    if not wait:
      return x
    spec = spec_of(x)
    axes = frozenset(axis for axis in summed_over(spec) if mesh.shape[axis] > 1)
    return jax.sharding.reshard(x, P(*spec, reduced=axes)) if axes else x

  return jax.tree.map(later, params, waits) if in_mesh() else params


def sum_now(grads, params):
  """Gradients that `sum_later` left apart, summed over the devices; they lie as `params` do."""
  total = lambda g, x: jax.sharding.reshard(g, spec_of(x))
  return jax.tree.map(total, grads, params) if in_mesh() else grads


def zeros_apart(params):
  """Zeros for `sum_later`'s gradients to be added to."""

  def zeros(x):
    spec, later = spec_of(x), jax.typeof(x).sharding.spec.reduced
    if not later:
      return jnp.zeros_like(x)
    return jax.sharding.reshard(
      jnp.zeros(x.shape, x.dtype, out_sharding=spec), P(*spec, unreduced=later)
    )

  return jax.tree.map(zeros, params)


def take(table: jax.Array, indices: jax.Array, dtype, spec: P, reduce_dtype: str, B: int):
  """Rows of a table [V, D] at indices [B, T], or [1, T] for all of B rows; NaN beyond the table.

  Args:
    spec: layout of the result, [B, T, D].
  """
  if in_mesh():
    indices = jax.sharding.reshard(indices, P(spec[0] if indices.shape[0] == B else None, spec[1]))
  return (_take if in_mesh() else _lookup)(jnp.dtype(dtype), spec, reduce_dtype, B, table, indices)


def _lookup(dtype, spec, reduce_dtype, B, table, indices):
  del reduce_dtype
  once = P(*(spec[:-1] if indices.shape[0] == B else (None, *spec[1:-1])), None)
  found = (
    unshard(table.astype(dtype))
    .at[indices]
    .get(out_sharding=layout(once), mode='fill', fill_value=jnp.nan)
  )
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

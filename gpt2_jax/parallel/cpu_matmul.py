"""Products, in the order of operands that a platform multiplies fastest."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from gpt2_jax.parallel.sharding import in_mesh, layout, platform

FEW = range(2, 33)  # rows


class Einsum(NamedTuple):
  """The letters of an equation: of its three arrays, and of the axes by what is done to them."""

  x: str
  y: str
  out: str
  batch: str  # in all three
  rows: str  # in x and out, in x's order
  columns: str  # in y and out, in y's order
  sums: str  # in x and y


def parse_einsum(equation: str) -> Einsum:
  """The letters of an equation: 'BTD,DCNH->CBTNH' has the rows BT, the columns CNH and the sums D."""
  operands, out = equation.split('->')
  x, y = operands.split(',')
  batch = ''.join(a for a in x if a in y and a in out)
  rows, columns = ''.join(a for a in x if a not in y), ''.join(a for a in y if a not in x)
  sums = ''.join(a for a in x if a in y and a not in out)
  return Einsum(x, y, out, batch, rows, columns, sums)


def einsum(
  equation: str, x: jax.Array, w: jax.Array, out_spec: P | None, precision: str | None, wide
) -> jax.Array:
  """`jnp.einsum(equation, x, w)` in the dtype `wide`, laid out as `out_spec` says.

  Inside a `jax.shard_map` `out_spec` is None. A CPU multiplies by `row_major`, where it can. There a
  float32 weight [out, in] times a few rows, those of a batch that is decoded, has the weight on the
  left: w · xᵀ takes half to a third of the time of x · wᵀ.
  """
  if lies_whole(x):
    rows, axes = x.size // x.shape[-1], parse_einsum(equation)
    if x.dtype != jnp.float32 or rows >= FEW.stop:
      return row_major(equation, x, w, out_spec, precision, wide)
    if not in_mesh() and rows in FEW and axes.sums == axes.x[-1] == axes.y[-1]:
      return _weight_first(axes, x, w, precision, wide)
  return jnp.einsum(
    equation,
    x,
    w,
    precision=precision,
    preferred_element_type=wide,
    out_sharding=out_spec and layout(out_spec),
  )


def lies_whole(x: jax.Array) -> bool:
  """Whether `row_major` can be used: on a CPU, where `x` isn't split over devices (it would be
  gathered) and has a known size (a program may be exported for any).
  """
  mesh = jax.sharding.get_abstract_mesh()
  split = mesh.size > 1 and set(mesh.axis_types) != {AxisType.Manual}
  return platform() == 'cpu' and not split and isinstance(x.size, int)


def row_major(
  equation: str,
  x: jax.Array,
  y: jax.Array,
  out_spec: P | None = None,
  precision: str | None = None,
  wide='float32',
) -> jax.Array:
  """As `einsum`; added up in float32, of operands that lie [batch, rows, sums] and [batch, sums,
  columns] or [batch, columns, sums], as XLA's library for CPUs wants them.

  These layouts are demanded of XLA. Left to itself it makes an operand in the order in which it is
  multiplied, element by element across memory. For bfloat16 it decides early, by the layouts, whether
  the library multiplies (at twice the rate of float32), or float32 does; and if they changed later, a
  product would have no implementation at all.
  """
  e = parse_einsum(equation)
  # the library multiplies no vectors in bfloat16: one is doubled, and half of the result is taken
  vector = x.dtype == jnp.bfloat16 and all(x.shape[e.x.index(a)] == 1 for a in e.rows)
  if vector:
    x = jnp.concatenate([x, x], axis=e.x.index(e.rows[0]))

  x_order, y_order = e.batch + e.rows + e.sums, e.batch + e.columns + e.sums
  if e.y != y_order:
    y_order = e.batch + e.sums + e.columns
  z_order, batch = e.batch + e.rows + e.columns, range(len(e.batch))
  contracted = [x_order.index(a) for a in e.sums], [y_order.index(a) for a in e.sums]
  z = jax.lax.dot_general(
    _arranged(x, e.x, x_order),
    _arranged(y, e.y, y_order),
    (contracted, (batch, batch)),
    precision,
    jnp.dtype('float32'),
    out_sharding=out_spec and layout(P(*(out_spec[e.out.index(a)] for a in z_order))),
  )
  z = _in_rows(z).astype(wide).transpose([z_order.index(a) for a in e.out])
  return jax.lax.slice_in_dim(z, 0, 1, axis=e.out.index(e.rows[0])) if vector else z


def kept(x: jax.Array) -> jax.Array:
  """`x`, marked for `jax.checkpoint` to keep for the backward pass (`remat.REMAT_POLICIES`).

  A CPU has no loops over bfloat16: XLA would keep a float32 copy of all layers' values beside them.
  So there the bits are kept.
  """
  if x.dtype != jnp.bfloat16 or platform() != 'cpu':
    return checkpoint_name(x, 'kept')
  return _of_bits(checkpoint_name(jax.lax.bitcast_convert_type(x, jnp.uint16), 'kept'), x)


@jax.custom_jvp
def _of_bits(bits: jax.Array, x: jax.Array) -> jax.Array:
  """`x` from its bits, which have no derivative."""
  del x
  return jax.lax.bitcast_convert_type(bits, jnp.bfloat16)


@_of_bits.defjvp
def _of_bits_jvp(primals, tangents):
  return _of_bits(*primals), tangents[1]


def _arranged(x: jax.Array, axes: str, want: str) -> jax.Array:
  if axes != want:  # made first and then transposed, or it would be made in the slow order
    x = _in_rows(x).transpose([axes.index(a) for a in want])
  return _in_rows(x)


def _in_rows(x: jax.Array) -> jax.Array:
  return with_layout_constraint(x, Layout(tuple(range(x.ndim))))


def _weight_first(axes: Einsum, x, w, precision, wide):
  y = jax.lax.dot_general(
    w, x, (((w.ndim - 1,), (x.ndim - 1,)), ((), ())), precision, jnp.dtype(wide)
  )
  made = axes.y[:-1] + axes.x[:-1]
  # without the barrier XLA would make x · wᵀ of it
  return jax.lax.optimization_barrier(y).transpose([made.index(letter) for letter in axes.out])

"""Products, in the order of operands that a platform multiplies fastest."""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from gpt2_jax.sharding import in_mesh, layout, platform

FEW = range(2, 33)  # rows


def einsum(
  equation: str, x: jax.Array, w: jax.Array, out_spec: P | None, precision: str | None, wide
) -> jax.Array:
  """`jnp.einsum(equation, x, w)` in the dtype `wide`, laid out as `out_spec` says.

  Inside a `jax.shard_map` `out_spec` is None. A CPU multiplies by `row_major`, where it can. There a
  float32 weight [out, in] times a few rows, those of a batch that is decoded, has the weight on the
  left: w · xᵀ takes half to a third of the time of x · wᵀ.
  """
  if lies_whole(x):
    rows = x.size // x.shape[-1]
    if x.dtype != jnp.float32 or rows >= FEW.stop:
      return row_major(equation, x, w, out_spec, precision, wide)
    if not in_mesh() and rows in FEW and _last_axes(equation):
      return _weight_first(equation, x, w, precision, wide)
  return jnp.einsum(
    equation,
    x,
    w,
    precision=precision,
    preferred_element_type=wide,
    out_sharding=out_spec and layout(out_spec),
  )


def lies_whole(x: jax.Array) -> bool:
  """Whether `row_major` can be used: on a CPU, of what isn't split over devices, since it would be
  gathered, and has a known size, since a program may be exported for any.
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
  the library multiplies (at twice the rate of float32), or float32 does; and were they to change
  later, a product would have no implementation at all.
  """
  x_axes, y_axes, out = letters(equation)
  batch = ''.join(a for a in x_axes if a in y_axes and a in out)
  sums = ''.join(a for a in x_axes if a in y_axes and a not in out)
  rows, columns = (''.join(a for a in axes if a not in batch + sums) for axes in (x_axes, y_axes))
  if x.dtype == jnp.bfloat16 and all(x.shape[x_axes.index(a)] == 1 for a in rows):
    # the library multiplies no vectors in bfloat16
    twice = jnp.concatenate([x, x], axis=x_axes.index(rows[0]))
    z = row_major(equation, twice, y, out_spec, precision, wide)
    return jax.lax.slice_in_dim(z, 0, 1, axis=out.index(rows[0]))
  lies = batch + columns + sums if y_axes == batch + columns + sums else batch + sums + columns
  x, y = _arranged(x, x_axes, batch + rows + sums), _arranged(y, y_axes, lies)
  made, axes = batch + rows + columns, range(len(batch))
  z = jax.lax.dot_general(
    x,
    y,
    ((range(x.ndim - len(sums), x.ndim), [lies.index(a) for a in sums]), (axes, axes)),
    precision,
    jnp.dtype('float32'),
    out_sharding=out_spec and layout(P(*(out_spec[out.index(a)] for a in made))),
  )
  return _in_rows(z).astype(wide).transpose([made.index(a) for a in out])


def kept(x: jax.Array) -> jax.Array:
  """`x`, for `jax.checkpoint` to keep for the backward pass (`config.REMAT_POLICIES`).

  A CPU has no loops over bfloat16: XLA would keep a float32 copy of all layers' values beside them.
  So their bits are kept there.
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


def letters(equation: str) -> tuple[str, str, str]:
  """Those of both operands and of the result."""
  (x, y), out = equation.split('->')[0].split(','), equation.split('->')[1]
  return x, y, out


def _arranged(x: jax.Array, axes: str, want: str) -> jax.Array:
  if axes != want:  # made first and then transposed, or it would be made in the slow order
    x = _in_rows(x).transpose([axes.index(a) for a in want])
  return _in_rows(x)


def _in_rows(x: jax.Array) -> jax.Array:
  return with_layout_constraint(x, Layout(tuple(range(x.ndim))))


def _last_axes(equation: str) -> bool:
  """Whether both operands are contracted along their last axis alone."""
  x_axes, w_axes, out = letters(equation)
  return [letter for letter in w_axes if letter not in out] == [x_axes[-1]] == [w_axes[-1]]


def _weight_first(equation: str, x, w, precision, wide):
  x_axes, w_axes, out = letters(equation)
  y = jax.lax.dot_general(
    w, x, (((w.ndim - 1,), (x.ndim - 1,)), ((), ())), precision, jnp.dtype(wide)
  )
  made = w_axes[:-1] + x_axes[:-1]
  # without the barrier XLA would make x · wᵀ of it
  return jax.lax.optimization_barrier(y).transpose([made.index(letter) for letter in out])

"""The device mesh, the layout of every array on it, and the checks that a model fits.

The mesh always has the axes `data`, `fsdp`, `seq` and `tensor`, of size 1 where unused, and is
explicit: an array's layout is part of its type (`jax.typeof(x)`), so that a layout error is found
while tracing. `data` and `fsdp` split the batch; `fsdp` splits parameters, which are gathered where
they are used (`unshard`); `seq` splits the positions of a row; `tensor` splits heads, the MLP's width
and the vocabulary.

Without a mesh (`jax.set_mesh` not called) every function here does nothing: a model then runs on
one device.
"""

import collections
import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gpt2_jax.core.chips import Chip, chip_of
from gpt2_jax.core.errors import UserError

AXES = ('data', 'fsdp', 'seq', 'tensor')  # neighbours on the fastest links last
BATCH = ('data', 'fsdp')  # the axes over which rows of a batch are split


def activation(letters: str) -> P:
  """Where an array of activations lies, by the letters of its axes: see `gpt2.py`. Parameters:
  `parameters.Row.layout`.
  """
  split = {'B': BATCH, 'T': 'seq', 'N': 'tensor', 'F': 'tensor', 'V': 'tensor'}
  return P(*(split.get(letter) for letter in letters))  # every query sees all S keys


@dataclasses.dataclass(frozen=True)
class Rules:
  """Where each kind of activation lies. The suffix of a name gives the letters of its axes."""

  act_btd: P = activation('BTD')
  act_btnh: P = activation('BTNH')
  act_bsnh: P = activation('BSNH')
  logits_btv: P = activation('BTV')
  cache_lbnsh: P = activation('LBNSH')
  rows_b: P = activation('B')
  rows_bt: P = activation('BT')


RULES = Rules()


def make_mesh(
  data: int = 1,
  fsdp: int = 1,
  tensor: int = 1,
  seq: int = 1,
  devices: Sequence[Any] | None = None,
  slices_over: str = 'data',
) -> Mesh:
  """An explicit mesh over `devices` (default: all). One size may be -1: what the others leave.

  Args:
    data, fsdp, tensor, seq: sizes of the axes.
    devices: real ones, or those of a topology description.
    slices_over: the axis that crosses the slow network between TPU slices, where there are several:
      each slice holds a stretch of it, and all of the other axes.

  Raises:
    UserError: the sizes don't multiply to the number of devices, or that axis doesn't divide by the
      number of slices.
  """
  devices = list(jax.devices() if devices is None else devices)
  sizes = [data, fsdp, seq, tensor]
  asked = ', '.join(f'{name}={size}' for name, size in zip(AXES, sizes))
  if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
    raise UserError(f'mesh {asked}: sizes are positive, and at most one may be -1 (inferred).')
  known = math.prod(size for size in sizes if size != -1)
  if -1 in sizes and len(devices) % known == 0:
    sizes[sizes.index(-1)] = len(devices) // known
  if math.prod(sizes) != len(devices):
    raise UserError(
      f'mesh {asked} does not cover the {len(devices)} devices of this run '
      f'({devices[0].device_kind}). Set config.mesh so that data·fsdp·seq·tensor = {len(devices)}, '
      'or one of them to -1.'
    )
  slices, across = num_slices(devices), AXES.index(slices_over) if slices_over in AXES else None
  if across is None or sizes[across] % slices:
    raise UserError(
      f'mesh {asked}: the {slices} slices lie along mesh.slices_over = {slices_over!r}, which '
      f'must be one of {", ".join(AXES)}, of a size that is a multiple of {slices}.'
    )
  return Mesh(_ordered(devices, sizes, slices, across), AXES, axis_types=(AxisType.Explicit,) * 4)


def num_slices(devices: Sequence[Any]) -> int:
  """How many TPU slices some devices belong to: within one they have fast links."""
  return len({getattr(device, 'slice_index', 0) for device in devices})


def _ordered(devices: list, sizes: list[int], slices: int, across: int) -> np.ndarray:
  """The devices as an array of these sizes, neighbours near each other where the network allows."""
  inside, between = list(sizes), [1] * len(sizes)
  inside[across], between[across] = sizes[across] // slices, slices
  for split in (False, True):  # an axis of the mesh may need parts of two axes of the torus
    try:
      if slices > 1:
        return mesh_utils.create_hybrid_device_mesh(
          inside, between, devices, allow_split_physical_axes=split
        )
      return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=split)
    except (NotImplementedError, ValueError, AssertionError):
      continue
  # a shape that it has no assignment for: in the order of ids, each slice in one piece
  by_slice = sorted(devices, key=lambda device: (getattr(device, 'slice_index', 0), device.id))
  each = np.array(by_slice).reshape(slices, *inside)
  return np.moveaxis(each, 0, across).reshape(sizes)


def own_device(mesh: Mesh) -> Any:
  """A device of this process, or where the mesh is only described, the first."""
  here = set(jax.local_devices())
  return next((device for device in mesh.devices.flat if device in here), mesh.devices.flat[0])


def check_divisible(mesh: Mesh, divisible: dict[str, tuple[int, str]]) -> None:
  """Checks that every named size divides by its mesh axis, before anything is compiled.

  Args:
    mesh: the mesh.
    divisible: name of the size -> (size, mesh axis), as `GPTConfig.divisible()` gives it.

  Raises:
    UserError: names all sizes that don't divide, per axis the sizes that would work, and meshes of
      as many devices that would.
  """
  wrong = {n: (s, a) for n, (s, a) in divisible.items() if s % mesh.shape[a]}
  if not wrong:
    return
  common = collections.defaultdict(int)
  for size, axis in divisible.values():
    common[axis] = math.gcd(common[axis], size)
  lines = [
    f'{name} = {size} is not divisible by mesh.{axis} = {mesh.shape[axis]}'
    for name, (size, axis) in wrong.items()
  ]
  for axis in sorted({axis for _, axis in wrong.values()}):
    works = [n for n in range(1, min(common[axis], 1024) + 1) if common[axis] % n == 0]
    lines.append(f'mesh.{axis} may be one of {works}')
  fit = [
    sizes
    for sizes in factorizations(mesh.size)
    if not any(common[axis] % size for axis, size in zip(AXES, sizes))
  ]
  shown = [' '.join(f'{axis}={n}' for axis, n in zip(AXES, sizes) if n > 1) for sizes in fit[:8]]
  more = f' and {len(fit) - 8} more' * (len(fit) > 8)
  lines.append(f'of {mesh.size} devices these meshes would work: {"; ".join(shown)}{more}')
  raise UserError('; '.join(lines) + '.')


def factorizations(n: int, axes: int = len(AXES)) -> list[tuple[int, ...]]:
  """All tuples of sizes of the axes, in their order, that multiply to n; large first sizes first."""
  if axes == 1:
    return [(n,)]
  return [
    (first, *rest)
    for first in range(n, 0, -1)
    if n % first == 0
    for rest in factorizations(n // first, axes - 1)
  ]


def whole_rows(tree):
  """Parameters on a mesh that splits no positions, for rows of any length: its `seq` is a part of
  `data`, and everything lies where it did. Others as they are.
  """
  mesh: Any = getattr(jax.tree.leaves(tree)[0].sharding, 'mesh', None)
  if mesh is None or mesh.shape.get('seq', 1) == 1:
    return tree
  data, fsdp, seq, tensor = mesh.devices.shape
  devices = mesh.devices.transpose(0, 2, 1, 3).reshape(data * seq, fsdp, 1, tensor)
  mesh = Mesh(devices, AXES, axis_types=(AxisType.Explicit,) * 4)
  return jax.tree.map(
    lambda x: jax.make_array_from_single_device_arrays(
      x.shape, NamedSharding(mesh, x.sharding.spec), [s.data for s in x.addressable_shards]
    ),
    tree,
  )


def in_mesh() -> bool:
  """Whether a mesh was set, by `jax.set_mesh`."""
  return not jax.sharding.get_abstract_mesh().empty


def platform() -> str:
  """'cpu', 'gpu' or 'tpu': of the mesh that is set, whose devices needn't be here, or JAX's own."""
  device = _described()
  name = jax.default_backend() if device is None else device.platform
  return {'cuda': 'gpu', 'rocm': 'gpu'}.get(name, name)


def chip() -> Chip | None:
  """The chip of `platform`; None if it is unknown."""
  return chip_of((_described() or jax.devices()[0]).device_kind)


def _described() -> Any:
  """What the mesh that is set says of its devices; None where none is, or it says nothing."""
  return jax.sharding.get_abstract_mesh().abstract_device if in_mesh() else None


@contextlib.contextmanager
def mesh_of(tree: Any) -> Iterator[None]:
  """Sets the mesh that some arrays lie on, or none where they lie on one device."""
  sharding = jax.tree.leaves(tree)[0].sharding
  mesh: Any = sharding.mesh if isinstance(sharding, NamedSharding) else Mesh(np.empty((), object), ())
  with jax.set_mesh(mesh):
    yield


def devices_of(tree: Any) -> frozenset:
  """The devices that some arrays lie on."""
  return frozenset(jax.tree.leaves(tree)[0].sharding.device_set)


def without_mesh():
  """A context without a mesh, for shapes that needn't divide by it."""
  return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ()))


def layout(spec: P) -> P | None:
  """`spec` as an `out_sharding=` argument: None where no mesh is set."""
  return spec if in_mesh() else None


def spec_of(x: jax.Array) -> P:
  """How an array is laid out, an entry for each axis."""
  axes = jax.typeof(x).sharding.spec.partitions
  return P(*axes, *(None,) * (x.ndim - len(axes)))


def reshard(x: jax.Array, spec: P) -> jax.Array:
  """`x` laid out as `spec` says."""
  return jax.sharding.reshard(x, spec) if in_mesh() else x


def by_rows(f: Callable[[Any, Any], Any], shared, rows):
  """`f(shared, rows)`, by each device for its own rows: inside, there is no mesh to think of.

  Args:
    f: keeps rows apart: row b of what it returns depends on row b alone.
    shared: what every device has whole.
    rows: a tree of arrays [B, …], None among them; so is what `f` returns.
  """
  if not in_mesh():
    return f(shared, rows)
  rows = jax.tree.map(lambda x: jax.sharding.reshard(x, P(BATCH)), rows)
  return jax.shard_map(f, in_specs=(P(), P(BATCH)), out_specs=P(BATCH))(shared, rows)


def on_devices(tree):
  """Abstract arrays, as `jax.eval_shape` gives them, with layouts on the real devices."""

  def real(leaf):
    if in_mesh():
      spec = leaf.sharding.spec if leaf.sharding is not None else P()  # None: a constant
      sharding = NamedSharding(jax.sharding.get_mesh(), spec)
    else:
      sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

  return jax.tree.map(real, tree)


def unshard(w: jax.Array) -> jax.Array:
  """The FSDP all-gather of a parameter, written down where the parameter is used."""
  if not in_mesh():
    return w
  return jax.sharding.reshard(w, P(*(None if axis == 'fsdp' else axis for axis in spec_of(w))))


def place(local_rows: dict[int, np.ndarray], shape: tuple[int, ...], sharding: NamedSharding):
  """A global array [A, M, ...] from the rows that this process holds.

  Args:
    local_rows: flat row number a·M + m -> that row.
    shape: the global shape.
    sharding: a sharding that splits axis 1 alone.
  """
  A, M = shape[:2]
  if sharding.is_fully_addressable:  # all rows are here, and this is quicker
    return jax.device_put(np.stack([local_rows[i] for i in range(A * M)]).reshape(shape), sharding)

  def shard(index):
    a, m = (range(n)[i] for n, i in zip((A, M), index[:2]))
    return np.stack([np.stack([local_rows[i * M + j] for j in m]) for i in a])

  return jax.make_array_from_callback(shape, sharding, shard)


def local_rows(shape: tuple[int, int], sharding: NamedSharding) -> list[int]:
  """The flat row numbers a·M + m of a global [A, M, ...] array that this process must provide."""
  A, M = shape
  rows = set()
  for index in sharding.addressable_devices_indices_map((A, M, 1)).values():
    assert index is not None
    rows.update(a * M + m for a in range(A)[index[0]] for m in range(M)[index[1]])
  return sorted(rows)

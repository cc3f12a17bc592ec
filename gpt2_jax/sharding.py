"""The device mesh, the layout of every array on it, and the checks that a model fits.

The mesh always has the axes `data`, `fsdp` and `tensor`, of size 1 where unused, and is explicit:
an array's layout is part of its type (`jax.typeof(x)`), so that a layout error is found while
tracing. `data` and `fsdp` split the batch; `fsdp` splits parameters, which are gathered where they
are used (`unshard`); `tensor` splits heads, the MLP's width and the vocabulary.

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
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gpt2_jax.errors import UserError

AXES = ('data', 'fsdp', 'tensor')
BATCH = ('data', 'fsdp')  # the axes over which rows of a batch are split


@dataclasses.dataclass(frozen=True)
class Rules:
  """Where each kind of array lies. The suffix of a name gives the letters of its axes."""

  wte_vd: P = P('tensor', 'fsdp')
  wpe_td: P = P(None, 'fsdp')
  lm_head_vd: P = P('tensor', 'fsdp')
  ln_d: P = P(None)
  c_attn_dcnh: P = P('fsdp', None, 'tensor', None)
  c_attn_cnh: P = P(None, 'tensor', None)
  attn_proj_nhd: P = P('tensor', None, 'fsdp')
  c_fc_df: P = P('fsdp', 'tensor')
  c_fc_f: P = P('tensor')
  mlp_proj_fd: P = P('tensor', 'fsdp')
  proj_d: P = P(None)
  head_dk: P = P('fsdp', None)
  head_k: P = P(None)
  act_btd: P = P(BATCH, None, None)
  act_btf: P = P(BATCH, None, 'tensor')
  act_btnh: P = P(BATCH, None, 'tensor', None)
  act_cbtnh: P = P(None, BATCH, None, 'tensor', None)
  logits_btv: P = P(BATCH, None, 'tensor')
  cache_lbnsh: P = P(None, BATCH, 'tensor', None, None)
  rows_b: P = P(BATCH)
  weights_nts: P = P('tensor', None, None)


RULES = Rules()


def make_mesh(
    data: int = 1, fsdp: int = 1, tensor: int = 1, devices: Sequence[Any] | None = None
) -> Mesh:
  """An explicit mesh over `devices` (default: all). One size may be -1: what the others leave.

  Raises:
    UserError: the sizes don't multiply to the number of devices.
  """
  devices = list(jax.devices() if devices is None else devices)
  sizes = [data, fsdp, tensor]
  asked = ', '.join(f'{name}={size}' for name, size in zip(AXES, sizes))
  if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
    raise UserError(f'mesh {asked}: sizes are positive, and at most one may be -1 (inferred).')
  known = math.prod(size for size in sizes if size != -1)
  if -1 in sizes and len(devices) % known == 0:
    sizes[sizes.index(-1)] = len(devices) // known
  if math.prod(sizes) != len(devices):
    raise UserError(
        f'mesh {asked} does not cover the {len(devices)} devices of this run '
        f'({devices[0].device_kind}). Set config.mesh so that data·fsdp·tensor = {len(devices)}, '
        'or one of them to -1.')
  try:  # follows the physical topology where it can
    return jax.make_mesh(sizes, AXES, (AxisType.Explicit,) * 3, devices=devices)
  except (NotImplementedError, ValueError, AssertionError):
    return Mesh(np.array(devices).reshape(sizes), AXES, axis_types=(AxisType.Explicit,) * 3)


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
    UserError: names all sizes that don't divide, and per axis the sizes that would work.
  """
  wrong = {n: (s, a) for n, (s, a) in divisible.items() if s % mesh.shape[a]}
  if not wrong:
    return
  common = collections.defaultdict(int)
  for size, axis in divisible.values():
    common[axis] = math.gcd(common[axis], size)
  lines = [f'{name} = {size} is not divisible by mesh.{axis} = {mesh.shape[axis]}'
           for name, (size, axis) in wrong.items()]
  for axis in sorted({axis for _, axis in wrong.values()}):
    works = [n for n in range(1, min(common[axis], 1024) + 1) if common[axis] % n == 0]
    lines.append(f'mesh.{axis} may be one of {works}')
  raise UserError('; '.join(lines) + '.')


def in_mesh() -> bool:
  """Whether a mesh was set, by `jax.set_mesh`."""
  return not jax.sharding.get_abstract_mesh().empty


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
  spec = jax.typeof(w).sharding.spec
  return jax.sharding.reshard(w, P(*(None if axis == 'fsdp' else axis for axis in spec)))


def place(local_rows: dict[int, np.ndarray], shape: tuple[int, ...], sharding: NamedSharding):
  """A global array [A, M, ...] from the rows that this process holds.

  Args:
    local_rows: flat row number a·M + m -> that row.
    shape: the global shape.
    sharding: a sharding that splits axis 1 alone.
  """
  A, M = shape[:2]

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

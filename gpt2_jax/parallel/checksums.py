"""Checksums of arrays, made on the devices that hold them: what a flipped bit changes.

An array's is a sum over its elements, modulo 2³², of their bits times an odd number that follows from
the element's place: of integers, so that no order of addition matters. It is the same however the
array is split over devices. One flipped bit always changes it; what changes several is missed once in
2⁶⁴ times or so, since there are two such sums.
"""

import dataclasses
import functools
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from gpt2_jax.parallel.sharding import without_mesh

FACTORS = (0x9E3779B1, 0x85EBCA77)  # odd; primes near those of Knuth's and MurmurHash's
UNSIGNED = {1: 'uint8', 2: 'uint16', 4: 'uint32'}


@dataclasses.dataclass(frozen=True)
class Checksums:
  """The checksums of a tree's arrays.

  Attributes:
    names: of the arrays, as `params.wte.weight`.
    devices: that they lie on, in order of their number.
    sums: [arrays, devices, 2] uint32, of the part that a device holds.
    parts: for each array, which part of it each device holds; replicas hold the same.
  """

  names: list[str]
  devices: list[Any]
  sums: np.ndarray
  parts: list[list[Any]]

  def of_arrays(self) -> dict[str, str]:
    """Returns the checksum of each array as a whole, in hexadecimal digits."""
    found = {}
    for name, sums_D2, parts in zip(self.names, self.sums, self.parts):
      firsts = [parts.index(part) for part in dict.fromkeys(parts)]  # a replica counts once
      total = sums_D2[firsts].sum(0, dtype=np.uint32)
      found[name] = ''.join(f'{int(half):08x}' for half in total)
    return found

  def differing(self, other: 'Checksums') -> list[tuple[str, list[Any]]]:
    """Returns which arrays differ from those of another tree, and on which devices."""
    differs = (self.sums != other.sums).any(-1)
    return [
      (name, [device for device, bad in zip(self.devices, row) if bad])
      for name, row in zip(self.names, differs)
      if row.any()
    ]

  def torn(self) -> list[tuple[str, list[Any]]]:
    """Returns which arrays have replicas that differ, and the devices that are not as most are; all
    of those where there is no majority.
    """
    found = []
    for name, sums_D2, parts in zip(self.names, self.sums, self.parts):
      odd = []
      for part in dict.fromkeys(parts):
        held = [d for d, other in enumerate(parts) if other == part]
        values = [tuple(sums_D2[d].tolist()) for d in held]
        most = max(values, key=values.count)
        if any(value != most for value in values):
          clear = 2 * values.count(most) > len(values)
          odd += [self.devices[d] for d, v in zip(held, values) if v != most or not clear]
      if odd:
        found.append((name, odd))
    return found


def checksums(tree: Any) -> Checksums:
  """Returns the checksums of a tree's arrays; all processes must call it together."""
  leaves = jax.tree.leaves_with_path(tree)
  names = [jax.tree_util.keystr(path, simple=True, separator='.') for path, _ in leaves]
  every = {device for _, leaf in leaves for device in leaf.sharding.device_set}
  devices = sorted(every, key=lambda device: device.id)
  at = {device: d for d, device in enumerate(devices)}
  found, parts = {}, []
  with without_mesh():
    for i, (_, leaf) in enumerate(leaves):
      for shard in leaf.addressable_shards:
        found[i, at[shard.device]] = _of_shard(shard, leaf.shape)
      held = {
        at[d]: _key(index) for d, index in leaf.sharding.devices_indices_map(leaf.shape).items()
      }
      parts.append([held.get(d, f'not on {d}') for d in range(len(devices))])
    sums = np.zeros((len(leaves), len(devices), 2), np.uint32)
    for place, value in jax.device_get(found).items():
      sums[place] = value
    if jax.process_count() > 1:  # each has zeros for the devices of others
      sums = np.asarray(multihost_utils.process_allgather(sums)).sum(0, dtype=np.uint32)
  return Checksums(names, devices, sums, parts)


def _key(index: tuple[slice, ...]) -> tuple:
  return tuple((part.start, part.stop) for part in index)


def _of_shard(shard: Any, shape: tuple[int, ...]) -> Any:
  """The two sums of one device's part of an array of a shape; on a CPU without a program."""
  starts = np.array([part.start or 0 for part in shard.index] or [0], np.uint32)
  if shard.device.platform == 'cpu':
    x = np.atleast_1d(shard.data)
    return _sums(np, x.view(UNSIGNED[x.dtype.itemsize]), starts, shape or (1,))
  return _on_device(shard.data, starts, shape)


@functools.partial(jax.jit, static_argnums=2)
def _on_device(x: jax.Array, starts: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  bits = jnp.atleast_1d(x.astype(jnp.uint8) if x.dtype == bool else x)
  bits = jax.lax.bitcast_convert_type(bits, UNSIGNED[bits.dtype.itemsize])
  return _sums(jnp, bits, starts, shape or (1,))


def _sums(library: types.ModuleType, bits: Any, starts: Any, shape: tuple[int, ...]) -> Any:
  """[2], of a part that begins at `starts` of an array of a shape; `library`: NumPy or JAX's."""
  place, stride = library.zeros(bits.shape, 'uint32'), 1
  for axis in reversed(range(bits.ndim)):
    numbers = library.arange(bits.shape[axis], dtype='uint32') + starts[axis]
    along = [1] * bits.ndim
    along[axis] = -1
    place = place + (numbers * np.uint32(stride % 2**32)).reshape(along)
    stride *= shape[axis]
  bits = bits.astype('uint32')

  def total(factor: int) -> Any:
    mixed = (place + np.uint32(1)) * np.uint32(factor)
    weight = (mixed ^ (mixed >> np.uint32(15))) * np.uint32(FACTORS[1]) | np.uint32(1)
    return (bits * weight).sum(dtype='uint32')

  return library.stack([total(factor) for factor in FACTORS])

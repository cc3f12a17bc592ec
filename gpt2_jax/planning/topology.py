"""Devices that are not there, to compile for: TPU slices by libtpu, GPUs by the CUDA plugin.

v5e:16x16         a TPU slice: v3, v4, v5e, v5p, v6e, v7x, and its chips in x and y (and z)
4*v5e:8x8         four such slices, joined by the data centre's network (DCN)
h100:8, h100:2x8  GPUs: a100, h100, h200; of one host, or hosts x GPUs
"""

import dataclasses
import difflib
import importlib.util
import math
import os
import re
from collections.abc import Sequence
from typing import Any

from gpt2_jax.core.chips import CHIPS, Chip
from gpt2_jax.core.errors import UserError

# Name -> (libtpu's name, beginning of the device kind, axes of the torus, chips at most).
TPUS = {
  'v3': ('v3', 'TPU v3', 2, 1024),
  'v4': ('v4', 'TPU v4', 3, 4096),
  'v5e': ('v5e', 'TPU v5 lite', 2, 256),
  'v5p': ('v5p', 'TPU v5', 3, 8960),
  'v6e': ('v6e', 'TPU v6 lite', 2, 256),
  'v7x': ('tpu7x', 'TPU7x', 3, 9216),
}
ALIASES = {
  'v5litepod': 'v5e',
  'v5': 'v5p',
  'tpu7x': 'v7x',
  'v7': 'v7x',
  'trillium': 'v6e',
  'ironwood': 'v7x',
}
MEGACORE = ('v4', 'v5p')  # both cores of a chip are one device
GPUS = {'a100': 'NVIDIA A100-SXM4-80GB', 'h100': 'NVIDIA H100 80GB HBM3', 'h200': 'NVIDIA H200'}
# What the CUDA compiler wants to know of a GPU (a GpuTargetConfigProto). On a GPU at hand jax's
# `xc.get_topology_for_devices(jax.devices()).target_config` prints it: H100's is from there.
TARGET = '''gpu_device_info {{ threads_per_block_limit: 1024 threads_per_warp: 32
  shared_memory_per_block: 49152 shared_memory_per_core: {shared} threads_per_core_limit: 2048
  core_count: {cores} fpus_per_core: {fpus} block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
  block_dim_limit_z: 65535 memory_bandwidth: {bandwidth} l2_cache_size: {cache}
  clock_rate_ghz: {clock} device_memory_size: {memory} shared_memory_per_block_optin: {optin}
  cuda_compute_capability {{ major: {major} }} registers_per_core_limit: 65536
  registers_per_block_limit: 65536 }}
platform_name: "CUDA" runtime_version {{ major: 12 minor: 9 patch: 0 }}
dnn_version_info {{ major: 9 minor: 10 }} device_description_str: "{name}"'''
HOPPER = dict(shared=233472, optin=232448, cores=132, fpus=128, cache=52428800, clock=1.98, major=9)
AMPERE = dict(shared=167936, optin=166912, cores=108, fpus=64, cache=41943040, clock=1.41, major=8)


@dataclasses.dataclass(frozen=True)
class Topology:
  """Devices, described."""

  name: str  # as asked for, in full: '4*v5e:8x8'
  chip: Chip
  devices: list[Any]  # jax's
  slices: list[int]  # of each device: TPU slice, or host of a GPU

  @property
  def chips(self) -> int:
    return len(self.devices) // self.chip.cores

  def slices_of(self, devices: Any) -> list[int]:
    """Returns the slice of each of some devices, such as a mesh's."""
    number = dict(zip(self.devices, self.slices))
    return [number[device] for device in devices]


def prepare_environment() -> None:
  """Makes jax use no accelerator, and libtpu print nothing; to be called before jax is first used."""
  os.environ['JAX_PLATFORMS'] = 'cpu'
  for name, value in dict(
    TPU_SKIP_MDS_QUERY='1',
    TPU_ACCELERATOR_TYPE='v5litepod-16',
    TPU_WORKER_HOSTNAMES='localhost',
    TPU_WORKER_ID='0',
    ALLOW_MULTIPLE_LIBTPU_LOAD='1',
    TPU_MIN_LOG_LEVEL='3',
    TF_CPP_MIN_LOG_LEVEL='1',
  ).items():
    os.environ.setdefault(name, value)
  import jax

  jax.config.update('jax_platforms', 'cpu')  # where jax is imported, the environment is too late


def legal(kind: str) -> list[str]:
  """Returns some names of slices of a TPU, small to large: powers of two on each axis."""
  _, _, axes, most = TPUS[kind]
  sizes = [2**n for n in range(6)]
  shapes = (
    [(x, y) for x in sizes for y in sizes if x <= y <= 2 * x]
    if axes == 2
    else [
      (x, y, z)
      for x in sizes
      for y in sizes
      for z in sizes
      if x <= y <= z <= 2 * x or (x, y, z) == (2, 2, 1)
    ]
  )
  shapes = [s for s in shapes if 4 <= math.prod(s) <= min(most, 1024) and s[:2] >= (2, 2)]
  return [f'{kind}:{"x".join(map(str, s))}' for s in sorted(shapes, key=lambda s: (math.prod(s), s))]


def _unknown(name: str) -> UserError:
  kinds = [*TPUS, *GPUS]
  near = difflib.get_close_matches(name.split(':')[0], [*kinds, *ALIASES], 1)
  hint = f' Do you mean {near[0]}:…?' if near and near[0] != name.split(':')[0] else ''
  return UserError(
    f"--topology {name!r} is none that is known.{hint} TPU: {', '.join(TPUS)} with the slice's "
    f'shape (v5e:16x16, v5p:4x4x4), several as 4*v5e:8x8; GPU: {", ".join(GPUS)} with their '
    'number, or hosts x GPUs (h100:8, h100:2x8).'
  )


def split(name: str) -> tuple[int, str, tuple[int, ...]]:
  """'4*v5e:8x8' -> 4, 'v5e', (8, 8).

  Raises:
    UserError: `name` is not the name of a topology.
  """
  found = re.fullmatch(r'(?:(\d+)\*)?([a-z]\w*):(\d+(?:x\d+)*)', name.strip().lower())
  if not found:
    raise _unknown(name)
  kind = ALIASES.get(found[2], found[2])
  shape = tuple(map(int, found[3].split('x')))
  if (kind not in TPUS and kind not in GPUS) or math.prod(shape) < 1:
    raise _unknown(name)
  return int(found[1] or 1), kind, shape


def _tpu(name: str, count: int, kind: str, shape: Sequence[int]) -> list[Any]:
  if importlib.util.find_spec('libtpu') is None:
    raise UserError(
      f'--topology {name}: the TPU compiler is not installed: pip install libtpu (no TPU is needed).'
    )
  from jax.errors import JaxRuntimeError
  from jax.experimental.topologies import get_topology_desc

  theirs, _, axes, most = TPUS[kind]
  near = min(legal(kind), key=lambda other: abs(math.prod(split(other)[2]) - math.prod(shape)))
  advice = f'{near} is near it; others: {", ".join(legal(kind))}.'
  if len(shape) != axes or math.prod(shape) > most:
    raise UserError(
      f'--topology {name}: a slice of {kind} has {axes} axes and at most {most:,} chips. {advice}'
    )
  options: dict[str, Any] = {'chip_config_name': 'megacore'} if kind in MEGACORE else {}
  if math.prod(shape) == 1:
    options['chips_per_host_bounds'] = (1, 1, 1)
  if count > 1:
    options['num_slices'] = count
  try:
    shown = f'{theirs}:{"x".join(map(str, shape))}'
    return list(get_topology_desc(platform='tpu', topology_name=shown, **options).devices)
  except JaxRuntimeError as e:
    raise UserError(
      f'--topology {name}: libtpu refuses it ({str(e).splitlines()[0]}). {advice}'
    ) from e


def _gpu(name: str, count: int, kind: str, shape: Sequence[int]) -> list[Any]:
  if count > 1 or len(shape) > 2:
    raise UserError(f'--topology {name}: GPUs are {kind}:N, or {kind}:HOSTSxGPUS.')
  from jax.experimental.topologies import get_topology_desc

  chip = CHIPS[max((n for n in CHIPS if GPUS[kind].startswith(n)), key=len)]
  target = TARGET.format(
    name=GPUS[kind],
    memory=chip.hbm,
    bandwidth=int(chip.hbm_bandwidth),
    **(AMPERE if kind == 'a100' else HOPPER),
  )
  hosts, each = shape if len(shape) == 2 else (1, shape[0])
  try:
    return list(
      get_topology_desc(platform='cuda', target_config=target, topology=f'1x{hosts}x{each}').devices
    )
  except NotImplementedError as e:
    raise UserError(
      f'--topology {name}: the CUDA compiler is not installed: pip install "gpt2_jax[cuda12]" (no '
      'GPU is needed).'
    ) from e


def get(name: str, slices: int | None = None) -> Topology:
  """Returns the devices of a topology, see the top of this file. No accelerator is touched.

  Args:
    name: of the topology.
    slices: how many slices, where the name doesn't say.

  Raises:
    UserError: there is no such topology, or its compiler is not installed.
  """
  count, kind, shape = split(name)
  if slices is not None:
    if slices < 1 or count not in (1, slices):
      raise UserError(f'--slices {slices} and --topology {name} contradict each other.')
    count = slices
  name = f'{count}*' if count > 1 else ''
  name += f'{kind}:{"x".join(map(str, shape))}'
  prepare_environment()
  if kind in TPUS:
    devices = _tpu(name, count, kind, shape)
    numbers = [getattr(device, 'slice_index', 0) for device in devices]
    return Topology(name, CHIPS[TPUS[kind][1]], devices, numbers)
  devices = _gpu(name, count, kind, shape)
  chip = CHIPS[max((n for n in CHIPS if GPUS[kind].startswith(n)), key=len)]
  return Topology(name, chip, devices, [device.process_index for device in devices])

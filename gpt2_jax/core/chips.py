"""Chips and their speeds, by the vendors' data sheets.

Sources: Google's "Cloud TPU system architecture" pages (v2 to v7x) and NVIDIA's data sheets of A100,
L4, H100, H200, B200. HBM of TPUs is the memory that their compiler allows a program (libtpu
0.0.42.1), HBM of GPUs the memory that the driver reports or, of a GPU that we haven't seen, that of
the data sheet. Two figures are no vendor's: `dcn`, a matter of the network and not of the chip, is
the share of the network card in the machines that the clouds rent out; the TPU v2's HBM is 15/16 of
its data sheet's.
"""

import contextlib
import dataclasses
import os
import platform
from pathlib import Path

GIB = 2**30
# Shares of a data sheet's figures that programs are assumed to get. Not measured.
COMPUTE, HBM, LINKS = 0.6, 0.8, 0.5


@dataclasses.dataclass(frozen=True)
class Chip:
  """A device as JAX counts them: a chip, or one of the two cores of a TPU v2, v3 or v7x."""

  flops: float  # dense bfloat16 FLOP/s
  hbm: int  # bytes of memory that a program may use
  hbm_bandwidth: float  # bytes/s
  ici: float  # bytes/s that it can send to its slice (TPU) or host (NVLink, else PCIe), all links
  dcn: float  # bytes/s that it can send to other slices or hosts
  cores: int = 1  # devices that make up one chip, as it is counted and paid for
  clock: float = 0  # Hz of a TPU: what its FLOP/s and the number of its multipliers make it


# By the beginning of jax's `device_kind`. Megacore chips (v4, v5p) are one device.
CHIPS = {
  'TPU v2': Chip(22.5e12, int(7.5 * GIB), 350e9, 124e9, 3e9, 2, clock=0.69e9),
  'TPU v3': Chip(61.5e12, int(15.48 * GIB), 450e9, 164e9, 3e9, 2, clock=0.94e9),
  'TPU v4': Chip(275e12, int(30.75 * GIB), 1228e9, 300e9, 6.25e9, clock=1.05e9),
  'TPU v5 lite': Chip(197e12, int(15.75 * GIB), 819e9, 200e9, 3.125e9, clock=1.5e9),
  'TPU v5': Chip(459e12, int(95.74 * GIB), 2765e9, 600e9, 6.25e9, clock=1.75e9),
  'TPU v6 lite': Chip(918e12, int(31.25 * GIB), 1640e9, 400e9, 6.25e9, clock=1.75e9),
  'TPU7x': Chip(1153.5e12, int(94.75 * GIB), 3690e9, 300e9, 6.25e9, 2, clock=2.2e9),
  'NVIDIA A100': Chip(312e12, 40 * 10**9, 1555e9, 300e9, 12.5e9),
  'NVIDIA A100-SXM4-80GB': Chip(312e12, 85_091_549_184, 2039e9, 300e9, 25e9),
  'NVIDIA L4': Chip(121e12, 24 * 10**9, 300e9, 32e9, 3.125e9),
  'NVIDIA H100': Chip(989e12, 84_929_347_584, 3352e9, 450e9, 50e9),
  'NVIDIA H100 PCIe': Chip(756e12, 80 * 10**9, 2000e9, 64e9, 25e9),
  'NVIDIA H200': Chip(989e12, 141 * 10**9, 4800e9, 450e9, 50e9),
  'NVIDIA B200': Chip(2250e12, 180 * 10**9, 8000e9, 900e9, 50e9),
}


def processor() -> str:
  """Returns the number of threads of the host's processor, and its name."""
  name = platform.processor() or platform.machine()
  with contextlib.suppress(OSError, StopIteration):
    lines = Path('/proc/cpuinfo').read_text().splitlines()
    name = next(line.partition(':')[2].strip() for line in lines if line.startswith('model name'))
  return f'{os.cpu_count()} x {name}'


def chip_of(device_kind: str) -> Chip | None:
  """Returns the chip with the longest name that `device_kind` begins with; None if it is unknown."""
  names = [name for name in CHIPS if device_kind.startswith(name)]
  return CHIPS[max(names, key=len)] if names else None


def peak_flops(device_kind: str) -> float | None:
  """Returns the bfloat16 FLOP/s of a device; None if they are unknown."""
  chip = chip_of(device_kind)
  return chip.flops if chip else None

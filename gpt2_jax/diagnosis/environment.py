"""What a report of a fault should say of the machine and the versions."""

import importlib.metadata
import os
import platform
import shutil
import sys

import jax

from gpt2_jax.core import chips
from gpt2_jax.core.chips import GIB
from gpt2_jax.training.watch import run_record

EXTRAS = ('torch', 'transformers', 'tensorflow-datasets', 'libtpu', 'fastapi', 'gcsfs', 's3fs')
VARIABLES = (
  'JAX_',
  'XLA_',
  'LIBTPU_',
  'CUDA_',
  'NVIDIA_VISIBLE',
  'SLURM_N',
  'SLURM_PROCID',
  'GLIBC_',
)


def describe() -> str:
  """Returns lines of `what  value`: versions, machine, devices, variables. No path, no key."""
  versions = run_record.versions()
  for name in EXTRAS:
    try:
      versions[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      continue
  ram = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
  rows = {
    'commit': run_record.commit() or 'not a checkout',
    'python': f'{platform.python_version()} ({sys.implementation.name})',
    'platform': platform.platform(),
    'processor': f'{chips.processor()}, {ram / GIB:.1f} GiB of memory',
    'disk': f'{shutil.disk_usage(".").free / GIB:.1f} GiB free here',
    'devices': f'{jax.device_count()} x {jax.devices()[0].device_kind} ({jax.default_backend()})',
    'processes': str(jax.process_count()),
    **versions,
    **{k: v for k, v in sorted(os.environ.items()) if k.startswith(VARIABLES) and '/' not in v},
  }
  return '\n'.join(f'{name:20s} {value}' for name, value in rows.items())

"""Starting JAX's distributed runtime: one process a host."""

import os

import jax

from gpt2_jax.errors import UserError


def _cluster() -> str | None:
  """What in the environment shows that this is one process of several, None where nothing does."""
  for name in ('SLURM_NTASKS', 'OMPI_COMM_WORLD_SIZE'):
    if int(os.environ.get(name, 1)) > 1:
      return name
  if len(os.environ.get('TPU_WORKER_HOSTNAMES', '').split(',')) > 1:
    return 'TPU_WORKER_HOSTNAMES'
  return 'JAX_COORDINATOR_ADDRESS' if 'JAX_COORDINATOR_ADDRESS' in os.environ else None


def initialize(mode: str) -> None:
  """Joins the other processes: always with 'on', with 'auto' where the environment shows a cluster.

  Raises:
    UserError: joining was asked for, or called for, and failed. A run never falls back to one host.
  """
  cause = '--distributed=on' if mode == 'on' else _cluster() if mode == 'auto' else None
  if cause is None:
    return
  try:
    jax.distributed.initialize()
  except (RuntimeError, ValueError) as e:
    raise UserError(f'the other processes could not be joined ({cause}): {e}. For a run on this host '
                    'alone pass --distributed=off.') from e
  print(f'process {jax.process_index()}/{jax.process_count()}: {jax.local_device_count()} of '
        f'{jax.device_count()} devices', flush=True)

"""Starting JAX's distributed runtime: one process a host."""

import glob
import importlib.util
import os
import socket
import sys
import time
import urllib.request

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from gpt2_jax.core.buckets import AnyPath
from gpt2_jax.core.errors import UserError, saving

# After so long without a sign of life a process counts as dead, and the others end too. A host that
# pages or is moved to another machine is silent for some seconds.
SILENCE_S = 60
VISIBLE_S = 15  # within which a shared folder shows what another host has written
FLAGS = ('--coordinator', '--num_processes', '--process_id')


def _count(name: str) -> int:
  value = os.environ.get(name, '1')
  return int(value) if value.isdecimal() else 1


def _tpu_hosts() -> int:
  """Returns the number of hosts of this TPU slice, by Google Cloud's metadata server; else 1."""
  chips = glob.glob('/dev/accel*') or glob.glob('/dev/vfio/[0-9]*')
  if not chips or not importlib.util.find_spec('libtpu') or 'TPU_SKIP_MDS_QUERY' in os.environ:
    return 1
  server = os.environ.get('GCE_METADATA_IP', '169.254.169.254')
  request = urllib.request.Request(
    f'http://{server}/computeMetadata/v1/instance/attributes/worker-network-endpoints',
    headers={'Metadata-Flavor': 'Google'},
  )
  try:
    with urllib.request.urlopen(request, timeout=3) as answer:
      return answer.read().decode().count(',') + 1
  except OSError:  # no such server, or no such attribute
    return 1


def _cluster() -> str | None:
  """Names what shows that this is one process of several; None if nothing does."""
  for name in ('SLURM_NTASKS', 'OMPI_COMM_WORLD_SIZE', 'MEGASCALE_NUM_SLICES'):
    if _count(name) > 1:
      return name
  for name in ('TPU_PROCESS_ADDRESSES', 'TPU_WORKER_HOSTNAMES'):
    value = os.environ.get(name, '')
    if ',' in value and not value.startswith('WARNING'):  # libtpu's, where it found none
      return name
  if 'JAX_COORDINATOR_ADDRESS' in os.environ:
    return 'JAX_COORDINATOR_ADDRESS'
  if 'KUBERNETES_SERVICE_HOST' in os.environ and 'JOB_COMPLETION_INDEX' in os.environ:
    return 'an indexed Job of Kubernetes: JOB_COMPLETION_INDEX'
  return 'a TPU slice of several hosts' if _tpu_hosts() > 1 else None


def leave(message: str) -> None:
  """Says what went wrong and ends this process at once with status 1, if it is one of several.

  The usual way out would wait for the others, which wait for this one in the middle of a step. Its
  end is what they notice.
  """
  if jax.distributed.is_initialized():
    print(message, file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(1)


def _check_free(port: int) -> None:
  """Raises an OSError if process 0 can't listen on a port, on which JAX may crash."""
  if socket.has_dualstack_ipv6():
    socket.create_server(('::', port), family=socket.AF_INET6, dualstack_ipv6=True).close()
  else:
    socket.create_server(('', port)).close()


def initialize(
  mode: str,
  coordinator: str | None = None,
  num_processes: int | None = None,
  process_id: int | None = None,
) -> None:
  """Joins the other processes, and says so.

  Args:
    mode: 'on', 'off', or 'auto': where the environment shows a cluster, or the rest is given.
    coordinator: HOST:PORT of process 0, on which it is to listen.
    num_processes: how many there are.
    process_id: which one this is, from 0.

  Raises:
    UserError: joining was asked for, or called for, and failed. A run never falls back to one host.
  """
  given = (coordinator, num_processes, process_id)
  missing = [flag for flag, value in zip(FLAGS, given) if value is None]
  asked = len(missing) < len(FLAGS)
  if asked and missing:
    raise UserError(f'{", ".join(FLAGS)} belong together: {" and ".join(missing)} is missing.')
  if asked and mode == 'off':
    raise UserError(f'--distributed=off contradicts {FLAGS[0]}: leave one of them out.')
  cause = (
    FLAGS[0]
    if asked
    else '--distributed=on'
    if mode == 'on'
    else (_cluster() if mode == 'auto' else None)
  )
  if cause is None:
    return
  if coordinator is not None and num_processes is not None and process_id is not None:
    host, _, port = coordinator.rpartition(':')
    if not host or not port.isdecimal() or not 0 <= process_id < num_processes:
      raise UserError(
        f'{FLAGS[0]}={coordinator} must be HOST:PORT of process 0, and {FLAGS[2]}='
        f'{process_id} one of 0 to {num_processes - 1}.'
      )
  try:
    if coordinator is not None and process_id == 0:
      _check_free(int(coordinator.rpartition(':')[2]))
    jax.distributed.initialize(
      coordinator,
      num_processes,
      process_id,
      cluster_detection_method='deactivate' if asked else None,
      heartbeat_timeout_seconds=SILENCE_S,
      shutdown_timeout_seconds=SILENCE_S,
    )
    if jax.process_count() < (num_processes or 1):
      raise RuntimeError(f'JAX sees {jax.process_count()} processes, not {num_processes}')
  except (OSError, RuntimeError, ValueError) as e:
    raise UserError(
      f'the other processes could not be joined ({cause}): {e}. For a run on this host '
      'alone pass --distributed=off.'
    ) from e


def say(text: str) -> None:
  """Prints a line, on process 0 alone."""
  if jax.process_index() == 0:
    print(text, flush=True)


def hello(mesh: Mesh) -> None:
  """Prints, on each of several hosts, its number, its devices and the mesh."""
  if jax.process_count() > 1:
    shape = ' '.join(f'{axis}={size}' for axis, size in mesh.shape.items())
    print(
      f'process {jax.process_index()}/{jax.process_count()} on {socket.gethostname()}: devices '
      f'{jax.local_device_count()}/{jax.device_count()}, mesh {shape}',
      flush=True,
    )


def check_shared(folder: AnyPath) -> None:
  """Checks that all processes see one folder, by a file that process 0 leaves there.

  Raises:
    UserError: on all of them, where one does not.
  """
  if jax.process_count() == 1:
    return
  mine, path = np.frombuffer(os.urandom(4), np.uint32), folder / '.shared'
  if jax.process_index() == 0:
    with saving('the workdir', path):
      path.write_text(str(mine[0]))
  number = str(multihost_utils.broadcast_one_to_all(mine)[0])
  sees, last = False, time.monotonic() + VISIBLE_S
  while not sees and time.monotonic() < last:
    sees = path.exists() and path.read_text() == number
    time.sleep(0 if sees else 0.2)
  blind = np.flatnonzero(~multihost_utils.process_allgather(np.array(sees)).reshape(-1)).tolist()
  if jax.process_index() == 0:
    path.unlink()
  if blind:
    raise UserError(
      f'{folder} is another folder on process {", ".join(map(str, blind))} than on '
      'process 0: checkpoints need one that all see (gs://…, NFS, Filestore). Name it with '
      '--workdir.'
    )

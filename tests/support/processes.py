"""Processes that tests start, and the environment of all of them, which importing this sets."""

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CACHE = os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', str(ROOT / '.jax_cache'))
os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0.03'
os.environ['JAX_PLATFORMS'] = 'cpu'
# less optimised code, in one piece: half the time to compile, which is most of the time tests take
QUICK = '--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1'
USUAL = {}  # jax.jit's compiler_options, for bits that two programs share as users compile them
if version('jaxlib').startswith('0.10.'):  # later ones know no other emitters
  QUICK += ' --xla_cpu_use_fusion_emitters=false'
  USUAL = {'xla_cpu_use_fusion_emitters': True}
BETTER = QUICK.replace('level=0', 'level=1')  # takes longer to compile, and half as long a step
os.environ['XLA_FLAGS'] = f'--xla_force_host_platform_device_count=8 {QUICK}'
ONLINE = os.environ.get('HF_HUB_OFFLINE', '0')  # as the user has it
os.environ['HF_HUB_OFFLINE'] = '1'


from support import forked  # noqa: E402


def environment(devices: int = 1, **extra: str) -> dict[str, str]:
  """The environment of a process of its own, with so many simulated devices."""
  flags = f'--xla_force_host_platform_device_count={devices} {QUICK}'
  return dict(os.environ, PYTHONPATH=str(ROOT), XLA_FLAGS=flags) | extra


def run(*command: str, cwd: Path = ROOT, timeout: float = 300, **env) -> subprocess.CompletedProcess:
  """Runs Python with these arguments, in a process of its own; its output is text."""
  return forked.run([sys.executable, *command], timeout, cwd=cwd, env=environment(**env))

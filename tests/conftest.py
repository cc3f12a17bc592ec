"""Eight simulated devices, compiled programs kept between runs, and small things to test with."""

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CACHE = os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', str(ROOT / '.jax_cache'))
os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0.03'
os.environ['JAX_PLATFORMS'] = 'cpu'
# less optimised code: half the time to compile, which is most of the time these tests take
QUICK = '--xla_backend_optimization_level=0'
USUAL = {}  # jax.jit's compiler_options, for bits that two programs share as users compile them
if version('jaxlib').startswith('0.10.'):  # later ones know no other emitters
  QUICK += ' --xla_cpu_use_fusion_emitters=false'
  USUAL = {'xla_cpu_use_fusion_emitters': True}
os.environ['XLA_FLAGS'] = f'--xla_force_host_platform_device_count=8 {QUICK}'
ONLINE = os.environ.get('HF_HUB_OFFLINE', '0')  # as the user has it
os.environ['HF_HUB_OFFLINE'] = '1'

import forked  # noqa: E402
import jax  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
from serving_fixtures import browser, byte_server, open_page  # noqa: E402, F401

from gpt2_jax.model.config import GPTConfig  # noqa: E402
from gpt2_jax.parallel.sharding import make_mesh  # noqa: E402


def pytest_addoption(parser):
  parser.addoption('--released', action='store_true', help='run tests/released on released weights')
  parser.addoption('--expected', metavar='FILE', help='what they expect, if not its expected.json')


def pytest_configure(config):
  if config.getoption('released'):
    os.environ['HF_HUB_OFFLINE'] = ONLINE  # read when the library is loaded, which is later


WORDS = (
  'the a of model token layer head width loss data mesh batch step seed cache key value query '
  'norm scale gate sum mean train test held out big small red green'
).split()


def make_text(rng: np.random.Generator, words: int) -> str:
  lines = [' '.join(rng.choice(WORDS, 8)) for _ in range(max(1, words // 8))]
  return '\n'.join(lines) + '\n'


@pytest.fixture(scope='session')
def text_folder(tmp_path_factory) -> Path:
  """40 files of made-up text, about 130 kB."""
  folder = tmp_path_factory.mktemp('text')
  rng = np.random.default_rng(0)
  for i in range(40):
    (folder / f'{i:02d}.txt').write_text(make_text(rng, 600))
  return folder


@pytest.fixture
def tiny() -> GPTConfig:
  """Odd sizes on purpose; weights large enough that every part matters."""
  return GPTConfig(
    vocab_size=97,
    n_positions=32,
    n_embd=32,
    n_layer=3,
    n_head=4,
    n_inner=80,
    vocab_multiple=8,
    initializer_range=0.3,
    embd_pdrop=0,
    attn_pdrop=0,
    resid_pdrop=0,
  )


def mesh_of(*sizes: int):
  """A context with a mesh over the first devices."""
  return jax.set_mesh(make_mesh(*sizes, devices=jax.devices()[: int(np.prod(sizes))]))


def environment(devices: int = 1, **extra: str) -> dict[str, str]:
  """The environment of a process of its own, with so many simulated devices."""
  flags = f'--xla_force_host_platform_device_count={devices} {QUICK}'
  return dict(os.environ, PYTHONPATH=str(ROOT), XLA_FLAGS=flags) | extra


def run(*command: str, cwd: Path = ROOT, timeout: float = 300, **env) -> subprocess.CompletedProcess:
  """Runs Python with these arguments, in a process of its own; its output is text."""
  return forked.run([sys.executable, *command], timeout, cwd=cwd, env=environment(**env))


def assert_close(have, want, tolerance: float = 1e-5) -> None:
  """The largest difference, by the largest value: float32 sums in another order are fine."""
  have, want = np.asarray(have, np.float64), np.asarray(want, np.float64)
  assert have.shape == want.shape
  assert np.isfinite(have).all() and np.isfinite(want).all()
  error = np.abs(have - want).max() / np.abs(want).max()
  assert error < tolerance, f'relative error {error:.2e}'

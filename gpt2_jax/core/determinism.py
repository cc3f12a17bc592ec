"""Flags with which a backend gives the same bits each time that a program is run."""

import os

import jax

from gpt2_jax.core.errors import UserError

VARIABLE = 'XLA_FLAGS'
# GPU: scatters, products and attention without atomic additions whose order is left to chance, and no
# choice of kernels by how fast they happen to be (openxla `docs/determinism.md`; the first implies
# the second, which older versions of XLA did not). CPU and TPU repeat themselves as they are: these
# flags mean nothing to them.
FLAGS = {
  '--xla_gpu_deterministic_ops': 'true',
  '--xla_gpu_exclude_nondeterministic_ops': 'true',
  '--xla_gpu_autotune_level': '0',
}
PRECISION = 'highest'  # of products that don't say: no TF32


def _given() -> dict[str, str]:
  """Returns the flags in the environment; the last of several with one name counts."""
  pairs = (flag.partition('=') for flag in os.environ.get(VARIABLE, '').split())
  return {name: value or 'true' for name, _, value in pairs}


def require() -> None:
  """Sets the flags. To be called before the first use of a device: XLA reads them once.

  Raises:
    UserError: the environment asks for the contrary.
  """
  given = _given()
  for flag, value in FLAGS.items():
    if given.get(flag, value) != value:
      raise UserError(
        f'config.deterministic needs {flag}={value}, but {VARIABLE} has '
        f'{flag}={given[flag]}: take it out there.'
      )
  missing = [f'{flag}={value}' for flag, value in FLAGS.items() if flag not in given]
  os.environ[VARIABLE] = ' '.join([os.environ.get(VARIABLE, ''), *missing]).strip()
  jax.config.update('jax_default_matmul_precision', PRECISION)


def check() -> None:
  """Checks that `require` was called.

  Raises:
    UserError: it was not.
  """
  if any(_given().get(flag) != value for flag, value in FLAGS.items()):
    raise UserError(
      'config.deterministic has to be known before JAX uses a device: start the run '
      'with launch.py, or call gpt2_jax.core.determinism.require() first.'
    )


def describe() -> dict[str, str]:
  """Returns the flags that are set, for the record of a run; nothing if `require` was not called."""
  found = {flag: value for flag, value in _given().items() if flag in FLAGS}
  if found.keys() != FLAGS.keys():
    return {}
  return found | {'jax_default_matmul_precision': PRECISION}

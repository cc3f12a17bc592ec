"""Arrays that are compared, and the meshes that they lie on."""

import jax
import numpy as np

from gpt2_jax.parallel.sharding import make_mesh


def mesh_of(*sizes: int):
  """A context with a mesh over the first devices."""
  return jax.set_mesh(make_mesh(*sizes, devices=jax.devices()[: int(np.prod(sizes))]))


def assert_close(have, want, tolerance: float = 1e-5) -> None:
  """The largest difference, by the largest value: float32 sums in another order are fine."""
  have, want = np.asarray(have, np.float64), np.asarray(want, np.float64)
  assert have.shape == want.shape
  assert np.isfinite(have).all() and np.isfinite(want).all()
  error = np.abs(have - want).max() / np.abs(want).max()
  assert error < tolerance, f'relative error {error:.2e}'

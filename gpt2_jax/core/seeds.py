"""Seeds, as users give them, to keys: in one place, so that two seeds are never one.

`jax.random.key` drops all but the lower 32 bits of a seed, unless 64 bits are enabled.
"""

import jax
import jax.numpy as jnp
import numpy as np

from gpt2_jax.core.bounds import SEED_MOST
from gpt2_jax.core.errors import UserError, brief

LIMIT = SEED_MOST + 1


def check(name: str, seed: object) -> int:
  """Returns a seed as an int. `name`: the user's name for it, for the message.

  Raises:
    UserError: it is no whole number from 0 to 2**64 - 1.
  """
  if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or not 0 <= int(seed) < LIMIT:
    raise UserError(f'{name} = {brief(seed)} must be a whole number from 0 to 2**64 - 1.')
  return int(seed)


def key_data(seed: int) -> np.ndarray:
  """Returns the bits of a seed's key, uint32, as JAX makes them if 64 bits are enabled."""
  impl = jax.config.jax_default_prng_impl  # pyright: ignore[reportAttributeAccessIssue]
  size = 2 if impl == 'threefry2x32' else 4  # rbg has them twice
  return np.resize(np.array(divmod(check('seed', seed), 1 << 32), np.uint32), size)


def key(seed: int) -> jax.Array:
  """Returns the key of a seed.

  Raises:
    UserError: as `check`.
  """
  seed = check('seed', seed)
  if seed < 1 << 32:
    return jax.random.key(seed)
  return jax.random.wrap_key_data(jnp.asarray(key_data(seed)))

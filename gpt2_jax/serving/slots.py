"""The state of a server's B slots on the device: their cache, their texts, how they choose."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gpt2_jax import batching
from gpt2_jax.attention import Blocks
from gpt2_jax.config import GPTConfig
from gpt2_jax.decoding import history as h
from gpt2_jax.decoding.history import History
from gpt2_jax.decoding.pytree import register
from gpt2_jax.errors import UserError, brief
from gpt2_jax.layers import KVCache, squeezed, write
from gpt2_jax.sharding import platform
from gpt2_jax.training.fit import memory_limit

CHUNK = 128  # ids of a prompt that are read at a time: others wait no longer
LEAST = 32  # to what a chunk is padded at least
BLOCKS = 8  # of a cache, at most
BLOCK_BYTES = 1 << 20  # of a block, at least


@register
@dataclasses.dataclass(frozen=True)
class Chosen:
  """How rows choose their tokens; of one row the same without B."""

  key_data_B: jax.Array  # of the key of request and sample: JAX passes it on faster than a key
  greedy_B: jax.Array
  temperature_B: jax.Array
  top_k_B: jax.Array  # the vocabulary's size: all
  top_p_B: jax.Array
  presence_B: jax.Array
  frequency_B: jax.Array
  biased_B: jax.Array
  bias_BV: jax.Array  # added to the logits
  logprobs_B: jax.Array  # whether log-probabilities are asked for


def chosen_of(
  V: int,
  *,
  temperature: float,
  top_k: int | None,
  top_p: float,
  presence: float,
  frequency: float,
  bias: dict[int, float],
  logprobs: bool,
) -> Chosen:
  """How one row chooses, for `admit`; temperature 0 takes the likeliest token. V: size of the
  vocabulary.
  """
  bias_V = np.zeros(V, np.float32)
  bias_V[list(bias)] = list(bias.values())
  draws = temperature > 0
  values: dict[str, Any] = dict(
    key_data_B=None,
    greedy_B=np.bool_(not draws),
    temperature_B=np.maximum(np.float32(temperature if draws else 1), np.finfo(np.float32).tiny),
    top_k_B=np.int32(V if top_k is None or not draws else min(top_k, V)),
    top_p_B=np.float32(top_p if draws else 1),
    presence_B=np.float32(presence),
    frequency_B=np.float32(frequency),
    biased_B=np.bool_(bool(bias)),
    bias_BV=bias_V,
    logprobs_B=np.bool_(logprobs),
  )
  return Chosen(**values)


@register
@dataclasses.dataclass(frozen=True)
class Slots:
  """B rows, on the device."""

  cache: Any  # of each layer the blocks of keys and of values, X of [B, N, S/X, H] each, `squeezed`
  history: History  # a row that is not running is idle, or its prompt is being read
  chosen: Chosen


@dataclasses.dataclass(frozen=True)
class Layer:
  """One layer's keys and values of all slots, in blocks of which so many are read."""

  k: tuple[jax.Array, ...]
  v: tuple[jax.Array, ...]
  used: jax.Array

  def update(self, layer, at_B, k_B1NH, v_B1NH) -> tuple['Layer', Blocks, Blocks]:
    """As `KVCache.update`, of one position a row. One beyond the cache is that of an idle row, and
    goes where no running one ever reads: nowhere, or to the last place, which ends a text.
    """
    k, v = _write(self.k, at_B, k_B1NH), _write(self.v, at_B, v_B1NH)
    return Layer(k, v, self.used), Blocks(k, self.used), Blocks(v, self.used)


def _write(blocks: tuple[jax.Array, ...], at_B, new_B1NH) -> tuple[jax.Array, ...]:
  if len(blocks) == 1:
    return (write(blocks[0], new_B1NH.swapaxes(1, 2), at_B),)

  def put(block_BNSH, place_B):
    B, _, S, _ = block_BNSH.shape
    place_B = jnp.where(place_B < 0, S, place_B)  # S and beyond: nowhere
    return block_BNSH.at[jnp.arange(B), :, place_B].set(new_B1NH[:, 0], mode='drop')

  return tuple(put(block, at_B - x * block.shape[2]) for x, block in enumerate(blocks))


def chunk_sizes(config: GPTConfig) -> list[int]:
  """To how many ids a chunk of a prompt is padded, so that few lengths are compiled; ascending."""
  most = min(CHUNK, config.n_positions)
  return sorted({batching.bucket(n, most, LEAST) for n in range(1, most + 1)})


def cache_length(config: GPTConfig) -> int:
  """Places in a cache: the model's context, and what the last chunk of a prompt may be padded by."""
  S = config.n_positions
  return -(-S // CHUNK) * CHUNK if S > CHUNK else S


def _blocks(config: GPTConfig, B: int) -> int:
  """In how many blocks a cache of B slots lies. In one where a condition costs more than it spares
  (on a GPU, of a small cache); and of one row, which XLA would copy.
  """
  S, X = cache_length(config), 1
  if platform() == 'cpu' and B > 1:
    bytes_a_layer = B * config.n_head * S * config.H * jnp.dtype(config.dtype).itemsize
    while 2 * X <= min(BLOCKS, bytes_a_layer // BLOCK_BYTES) and S % (2 * X) == 0:
      X *= 2
  return X


def check_memory(config: GPTConfig, B: int, device: Any) -> None:
  """Raises: UserError: the memory of a device can't hold the caches of B slots."""
  each = 2 * config.n_layer * config.n_embd * cache_length(config) * jnp.dtype(
    config.dtype
  ).itemsize + 4 * (config.vocab_size + config.n_positions)
  try:
    limit = memory_limit(device)
  except UserError:  # a chip of which it is not known
    return
  if device.platform == 'cpu':  # of half the machine's, which simulated devices share
    limit *= 2 * jax.local_device_count()
  if B * each > limit:
    raise UserError(
      f'{brief(B)} slots need {brief(B * each >> 30)} GiB for their caches, and the device has '
      f'{limit >> 30}: at most --slots {max(1, limit // 2 // each)} are wise.'
    )


@functools.partial(jax.jit, static_argnames=('config',))
def blank(config: GPTConfig) -> Any:
  """An empty cache of one row, to read a prompt into; `squeezed`."""
  return squeezed(KVCache.zeros(config, 1, cache_length(config)))


@functools.partial(jax.jit, static_argnames=('config', 'B'))
def empty(config: GPTConfig, *, B: int) -> Slots:
  """B idle slots, each with room for the model's context."""
  V, S = config.vocab_size, config.n_positions
  zero_B, no_B, real_B = jnp.zeros(B, jnp.int32), jnp.zeros(B, bool), jnp.zeros(B)
  history = History(
    tokens_BS=jnp.zeros((B, S), jnp.int32),
    lengths_B=zero_B + 1,
    prompt_B=zero_B + 1,
    limits_B=zero_B,
    context_B=zero_B + S,
    which_B=zero_B,
    stop_B=zero_B,
    guide_B=zero_B,
    reason_B=zero_B + h.LIMIT,
  )
  chosen = Chosen(
    key_data_B=jax.random.key_data(jax.random.split(jax.random.key(0), B)),
    greedy_B=~no_B,
    temperature_B=real_B + 1,
    top_k_B=zero_B + V,
    top_p_B=real_B + 1,
    presence_B=real_B,
    frequency_B=real_B,
    biased_B=no_B,
    bias_BV=jnp.zeros((B, V)),
    logprobs_B=no_B,
  )
  shape, X = (B, config.n_head, cache_length(config), config.H), _blocks(config, B)
  zeros = lambda: tuple(jnp.split(jnp.zeros(shape, config.dtype), X, axis=2))
  cache = tuple((zeros(), zeros()) for _ in range(config.n_layer))
  return Slots(squeezed(cache), history, chosen)

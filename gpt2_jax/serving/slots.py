"""The state of a server's B slots on the device: cache, texts, and how each chooses its tokens."""

import dataclasses
import functools
from collections.abc import Mapping
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
from gpt2_jax.decoding.samplers import SAMPLERS
from gpt2_jax.errors import UserError, brief
from gpt2_jax.layers import KVCache, squeezed, write
from gpt2_jax.sharding import platform
from gpt2_jax.training.fit import memory_limit

CHUNK = 128  # the most ids of a prompt that are read at a time: others wait no longer
LEAST = 32  # the shortest length that a chunk is padded to
BLOCKS = 8  # the most blocks of a cache
BLOCK_BYTES = 1 << 20  # the least bytes of a block


# The rules that are numbers of a row: all but lists, texts and functions.
RULES = {name: rule for name, rule in SAMPLERS.items() if rule.kind is not None}
FLOATS = [name for name, rule in RULES.items() if isinstance(rule.off, float)]
INTS = [name for name in RULES if name not in FLOATS]  # flags among them
# The rules that many requests use. A step in which no row wants another one does not ask for each of
# the others, as conditions cost time, above all on a GPU.
COMMON = ('frequency_penalty', 'presence_penalty', 'temperature', 'top_k', 'top_p')


@register
@dataclasses.dataclass(frozen=True)
class Choice:
  """How B rows choose their tokens; one row's has the same fields without the axis B. The numbers of
  all rules lie in two arrays, since each array of a program costs time.
  """

  greedy_B: jax.Array  # whether the likeliest token is taken
  floats_BR: jax.Array  # numbers of the rules `FLOATS`; a rule's `off` does nothing
  ints_BR: jax.Array  # and of `INTS`
  level_B: jax.Array  # which rules are wanted: 0 none, 1 some of `COMMON`, 2 others
  biased_B: jax.Array  # whether the bias is not zero
  bias_BV: jax.Array  # added to the logits
  logprobs_B: jax.Array  # whether log-probabilities are asked for

  @property
  def numbers(self) -> dict[str, jax.Array]:
    """The numbers of each rule, [B]."""
    return dict(zip(FLOATS, self.floats_BR.T)) | dict(zip(INTS, self.ints_BR.T))


def choice_of(
  V: int,
  options: Mapping[str, Any],
  *,
  greedy: bool = False,
  bias: Mapping[int, float] | None = None,
  logprobs: bool = False,
) -> Choice:
  """Returns how one row chooses, for a model with V ids; `options` are those of `RULES`."""
  numbers = {
    name: rule.number(None if greedy and rule.draws else options.get(name))
    for name, rule in RULES.items()
  }
  wanted = [name for name, rule in RULES.items() if numbers[name] != rule.off]
  bias_V = np.zeros(V, np.float32)
  for token, value in (bias or {}).items():
    bias_V[token] = value
  fields: list[Any] = [
    np.bool_(greedy),
    np.array([numbers[name] for name in FLOATS], np.float32),
    np.array([numbers[name] for name in INTS], np.int32),
    np.int32(max((1 if name in COMMON else 2 for name in wanted), default=0)),
    np.bool_(bool(bias)),
    bias_V,
    np.bool_(logprobs),
  ]
  return Choice(*fields)


@register
@dataclasses.dataclass(frozen=True)
class Slots:
  """The state of B slots on the device."""

  cache: Any  # of each layer the blocks of keys and of values, X of [B, N, S/X, H] each, `squeezed`
  history: History  # of a slot that does not run: it is idle, or its prompt is being read
  key_data_B: jax.Array  # of the key of request and sample: JAX passes it on faster than a key
  choice: Choice


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
  """Returns the lengths that chunks of a prompt are padded to, in order: few, as all are compiled."""
  most = min(CHUNK, config.n_positions)
  return sorted({batching.bucket(n, most, LEAST) for n in range(1, most + 1)})


def cache_length(config: GPTConfig) -> int:
  """Returns how many positions a cache has: the model's context, and the padding of a last chunk."""
  S = config.n_positions
  return -(-S // CHUNK) * CHUNK if S > CHUNK else S


def _blocks(config: GPTConfig, B: int) -> int:
  """Returns the number of blocks of a cache of B slots: 1 where a condition costs more than it saves
  (on a GPU, in a small cache), and for one row, whose blocks XLA would copy.
  """
  S, X = cache_length(config), 1
  if platform() == 'cpu' and B > 1:
    bytes_a_layer = B * config.n_head * S * config.H * jnp.dtype(config.dtype).itemsize
    while 2 * X <= min(BLOCKS, bytes_a_layer // BLOCK_BYTES) and S % (2 * X) == 0:
      X *= 2
  return X


def check_memory(config: GPTConfig, B: int, device: Any) -> None:
  """Checks that the memory of a device can hold the caches of B slots.

  Raises:
    UserError: it can't; names how many slots are wise.
  """
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
  """Returns an empty cache of one row, to read a prompt into; `squeezed`."""
  return squeezed(KVCache.zeros(config, 1, cache_length(config)))


@functools.partial(jax.jit, static_argnames=('config', 'B'))
def empty(config: GPTConfig, *, B: int) -> Slots:
  """Returns B idle slots, each with positions for the model's whole context."""
  S = config.n_positions
  zero_B = jnp.zeros(B, jnp.int32)
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
  key_data_B = jax.random.key_data(jax.random.split(jax.random.key(0), B))
  idle = choice_of(config.vocab_size, {}, greedy=True)
  choice = jax.tree.map(lambda x: jnp.broadcast_to(x, (B, *np.shape(x))), idle)
  shape, X = (B, config.n_head, cache_length(config), config.H), _blocks(config, B)
  zeros = lambda: tuple(jnp.split(jnp.zeros(shape, config.dtype), X, axis=2))
  cache = tuple((zeros(), zeros()) for _ in range(config.n_layer))
  return Slots(squeezed(cache), history, key_data_B, choice)

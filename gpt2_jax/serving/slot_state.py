"""The state of a server's B slots on the device: cache, texts, and how each chooses its tokens."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gpt2_jax.core.errors import UserError, brief
from gpt2_jax.decoding import row_state as h
from gpt2_jax.decoding.pytree import register
from gpt2_jax.decoding.row_state import History
from gpt2_jax.decoding.samplers import SAMPLERS
from gpt2_jax.model import text_batches
from gpt2_jax.model.config import GPTConfig
from gpt2_jax.model.kv_cache import Cache, cache_dtype, empty_cache
from gpt2_jax.parallel.sharding import platform
from gpt2_jax.serving.cache_blocks import SlotCache
from gpt2_jax.training.memory_estimate import memory_limit

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

  cache: SlotCache
  history: History  # of a slot that does not run: it is idle, or its prompt is being read
  key_data_B: jax.Array  # of the key of request and sample: JAX passes it on faster than a key
  choice: Choice


def chunk_sizes(config: GPTConfig) -> list[int]:
  """Returns the lengths that chunks of a prompt are padded to, in order: few, as all are compiled."""
  most = min(CHUNK, config.n_positions)
  return sorted({text_batches.bucket(n, most, LEAST) for n in range(1, most + 1)})


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
    bytes_a_layer = B * config.n_head * S * config.H * cache_dtype(config).itemsize
    while 2 * X <= min(BLOCKS, bytes_a_layer // BLOCK_BYTES) and S % (2 * X) == 0:
      X *= 2
  return X


def check_memory(config: GPTConfig, B: int, device: Any) -> None:
  """Checks that the memory of a device can hold the caches of B slots.

  Raises:
    UserError: it can't; names how many slots are wise.
  """
  values = 2 * config.n_layer * config.n_embd * cache_length(config)
  each = values * cache_dtype(config).itemsize + 4 * (config.vocab_size + config.n_positions)
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
def blank(config: GPTConfig) -> Cache:
  """Returns an empty cache of one row, to read a prompt into."""
  return empty_cache(config, 1, cache_length(config))


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
  cache = SlotCache.empty(config, B, cache_length(config), _blocks(config, B))
  return Slots(cache, history, key_data_B, choice)

"""The compiled decoding loop: prefill, then one token after another over a preallocated cache.

Prompts of different lengths are padded on the right to P. A row's new tokens go to cache slots P,
P + 1, …, while their positions go on from the row's own length; padding is masked. So a row computes
the same whatever it is batched with.

The key of a draw is folded from (seed, which sample of its prompt, position): a sample depends on its
prompt and seed alone.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from gpt2_jax.attention import causal_mask
from gpt2_jax.config import GPTConfig
from gpt2_jax.decoding.processors import Processor
from gpt2_jax.layers import pick
from gpt2_jax.model import KVCache, Params, bind
from gpt2_jax.sharding import BATCH, P, reshard

ROWS = P(BATCH, None)


class Decoded(NamedTuple):
  """What `decode` returns, one row a prompt."""

  tokens_BN: jax.Array  # new ids; beyond `counts_B` they mean nothing
  logprobs_BN: jax.Array  # log-probability of each under the model itself, before the processors
  counts_B: jax.Array  # how many are new, an end-of-sequence id included


class _Carry(NamedTuple):
  t: jax.Array  # how many tokens each row has drawn, finished rows aside
  cache: KVCache | None
  out: Decoded
  done_B: jax.Array


def _next_logits(model, x_B1D: jax.Array) -> jax.Array:
  logits_BV = reshard(model.logits(x_B1D), P(BATCH, None, None))[:, 0]
  return logits_BV[:, :model.config.vocab_size]


def _draw(logits_BV, processors, keys_B, positions_B):
  """The next token of each row, and its log-probability under the model."""
  processed_BV = logits_BV
  for processor in processors:
    processed_BV = processor(processed_BV)
  if keys_B is None:
    tokens_B = jnp.argmax(processed_BV, axis=-1)
  else:
    keys_B = jax.vmap(jax.random.fold_in)(keys_B, positions_B)
    tokens_B = jax.vmap(jax.random.categorical)(keys_B, processed_BV)
  return tokens_B.astype(jnp.int32), pick(jax.nn.log_softmax(logits_BV, axis=-1), tokens_B)


@functools.partial(jax.jit, static_argnames=('config', 'N'))
def decode(
    config: GPTConfig,
    params: Params,
    prompts_BP: jax.Array,
    lengths_B: jax.Array,
    limits_B: jax.Array,
    samples_B: jax.Array,
    key: jax.Array | None,
    processors: tuple[Processor, ...],
    eos: jax.Array,
    *,
    N: int,
) -> Decoded:
  """Continues prompts.

  Args:
    config, params: the model.
    prompts_BP: ids, padded on the right.
    lengths_B: how many of them are the prompt, at least 1.
    limits_B: how many tokens a row may get, from 1 to N.
    samples_B: which sample of its prompt a row is.
    key: of the request; None: the likeliest token is taken (greedy).
    processors: applied to the logits in turn.
    eos: ids [E] that end a row; E may be 0.
    N: the most new tokens, static: the cache has P + N slots.
  """
  B, prompt_slots = prompts_BP.shape
  S = prompt_slots + N
  model = bind(config, params)
  rows_B = jnp.zeros_like(lengths_B)
  keys_B = None if key is None else jax.vmap(jax.random.fold_in, (None, 0))(key, samples_B)

  def emit(out: Decoded, done_B, logits_BV, t):
    tokens_B, logprobs_B = _draw(logits_BV, processors, keys_B, lengths_B + t)
    put = lambda all_BN, new_B: jax.lax.dynamic_update_slice(
        all_BN, reshard(new_B[:, None], ROWS), (0, t))
    out = Decoded(put(out.tokens_BN, tokens_B), put(out.logprobs_BN, logprobs_B),
                  jnp.where(done_B, out.counts_B, t + 1))
    return out, done_B | (tokens_B[:, None] == eos).any(-1) | (t + 1 >= limits_B)

  filled = model.transformer(
      prompts_BP, cache=KVCache.zeros(config, B, S), mask_BTS=causal_mask(prompt_slots, S))
  x_B1D = pick(filled.x_BTD, lengths_B - 1)[:, None]
  wide = lambda dtype: jnp.zeros_like(rows_B, dtype)[:, None] + jnp.zeros((1, N), dtype)
  out = Decoded(wide(jnp.int32), wide(jnp.float32), rows_B)
  out, done_B = emit(out, rows_B > 0, _next_logits(model, x_B1D), 0)

  def body(carry: _Carry) -> _Carry:
    t, cache, out, done_B = carry
    last_B1 = jax.lax.dynamic_slice_in_dim(out.tokens_BN, t - 1, 1, axis=1)
    slots = jnp.arange(S)
    mask_BS = (slots < lengths_B[:, None]) | ((slots >= prompt_slots) & (slots < prompt_slots + t))
    step = model.transformer(
        last_B1, positions_BT=(lengths_B + t - 1)[:, None], mask_BTS=mask_BS[:, None],
        cache=cache, slot=prompt_slots + t - 1)
    out, done_B = emit(out, done_B, _next_logits(model, step.x_BTD), t)
    return _Carry(t + 1, step.cache, out, done_B)

  start = _Carry(jnp.asarray(1), filled.cache, out, done_B)
  return jax.lax.while_loop(lambda carry: ~carry.done_B.all(), body, start).out

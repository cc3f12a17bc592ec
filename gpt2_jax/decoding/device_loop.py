"""The compiled decoding loop: prefill, then step after step over a preallocated cache.

Prompts of different lengths are padded on the right to P. A row's new tokens go to cache slots P,
P + 1, …, while their positions go on from the row's own length; padding is masked. So a row computes
the same whatever it is batched with.

The key of a draw is folded from (seed, which sample of its prompt, position): a sample depends on its
prompt and seed alone.

What happens to the model's output is a matter of each row alone. It runs in `sharding.by_rows`: each
device with its own rows, so processors and searches are written as for one device.
"""

import dataclasses
import functools
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from gpt2_jax.decoding.edited import editing
from gpt2_jax.decoding.processors import Processor
from gpt2_jax.decoding.pytree import register
from gpt2_jax.decoding.row_state import Endings, History
from gpt2_jax.model.attention import causal_mask
from gpt2_jax.model.config import GPTConfig
from gpt2_jax.model.edits import Placed
from gpt2_jax.model.gpt2 import GPT2, Output, Params, bind
from gpt2_jax.model.kv_cache import Cache, empty_cache
from gpt2_jax.model.layers import pick
from gpt2_jax.parallel.sharding import BATCH, P, by_rows, reshard


@register
class Rules:
  """The processors and the endings of all rows."""

  processors: tuple[Processor, ...]
  endings: Endings


@register
class Request:
  """A prompts that B = A·C rows continue, those of one prompt side by side."""

  prompts_AP: jax.Array  # ids that the model reads first, padded on the right
  windows_A: jax.Array  # how many, at least 1
  history: History  # of the rows; longer than the window where the context has slid on
  samples_B: jax.Array  # which sample of its prompt a row is
  key: jax.Array | None  # of the request; None: greedy
  rules: Rules
  edits: tuple[Placed, ...] = ()  # of the model's activations, over all its positions

  @property
  def C(self) -> int:
    """The number of rows that continue a prompt."""
    return self.samples_B.shape[0] // self.windows_A.shape[0]


@register
class Record:
  """Log-probabilities under the model itself, before the processors; places are `History`'s."""

  logprobs_BS: jax.Array
  top_ids_BSK: jax.Array  # the K likeliest ids
  top_logprobs_BSK: jax.Array

  @classmethod
  def zeros(cls, history: History, K: int) -> 'Record':
    zero_BS = jnp.zeros_like(history.tokens_BS, jnp.float32)
    zero_BSK = zero_BS[..., None] + jnp.zeros(K)
    return cls(zero_BS, zero_BSK.astype(jnp.int32), zero_BSK)

  def put(self, places_B: jax.Array, tokens_B: jax.Array, logits_BV: jax.Array) -> 'Record':
    """With what `logits_BV` say of the tokens at some places."""
    total_B1 = jax.nn.logsumexp(logits_BV, axis=-1, keepdims=True)
    chosen_B1 = jnp.take_along_axis(logits_BV, tokens_B[:, None], axis=-1) - total_B1
    here_BS = jnp.arange(self.logprobs_BS.shape[1]) == places_B[:, None]
    record = dataclasses.replace(self, logprobs_BS=jnp.where(here_BS, chosen_B1, self.logprobs_BS))
    if not self.top_ids_BSK.shape[-1]:
      return record
    top_BK, ids_BK = jax.lax.top_k(logits_BV, self.top_ids_BSK.shape[-1])
    put = lambda all_BSK, new_BK: jnp.where(here_BS[..., None], new_BK[:, None], all_BSK)
    return dataclasses.replace(
      record,
      top_ids_BSK=put(self.top_ids_BSK, ids_BK),
      top_logprobs_BSK=put(self.top_logprobs_BSK, top_BK - total_B1),
    )


class Search(Protocol):
  """The interface of a search, which `start` and `advance` compile. Implementations are registered.

  Its state is a pytree with a `t`, how many steps were made, and a `cache`.
  """

  def start(self, model: GPT2, request: Request, N: int, K: int) -> Any:
    """Returns the state after the first step, for N new tokens and K top log-probabilities."""
    ...

  def step(self, model: GPT2, request: Request, state: Any) -> Any:
    """Returns the state after one more step."""
    ...

  def running(self, state: Any) -> jax.Array:
    """Whether any row wants another step."""
    ...

  def results(self, state: Any) -> tuple[History, Record, jax.Array | None]:
    """Returns what has been found, as many rows for each prompt, and their scores, if any."""
    ...


def expand(x: jax.Array, C: int, axis: int = 0) -> jax.Array:
  """Repeats each index of an axis C times, side by side. On a mesh nothing moves."""
  before, n, after = x.shape[:axis], x.shape[axis], x.shape[axis + 1 :]
  wide = jnp.broadcast_to(jnp.expand_dims(x, axis + 1), (*before, n, C, *after))
  # a reshape forgets how an axis of one row is laid out
  return reshard(wide.reshape(*before, n * C, *after), jax.typeof(x).sharding.spec)


def expand_cache(cache: Cache, C: int) -> Cache:
  return cache.map(lambda x_ANSH: expand(x_ANSH, C, axis=x_ANSH.ndim - 4))


def next_logits(model: GPT2, x_BTD: jax.Array) -> jax.Array:
  """Returns logits over the true vocabulary, [B, T, V], each row whole on its devices."""
  return reshard(model.logits(x_BTD), P(BATCH, None, None))[..., : model.config.vocab_size]


def prefill(model: GPT2, request: Request, N: int):
  """Reads the prompts, into a cache with room for N tokens more.

  Returns:
    The model's `Output` [A, P, …], and the hidden state of each prompt's last token, [A, 1, D].
  """
  A, prompt_slots = request.prompts_AP.shape
  S = prompt_slots + N
  positions_AP = expand(jnp.arange(prompt_slots)[None], A) if request.edits else None
  filled = model.transformer(
    request.prompts_AP,
    cache=empty_cache(model.config, A, S),
    mask_BTS=causal_mask(prompt_slots, S),
    listen=editing(request.edits, positions_AP),
  )
  return filled, pick(filled.x_BTD, request.windows_A - 1)[:, None]


def read(
  model: GPT2, request: Request, tokens_BT: jax.Array, t, cache: Cache, *, alone: bool = False
) -> Output:
  """Returns the model's `Output` for T tokens, the first of which is each row's new token t (from 0).

  Args:
    tokens_BT: the tokens; they follow each other, or are T alternatives that don't see each other,
      if `alone`.
    t: how many new tokens the cache has already, for all rows or [B].
  """
  B, T = tokens_BT.shape
  prompt_slots = request.prompts_AP.shape[1]
  windows_B1 = expand(request.windows_A, B // request.windows_A.shape[0])[:, None]
  t_B1 = jnp.reshape(t, (-1, 1))
  slots = jnp.arange(cache.positions)
  old_BS = (slots < windows_B1) | ((slots >= prompt_slots) & (slots < prompt_slots + t_B1))
  own_BTS = slots - prompt_slots - t_B1[..., None]
  among = jnp.arange(T)[:, None]
  own_BTS = (own_BTS == among) if alone else (own_BTS >= 0) & (own_BTS <= among)
  positions_BT = windows_B1 + t_B1 + (0 if alone else jnp.arange(T))
  # beyond the context nothing is asked for, but a NaN there would spoil the row: 0 · NaN is NaN
  positions_BT = jnp.minimum(positions_BT, model.config.n_positions - 1)
  return model.transformer(
    tokens_BT,
    positions_BT=positions_BT,
    listen=editing(request.edits, positions_BT),
    mask_BTS=old_BS[:, None] | own_BTS,
    cache=cache,
    slot=prompt_slots + t,
  )


def process(rules: Rules, scores_BV: jax.Array, history: History) -> jax.Array:
  for processor in rules.processors:
    scores_BV = processor(scores_BV, history)
  return scores_BV


def row_keys(key: jax.Array | None, samples_B: jax.Array) -> jax.Array | None:
  return None if key is None else jax.vmap(jax.random.fold_in, (None, 0))(key, samples_B)


def choose(scores_BV: jax.Array, keys_B: jax.Array | None, history: History) -> jax.Array:
  """Returns the next token of each row: drawn, or the likeliest."""
  if keys_B is None:
    return jnp.argmax(scores_BV, axis=-1).astype(jnp.int32)
  keys_B = jax.vmap(jax.random.fold_in)(keys_B, history.lengths_B)
  return jax.vmap(jax.random.categorical)(keys_B, scores_BV).astype(jnp.int32)


@register
class Sampling:
  """State of `Sample`."""

  t: jax.Array
  cache: Cache
  history: History
  record: Record


@register
class Sample:
  """Each row for itself: the likeliest token, or one drawn where the request has a key."""

  def _push(self, model: GPT2, request: Request, x_B1D, history: History, record: Record):
    logits_BV = next_logits(model, x_B1D)[:, 0]
    keys_B = row_keys(request.key, request.samples_B)

    def each(rules: Rules, rows):
      logits_BV, keys_B, history, record = rows
      scores_BV = process(rules, logits_BV, history)
      tokens_B = choose(scores_BV, keys_B, history)
      record = record.put(history.lengths_B, tokens_B, logits_BV)
      return history.refuse(scores_BV).push(tokens_B, rules.endings), record

    return by_rows(each, request.rules, (logits_BV, keys_B, history, record))

  def start(self, model: GPT2, request: Request, N: int, K: int) -> Sampling:
    filled, x_A1D = prefill(model, request, N)
    history, record = self._push(
      model, request, expand(x_A1D, request.C), request.history, Record.zeros(request.history, K)
    )
    return Sampling(jnp.asarray(1), expand_cache(filled.cache, request.C), history, record)

  def step(self, model: GPT2, request: Request, state: Sampling) -> Sampling:
    last_B1 = pick(state.history.tokens_BS, state.history.lengths_B - 1)[:, None]
    out = read(model, request, last_B1, state.t - 1, state.cache)
    history, record = self._push(model, request, out.x_BTD, state.history, state.record)
    return Sampling(state.t + 1, out.cache, history, record)

  def running(self, state: Sampling) -> jax.Array:
    return state.history.running_B.any()

  def results(self, state: Sampling):
    return state.history, state.record, None


@functools.partial(jax.jit, static_argnames=('config', 'N', 'K'))
def start(config: GPTConfig, params: Params, search: Search, request: Request, *, N: int, K: int):
  """Reads the prompts and makes the first step.

  Args:
    config, params: the model, best in the form 'decode'.
    search: how tokens are chosen.
    request: what is continued.
    N: the most new tokens, static: the cache has P + N slots.
    K: how many likeliest tokens are recorded, static.

  Returns:
    The state, and whether any row goes on.
  """
  state = search.start(bind(config, params), request, N, K)
  return state, search.running(state)


@functools.partial(jax.jit, static_argnames=('config',), donate_argnames=('state',))
def advance(config: GPTConfig, params: Params, search: Search, request: Request, state, until):
  """Makes steps until all rows have stopped, or `until` steps were made in all."""
  model = bind(config, params)
  state = jax.lax.while_loop(
    lambda state: search.running(state) & (state.t < until),
    lambda state: search.step(model, request, state),
    state,
  )
  return state, search.running(state)

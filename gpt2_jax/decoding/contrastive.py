"""Contrastive search (Su et al. 2022, arXiv:2202.06417): what is likely, and not like what was said.

Semantics are those of Hugging Face's `generate`, in its versions 4. Letters: `K` candidates.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jax.typing import ArrayLike

from gpt2_jax.decoding.device_loop import (
  Record,
  Request,
  Rules,
  expand,
  expand_cache,
  next_logits,
  prefill,
  process,
  read,
)
from gpt2_jax.decoding.pytree import register
from gpt2_jax.decoding.row_state import Endings, History
from gpt2_jax.decoding.warpers import NEVER, log_probs
from gpt2_jax.model.gpt2 import GPT2
from gpt2_jax.model.kv_cache import Cache
from gpt2_jax.model.layers import pick
from gpt2_jax.parallel.sharding import BATCH, by_rows, reshard


@register
class Contrasting:
  """State of `Contrastive`."""

  t: jax.Array
  cache: Cache
  history: History
  record: Record
  logits_BV: jax.Array  # of the token to come
  said_BSD: jax.Array  # directions of the hidden states, in the slots that the cache has them


def _directions(x_BTD: jax.Array) -> jax.Array:
  """Vectors of length 1; of zeros (a model of width 1 has no others) zeros."""
  x = x_BTD.astype(jnp.float32)
  squares = jnp.maximum(jnp.square(x).sum(-1, keepdims=True), jnp.finfo(jnp.float32).tiny)
  return (x * jax.lax.rsqrt(squares)).astype(x_BTD.dtype)


class Candidates(NamedTuple):
  """The K candidates for the next token of each row, and what they are compared with."""

  history: History
  record: Record
  logits_BV: jax.Array
  logprobs_BK: jax.Array
  tokens_BK: jax.Array
  said_BSD: jax.Array
  new_BKD: jax.Array  # directions of the candidates' hidden states
  before_BS: jax.Array  # the slots of `said_BSD` that hold a token before the candidates

  def choose(self, alpha: ArrayLike, precision) -> jax.Array:
    """Returns which candidate is likely and unlike all tokens before it, [B]."""
    cosine_BKS = jnp.einsum(
      'BKD,BSD->BKS',
      self.new_BKD,
      self.said_BSD,
      precision=precision,
      preferred_element_type=jnp.float32,
    )
    alike_BK = jnp.where(self.before_BS[:, None], cosine_BKS, NEVER).max(-1)
    ranks_BK = (1 - alpha) * jnp.exp(self.logprobs_BK) - alpha * alike_BK
    return jnp.argmax(jnp.where(self.logprobs_BK > NEVER, ranks_BK, NEVER), axis=-1)

  def push(self, chosen_B: jax.Array, endings: Endings) -> tuple[History, Record]:
    """Puts the chosen candidates to the rows."""
    tokens_B = jnp.take_along_axis(self.tokens_BK, chosen_B[:, None], axis=1)[:, 0]
    record = self.record.put(self.history.lengths_B, tokens_B, self.logits_BV)
    return self.history.push(tokens_B, endings), record


def keep_chosen(cache: Cache, chosen_B: jax.Array, slot: jax.Array, K: int) -> Cache:
  """Returns a cache in which, of the K candidates from `slot` on, the chosen one stands first."""

  def keep(x_BNSH):
    S = x_BNSH.ndim - 2
    new_BNKH = jax.lax.dynamic_slice_in_dim(x_BNSH, slot, K, S)
    chosen_BK = chosen_B[:, None] == jnp.arange(K)
    new_BN1H = jnp.where(chosen_BK[:, None, :, None], new_BNKH, 0).sum(S, keepdims=True)
    return jax.lax.dynamic_update_slice_in_dim(x_BNSH, new_BN1H, slot, S)

  return cache.map(keep)


@register
class Contrastive:
  """Of the k likeliest tokens the one with the most (1 - alpha)·p - alpha·(largest cosine of its last
  hidden state with those of all tokens before it).

  The candidates are read as alternatives for one position: the cache has k slots for them, of which
  the chosen one's is kept. A candidate that a processor forbids is never taken, where Hugging Face's
  counts it with p = 0.
  """

  alpha: ArrayLike
  k: int = dataclasses.field(metadata=dict(static=True))

  def start(self, model: GPT2, request: Request, N: int, K: int) -> Contrasting:
    filled, x_A1D = prefill(model, request, N + self.k)
    C = request.C
    prompts_APD = reshard(filled.x_BTD, P(BATCH, None, None))  # new slots go beside: not over `seq`
    said_APD = jnp.pad(_directions(prompts_APD), ((0, 0), (0, N), (0, 0)))
    state = Contrasting(
      jnp.asarray(0),
      expand_cache(filled.cache, C),
      request.history,
      Record.zeros(request.history, K),
      expand(next_logits(model, x_A1D)[:, 0], C),
      expand(said_APD, C),
    )
    return self.step(model, request, state)

  def _propose(self, rules: Rules, rows: tuple[History, jax.Array]):
    """Returns the histories, and the k likeliest tokens with their log-probabilities, [B, k]."""
    history, logits_BV = rows
    scores_BV = process(rules, logits_BV, history)
    return history.refuse(scores_BV), *jax.lax.top_k(log_probs(scores_BV), self.k)

  def step(self, model: GPT2, request: Request, state: Contrasting) -> Contrasting:
    history, logprobs_BK, tokens_BK = by_rows(
      self._propose, request.rules, (state.history, state.logits_BV)
    )
    out = read(model, request, tokens_BK, state.t, state.cache, alone=True)
    prompt_slots, precision = request.prompts_AP.shape[1], model.config.precision
    slot, slots = prompt_slots + state.t, jnp.arange(state.said_BSD.shape[1])
    windows_B1 = expand(request.windows_A, request.C)[:, None]

    def choose(shared, candidates: Candidates):
      alpha, endings = shared
      chosen_B = candidates.choose(alpha, precision)
      return *candidates.push(chosen_B, endings), chosen_B

    candidates = Candidates(
      history=history,
      record=state.record,
      logits_BV=state.logits_BV,
      logprobs_BK=logprobs_BK,
      tokens_BK=tokens_BK,
      said_BSD=state.said_BSD,
      new_BKD=_directions(out.x_BTD),
      before_BS=(slots < windows_B1) | ((slots >= prompt_slots) & (slots < slot)),
    )
    history, record, chosen_B = by_rows(choose, (self.alpha, request.rules.endings), candidates)
    x_B1D = pick(out.x_BTD, chosen_B)[:, None]
    said_BSD = jax.lax.dynamic_update_slice_in_dim(state.said_BSD, _directions(x_B1D), slot, axis=1)
    return Contrasting(
      state.t + 1,
      keep_chosen(out.cache, chosen_B, slot, self.k),
      history,
      record,
      next_logits(model, x_B1D)[:, 0],
      said_BSD,
    )

  def running(self, state: Contrasting) -> jax.Array:
    return state.history.running_B.any()

  def results(self, state: Contrasting):
    return state.history, state.record, None

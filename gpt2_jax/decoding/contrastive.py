"""Contrastive search (Su et al. 2022, arXiv:2202.06417): what is likely, and not like what was said.

Semantics are those of Hugging Face's `generate`, in its versions 4. Letters: `K` candidates.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jax.typing import ArrayLike

from gpt2_jax.decoding.history import History
from gpt2_jax.decoding.loop import (
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
from gpt2_jax.decoding.warpers import NEVER, log_probs
from gpt2_jax.layers import Cache, pick
from gpt2_jax.model import GPT2
from gpt2_jax.sharding import BATCH, by_rows, reshard


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

  def step(self, model: GPT2, request: Request, state: Contrasting) -> Contrasting:
    prompt_slots = request.prompts_AP.shape[1]
    slot = prompt_slots + state.t
    C = request.C
    precision = model.config.precision

    def propose(rules: Rules, rows):
      history, logits_BV = rows
      scores_BV = process(rules, logits_BV, history)
      logprobs_BK, tokens_BK = jax.lax.top_k(log_probs(scores_BV), self.k)
      return history.refuse(scores_BV), logprobs_BK, tokens_BK

    def choose(shared, rows):
      alpha, slot, endings = shared
      history, record, logits_BV, logprobs_BK, tokens_BK, said_BSD, new_BKD, windows_B = rows
      slots = jnp.arange(said_BSD.shape[1])
      before_BS = (slots < windows_B[:, None]) | ((slots >= prompt_slots) & (slots < slot))
      cosine_BKS = jnp.einsum(
        'BKD,BSD->BKS', new_BKD, said_BSD, precision=precision, preferred_element_type=jnp.float32
      )
      alike_BK = jnp.where(before_BS[:, None], cosine_BKS, NEVER).max(-1)
      ranks_BK = jnp.where(
        logprobs_BK > NEVER, (1 - alpha) * jnp.exp(logprobs_BK) - alpha * alike_BK, NEVER
      )
      chosen_B = jnp.argmax(ranks_BK, axis=-1)
      tokens_B = jnp.take_along_axis(tokens_BK, chosen_B[:, None], axis=1)[:, 0]
      record = record.put(history.lengths_B, tokens_B, logits_BV)
      return history.push(tokens_B, endings), record, chosen_B

    history, logprobs_BK, tokens_BK = by_rows(
      propose, request.rules, (state.history, state.logits_BV)
    )
    out = read(model, request, tokens_BK, state.t, state.cache, alone=True)
    history, record, chosen_B = by_rows(
      choose,
      (self.alpha, slot, request.rules.endings),
      (
        history,
        state.record,
        state.logits_BV,
        logprobs_BK,
        tokens_BK,
        state.said_BSD,
        _directions(out.x_BTD),
        expand(request.windows_A, C),
      ),
    )

    def keep(x_BNSH):
      S = x_BNSH.ndim - 2
      new_BNKH = jax.lax.dynamic_slice_in_dim(x_BNSH, slot, self.k, S)
      chosen_BK = chosen_B[:, None] == jnp.arange(self.k)
      new_BN1H = jnp.where(chosen_BK[:, None, :, None], new_BNKH, 0).sum(S, keepdims=True)
      return jax.lax.dynamic_update_slice_in_dim(x_BNSH, new_BN1H, slot, S)

    x_B1D = pick(out.x_BTD, chosen_B)[:, None]
    said_BSD = jax.lax.dynamic_update_slice_in_dim(state.said_BSD, _directions(x_B1D), slot, axis=1)
    return Contrasting(
      state.t + 1,
      jax.tree.map(keep, out.cache),
      history,
      record,
      next_logits(model, x_B1D)[:, 0],
      said_BSD,
    )

  def running(self, state: Contrasting) -> jax.Array:
    return state.history.running_B.any()

  def results(self, state: Contrasting):
    return state.history, state.record, None

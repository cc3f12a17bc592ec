"""Speculative decoding: guess k tokens cheaply, and let the model judge them in one forward pass.

A guess x, drawn from q, is kept with probability min(1, p(x) / q(x)); in place of the first that is
not, a token is drawn from the positive part of p - q, and after k that were, one more from p
(Leviathan et al. 2023, arXiv:2211.17192; Chen et al. 2023, arXiv:2302.01318). What comes out has
the distribution p of the model and its processors exactly, whoever guesses. Greedily a guess is kept
if it is the likeliest token.

Rows keep different numbers of guesses, so each has its own place in the caches. What a rejected guess
left there is masked, and written over in the next round.
"""

import dataclasses
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from gpt2_jax.decoding.device_loop import (
  Record,
  Request,
  Rules,
  Sample,
  expand_cache,
  next_logits,
  prefill,
  process,
  read,
  row_keys,
)
from gpt2_jax.decoding.pytree import register
from gpt2_jax.decoding.row_state import RUNNING, History
from gpt2_jax.decoding.warpers import NEVER, log_probs
from gpt2_jax.model.config import GPTConfig
from gpt2_jax.model.gpt2 import Params, bind
from gpt2_jax.model.kv_cache import Cache
from gpt2_jax.model.layers import pick
from gpt2_jax.parallel.sharding import by_rows

GUESS, KEEP, REPLACE = range(3)  # what a random number is for; each position has its own
WAITING = -1  # in `History.reason_B`: the row's round is over
NO_GUESS = -1  # an id that no token has


class Guesser(Protocol):
  """Who guesses. Registered as a JAX dataclass."""

  def start(self, request: Request, N: int) -> Any:
    """Returns the memory to begin with, for N new tokens."""

  def guess(
    self, request: Request, history: History, t_B: jax.Array, memory: Any, k: int
  ) -> tuple[jax.Array, jax.Array | None, Any]:
    """Returns k tokens that may come next, [B, k]; the distributions that they were drawn from,
    [B, k, V], None where nothing was drawn; and its memory. The last new token is number `t_B`.
    """
    ...


@register
class Lookup:
  """Guesses what followed the last few tokens when they came before (prompt lookup decoding, Saxena
  2023): the latest of the longest matches. Without a match any guess will do.
  """

  longest: ArrayLike  # most tokens that are matched

  def start(self, request: Request, N: int) -> None:
    return None

  def guess(self, request: Request, history: History, t_B: jax.Array, memory: None, k: int):

    def each(longest: ArrayLike, history: History) -> jax.Array:
      tokens_BS, lengths_B1 = history.tokens_BS, history.lengths_B[:, None]
      places = jnp.arange(tokens_BS.shape[1])
      before_BS = (places > 0) & (places < lengths_B1)

      def compare(j, carry):  # the j-th id before each place with the j-th before the next one
        same_BS, n_BS = carry
        wanted_B1 = jnp.take_along_axis(tokens_BS, jnp.maximum(lengths_B1 - j, 0), axis=1)
        same_BS &= (places >= j) & (jnp.roll(tokens_BS, j, axis=1) == wanted_B1)
        return same_BS, n_BS + same_BS

      most = jnp.minimum(longest, places.size)
      _, n_BS = jax.lax.fori_loop(1, most + 1, compare, (before_BS, jnp.zeros_like(tokens_BS)))
      best_BS = before_BS & (n_BS == n_BS.max(-1, keepdims=True))
      from_B1 = jnp.where(best_BS, places, 0).max(-1, keepdims=True)
      guessed_Bk = from_B1 + jnp.arange(k) % (lengths_B1 - from_B1)  # at its end, it begins anew
      return jnp.take_along_axis(tokens_BS, guessed_Bk, axis=1)

    return by_rows(each, self.longest, history), None, None


def _of_another(request: Request) -> Request:
  """A request of another model: edits are of the one that judges."""
  return dataclasses.replace(request, edits=())


@register
class Draft:
  """Guesses as a smaller model does that has the same vocabulary, with the same processors."""

  config: GPTConfig = dataclasses.field(metadata=dict(static=True))
  params: Params  # best in the form 'decode'

  def start(self, request: Request, N: int) -> Cache:
    request = _of_another(request)
    filled, _ = prefill(bind(self.config, self.params), request, N)
    return expand_cache(filled.cache, request.C)

  def guess(self, request: Request, history: History, t_B: jax.Array, memory: Cache, k: int):
    request = _of_another(request)
    model, keys_B = bind(self.config, self.params), row_keys(request.key, request.samples_B)

    def each(rules: Rules, rows):
      logits_BV, keys_B, history = rows
      scores_BV = process(rules, logits_BV, history)
      useless_BV = jnp.isnan(scores_BV) | (scores_BV == NEVER).all(-1, keepdims=True)
      log_BV = log_probs(jnp.where(useless_BV.any(-1, keepdims=True), 0.0, scores_BV))
      if keys_B is None:
        guess_B, q_BV = jnp.argmax(log_BV, axis=-1), None
      else:
        keys_B = _keys(keys_B, history.lengths_B, GUESS)
        guess_B, q_BV = jax.vmap(jax.random.categorical)(keys_B, log_BV), jnp.exp(log_BV)
      guess_B = guess_B.astype(jnp.int32)
      return history.push(guess_B, rules.endings), (guess_B, q_BV)

    def draw(x_B1D: jax.Array, history: History):
      return by_rows(each, request.rules, (next_logits(model, x_B1D)[:, 0], keys_B, history))

    def draw_more(carry, i):
      cache, history, guess_B = carry
      out = read(model, request, guess_B[:, None], t_B + i, cache)
      history, drawn = draw(out.x_BTD, history)
      return (out.cache, history, drawn[0]), drawn

    # of k kept guesses the last has not been read: so the last two tokens are. Of a row with one new
    # token, that one and what is not there yet
    from_B = jnp.maximum(t_B - 1, 0)
    place_B = history.lengths_B - 1 - t_B + from_B
    known_B2 = jnp.stack([pick(history.tokens_BS, place_B + i) for i in range(2)], axis=1)
    out = read(model, request, known_B2, from_B, memory)
    ahead, first = draw(pick(out.x_BTD, t_B - from_B)[:, None], history)
    (cache, *_), more = jax.lax.scan(draw_more, (out.cache, ahead, first[0]), jnp.arange(1, k))
    guesses_Bk, q_BkV = jax.tree.map(
      lambda one, more: jnp.concatenate([one[:, None], jnp.moveaxis(more, 0, 1)], axis=1), first, more
    )
    return guesses_Bk, q_BkV, cache


def _keys(keys_B: jax.Array, positions_B: jax.Array, purpose: int) -> jax.Array:
  """Returns keys for the token at each row's position. A guess after a rejected one is drawn anew
  with the same key, which has decided nothing yet.
  """
  fold = lambda key, position: jax.random.fold_in(jax.random.fold_in(key, position), purpose)
  return jax.vmap(fold)(keys_B, positions_B)


def decide(
  scores_BV: jax.Array,
  guess_B: jax.Array,
  q_BV: jax.Array,
  keys_B: jax.Array | None,
  history: History,
) -> jax.Array:
  """Returns the next token of each row: its guess, or another in place of it.

  Args:
    scores_BV: of the model, processed.
    guess_B: NO_GUESS where there is none.
    q_BV: what the guess was drawn from; 0 where there is none.
    keys_B: of the rows; None: greedy.
    history: what stands before the token.
  """
  if keys_B is None:
    return jnp.argmax(scores_BV, axis=-1).astype(jnp.int32)
  p_BV = jnp.exp(log_probs(scores_BV))
  guessed = lambda x_BV: pick(x_BV, guess_B)
  u_B = jax.vmap(jax.random.uniform)(_keys(keys_B, history.lengths_B, KEEP))
  keep_B = u_B * guessed(q_BV) < guessed(p_BV)
  rest_BV = jnp.maximum(p_BV - q_BV, 0)
  rest_BV = jnp.where(rest_BV.any(-1, keepdims=True), rest_BV, p_BV)  # none: p is q, but for rounding
  other_B = jax.vmap(jax.random.categorical)(
    _keys(keys_B, history.lengths_B, REPLACE), jnp.log(rest_BV)
  )
  return jnp.where(keep_B, guess_B, other_B).astype(jnp.int32)


def judge(rules: Rules, rows) -> tuple[History, Record]:
  """Keeps guesses as long as they are right, and writes one token after them."""
  logits_BTV, guesses_Bk, q_BkV, keys_B, history, record = rows
  k, V = guesses_Bk.shape[1], logits_BTV.shape[-1]

  def going(carry):
    j, history, _ = carry
    return (j <= k) & history.running_B.any()

  def body(carry):
    j, history, record = carry
    at = lambda x: jax.lax.dynamic_index_in_dim(x, j, axis=1, keepdims=False)
    guess_B = jnp.where(j < k, at(guesses_Bk), NO_GUESS)
    q_BV = jax.nn.one_hot(guess_B, V) if q_BkV is None else jnp.where(j < k, at(q_BkV), 0)
    scores_BV = process(rules, at(logits_BTV), history)
    token_B = decide(scores_BV, guess_B, q_BV, keys_B, history)
    record = record.put(history.lengths_B, token_B, at(logits_BTV))
    history = history.refuse(scores_BV).push(token_B, rules.endings)
    over_B = history.running_B & (token_B != guess_B)
    return (
      j + 1,
      dataclasses.replace(history, reason_B=jnp.where(over_B, WAITING, history.reason_B)),
      record,
    )

  _, history, record = jax.lax.while_loop(going, body, (jnp.asarray(0), history, record))
  reason_B = jnp.where(history.reason_B == WAITING, RUNNING, history.reason_B)
  return dataclasses.replace(history, reason_B=reason_B), record


@register
class Speculation:
  """State of `Speculative`; t counts rounds, of 1 to k + 1 tokens, after the first token."""

  t: jax.Array
  cache: Cache
  history: History
  record: Record
  memory: Any  # of the guesser


@register
class Speculative:
  """Does what `Sample` does, several tokens at a step: k guesses at a time. Its draws are others,
  of the same distribution.
  """

  guesser: Guesser
  k: int = dataclasses.field(metadata=dict(static=True))

  def start(self, model, request: Request, N: int, K: int) -> Speculation:
    most = N + self.k  # with guesses behind the last token
    first = Sample().start(model, request, most, K)
    return Speculation(
      first.t, first.cache, first.history, first.record, self.guesser.start(request, most)
    )

  def step(self, model, request: Request, state: Speculation) -> Speculation:
    history = state.history
    t_B = jnp.maximum(history.lengths_B - request.history.lengths_B - 1, 0)
    guesses_Bk, q_BkV, memory = self.guesser.guess(request, history, t_B, state.memory, self.k)
    last_B1 = pick(history.tokens_BS, history.lengths_B - 1)[:, None]
    out = read(model, request, jnp.concatenate([last_B1, guesses_Bk], axis=1), t_B, state.cache)
    history, record = by_rows(
      judge,
      request.rules,
      (
        next_logits(model, out.x_BTD),
        guesses_Bk,
        q_BkV,
        row_keys(request.key, request.samples_B),
        history,
        state.record,
      ),
    )
    return Speculation(state.t + 1, out.cache, history, record, memory)

  def running(self, state: Speculation) -> jax.Array:
    return state.history.running_B.any()

  def results(self, state: Speculation):
    return state.history, state.record, None

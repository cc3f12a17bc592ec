"""Beam search: plain, sampled, and in groups. Semantics are those of Hugging Face's `generate`.

Letters: `A` prompts, `G` groups of beams, `K` beams of each group of a prompt, `B` = A·G·K rows,
those of one prompt side by side, `J` candidates for the K beams of a group, `M` = K·V continuations.
For example, A = 2 prompts with num_beams = 4 and num_beam_groups = 2 have G = 2, K = 2 and B = 8:

    row       0   1   2   3   4   5   6   7
    prompt    0   0   0   0   1   1   1   1
    group     0   0   1   1   0   0   1   1

The groups take their turns: group 0 has the rows 0, 1, 4, 5, and with one id that ends a text J = 4
candidates for its 2 beams of each prompt. A row continues a beam of its own group: row 6 ("beam 2" of
prompt 1) may go on from beam 2 or 3. A score of -inf says that there is no such beam.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from gpt2_jax.decoding.beam_rows import (
  Extended,
  Rows,
  Searching,
  Shared,
  Texts,
  best,
  existing,
  merge,
  reorder,
  row_numbers,
  split,
  take,
  zeros_like_rows,
)
from gpt2_jax.decoding.device_loop import (
  Record,
  Request,
  expand,
  expand_cache,
  next_logits,
  prefill,
  process,
  read,
  row_keys,
)
from gpt2_jax.decoding.pytree import register
from gpt2_jax.decoding.row_state import NO_TOKEN, NOT_A_NUMBER, History
from gpt2_jax.decoding.warpers import NEVER
from gpt2_jax.model.gpt2 import GPT2
from gpt2_jax.model.layers import pick
from gpt2_jax.parallel.sharding import by_rows


@register
class Beams:
  """Beam search. What ends a row ends a beam; the prompt is done when no other can be better.

  With a key, candidates are drawn instead, without replacement: the largest of scores with Gumbel
  noise (Kool et al. 2019, arXiv:1903.06059).

  Each of several groups is a beam search for itself, but that a token costs `diversity` for each beam
  of an earlier group that has chosen it at this step (Vijayakumar et al. 2016, arXiv:1610.02424).

  Prompts know nothing of each other. A prompt that has fewer texts than beams is refused as NO_TOKEN
  if they are asked for; Hugging Face fills up with copies.
  """

  length_penalty: ArrayLike
  diversity: ArrayLike
  at_once: ArrayLike  # a prompt is done as soon as all its beams are finished
  patient: ArrayLike  # it is not while a beam may be better at its greatest length
  returned: Any  # how many beams of each prompt are returned, an integer
  num_beams: int = dataclasses.field(metadata=dict(static=True))
  groups: int = dataclasses.field(metadata=dict(static=True))
  n_eos: int = dataclasses.field(metadata=dict(static=True))  # how many ids end a beam

  @property
  def K(self) -> int:
    """How many beams a group of a prompt has."""
    return self.num_beams // self.groups

  def _ranked(self, scores: jax.Array, lengths: jax.Array) -> jax.Array:
    return scores / lengths.astype(jnp.float32) ** self.length_penalty

  def _candidates(self, shared: Shared, scores_BV: jax.Array, rows: Rows):
    """Takes the J best continuations of the K beams of a group by a token, or J that are drawn.

    Returns:
      The continuations, the beams that they continue, [A, J], and their last ids, [A, J].
    """
    B, V = scores_BV.shape
    K, running = self.K, rows.running
    A, J = B // K, min(max(2, 1 + self.n_eos) * K, K * V)  # K go on, whatever ids end a beam
    sums_BV = jnp.where(scores_BV > NEVER, running.scores_B[:, None] + scores_BV, NEVER)
    scores_AM = sums_BV.reshape(A, K * V)
    drawn_AM = scores_AM
    if rows.keys_B is not None:
      places_B = running.history.prompt_B + shared.t
      keys_A = jax.vmap(jax.random.fold_in)(rows.keys_B, places_B)[::K]
      drawn_AM += jax.vmap(lambda key: jax.random.gumbel(key, (K * V,)))(keys_A)
    picks_AJ = jax.lax.top_k(drawn_AM, J)[1]
    parents_AJ, tokens_AJ = picks_AJ // V, picks_AJ % V
    at_picks = lambda x_AM: jnp.take_along_axis(x_AM, picks_AJ, axis=1).ravel()
    scores_C = at_picks(scores_AM)

    # the likeliest ids are those of the parent; the chosen one's log-probability is its own
    places_B = running.history.lengths_B
    record = running.record.put(places_B, jnp.zeros_like(places_B), rows.logits_BV)
    history, record, places_C = take((running.history, record, places_B), row_numbers(parents_AJ, K))
    logprobs_C = at_picks(jax.nn.log_softmax(rows.logits_BV, axis=-1).reshape(A, K * V))
    here_CS = jnp.arange(record.logprobs_BS.shape[1]) == places_C[:, None]
    record = dataclasses.replace(
      record, logprobs_BS=jnp.where(here_CS, logprobs_C[:, None], record.logprobs_BS)
    )
    history = dataclasses.replace(history, reason_B=existing(scores_C))
    history = history.push(tokens_AJ.ravel(), shared.rules.endings)
    return Texts(history, record, scores_C), parents_AJ, tokens_AJ

  def _extend(self, shared: Shared, chosen_AV: jax.Array, rows: Rows) -> tuple[Extended, jax.Array]:
    """Puts one more token to the K beams of a group of each prompt.

    Args:
      shared: what holds for all rows.
      chosen_AV: how many beams of earlier groups have chosen a token.
      rows: of the group, A·K.

    Returns:
      The rows, with parents among the group's beams, and `chosen_AV` with this group's.
    """
    A, K, running = chosen_AV.shape[0], self.K, rows.running
    costs_BV = self.diversity * jnp.repeat(chosen_AV, K, axis=0)
    logprobs_BV = jax.nn.log_softmax(rows.logits_BV, axis=-1)
    scores_BV = process(shared.rules, logprobs_BV - costs_BV, running.history)
    able = running.history.refuse(scores_BV)
    broken_A = (able.reason_B == NOT_A_NUMBER).reshape(A, K).any(1)
    scores_BV = jnp.where(able.running_B[:, None], scores_BV, NEVER)
    texts, parents_AJ, tokens_AJ = self._candidates(shared, scores_BV, rows)
    J, scores_AJ = parents_AJ.shape[1], texts.scores_B.reshape(parents_AJ.shape)
    goes_on_AJ = texts.history.running_B.reshape(A, J)

    # an end counts among the K best candidates only
    ended_AJ = (scores_AJ > NEVER) & ~goes_on_AJ & (jnp.arange(J) < K)
    ranked_AJ = jnp.where(ended_AJ, self._ranked(scores_AJ, shared.t + 1), NEVER)
    ended = dataclasses.replace(texts, scores_B=ranked_AJ.ravel())
    finished = best(A, K, rows.finished, ended)
    scores_AK, best_AK = jax.lax.top_k(jnp.where(goes_on_AJ, scores_AJ, NEVER), K)
    running = take(texts, row_numbers(best_AK, J))
    parents_AK, tokens_AK = (jnp.take_along_axis(x, best_AK, axis=1) for x in (parents_AJ, tokens_AJ))
    count = lambda chosen_V, tokens_K, there_K: chosen_V.at[tokens_K].add(there_K.astype(jnp.int32))
    chosen_AV = jax.vmap(count)(chosen_AV, tokens_AK, scores_AK > NEVER)

    # in groups a beam that has just ended is hoped for as well, as it was in their last version
    hope_A = (scores_AJ if self.groups > 1 else scores_AK).max(1)
    done_A = broken_A | self._done(shared.t, hope_A, running.history, finished)
    scores_B = jnp.where(done_A[:, None], NEVER, scores_AK).ravel()
    history = dataclasses.replace(running.history, reason_B=existing(scores_B))
    running = Texts(history, running.record, scores_B)
    broken_B, h = jnp.repeat(broken_A, K), finished.history
    finished = Texts(  # the broken ones come first: they are reported
      dataclasses.replace(h, reason_B=jnp.where(broken_B, NOT_A_NUMBER, h.reason_B)),
      finished.record,
      jnp.where(broken_B, jnp.inf, finished.scores_B),
    )
    return Extended(running, finished, parents_AK.ravel()), chosen_AV

  def _done(self, t, hope_A: jax.Array, running: History, finished: Texts) -> jax.Array:
    """Whether no beam of a prompt's group, with a sum of at most `hope_A`, becomes better than all of
    its finished ones, [A].
    """
    most_A = jnp.minimum(running.limits_B, running.context_B - running.prompt_B)[:: self.K]
    far = jnp.logical_and(self.patient, jnp.greater(self.length_penalty, 0))
    ranked_A = self._ranked(hope_A, jnp.where(far, most_A, t + 1))
    worst_A = finished.scores_B.reshape(-1, self.K)[:, -1]
    return (worst_A > NEVER) & (self.at_once | (ranked_A <= worst_A))

  def _advance(self, request: Request, t, logits_BV, running: Texts, finished: Texts) -> Extended:
    """Puts one more token to all beams."""

    def each(shared: Shared, rows: Rows) -> Extended:
      search, (B, V) = shared.search, rows.logits_BV.shape
      A, G = B // search.num_beams, search.groups

      def group(chosen_AV, turn):
        g, part = turn
        extended, chosen_AV = search._extend(shared, chosen_AV, part)
        return chosen_AV, extended._replace(parents_B=extended.parents_B + g * search.K)

      none_AV = zeros_like_rows(rows.finished.history.lengths_B, A, V)
      return merge(A, jax.lax.scan(group, none_AV, (jnp.arange(G), split(A, G, rows)))[1])

    rows = Rows(logits_BV, row_keys(request.key, request.samples_B), running, finished)
    return by_rows(each, Shared(self, request.rules, t), rows)

  def start(self, model: GPT2, request: Request, N: int, K: int) -> Searching:
    def one_a_group(_, texts: Texts) -> tuple[Texts, Texts]:
      first_B = jnp.arange(texts.scores_B.size) % self.K == 0
      running_B = texts.history.running_B  # what isn't, is finished as it is
      scores_B = jnp.where(first_B & running_B, 0, NEVER)
      history = dataclasses.replace(texts.history, reason_B=existing(scores_B))
      return (
        Texts(history, texts.record, scores_B),
        dataclasses.replace(texts, scores_B=jnp.where(running_B, NEVER, 0)),
      )

    filled, x_A1D = prefill(model, request, N)
    logits_BV = expand(next_logits(model, x_A1D)[:, 0], self.num_beams)
    record = Record.zeros(request.history, K)
    texts = Texts(request.history, record, jnp.zeros_like(record.logprobs_BS[:, 0]))
    first = self._advance(request, jnp.asarray(0), logits_BV, *by_rows(one_a_group, None, texts))
    cache = expand_cache(filled.cache, self.num_beams)  # the same for all beams
    return Searching(jnp.asarray(1), cache, first.running, first.finished)

  def step(self, model: GPT2, request: Request, state: Searching) -> Searching:
    history = state.running.history
    last_B1 = pick(history.tokens_BS, history.lengths_B - 1)[:, None]
    out = read(model, request, last_B1, state.t - 1, state.cache)
    running, finished, parents_B = self._advance(
      request, state.t, next_logits(model, out.x_BTD)[:, 0], state.running, state.finished
    )
    return Searching(state.t + 1, reorder(out.cache, parents_B, self.num_beams), running, finished)

  def running(self, state: Searching) -> jax.Array:
    return (state.running.scores_B > NEVER).any()

  def results(self, state: Searching):
    texts = _results(self, state.running, state.finished, n=int(self.returned))
    return texts.history, texts.record, texts.scores_B


@functools.partial(jax.jit, static_argnames='n')
def _results(search: Beams, running: Texts, finished: Texts, n: int) -> Texts:
  """Returns the n best beams of each prompt; where it isn't done, running ones are among them."""

  def each(search: Beams, rows: tuple[Texts, Texts]) -> Texts:
    running, finished = rows
    A = running.scores_B.size // search.num_beams
    goes_on_A = (running.scores_B.reshape(A, -1) > NEVER).any(1)
    ranked_B = search._ranked(running.scores_B, jnp.maximum(running.history.new_B, 1))
    texts = best(A, n, finished, dataclasses.replace(running, scores_B=ranked_B))
    h = texts.history  # of the finished, those that are running are missing
    missing_B = h.running_B & ~jnp.repeat(goes_on_A, n)
    reason_B = jnp.where(missing_B, NO_TOKEN, h.reason_B)
    return dataclasses.replace(texts, history=dataclasses.replace(h, reason_B=reason_B))

  return by_rows(each, search, (running, finished))

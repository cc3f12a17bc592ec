"""Beam search: plain, sampled, and in groups. Semantics are those of Hugging Face's `generate`.

Letters: `A` prompts, `K` beams of each or of a group of each, `B` = A·K rows, those of one prompt
side by side, `J` candidates for the beams of a prompt, `G` groups.
A score of -inf says that there is no such beam.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from gpt2_jax.decoding.history import NO_TOKEN, NOT_A_NUMBER, RUNNING, History
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
  row_keys,
)
from gpt2_jax.decoding.pytree import register
from gpt2_jax.decoding.warpers import NEVER
from gpt2_jax.layers import Cache, pick
from gpt2_jax.model import GPT2
from gpt2_jax.sharding import BATCH, P, by_rows, in_mesh, spec_of


@register
class Texts:
  """As many beams of each prompt, best first."""

  history: History
  record: Record
  scores_B: jax.Array


@register
class Searching:
  """State of `Beams`."""

  t: jax.Array
  cache: Cache  # of the running beams
  running: Texts  # scored by the sum of log-probabilities; none when a prompt is done
  finished: Texts  # scored by the sum / length ** length_penalty


def _rows(which_AJ: jax.Array, K: int) -> jax.Array:
  """The rows, [A·J], of some of each prompt's K beams."""
  return (which_AJ + K * jnp.arange(which_AJ.shape[0])[:, None]).ravel()


def _take(tree: Any, rows: jax.Array) -> Any:
  return jax.tree.map(lambda x: x[rows], tree)


def _beside(A: int, *trees: Any) -> Any:
  """The beams that several trees have of each prompt, side by side."""

  def join(*xs):
    x_AJ = jnp.concatenate([x.reshape(A, x.shape[0] // A, *x.shape[1:]) for x in xs], axis=1)
    return x_AJ.reshape(A * x_AJ.shape[1], *x_AJ.shape[2:])

  return jax.tree.map(join, *trees)


def _split(A: int, G: int, tree: Any) -> Any:
  """The beams of each of the G groups of a prompt, [G, A·K]."""

  def split(x):
    K = x.shape[0] // (A * G)
    return x.reshape(A, G, K, *x.shape[1:]).swapaxes(0, 1).reshape(G, A * K, *x.shape[1:])

  return jax.tree.map(split, tree)


def _merge(A: int, tree: Any) -> Any:
  """Undoes `_split`."""

  def merge(x):
    G, K = x.shape[0], x.shape[1] // A
    return x.reshape(G, A, K, *x.shape[2:]).swapaxes(0, 1).reshape(A * G * K, *x.shape[2:])

  return jax.tree.map(merge, tree)


def _reasons(scores_B: jax.Array) -> jax.Array:
  """That beams are running, if they are there."""
  return jnp.where(scores_B > NEVER, RUNNING, NO_TOKEN)


def _best(A: int, n: int, *texts: Texts) -> Texts:
  """The n best beams of each prompt."""
  both = _beside(A, *texts)
  scores_AJ = both.scores_B.reshape(A, -1)
  return _take(both, _rows(jax.lax.top_k(scores_AJ, n)[1], scores_AJ.shape[1]))


def _reorder(cache: Cache, parents_B: jax.Array, K: int) -> Cache:
  """The cache of beams that continue others, numbered among the K of their prompt."""

  def take(cache, parents_B):
    rows_B = _rows(parents_B.reshape(-1, K), K)
    return jax.tree.map(lambda x_BNSH: x_BNSH[..., rows_B, :, :, :], cache)

  if not in_mesh():
    return take(cache, parents_B)
  specs = jax.tree.map(spec_of, cache)
  return jax.shard_map(take, in_specs=(specs, P(BATCH)), out_specs=specs)(cache, parents_B)


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

  def _ranked(self, scores: jax.Array, lengths: jax.Array) -> jax.Array:
    return scores / lengths.astype(jnp.float32) ** self.length_penalty

  def _candidates(self, rules: Rules, t, scores_BV, logits_BV, keys_B, running: Texts):
    """The J best continuations of each prompt's K beams by a token, or J that are drawn.

    Returns:
      The continuations, the beams that they continue, [A, J], and their last ids, [A, J].
    """
    B, V = scores_BV.shape
    K = self.num_beams // self.groups
    A, J = B // K, min(max(2, 1 + self.n_eos) * K, K * V)  # K go on, whatever ids end a beam
    sums_BV = jnp.where(scores_BV > NEVER, running.scores_B[:, None] + scores_BV, NEVER)
    scores_AM = sums_BV.reshape(A, K * V)
    drawn_AM = scores_AM
    if keys_B is not None:
      keys_A = jax.vmap(jax.random.fold_in)(keys_B, running.history.prompt_B + t)[::K]
      drawn_AM += jax.vmap(lambda key: jax.random.gumbel(key, (K * V,)))(keys_A)
    picks_AJ = jax.lax.top_k(drawn_AM, J)[1]
    parents_AJ, tokens_AJ = picks_AJ // V, picks_AJ % V
    at_picks = lambda x_AM: jnp.take_along_axis(x_AM, picks_AJ, axis=1).ravel()
    scores_C = at_picks(scores_AM)

    # what the likeliest ids are is the parent's; what the chosen one's log-probability is, is not
    places_B = running.history.lengths_B
    record = running.record.put(places_B, jnp.zeros_like(places_B), logits_BV)
    history, record, places_C = _take((running.history, record, places_B), _rows(parents_AJ, K))
    logprobs_C = at_picks(jax.nn.log_softmax(logits_BV, axis=-1).reshape(A, K * V))
    here_CS = jnp.arange(record.logprobs_BS.shape[1]) == places_C[:, None]
    record = dataclasses.replace(
      record, logprobs_BS=jnp.where(here_CS, logprobs_C[:, None], record.logprobs_BS)
    )
    history = dataclasses.replace(history, reason_B=_reasons(scores_C))
    history = history.push(tokens_AJ.ravel(), rules.endings)
    return Texts(history, record, scores_C), parents_AJ, tokens_AJ

  def _extend(self, rules: Rules, t, chosen_AV, logits_BV, keys_B, running: Texts, finished: Texts):
    """Puts one more token to the K beams of a group of each prompt.

    Args:
      rules: what holds for all rows.
      t: how many new tokens the beams have.
      chosen_AV: how many beams of earlier groups have chosen a token.
      logits_BV: of the running beams.
      keys_B: of their prompts; None: the best candidates are taken.
      running, finished: the beams.

    Returns:
      The running and the finished beams, the beam that each running one continues, `chosen_AV`.
    """
    A = chosen_AV.shape[0]
    K = logits_BV.shape[0] // A
    costs_BV = self.diversity * jnp.repeat(chosen_AV, K, axis=0)
    scores_BV = process(rules, jax.nn.log_softmax(logits_BV, axis=-1) - costs_BV, running.history)
    able = running.history.refuse(scores_BV)
    broken_A = (able.reason_B == NOT_A_NUMBER).reshape(A, K).any(1)
    scores_BV = jnp.where(able.running_B[:, None], scores_BV, NEVER)
    candidates, parents_AJ, tokens_AJ = self._candidates(
      rules, t, scores_BV, logits_BV, keys_B, running
    )
    J, scores_AJ = parents_AJ.shape[1], candidates.scores_B.reshape(parents_AJ.shape)
    goes_on_AJ = candidates.history.running_B.reshape(A, J)

    # an end counts among the K best candidates only
    ended_AJ = (scores_AJ > NEVER) & ~goes_on_AJ & (jnp.arange(J) < K)
    ranked_AJ = jnp.where(ended_AJ, self._ranked(scores_AJ, t + 1), NEVER)
    finished = _best(A, K, finished, dataclasses.replace(candidates, scores_B=ranked_AJ.ravel()))
    scores_AK, best_AK = jax.lax.top_k(jnp.where(goes_on_AJ, scores_AJ, NEVER), K)
    running = _take(candidates, _rows(best_AK, J))
    parents_AK, tokens_AK = (jnp.take_along_axis(x, best_AK, axis=1) for x in (parents_AJ, tokens_AJ))
    count = lambda chosen_V, tokens_K, there_K: chosen_V.at[tokens_K].add(there_K.astype(jnp.int32))
    chosen_AV = jax.vmap(count)(chosen_AV, tokens_AK, scores_AK > NEVER)

    h = running.history
    most_A = jnp.minimum(h.limits_B, h.context_B - h.prompt_B)[::K]
    length_A = jnp.where(
      jnp.logical_and(self.patient, jnp.greater(self.length_penalty, 0)), most_A, t + 1
    )
    # in groups a beam that has just ended is hoped for as well, as it was in their last version
    hope_A = self._ranked((scores_AJ if self.groups > 1 else scores_AK).max(1), length_A)
    worst_A = finished.scores_B.reshape(A, K)[:, -1]
    done_A = broken_A | ((worst_A > NEVER) & (self.at_once | (hope_A <= worst_A)))

    scores_B = jnp.where(done_A[:, None], NEVER, scores_AK).ravel()
    running = Texts(dataclasses.replace(h, reason_B=_reasons(scores_B)), running.record, scores_B)
    broken_B, h = jnp.repeat(broken_A, K), finished.history
    finished = Texts(  # the broken ones come first: they are reported
      dataclasses.replace(h, reason_B=jnp.where(broken_B, NOT_A_NUMBER, h.reason_B)),
      finished.record,
      jnp.where(broken_B, jnp.inf, finished.scores_B),
    )
    return running, finished, parents_AK.ravel(), chosen_AV

  def _advance(self, request: Request, t, logits_BV, running: Texts, finished: Texts):
    """The beams with one more token, and the beam of its prompt that each running one continues."""

    def each(shared, rows):
      search, rules, t = shared
      A, G, K = len(rows[0]) // self.num_beams, self.groups, self.num_beams // self.groups

      def group(chosen_AV, part):
        *part, chosen_AV = search._extend(rules, t, chosen_AV, *part)
        return chosen_AV, part

      none_AV = jnp.zeros((A, rows[0].shape[1]), jnp.int32)
      none_AV += 0 * rows[2].history.lengths_B[:A, None]  # so it lies where the rows do
      parts = jax.lax.scan(group, none_AV, _split(A, G, rows))[1]
      running, finished, parents_B = _merge(A, parts)
      return running, finished, parents_B + jnp.arange(parents_B.size) // K % G * K

    rows = logits_BV, row_keys(request.key, request.samples_B), running, finished
    return by_rows(each, (self, request.rules, t), rows)

  def start(self, model: GPT2, request: Request, N: int, K: int) -> Searching:
    def one_a_group(_, texts: Texts) -> tuple[Texts, Texts]:
      first_B = jnp.arange(texts.scores_B.size) % (self.num_beams // self.groups) == 0
      running_B = texts.history.running_B  # what isn't, is finished as it is
      scores_B = jnp.where(first_B & running_B, 0, NEVER)
      history = dataclasses.replace(texts.history, reason_B=_reasons(scores_B))
      return (
        Texts(history, texts.record, scores_B),
        dataclasses.replace(texts, scores_B=jnp.where(running_B, NEVER, 0)),
      )

    filled, x_A1D = prefill(model, request, N)
    logits_BV = expand(next_logits(model, x_A1D)[:, 0], self.num_beams)
    record = Record.zeros(request.history, K)
    texts = Texts(request.history, record, jnp.zeros_like(record.logprobs_BS[:, 0]))
    running, finished, parents_B = self._advance(
      request, jnp.asarray(0), logits_BV, *by_rows(one_a_group, None, texts)
    )
    del parents_B  # all beams have the same cache
    return Searching(jnp.asarray(1), expand_cache(filled.cache, self.num_beams), running, finished)

  def step(self, model: GPT2, request: Request, state: Searching) -> Searching:
    history = state.running.history
    last_B1 = pick(history.tokens_BS, history.lengths_B - 1)[:, None]
    out = read(model, request, last_B1, state.t - 1, state.cache)
    running, finished, parents_B = self._advance(
      request, state.t, next_logits(model, out.x_BTD)[:, 0], state.running, state.finished
    )
    return Searching(state.t + 1, _reorder(out.cache, parents_B, self.num_beams), running, finished)

  def running(self, state: Searching) -> jax.Array:
    return (state.running.scores_B > NEVER).any()

  def results(self, state: Searching):
    texts = _results(self, state.running, state.finished, n=int(self.returned))
    return texts.history, texts.record, texts.scores_B


@functools.partial(jax.jit, static_argnames='n')
def _results(search: Beams, running: Texts, finished: Texts, n: int) -> Texts:
  """The n best of each prompt: where it isn't done, those that run are among them."""

  def each(search: Beams, rows: tuple[Texts, Texts]) -> Texts:
    running, finished = rows
    A = running.scores_B.size // search.num_beams
    goes_on_A = (running.scores_B.reshape(A, -1) > NEVER).any(1)
    ranked_B = search._ranked(running.scores_B, jnp.maximum(running.history.new_B, 1))
    texts = _best(A, n, finished, dataclasses.replace(running, scores_B=ranked_B))
    h = texts.history  # of the finished, those that are running are missing
    missing_B = h.running_B & ~jnp.repeat(goes_on_A, n)
    reason_B = jnp.where(missing_B, NO_TOKEN, h.reason_B)
    return dataclasses.replace(texts, history=dataclasses.replace(h, reason_B=reason_B))

  return by_rows(each, search, (running, finished))

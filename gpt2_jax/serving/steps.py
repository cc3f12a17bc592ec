"""The compiled programs of a server: B slots, each a row of one cache, that come and go on their own.

A row's prompt is read in chunks into its part of the cache (`prefill`), all but the last id. Then the
row is `admit`ted, and each `step` makes one more id of every row that is running. What a row computes
is in the same program whatever the others do, so they change nothing about it, to the last bit.

The numbers of a row's options are arrays [B, 1] in the fields of `decoding`'s processors, each with a
value that does nothing; a processor that no running row wants is not run.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gpt2_jax.config import GPTConfig
from gpt2_jax.decoding import history as h
from gpt2_jax.decoding.history import Endings, History
from gpt2_jax.decoding.loop import choose, next_logits
from gpt2_jax.decoding.processors import CountPenalty
from gpt2_jax.decoding.pytree import register
from gpt2_jax.decoding.warpers import Temperature, TopK, TopP
from gpt2_jax.layers import KVCache, pick
from gpt2_jax.model import Params, bind

CHUNK = 128  # ids of a prompt that are read at a time: others wait no longer
K = 5  # alternatives of a token whose log-probabilities are told, as many as OpenAI's


@register
@dataclasses.dataclass(frozen=True)
class Chosen:
  """How rows choose their tokens; of one row the same without B."""

  keys_B: jax.Array  # of the request and the sample
  greedy_B: jax.Array
  temperature_B: jax.Array
  top_k_B: jax.Array  # the vocabulary's size: all
  top_p_B: jax.Array
  presence_B: jax.Array
  frequency_B: jax.Array
  biased_B: jax.Array
  bias_BV: jax.Array  # added to the logits
  logprobs_B: jax.Array  # whether log-probabilities are asked for


@register
@dataclasses.dataclass(frozen=True)
class Slots:
  """B rows, on the device."""

  cache: Any  # a `KVCache` for each layer: a prompt's and a text's ids from place 0 on
  history: History  # a row that is not running is idle, or its prompt is being read
  chosen: Chosen


@register
@dataclasses.dataclass(frozen=True)
class Scores:
  """Log-probabilities under the model itself: of ids, and of the K likeliest."""

  logprobs: jax.Array  # [..]
  top_ids: jax.Array  # [.., K]
  top_logprobs: jax.Array  # [.., K]


@register
@dataclasses.dataclass(frozen=True)
class Step:
  """What a step has made."""

  tokens_B: jax.Array
  reason_B: jax.Array  # as in `History`
  scores: Scores  # [B]; zero where no row asks for them


def _scores(logits_XV: jax.Array, ids_X: jax.Array) -> Scores:
  total_X1 = jax.nn.logsumexp(logits_XV, axis=-1, keepdims=True)
  top_XK, ids_XK = jax.lax.top_k(logits_XV, min(K, logits_XV.shape[-1]))
  chosen_X1 = jnp.take_along_axis(logits_XV, ids_X[:, None], axis=-1)
  return Scores((chosen_X1 - total_X1)[:, 0], ids_XK, top_XK - total_X1)


def _if_asked(asked, logits_XV: jax.Array, ids_X: jax.Array) -> Scores:
  zeros = lambda *_: jax.tree.map(
      lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(_scores, logits_XV, ids_X))
  return jax.lax.cond(asked, _scores, zeros, logits_XV, ids_X)


@dataclasses.dataclass(frozen=True)
class _Part:
  """One layer's cache of all slots, [B, N, S, H], of which one is read and written, in place."""

  k: jax.Array
  v: jax.Array
  slot: jax.Array

  def update(self, layer, start, k_1TNH, v_1TNH) -> tuple['_Part', jax.Array, jax.Array]:
    """As `KVCache.update`, for the one row that is the slot's."""
    def put(all_BNSH, new_1TNH):
      all_BNSH = jax.lax.dynamic_update_slice(
          all_BNSH, new_1TNH.swapaxes(1, 2), (self.slot, 0, start, 0))
      return all_BNSH, jax.lax.dynamic_slice_in_dim(all_BNSH, self.slot, 1, axis=0)

    (k, k_1NSH), (v, v_1NSH) = put(self.k, k_1TNH), put(self.v, v_1TNH)
    return _Part(k, v, self.slot), k_1NSH.swapaxes(1, 2), v_1NSH.swapaxes(1, 2)


@functools.partial(jax.jit, static_argnames=('config', 'B'))
def empty(config: GPTConfig, *, B: int) -> Slots:
  """B idle slots, each with room for the model's context."""
  V, S = config.vocab_size, config.n_positions
  S_chunks = -(-S // CHUNK) * CHUNK if S > CHUNK else S
  zero_B, no_B, real_B = jnp.zeros(B, jnp.int32), jnp.zeros(B, bool), jnp.zeros(B)
  history = History(
      tokens_BS=jnp.zeros((B, S), jnp.int32), lengths_B=zero_B + 1, prompt_B=zero_B + 1,
      limits_B=zero_B, context_B=zero_B + S, which_B=zero_B, stop_B=zero_B, guide_B=zero_B,
      reason_B=zero_B + h.LIMIT)
  chosen = Chosen(
      keys_B=jax.random.split(jax.random.key(0), B), greedy_B=~no_B, temperature_B=real_B + 1,
      top_k_B=zero_B + V, top_p_B=real_B + 1, presence_B=real_B, frequency_B=real_B, biased_B=no_B,
      bias_BV=jnp.zeros((B, V)), logprobs_B=no_B)
  return Slots(KVCache.zeros(config, B, S_chunks), history, chosen)


@functools.partial(jax.jit, static_argnames=('config',), donate_argnames=('slots',))
def prefill(config: GPTConfig, params: Params, slots: Slots, slot, start, tokens_T, next_T, asked
            ) -> tuple[Slots, Scores]:
  """Reads T ids of a prompt into a slot.

  Args:
    config, params: the model, in the form 'decode'.
    slots: are given up; those that are returned take their place.
    slot: which of them.
    start: place of the first id.
    tokens_T: ids, padded on the right. What is written for padding is written over before it is seen.
    next_T: the ids after them.
    asked: whether the log-probabilities of these are.
  """
  T = tokens_T.shape[0]
  model = bind(config, params)

  # padding may lie beyond the context, where there is no position
  positions_1T = jnp.minimum(start + jnp.arange(T), config.n_positions - 1)[None]
  out = model.transformer(
      tokens_T[None], positions_BT=positions_1T, slot=start,
      cache=tuple(_Part(layer.k, layer.v, slot) for layer in slots.cache))
  cache = tuple(KVCache(layer.k, layer.v) for layer in out.cache)

  # no logits are computed where they are not asked for
  score = lambda x_1TD: _scores(next_logits(model, x_1TD)[0], next_T)
  zeros = lambda x_1TD: jax.tree.map(
      lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(score, x_1TD))
  scores = jax.lax.cond(asked, score, zeros, out.x_BTD)
  return dataclasses.replace(slots, cache=cache), scores


@functools.partial(jax.jit, donate_argnames=('slots',))
def admit(slots: Slots, slot, tokens_S, length, limit, seed, sample, chosen: Chosen) -> Slots:
  """Lets a slot run, whose cache has the first `length` - 1 of some ids.

  Args:
    slots: are given up.
    slot: which of them.
    tokens_S: the ids of the prompt.
    length: how many they are.
    limit: the most new ids.
    seed, sample: of which its key is made.
    chosen: of this row, without its key.
  """
  key = jax.random.fold_in(jax.random.key(seed), sample)
  put = lambda all_B, x: all_B.at[slot].set(x)
  history = slots.history
  history = dataclasses.replace(
      history, tokens_BS=put(history.tokens_BS, tokens_S), lengths_B=put(history.lengths_B, length),
      prompt_B=put(history.prompt_B, length), limits_B=put(history.limits_B, limit),
      reason_B=put(history.reason_B, h.RUNNING))
  return dataclasses.replace(
      slots, history=history,
      chosen=jax.tree.map(put, slots.chosen, dataclasses.replace(chosen, keys_B=key)))


@functools.partial(jax.jit, donate_argnames=('slots',))
def stop(slots: Slots, stopped_B) -> Slots:
  """Makes some slots idle."""
  history = slots.history
  reason_B = jnp.where(stopped_B, h.LIMIT, history.reason_B)
  return dataclasses.replace(slots, history=dataclasses.replace(history, reason_B=reason_B))


@functools.partial(jax.jit, donate_argnames=('slots',))
def wipe(slots: Slots, slot) -> Slots:
  """Zeroes a slot's cache. A NaN there would spoil later rows, unseen as it is: 0 · NaN is NaN."""
  cache = jax.tree.map(lambda x_BNSH: x_BNSH.at[slot].set(0), slots.cache)
  return dataclasses.replace(slots, cache=cache)


def _process(chosen: Chosen, logits_BV: jax.Array, history: History) -> jax.Array:
  """Scores by which tokens are chosen, in the order of `assemble.make_processors`."""
  c, V, running_B = chosen, logits_BV.shape[-1], history.running_B

  def where(wanted_B, process: Callable[[jax.Array, History], jax.Array], scores_BV):
    wanted_B = wanted_B & running_B
    change = lambda scores_BV: jnp.where(wanted_B[:, None], process(scores_BV, history), scores_BV)
    return jax.lax.cond(wanted_B.any(), change, lambda scores_BV: scores_BV, scores_BV)

  penalty = CountPenalty(c.presence_B[:, None], c.frequency_B[:, None])
  scores_BV = where(c.biased_B, lambda scores_BV, _: scores_BV + c.bias_BV, logits_BV)
  scores_BV = where((c.presence_B != 0) | (c.frequency_B != 0), penalty, scores_BV)
  scores_BV = where(c.temperature_B != 1, Temperature(c.temperature_B[:, None]), scores_BV)
  scores_BV = where(c.top_k_B < V, TopK(c.top_k_B[:, None]), scores_BV)
  return where(c.top_p_B < 1, TopP(c.top_p_B[:, None]), scores_BV)


@functools.partial(jax.jit, static_argnames=('config',), donate_argnames=('slots',))
def step(config: GPTConfig, params: Params, eos_E: jax.Array, slots: Slots) -> tuple[Slots, Step]:
  """One more id in every slot that is running.

  Args:
    config, params: the model, in the form 'decode'.
    eos_E: ids that end a text.
    slots: are given up.
  """
  model, history, chosen = bind(config, params), slots.history, slots.chosen
  running_B = history.running_B
  # an idle slot writes where no running one ever reads: the last place ends a text
  at_B = jnp.where(running_B, history.lengths_B - 1, config.n_positions - 1)
  last_B1 = pick(history.tokens_BS, at_B)[:, None]
  out = model.transformer(last_B1, cache=slots.cache, slot=at_B)
  logits_BV = next_logits(model, out.x_BTD)[:, 0]
  scores_BV = _process(chosen, logits_BV, history)
  draw = lambda scores_BV: jnp.where(
      chosen.greedy_B, choose(scores_BV, None, history), choose(scores_BV, chosen.keys_B, history))
  tokens_B = jax.lax.cond((running_B & ~chosen.greedy_B).any(), draw,
                          lambda scores_BV: choose(scores_BV, None, history), scores_BV)
  scores = _if_asked((running_B & chosen.logprobs_B).any(), logits_BV, tokens_B)
  history = history.refuse(scores_BV).push(tokens_B, Endings(eos_E))
  return Slots(out.cache, history, chosen), Step(tokens_B, history.reason_B, scores)


def chosen_of(
    V: int, *, temperature: float, top_k: int | None, top_p: float, presence: float,
    frequency: float, bias: dict[int, float], logprobs: bool) -> Chosen:
  """How one row chooses, for `admit`; temperature 0 takes the likeliest token. V: size of the
  vocabulary.
  """
  bias_V = np.zeros(V, np.float32)
  bias_V[list(bias)] = list(bias.values())
  draws = temperature > 0
  values: dict[str, Any] = dict(
      keys_B=None, greedy_B=np.bool_(not draws),
      temperature_B=np.float32(temperature if draws else 1),
      top_k_B=np.int32(V if top_k is None or not draws else min(top_k, V)),
      top_p_B=np.float32(top_p if draws else 1), presence_B=np.float32(presence),
      frequency_B=np.float32(frequency), biased_B=np.bool_(bool(bias)), bias_BV=bias_V,
      logprobs_B=np.bool_(logprobs))
  return Chosen(**values)

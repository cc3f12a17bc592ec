"""The compiled programs of a server: B slots, each a row of one cache, that come and go on their own.

A prompt is read in chunks into a cache of its own (`prefill`), all but the last id. Then a row is
`admit`ted that begins with it, and each `step` makes one more id of every row that is running. What a
row computes is in the same program whatever the others do, so they change nothing about it, to the
last bit. The slots' cache lies in blocks of positions; a step reads those that some running row has
reached, since a CPU waits for memory.

The numbers of a row's options are arrays [B, 1] in the fields of `decoding`'s processors, each with a
value that does nothing; a processor that no running row wants is not run.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from gpt2_jax.attention import causal_mask
from gpt2_jax.config import GPTConfig
from gpt2_jax.decoding import history as h
from gpt2_jax.decoding.history import Endings, History
from gpt2_jax.decoding.loop import choose, next_logits
from gpt2_jax.decoding.processors import FrequencyPenalty, PresencePenalty
from gpt2_jax.decoding.pytree import register
from gpt2_jax.decoding.warpers import Temperature, TopK, TopP
from gpt2_jax.layers import pick, squeezed, unsqueezed
from gpt2_jax.model import Params, bind
from gpt2_jax.serving.slots import Chosen, Layer, Slots, cache_length

K = 5  # alternatives of a token whose log-probabilities are told, as many as OpenAI's


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
    lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(_scores, logits_XV, ids_X)
  )
  return jax.lax.cond(asked, _scores, zeros, logits_XV, ids_X)


@functools.partial(jax.jit, static_argnames=('config',), donate_argnames=('cache',))
def prefill(
  config: GPTConfig, params: Params, cache, start, tokens_T, next_T, asked
) -> tuple[Any, Scores]:
  """Reads T ids of a prompt.

  Args:
    config, params: the model, in the form 'decode'.
    cache: of this row, with the ids before them; is given up.
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
    tokens_T[None], positions_BT=positions_1T, slot=start, cache=unsqueezed(cache)
  )

  # no logits are computed where they are not asked for
  score = lambda x_1TD: _scores(next_logits(model, x_1TD)[0], next_T)
  zeros = lambda x_1TD: jax.tree.map(
    lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(score, x_1TD)
  )
  scores = jax.lax.cond(asked, score, zeros, out.x_BTD)
  return squeezed(out.cache), scores


@functools.partial(jax.jit, donate_argnames=('slots',))
def admit(
  slots: Slots, slot, cache, tokens_S, length, limit, key_data, sample, chosen: Chosen
) -> Slots:
  """Lets a slot run.

  Args:
    slots: are given up; those that are returned take their place.
    slot: which of them.
    cache: has the first `length` - 1 of its ids. All of it is copied: what an earlier row left, a NaN
      perhaps, would spoil this one, unseen as it is (0 · NaN is NaN).
    tokens_S: the ids of the prompt.
    length: how many they are.
    limit: the most new ids.
    key_data, sample: of which its key is made: of a seed (`seeds.key_data`), and of one of its texts.
    chosen: of this row, without its key.
  """
  key = jax.random.fold_in(jax.random.wrap_key_data(key_data), sample)
  put = lambda all_B, x: all_B.at[slot].set(x)
  split = lambda row_NSH, blocks: tuple(jnp.split(row_NSH, len(blocks), axis=1))
  all_slots = tuple(
    (jax.tree.map(put, k, split(layer.k, k)), jax.tree.map(put, v, split(layer.v, v)))
    for (k, v), layer in zip(unsqueezed(slots.cache), cache)
  )
  history = slots.history
  history = dataclasses.replace(
    history,
    tokens_BS=put(history.tokens_BS, tokens_S),
    lengths_B=put(history.lengths_B, length),
    prompt_B=put(history.prompt_B, length),
    limits_B=put(history.limits_B, limit),
    reason_B=put(history.reason_B, h.RUNNING),
  )
  return Slots(
    squeezed(all_slots),
    history,
    jax.tree.map(put, slots.chosen, dataclasses.replace(chosen, key_data_B=jax.random.key_data(key))),
  )


@functools.partial(jax.jit, donate_argnames=('slots',))
def stop(slots: Slots, stopped_B) -> Slots:
  """Makes some slots idle."""
  history = slots.history
  reason_B = jnp.where(stopped_B, h.LIMIT, history.reason_B)
  return dataclasses.replace(slots, history=dataclasses.replace(history, reason_B=reason_B))


def _process(chosen: Chosen, logits_BV: jax.Array, history: History) -> jax.Array:
  """Scores by which tokens are chosen, in the order of `assemble.make_processors`."""
  c, V, running_B = chosen, logits_BV.shape[-1], history.running_B

  def where(wanted_B, process: Callable[[jax.Array, History], jax.Array], scores_BV):
    wanted_B = wanted_B & running_B
    change = lambda scores_BV: jnp.where(wanted_B[:, None], process(scores_BV, history), scores_BV)
    return jax.lax.cond(wanted_B.any(), change, lambda scores_BV: scores_BV, scores_BV)

  scores_BV = where(c.biased_B, lambda scores_BV, _: scores_BV + c.bias_BV, logits_BV)
  scores_BV = where(c.frequency_B != 0, FrequencyPenalty(c.frequency_B[:, None]), scores_BV)
  scores_BV = where(c.presence_B != 0, PresencePenalty(c.presence_B[:, None]), scores_BV)
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
  S_block = slots.cache[0][0][0].shape[-2]
  at_B = history.lengths_B - 1
  used = jnp.where(running_B, at_B, -1).max() // S_block + 1
  last_B1 = pick(history.tokens_BS, at_B)[:, None]
  out = model.transformer(
    last_B1,
    positions_BT=at_B[:, None],
    mask_BTS=causal_mask(1, cache_length(config), at_B),
    slot=jnp.where(running_B, at_B, cache_length(config)),  # an idle slot writes nowhere
    cache=tuple(Layer(k, v, used) for k, v in unsqueezed(slots.cache)),
  )
  cache = squeezed(tuple((layer.k, layer.v) for layer in out.cache))
  logits_BV = next_logits(model, out.x_BTD)[:, 0]
  scores_BV = _process(chosen, logits_BV, history)
  keys_B = jax.random.wrap_key_data(chosen.key_data_B)
  draw = lambda scores_BV: jnp.where(
    chosen.greedy_B, choose(scores_BV, None, history), choose(scores_BV, keys_B, history)
  )
  tokens_B = jax.lax.cond(
    (running_B & ~chosen.greedy_B).any(),
    draw,
    lambda scores_BV: choose(scores_BV, None, history),
    scores_BV,
  )
  scores = _if_asked((running_B & chosen.logprobs_B).any(), logits_BV, tokens_B)
  history = history.refuse(scores_BV).push(tokens_B, Endings(eos_E))
  return Slots(cache, history, chosen), Step(tokens_B, history.reason_B, scores)

"""The compiled programs of a server, over B slots whose rows come and go one by one.

A prompt, all but its last id, is read in chunks into a cache of its own (`prefill`). Then a row that
begins with it is admitted to a slot (`admit`), and each `step` makes one more id for every row that
runs. A row is computed by the same program whatever the other rows do, so they change nothing about
it, to the last bit. The slots' cache lies in blocks of positions; a step reads the blocks that some
running row has reached, since a CPU waits for memory.

What a row's options are is numbers in arrays, which become [B, 1] in the fields of `decoding`'s
processors; a rule that no running row wants is not run.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

from gpt2_jax.decoding import row_state as h
from gpt2_jax.decoding.device_loop import choose, next_logits
from gpt2_jax.decoding.edited import editing
from gpt2_jax.decoding.pytree import register
from gpt2_jax.decoding.row_state import Endings, History
from gpt2_jax.decoding.samplers import Given
from gpt2_jax.model.attention import causal_mask
from gpt2_jax.model.config import GPTConfig
from gpt2_jax.model.edits import Placed
from gpt2_jax.model.gpt2 import Params, bind
from gpt2_jax.model.layers import pick
from gpt2_jax.serving.cache_blocks import BlocksMask, SlotCache
from gpt2_jax.serving.slot_state import COMMON, RULES, Choice, Slots, cache_length

Edits = tuple[Placed, ...]
K = 5  # alternatives of a token whose log-probabilities are told, as many as OpenAI's


@register
@dataclasses.dataclass(frozen=True)
class Scores:
  """Log-probabilities under the model itself: those of some ids, and of the K likeliest."""

  logprobs: jax.Array  # [..]
  top_ids: jax.Array  # [.., K]
  top_logprobs: jax.Array  # [.., K]


@register
@dataclasses.dataclass(frozen=True)
class Step:
  """The result of a step."""

  tokens_B: jax.Array
  reason_B: jax.Array  # as in `History`
  scores: Scores  # [B]; zero where no row asks for them


def _scores(logits_XV: jax.Array, ids_X: jax.Array) -> Scores:
  total_X1 = jax.nn.logsumexp(logits_XV, axis=-1, keepdims=True)
  top_XK, ids_XK = jax.lax.top_k(logits_XV, min(K, logits_XV.shape[-1]))
  chosen_X1 = jnp.take_along_axis(logits_XV, ids_X[:, None], axis=-1)
  return Scores((chosen_X1 - total_X1)[:, 0], ids_XK, top_XK - total_X1)


def cond_or_zeros(asked, f: Callable[..., Scores], *args) -> Scores:
  """Returns f(*args) if asked, else zeros of its shapes; then nothing of it is computed."""

  def zeros(*args):
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(f, *args))

  return jax.lax.cond(asked, f, zeros, *args)


@functools.partial(jax.jit, static_argnames=('config',), donate_argnames=('cache',))
def prefill(
  config: GPTConfig, params: Params, cache, start, tokens_T, next_T, asked, edits: Edits = ()
) -> tuple[Any, Scores]:
  """Reads T ids of a prompt.

  Args:
    config, params: the model, in the form 'decode'.
    cache: of one row, with the ids before these; is given up.
    start: position of the first id.
    tokens_T: ids, padded on the right. What padding leaves in the cache is written over before it is
      seen.
    next_T: the ids that come after each of these.
    asked: whether the log-probabilities of `next_T` are asked for; no logits are computed if not.
    edits: of the model's activations, over all its positions.

  Returns:
    The cache, and the log-probabilities or zeros.
  """
  T = tokens_T.shape[0]
  model = bind(config, params)

  # padding may lie beyond the context, where there is no position
  positions_1T = jnp.minimum(start + jnp.arange(T), config.n_positions - 1)[None]
  out = model.transformer(
    tokens_T[None],
    positions_BT=positions_1T,
    slot=start,
    cache=cache,
    listen=editing(edits, positions_1T),
  )

  def score(x_1TD):
    return _scores(next_logits(model, x_1TD)[0], next_T)

  return out.cache, cond_or_zeros(asked, score, out.x_BTD)


@register
@dataclasses.dataclass(frozen=True)
class NewRow:
  """A row that begins.

  Attributes:
    tokens_S: the ids of its prompt, padded to the model's context.
    length: how many they are.
    limit: the most new ids.
    key_data: of the seed (`seeds.key_data`).
    sample: its number among the texts of its prompt and seed.
    choice: how it chooses.
  """

  tokens_S: Any
  length: Any
  limit: Any
  key_data: Any
  sample: Any
  choice: Choice


@functools.partial(jax.jit, donate_argnames=('slots',))
def admit(slots: Slots, slot, cache, row: NewRow) -> Slots:
  """Lets a row run in a slot.

  Args:
    slots: are given up; those that are returned take their place.
    slot: its number.
    cache: has all ids of the prompt but the last one. All of it is copied: what an earlier row left,
      a NaN perhaps, would spoil this one, though it is masked (0 · NaN is NaN).
    row: the row.
  """
  key = jax.random.fold_in(jax.random.wrap_key_data(row.key_data), row.sample)

  def put(all_B, x):
    return all_B.at[slot].set(x)

  history = slots.history
  history = dataclasses.replace(
    history,
    tokens_BS=put(history.tokens_BS, row.tokens_S),
    lengths_B=put(history.lengths_B, row.length),
    prompt_B=put(history.prompt_B, row.length),
    limits_B=put(history.limits_B, row.limit),
    reason_B=put(history.reason_B, h.RUNNING),
  )
  return Slots(
    slots.cache.put(slot, cache),
    history,
    put(slots.key_data_B, jax.random.key_data(key)),
    jax.tree.map(put, slots.choice, row.choice),
  )


@functools.partial(jax.jit, donate_argnames=('slots',))
def stop(slots: Slots, stopped_B) -> Slots:
  """Makes some slots idle."""
  history = slots.history
  reason_B = jnp.where(stopped_B, h.LIMIT, history.reason_B)
  return dataclasses.replace(slots, history=dataclasses.replace(history, reason_B=reason_B))


def process(choice: Choice, logits_BV: jax.Array, history: History, eos_E: jax.Array) -> jax.Array:
  """Returns the scores by which tokens are chosen: the logits after the bias and the rules that rows
  want, in the order of `SAMPLERS`.
  """
  given, running_B = Given(logits_BV.shape[-1], eos_E, eos_E), history.running_B

  def where(wanted_B, process: Callable[[jax.Array], jax.Array], scores_BV):
    def change(scores_BV):
      return jnp.where(wanted_B[:, None], process(scores_BV), scores_BV)

    return jax.lax.cond(wanted_B.any(), change, lambda scores_BV: scores_BV, scores_BV)

  def follow(rules: Iterable[str], scores_BV):
    for name in rules:
      number_B, rule = choice.numbers[name], RULES[name]
      processor = functools.partial(rule.processor(number_B[:, None], given), history=history)
      scores_BV = where((number_B != rule.off) & running_B, processor, scores_BV)
    return scores_BV

  scores_BV = where(choice.biased_B & running_B, lambda x_BV: x_BV + choice.bias_BV, logits_BV)
  follow_level = [functools.partial(follow, rules) for rules in ((), COMMON, RULES)]
  return jax.lax.switch(jnp.where(running_B, choice.level_B, 0).max(), follow_level, scores_BV)


@functools.partial(jax.jit, static_argnames=('config',), donate_argnames=('slots',))
def step(
  config: GPTConfig, params: Params, eos_E: jax.Array, slots: Slots, edits: Edits = ()
) -> tuple[Slots, Step]:
  """Makes one more id in every slot that runs.

  Args:
    config, params: the model, in the form 'decode'.
    eos_E: ids that end a text.
    slots: are given up.
    edits: of the model's activations, over all its positions.
  """
  model, history, choice = bind(config, params), slots.history, slots.choice
  running_B = history.running_B
  at_B = history.lengths_B - 1
  used = jnp.where(running_B, at_B, -1).max() // slots.cache.block + 1
  last_B1 = pick(history.tokens_BS, at_B)[:, None]
  out = model.transformer(
    last_B1,
    positions_BT=at_B[:, None],
    mask_BTS=BlocksMask(causal_mask(1, cache_length(config), at_B)),
    slot=jnp.where(running_B, at_B, cache_length(config)),  # an idle slot writes nowhere
    cache=slots.cache.using(used),
    listen=editing(edits, at_B[:, None]),
  )
  logits_BV = next_logits(model, out.x_BTD)[:, 0]
  scores_BV = process(choice, logits_BV, history, eos_E)
  keys_B = jax.random.wrap_key_data(slots.key_data_B)

  def greedy(scores_BV):
    return choose(scores_BV, None, history)

  def draw(scores_BV):
    return jnp.where(choice.greedy_B, greedy(scores_BV), choose(scores_BV, keys_B, history))

  tokens_B = jax.lax.cond((running_B & ~choice.greedy_B).any(), draw, greedy, scores_BV)
  scores = cond_or_zeros((running_B & choice.logprobs_B).any(), _scores, logits_BV, tokens_B)
  history = history.refuse(scores_BV).push(tokens_B, Endings(eos_E))
  made = Step(tokens_B, history.reason_B, scores)
  return Slots(SlotCache.of(out.cache), history, slots.key_data_B, choice), made

"""The state of rows: their ids so far, and why they stopped. Processors see nothing else."""

import dataclasses

import jax
import jax.numpy as jnp

from gpt2_jax.decoding.automaton import Automaton
from gpt2_jax.decoding.pytree import register

# why a row stopped, in `History.reason_B`
RUNNING, END_ID, STOP_STRING, GUIDE, LIMIT, CONTEXT, NOT_A_NUMBER, NO_TOKEN = range(8)
# what a user is told of it, as `Generated.finish_reason`
REASONS = {END_ID: 'stop', STOP_STRING: 'stop', GUIDE: 'stop', LIMIT: 'length', CONTEXT: 'context'}


@register
class Endings:
  """The ends of a text: ids, and automata of stop strings and of a regular expression."""

  eos_E: jax.Array  # ids that end it; E may be 0
  stop: Automaton | None = None  # accepts a text that has a stop string in it
  guide: Automaton | None = None  # accepts what a regular expression matches


@register
class History:
  """The ids of B rows, and how far each has come. Rows know nothing of each other."""

  tokens_BS: jax.Array  # ids from a row's first on; at and beyond `lengths_B` they mean nothing
  lengths_B: jax.Array  # how many there are
  prompt_B: jax.Array  # how many of them are the prompt
  limits_B: jax.Array  # how many new ones there may be
  context_B: jax.Array  # how many there may be before the model's context is full
  which_B: jax.Array  # which of the prompts a row continues
  stop_B: jax.Array  # state of `Endings.stop`
  guide_B: jax.Array  # state of `Endings.guide`
  reason_B: jax.Array  # RUNNING, or why no more is written

  @property
  def new_B(self) -> jax.Array:
    """The number of new ids of each row."""
    return self.lengths_B - self.prompt_B

  @property
  def running_B(self) -> jax.Array:
    return self.reason_B == RUNNING

  def counts(self, V: int, *, new: bool = False) -> jax.Array:
    """Counts each id of the vocabulary in each row, or among its `new` ids, [B, V]."""
    places = jnp.arange(self.tokens_BS.shape[1])
    real_BS = places < self.lengths_B[:, None]
    if new:
      real_BS &= places >= self.prompt_B[:, None]

    def count(tokens_S, real_S):
      return jnp.zeros(V, jnp.int32).at[tokens_S].add(real_S.astype(jnp.int32), mode='drop')

    return jax.vmap(count)(self.tokens_BS, real_BS)

  def last(self, n: int) -> tuple[jax.Array, jax.Array]:
    """Returns the last n ids of each row, [B, n], oldest first, and which there are, [B, n]."""
    places_Bn = self.lengths_B[:, None] - n + jnp.arange(n)
    tokens_Bn = jnp.take_along_axis(self.tokens_BS, jnp.maximum(places_Bn, 0), axis=1)
    return tokens_Bn, places_Bn >= 0

  def refuse(self, scores_BV: jax.Array) -> 'History':
    """Stops the rows by whose scores no token can be chosen: one is NaN, or no token is allowed."""
    why_B = jnp.where(
      jnp.isnan(scores_BV).any(-1),
      NOT_A_NUMBER,
      jnp.where((scores_BV == -jnp.inf).all(-1), NO_TOKEN, RUNNING),
    )
    return dataclasses.replace(self, reason_B=jnp.where(self.running_B, why_B, self.reason_B))

  def push(self, tokens_B: jax.Array, endings: Endings) -> 'History':
    """Adds an id to each row that is running, and stops the rows that it ends."""
    running_B = self.running_B
    here_BS = (jnp.arange(self.tokens_BS.shape[1]) == self.lengths_B[:, None]) & running_B[:, None]
    stop_B, guide_B, reason_B = self.stop_B, self.guide_B, jnp.zeros_like(self.reason_B)
    end = lambda reason_B, ended_B, why: jnp.where((reason_B == RUNNING) & ended_B, why, reason_B)
    reason_B = end(reason_B, (tokens_B[:, None] == endings.eos_E).any(-1), END_ID)
    if endings.stop is not None:
      stop_B = endings.stop.step(stop_B, tokens_B)
      reason_B = end(reason_B, endings.stop.accepts(stop_B), STOP_STRING)
    if endings.guide is not None:
      guide_B = endings.guide.step(guide_B, tokens_B)
      reason_B = end(reason_B, endings.guide.complete(guide_B), GUIDE)
    reason_B = end(reason_B, self.new_B + 1 >= self.limits_B, LIMIT)
    reason_B = end(reason_B, self.lengths_B + 1 >= self.context_B, CONTEXT)
    new = lambda now_B, then_B: jnp.where(running_B, now_B, then_B)
    return dataclasses.replace(
      self,
      tokens_BS=jnp.where(here_BS, tokens_B[:, None], self.tokens_BS),
      lengths_B=self.lengths_B + running_B,
      stop_B=new(stop_B, self.stop_B),
      guide_B=new(guide_B, self.guide_B),
      reason_B=new(reason_B, self.reason_B),
    )

"""The rows of beam search: what stands in them, and how they are split, joined and chosen among."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gpt2_jax.decoding.device_loop import Record, Rules
from gpt2_jax.decoding.pytree import register
from gpt2_jax.decoding.row_state import NO_TOKEN, RUNNING, History
from gpt2_jax.decoding.warpers import NEVER
from gpt2_jax.model.kv_cache import Cache
from gpt2_jax.parallel.sharding import BATCH, P, in_mesh, spec_of


@register
class Texts:
  """Beams, as many of each prompt, the best first."""

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


class Shared(NamedTuple):
  """What holds for all rows."""

  search: Any  # the `Beams`
  rules: Rules
  t: jax.Array  # how many new tokens the beams have


class Rows(NamedTuple):
  """Rows before a step."""

  logits_BV: jax.Array  # of the running beams
  keys_B: jax.Array | None  # of their prompts; None: the best candidates are taken
  running: Texts
  finished: Texts


class Extended(NamedTuple):
  """Rows after a step."""

  running: Texts
  finished: Texts
  parents_B: jax.Array  # which beam of its prompt each running one continues


def zeros_like_rows(rows_B: jax.Array, A: int, V: int) -> jax.Array:
  """Returns zeros [A, V] that lie where the rows do: within `shard_map`, an array that is made of
  nothing counts as the same on all devices, and no loop may carry it along with others.
  """
  return jnp.zeros((A, V), jnp.int32) + 0 * rows_B[:A, None]


def row_numbers(which_AJ: jax.Array, K: int) -> jax.Array:
  """Returns the rows, [A·J], of some of each prompt's K beams."""
  return (which_AJ + K * jnp.arange(which_AJ.shape[0])[:, None]).ravel()


def take(tree: Any, rows: jax.Array) -> Any:
  """Returns these rows of every array."""
  return jax.tree.map(lambda x: x[rows], tree)


def split(A: int, G: int, tree: Any) -> Any:
  """Returns the rows of each of the G groups, [G, A·K]."""

  def groups_of(x):
    K = x.shape[0] // (A * G)
    return x.reshape(A, G, K, *x.shape[1:]).swapaxes(0, 1).reshape(G, A * K, *x.shape[1:])

  return jax.tree.map(groups_of, tree)


def merge(A: int, tree: Any) -> Any:
  """Undoes `split`."""

  def of_groups(x):
    G, K = x.shape[0], x.shape[1] // A
    return x.reshape(G, A, K, *x.shape[2:]).swapaxes(0, 1).reshape(A * G * K, *x.shape[2:])

  return jax.tree.map(of_groups, tree)


def existing(scores_B: jax.Array) -> jax.Array:
  """Returns RUNNING for the beams that there are, NO_TOKEN for the others."""
  return jnp.where(scores_B > NEVER, RUNNING, NO_TOKEN)


def best(A: int, n: int, *texts: Texts) -> Texts:
  """Returns the n best beams of each prompt."""

  def join(*xs):
    x_AJ = jnp.concatenate([x.reshape(A, x.shape[0] // A, *x.shape[1:]) for x in xs], axis=1)
    return x_AJ.reshape(A * x_AJ.shape[1], *x_AJ.shape[2:])

  all_of_them = jax.tree.map(join, *texts)
  scores_AJ = all_of_them.scores_B.reshape(A, -1)
  return take(all_of_them, row_numbers(jax.lax.top_k(scores_AJ, n)[1], scores_AJ.shape[1]))


def reorder(cache: Cache, parents_B: jax.Array, K: int) -> Cache:
  """Returns the cache of beams that continue others, numbered among the K of their prompt."""

  def chosen(cache, parents_B):
    rows_B = row_numbers(parents_B.reshape(-1, K), K)
    return cache.map(lambda x_BNSH: x_BNSH[..., rows_B, :, :, :])

  if not in_mesh():
    return chosen(cache, parents_B)
  specs = jax.tree.map(spec_of, cache)
  return jax.shard_map(chosen, in_specs=(specs, P(BATCH)), out_specs=specs)(cache, parents_B)

"""Path patching: what a head does through the heads that read it, and not otherwise.

    map_LN = path_patch(model, clean, corrupted, metric, receivers=[(9, 9), (10, 0)], into='q')

Of each sender in turn (Wang et al. 2022, arXiv:2211.00593, section 3.1; Goldowsky-Dill et al. 2023,
arXiv:2304.05969): the corrupted run, in which all heads are held at what they were and the sender
alone at the clean run's, gives what the receivers would read; then a corrupted run with that in the
receivers, and nothing else held, gives the metric.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gpt2_jax.core.errors import UserError, brief
from gpt2_jax.interpretation.linear import pair_of
from gpt2_jax.interpretation.patching import MEMORY, Metric
from gpt2_jax.model.edits import Edit, run, sizes_of
from gpt2_jax.model.gpt2 import Params, bind
from gpt2_jax.model.pretrained_model import Model, params_of


def path_patch(
  model: Model,
  clean: Any,
  corrupted: Any,
  metric: Metric,
  *,
  receivers: Sequence[tuple[int, int]] | None = None,
  into: str = 'q',
  hold_mlps: bool = False,
  read: Any = -1,
  memory: int = MEMORY,
) -> np.ndarray:
  """The metric with each head's clean output on its way to the receivers alone.

  Args:
    model, clean, corrupted, metric: as of `patching.patch`.
    receivers: heads, as (layer, head); None: the logits.
    into: what of the receivers reads it: 'q', 'k' or 'v'.
    hold_mlps: whether MLPs are held too, so that only the direct path is left; as in the paper they
      are not.
    read: the position that the metric reads, or one for each row, [B].
    memory: bytes that the senders of one chunk may take, about.

  Returns:
    The metric, [L, N, *its own axes]. Of a sender that is not before a receiver, the corrupted run's.

  Raises:
    UserError: there is no such head or site, or as of `patching.patch`.
  """
  if into not in ('q', 'k', 'v'):
    raise UserError(f'into = {brief(into)} is none of q, k, v.')
  config = model.config
  heads = np.zeros((0, 2), int) if receivers is None else np.asarray(receivers)
  sizes = np.array([config.n_layer, config.n_head])
  if heads.ndim != 2 or heads.shape[1] != 2 or (heads < -sizes).any() or (heads >= sizes).any():
    raise UserError(
      f'receivers = {brief(receivers)} are no pairs of a layer below {sizes[0]} and a head below '
      f'{sizes[1]}.'
    )
  if receivers is not None and not len(heads):
    raise UserError('receivers are none: the edit touches nothing. None means the logits.')
  pair, s = pair_of(model, clean, corrupted, metric, read, 0), sizes_of(config, *np.shape(clean))
  # a sender's own copies of z and of what the receivers read, of all layers, and its logits
  each = 4 * s['B'] * s['T'] * (s['L'] * (2 * s['N'] * s['H'] + s['D'] * hold_mlps) + 2 * s['V'])
  at_once = int(min(max(memory // each, 1), sizes.prod()))
  how = (config, into, hold_mlps, at_once, receivers is None)
  return np.asarray(_paths(how, params_of(model), jnp.asarray(heads % sizes), *pair))


@functools.partial(jax.jit, static_argnums=0)
def _paths(how, params: Params, heads, clean, corrupted, reads_B, metric: Metric) -> jax.Array:
  config, into, hold_mlps, at_once, to_logits = how
  model, rows = bind(config, params), jnp.arange(len(clean))
  theirs = run(model, clean, record=('z',))[1]['z']
  _, ours = run(model, corrupted, record=('z', 'mlp_out'))
  of_logits = lambda logits_BTV: metric(logits_BTV[rows, reads_B])

  def one(sender):
    layer, head = sender
    held_LBTNH = ours['z'].at[layer, :, :, head].set(theirs[layer, :, :, head])
    edits = [Edit('z', value=held_LBTNH)]
    edits += [Edit('mlp_out', value=ours['mlp_out'])] if hold_mlps else []
    logits_BTV, found = run(model, corrupted, edits, () if to_logits else (into,))
    if to_logits:
      return of_logits(logits_BTV)
    reading = [
      Edit(into, value=found[into], layer=heads[i, 0], head=heads[i, 1]) for i in range(len(heads))
    ]
    # what a receiver reads changes nothing of another one's: each is of the first run
    return of_logits(run(model, corrupted, reading)[0])

  layers, numbers = jnp.indices((config.n_layer, config.n_head)).reshape(2, -1)
  found = jax.lax.map(one, (layers, numbers), batch_size=at_once)
  return found.reshape(config.n_layer, config.n_head, *found.shape[1:])

"""Sweeps of patches: what each activation of one run does in another.

    difference = lambda logits_BV: (logits_BV[:, right] - logits_BV[:, wrong]).mean()
    map_LT = patch(model, clean, corrupted, difference, over='resid_pre')

Activation patching (Meng et al. 2022, arXiv:2202.05262; Heimersheim & Nanda 2024, arXiv:2404.15255),
as in TransformerLens' `patching.py`, but all patches in one compiled program.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gpt2_jax.core.errors import UserError, brief
from gpt2_jax.core.progress import track
from gpt2_jax.interpretation.packing import ALL, Pack, PackedMask, Patcher, packs, unpack
from gpt2_jax.model.edits import AXES, run, sizes_of
from gpt2_jax.model.gpt2 import Params, bind
from gpt2_jax.model.pretrained_model import Model, params_of
from gpt2_jax.model.sites import SITES, site

Metric = Callable[[jax.Array], jax.Array]
PLACES = ('position', 'head', 'neuron')
MEMORY = 2**30  # bytes


def patch(
  model: Model,
  clean: Any,
  corrupted: Any,
  metric: Metric,
  *,
  over: str = 'resid_pre',
  by: Sequence[str] | None = None,
  read: Any = -1,
  memory: int = MEMORY,
) -> np.ndarray:
  """The metric of the corrupted run with an activation of the clean one in it, for each in turn.

  What the corrupted run has below the patched layer, and before the patched position, is read from
  its record: it is what a whole run would give, to rounding. The other direction is that of `clean`
  and `corrupted` the other way round.

  Args:
    model: a language model, in the form 'train', on one device.
    clean, corrupted: ids, [B, T] both.
    metric: a function of the logits [B, V] at `read`, to a number, or an array. To be traced; of a
      `jax.tree_util.Partial` other arguments compile nothing.
    over: a site of the blocks: 'resid_pre', 'z', 'q', 'pattern', 'mlp_post', …
    by: the axes of the sweep beside the layer: of 'position', 'head', 'neuron'. Along others a patch
      is of all. Default: 'head' where the site has heads, else 'position'.
    read: the position that the metric reads, or one for each row, [B]; None: all, and the metric
      gets [B, T, V].
    memory: bytes that a chunk of patches may take, about.

  Returns:
    The metric, [L, *by, *its own axes].

  Raises:
    UserError: there is no such site or axis, or the runs have different shapes.
  """
  clean, corrupted = as_pair(clean, corrupted)
  check_over(over)
  _, found = run(model, clean, record=(over,))
  return sweep(model, corrupted, found[over], metric, over=over, by=by, read=read, memory=memory)


def ablate(
  model: Model, tokens: Any, metric: Metric, *, how: str = 'zero', over: str = 'z', **options: Any
) -> np.ndarray:
  """The metric without each activation in turn.

  Args:
    model, metric, over: as of `patch`.
    tokens: ids, [B, T].
    how: what stands in its place: 'zero'; 'mean', of the rows, at each position; or 'resample',
      that of the next row.
    **options: `by`, `read` and `memory` of `patch`.

  Returns:
    As `patch`.
  """
  ways = {
    'zero': np.zeros_like,
    'mean': lambda x: np.broadcast_to(x.mean(1, keepdims=True), x.shape),
    'resample': lambda x: np.roll(x, -1, 1),
  }
  if how not in ways:
    raise UserError(f'how = {brief(how)} is none of {", ".join(ways)}.')
  check_over(over)
  _, found = run(model, tokens, record=(over,))
  return sweep(model, tokens, ways[how](np.asarray(found[over])), metric, over=over, **options)


def as_pair(clean: Any, corrupted: Any) -> tuple[np.ndarray, np.ndarray]:
  """Two runs' ids, [B, T] both, or a `UserError`."""
  clean, corrupted = np.asarray(clean), np.asarray(corrupted)
  if clean.shape != corrupted.shape or clean.ndim != 2:
    raise UserError(f'clean is {clean.shape} and corrupted {corrupted.shape}: both are to be [B, T].')
  return clean, corrupted


def traced(metric: Metric) -> jax.tree_util.Partial:
  """A metric as an argument of a program; other arguments of a `Partial` compile nothing."""
  return metric if isinstance(metric, jax.tree_util.Partial) else jax.tree_util.Partial(metric)


def axes_of(over: str, by: Sequence[str] | None) -> tuple[str, ...]:
  """The axes of a sweep over a site beside the layer: those asked for, or its usual one.

  Raises:
    UserError: the site has no such axis, or one is named twice.
  """
  has = [AXES[a] for a in site(over).letters if AXES.get(a) in PLACES]
  if by is None:
    return ('head',) if 'head' in has else ('position',)
  if wrong := [name for name in by if name not in has]:
    raise UserError(f'{over} has no axis {brief(wrong[0])} to sweep over: it has {", ".join(has)}.')
  if len(set(by)) < len(by):
    raise UserError(f'by = {brief(by)} names an axis twice.')
  return tuple(by)


def check_over(over: str) -> None:
  """Raises a `UserError` if a site is none that can be swept over."""
  if not site(over).layered:
    said = ', '.join(name for name, s in SITES.items() if s.layered)
    raise UserError(f'{over} is outside of the blocks; a sweep is over one of {said}.')


def sweep(
  model: Model,
  tokens_BT: Any,
  values: Any,
  metric: Metric,
  *,
  over: str,
  by: Sequence[str] | None = None,
  read: Any = -1,
  memory: int = MEMORY,
) -> np.ndarray:
  """As `patch`, with values of any source, [L, …the site's axes], in the run of `tokens_BT`."""
  config, params, (B, T) = model.config, params_of(model), np.shape(tokens_BT)
  if config.form != 'train' or len(jax.tree.leaves(params)[0].sharding.device_set) > 1:
    raise UserError("a sweep wants a model in the form 'train', on one device; see `edits.run`.")
  sizes, letters = sizes_of(config, B, T), site(over).letters
  has = {AXES[a]: sizes[a] for a in letters if a in AXES and AXES[a] in PLACES}
  by = axes_of(over, by)
  reads_BR = reads_of(read, B, T)
  places = np.array(list(itertools.product(*(range(has[p]) if p in by else (ALL,) for p in PLACES))))
  at_once = max(1, memory // _bytes(sizes, reads_BR.size))
  record = ('resid_pre', 'k', 'v', 'resid_post')
  _, own = run(model, tokens_BT, record=record)
  own['resid_post'] = own['resid_post'][-1]
  every = [(layer, *pack) for layer in range(config.n_layer) for pack in packs(places, B, T, at_once)]
  results: Any = [[None] * len(places) for _ in range(config.n_layer)]
  how, values = (config, over, read is None), jnp.asarray(values)
  metric = traced(metric)
  with track('patches', len(every) * len(every[0][1])) as advance:
    for layer, numbers, pack in every:
      metrics = np.asarray(_chunk(how, params, layer, own, values, pack, reads_BR, metric))
      for number, result in zip(numbers, metrics):
        results[layer][number] = result
      advance(len(numbers))
  table = np.array(results)
  named = [has[name] for name in PLACES if name in by]
  table = table.reshape(config.n_layer, *named, *table.shape[2:])
  order = [[p for p in PLACES if p in by].index(name) + 1 for name in by]
  return table.transpose(0, *order, *range(len(by) + 1, table.ndim))


def reads_of(read: Any, B: int, T: int) -> np.ndarray:
  """The positions that the metric reads, [B, R]."""
  reads = np.arange(T) if read is None else np.reshape(read, (-1, 1))
  if read is not None and len(reads) not in (1, B):
    raise UserError(f'read = {brief(read)} is not one position, or one for each of {B} rows.')
  reads = np.broadcast_to(reads, (B, reads.shape[-1]))
  if (reads < -T).any() or (reads >= T).any():
    raise UserError(f'read = {brief(read)} is not among 0 … {T - 1}.')
  return (reads % T).astype(np.int32)


def _bytes(sizes: dict[str, int], reads: int) -> int:
  """What one patch takes, about: its tokens' largest arrays, twice, and the logits that are read."""
  s = sizes
  token = 8 * s['D'] + 2 * s['F'] + 3 * s['N'] * s['S']
  return 4 * (s['B'] * s['T'] * token + 2 * reads * s['V'])


@functools.partial(jax.jit, static_argnums=0)
def _chunk(how, params: Params, start, own, values, pack: Pack, reads_BR, metric: Metric):
  """The metric of each patch of a pack, all in the layer `start`."""
  config, over, whole = how
  model, (K, B, _) = bind(config, params), pack.slot_KBT.shape
  pack = jax.tree.map(jnp.asarray, pack)
  block, layers = nnx.split(model.h)

  def one(layer, x_1MD):
    this = nnx.merge(block, jax.tree.map(lambda w: w[layer], layers))
    see = PackedMask(pack, own['k'][layer], own['v'][layer])
    return this(x_1MD, layer, see, at=Patcher(over, pack, values[start], layer == start))[0]

  x_1MD = own['resid_pre'][start][pack.row_M, pack.position_M][None]
  x_1MD = jax.lax.fori_loop(start, config.n_layer, one, x_1MD)
  rows = jnp.arange(B)[:, None]
  x_KBRD = unpack(x_1MD[0], pack.slot_KBT[:, rows, reads_BR], own['resid_post'][rows, reads_BR])
  x_BRD = model.ln_f(x_KBRD.reshape(K * B, *x_KBRD.shape[2:]))
  logits = model.logits(x_BRD)[..., : config.vocab_size]
  logits = logits.reshape(K, B, *logits.shape[1:])
  return jax.vmap(metric)(logits if whole else logits[:, :, 0])

"""Reading and changing what is inside of the model: `run(model, tokens, edits, record)`.

    logits, found = run(model, tokens, [Edit('z', 'zero', layer=5, head=1)], record=['resid_post'])

An edit is data: where it is, and its value, are arrays, so that one compiled program serves every
layer, position and head. `run` is a pure function and goes under `jax.jit`, `jax.vmap` and
`jax.grad`, over the edits too, which are pytrees; on a mesh its arrays lie as the model's do.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from gpt2_jax.core.errors import UserError, brief
from gpt2_jax.model.config import GPTConfig
from gpt2_jax.model.gpt2 import Params, bind
from gpt2_jax.model.pretrained_model import Model, params_of
from gpt2_jax.model.sites import SILENT, SITES, Listener, Site, site
from gpt2_jax.parallel.sharding import RULES, layout, mesh_of, reshard, spec_of, whole_rows

# letter of an axis -> what it is called in an edit
AXES = {'L': 'layer', 'B': 'row', 'T': 'position', 'N': 'head', 'S': 'key'}
AXES |= dict.fromkeys('DHFV', 'neuron')
PLACES = ('layer', 'row', 'position', 'head', 'key', 'neuron')
WAYS = {
  'replace': lambda x, value: value,
  'add': lambda x, value: x + value,
  'scale': lambda x, value: x * value,
  'zero': lambda x, value: jnp.zeros_like(x),
  'mean': lambda x, value: x.mean(0, keepdims=True),
}
Where = Any  # None: all; an index, negative from the end; a slice; a mask; indices
How = Literal['replace', 'add', 'scale', 'zero', 'mean'] | Callable[[jax.Array, Any], jax.Array]


@functools.partial(
  jax.tree_util.register_dataclass, data_fields=['value', *PLACES], meta_fields=['site', 'how']
)
@dataclasses.dataclass(frozen=True)
class Edit:
  """A change of the activations at a site.

  Attributes:
    site: a name of `sites.SITES`.
    how: 'replace', 'add' or 'scale' by `value`; 'zero'; 'mean', of the batch's rows, at each
      position; or a function of the activations and `value`.
    value: a number or an array that broadcasts with the activations, whose axes are `letters` of the
      site: [B, T, N, H]; with one axis more the first is of layers, as what is recorded has.
    layer, row, position, head, key, neuron: where. Each is None (all), an index, a slice, a list of
      indices, or a mask along that axis. `key` is an attention pattern's last axis; `neuron` the last
      one of all others: of D, H, F or V. Under a transformation of JAX, an index or a mask.
  """

  site: str
  how: How = 'replace'
  value: Any = None
  layer: Where = None
  row: Where = None
  position: Where = None
  head: Where = None
  key: Where = None
  neuron: Where = None


@functools.partial(
  jax.tree_util.register_dataclass, data_fields=['value', 'masks'], meta_fields=['site', 'how']
)
@dataclasses.dataclass(frozen=True)
class Placed:
  """An edit of arrays of known sizes: `masks`, letter of an axis -> true where it changes.

  The mask of T may be one for each row, [B, T].
  """

  site: str
  how: Any
  value: Any
  masks: dict[str, jax.Array]

  def __call__(self, x: jax.Array, layer: jax.Array | int | None) -> jax.Array:
    """The activations of one layer after the edit."""
    letters, value = SITES[self.site].letters, self.value
    if layer is not None and value is not None and jnp.ndim(value) > len(letters):
      value = jnp.asarray(value)[layer]
    way = self.how if callable(self.how) else WAYS[self.how]
    new, spec = jnp.asarray(way(x, value), x.dtype), spec_of(x)
    mask, new = (reshard(jnp.broadcast_to(y, x.shape), spec) for y in (self.mask(x, layer), new))
    return jnp.where(mask, new, x)

  def mask(self, x: jax.Array, layer: jax.Array | int | None) -> jax.Array:
    """True where the edit changes `x`, of one layer; it broadcasts with `x`."""
    here = jnp.asarray(True) if layer is None else jnp.asarray(self.masks['L'])[layer]
    for axis, letter in enumerate(SITES[self.site].letters):
      if letter in self.masks:
        mask = jnp.asarray(self.masks[letter])
        along = [-1 if i == axis else 1 for i in range(x.ndim)]
        along[0] = mask.shape[0] if mask.ndim == 2 else along[0]
        here = here & mask.reshape(along)
    return here

  def at_positions(self, positions_BT: jax.Array) -> 'Placed':
    """The same edit of tokens at these positions, which is placed over all that the model has."""
    if 'T' not in self.masks:
      return self
    spec = spec_of(positions_BT)
    mask_BT = jnp.asarray(self.masks['T']).at[positions_BT].get(out_sharding=layout(spec))
    return dataclasses.replace(self, masks=self.masks | {'T': mask_BT})


def sizes_of(config: GPTConfig, B: int, T: int) -> dict[str, int]:
  """Letter -> size of that axis, in a batch of B rows of T tokens; here V has no padding."""
  c = config
  return {'L': c.n_layer, 'B': B, 'T': T, 'S': T, 'N': c.n_head} | {
    letter: c.sizes[letter] for letter in 'DHF'
  } | {'V': c.vocab_size}  # fmt: skip


def _mask(where: Where, size: int, said: str) -> Any:
  """What an edit says of one axis, as a mask."""
  if isinstance(where, Tracer):  # what it is can't be known: `_missed` looks at it later
    if where.dtype == bool:
      return where
    where = jnp.where(where < 0, where + size, where)
    return (jnp.arange(size) == where[..., None]).reshape(-1, size).any(0)
  mask = np.zeros(size, bool)
  try:
    if where is None or isinstance(where, slice):
      mask[where or slice(None)] = True
    elif np.size(where):
      mask[np.asarray(where)] = True
  except (IndexError, TypeError, ValueError):
    raise UserError(f'{said} = {brief(where)} is not among 0 … {size - 1}.') from None
  if not mask.any():
    raise UserError(f'{said} = {brief(where)} is none of 0 … {size - 1}: the edit touches nothing.')
  return mask


def edit_list(edits: Any) -> list[Edit]:
  """The edits of a tree of them. Raises a `UserError` where it holds anything else."""
  leaves = jax.tree.leaves(edits, is_leaf=lambda x: isinstance(x, Edit))
  if wrong := [leaf for leaf in leaves if not isinstance(leaf, Edit)]:
    raise UserError(f'edits hold {brief(wrong[0])}, which is no Edit.')
  return leaves


def place(
  edit: Edit, config: GPTConfig, sizes: dict[str, int], value_sizes: dict[str, int] | None = None
) -> Placed:
  """The edit over axes of these sizes; `value_sizes`: those of its value, if they are others.

  Raises:
    UserError: the site doesn't exist, or has no such axis, index or layer; the edit touches nothing;
      or its value doesn't fit.
  """
  at = site(edit.site)
  check_site(at, config)
  letters = ('L' if at.layered else '') + at.letters
  axes = {AXES[letter]: letter for letter in letters if letter in AXES}
  for name in PLACES:
    if getattr(edit, name) is not None and name not in axes:
      raise UserError(f'{at.name} has no axis {name}: it has {", ".join(axes)}.')
  if not callable(edit.how) and edit.how not in WAYS:
    raise UserError(f'how = {brief(edit.how)} is none of {", ".join(WAYS)}, and no function.')
  wants = edit.how not in ('zero', 'mean')
  if not callable(edit.how) and wants == (edit.value is None):
    said = 'wants a' if wants else 'has no'
    raise UserError(f'an edit {edit.how!r} of {at.name} {said} value.')
  shape, most = jnp.shape(edit.value) if edit.value is not None else (), value_sizes or sizes
  for given, letter in zip(shape[::-1], letters[::-1]):
    if given not in (1, most.get(letter, 1)):
      raise UserError(
        f'the value of {at.name} has shape {shape}; its axes are {letters}, of sizes '
        f'{tuple(most.get(a, 1) for a in letters)}.'
      )
  if len(shape) > len(letters):
    raise UserError(f'the value of {at.name} has {len(shape)} axes, more than {letters}.')
  masks = {
    letter: _mask(getattr(edit, name), sizes[letter], f'{at.name}: {name}')
    for name, letter in axes.items()
  }
  return Placed(edit.site, edit.how, edit.value, masks)


def check_site(at: Site, config: GPTConfig) -> None:
  """Raises a `UserError` for a site that this model can't show."""
  if at.name == 'result' and (config.form != 'train' or config.adapter('attn.c_proj')):
    raise UserError(
      "result, what each head writes, is there in the form 'train' and without an adapter on "
      'attn.c_proj: see gpt2_jax.merge_adapters.'
    )


@dataclasses.dataclass(frozen=True)
class Listening:
  """Who makes edits and records; a `sites.Listen`."""

  edits: Sequence[Placed] = ()
  record: Sequence[str] = ()

  def hears(self, *names: str) -> bool:
    """Whether any of these is changed or recorded."""
    return any(name in self.record or any(e.site == name for e in self.edits) for name in names)

  def layer(self, number: jax.Array | int | None) -> Listener:
    """For one layer."""
    return _Layer(self, number, {}) if self.edits or self.record else SILENT


@dataclasses.dataclass(frozen=True)
class _Layer:
  """`Listening`, in one layer."""

  all: Listening
  number: jax.Array | int | None
  found: dict[str, jax.Array]

  def hears(self, *names: str) -> bool:
    return self.all.hears(*names)

  def __call__(self, name: str, value: jax.Array) -> jax.Array:
    for edit in self.all.edits:
      if edit.site == name:
        value = edit(value, self.number)
    if name in self.all.record:
      self.found[name] = value
    return value


def run(
  model: Model, tokens_BT: Any, edits: Any = (), record: Sequence[str] = ()
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """A forward pass in which activations are changed and recorded.

  Args:
    model: a language model.
    tokens_BT: ids. On a mesh the rows must divide by the parts of the batch.
    edits: an `Edit`, or a tree of them; those of one site are made one after another.
    record: names of `sites.SITES`. A site that is edited is recorded as it is after it.

  Returns:
    Logits [B, T, V] in float32, and name -> array: of a site of the blocks with an axis of layers
    first, [L, B, T, D]. NaN if the place of an edit was traced and is nowhere.

  Raises:
    UserError: a site, an axis or an index does not exist, or an edit touches nothing: it lists what
      there is.
  """
  config, params = model.config, params_of(model)
  tokens_BT = jnp.asarray(tokens_BT)
  if config.head != 'lm' or tokens_BT.ndim != 2:
    raise UserError('tokens are [B, T], and the model is one of language.')
  for name in record:
    check_site(site(name), config)
  sizes = sizes_of(config, *tokens_BT.shape)
  placed = tuple(place(edit, config, sizes) for edit in edit_list(edits))
  leaves = jax.tree.leaves((params, tokens_BT, placed))
  traced = any(isinstance(leaf, Tracer) for leaf in leaves)
  params = params if traced else whole_rows(params)
  with contextlib.nullcontext() if traced else mesh_of(params):
    return _run(config, params, tokens_BT, placed, tuple(record))


@functools.partial(jax.jit, static_argnames=('config', 'record'))
def _run(config: GPTConfig, params: Params, tokens_BT, edits: tuple[Placed, ...], record):
  model, listen = bind(config, params), Listening(edits, record)
  out = model.transformer(tokens_BT, listen=listen)
  logits_BTV = reshard(model.logits(out.x_BTD), RULES.act_btd)[..., : config.vocab_size]
  at = listen.layer(None)
  logits_BTV = at('logits', logits_BTV)
  for edit in edits:
    touches = jnp.stack([jnp.any(mask) for mask in edit.masks.values()]).all()
    logits_BTV = jnp.where(touches, logits_BTV, jnp.nan)
  return logits_BTV, out.found | at.found

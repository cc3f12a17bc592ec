"""Many patched runs in one batch, without the tokens that no patch changes.

A patch at position s of layer l leaves all that is below l, and all tokens before s, as they are in
the run that is patched. So of K patches only the tokens from s on are computed, from layer l on, as
one row of M tokens; attention reads the keys and values of the others from that run's own record.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gpt2_jax.model.attention import attention, causal_mask
from gpt2_jax.model.sites import SILENT, SITES, Listener

ALL = -1  # in place of an index


class Pack(NamedTuple):
  """Where the tokens of K patches of B rows lie among M.

  Attributes:
    patch_M, row_M, position_M: of each token; padding repeats the first token, and nobody reads it.
    slot_KBT: where a patch's token lies; M where it is as in the run that is patched.
    position_K, head_K, neuron_K: what each patch changes; `ALL`, or an index.
  """

  patch_M: np.ndarray
  row_M: np.ndarray
  position_M: np.ndarray
  slot_KBT: np.ndarray
  position_K: np.ndarray
  head_K: np.ndarray
  neuron_K: np.ndarray


def packs(places: np.ndarray, B: int, T: int, at_once: int) -> Iterator[tuple[np.ndarray, Pack]]:
  """Divides patches into packs of one shape, so that one program serves all.

  Args:
    places: of each patch its position, head and neuron, or `ALL`, [patches, 3].
    B, T: rows, and tokens of each.
    at_once: patches in a pack, at most.

  Yields:
    The numbers of the patches, and the pack. The last one may hold patches twice.
  """
  chunks = -(-len(places) // at_once)
  K = -(-len(places) // chunks)
  by_length = np.argsort(places[:, 0], kind='stable')
  order = np.empty_like(by_length)  # many tokens beside few: all packs are about as long
  order[::2], order[1::2] = by_length[: -(-len(order) // 2)], by_length[::-1][: len(order) // 2]
  order = np.resize(order, chunks * K).reshape(chunks, K)
  starts = np.maximum(places[order, 0], 0)
  M = int((T - starts).sum(1).max()) * B
  for numbers, start_K in zip(order, starts):
    patch, row, position = np.nonzero(
      np.broadcast_to(np.arange(T) >= start_K[:, None, None], (K, B, T))
    )
    slot_KBT = np.full((K, B, T), M, np.int32)
    slot_KBT[patch, row, position] = np.arange(len(patch))
    fill = lambda x: np.concatenate([x, np.repeat(x[:1], M - len(x))]).astype(np.int32)
    where = places[numbers].astype(np.int32).T
    yield numbers, Pack(fill(patch), fill(row), fill(position), slot_KBT, *where)


def unpack(x_M: jax.Array, slot: Any, otherwise: Any) -> jax.Array:
  """Tokens [M, …] in their places, and `otherwise`, which broadcasts, where there is none."""
  found = x_M.at[slot].get(mode='clip')
  here = (slot < len(x_M)).reshape(slot.shape + (1,) * (found.ndim - slot.ndim))
  return jnp.where(here, found, otherwise)


@dataclasses.dataclass(frozen=True)
class PackedMask:
  """Causal attention of packed tokens; stands where a `Mask` does, in one layer.

  Attributes:
    pack: how they lie.
    k_BTNH, v_BTNH: of the run that is patched.
  """

  pack: Pack
  k_BTNH: jax.Array
  v_BTNH: jax.Array

  def attend(self, q_1MNH, k_1MNH, v_1MNH, *, at: Listener = SILENT, **how: Any) -> jax.Array:
    """The attended values, [1, M, N, H]; options as of `attention`."""
    pack, (K, B, T) = self.pack, self.pack.slot_KBT.shape
    q, k, v = (
      unpack(x[0], pack.slot_KBT, otherwise).reshape(K * B, T, *x.shape[2:])
      for x, otherwise in ((q_1MNH, 0), (k_1MNH, self.k_BTNH), (v_1MNH, self.v_BTNH))
    )
    z = attention(q, k, v, causal_mask(T, T), at=at, **how)
    return z[pack.patch_M * B + pack.row_M, pack.position_M][None]


@dataclasses.dataclass(frozen=True)
class Patcher:
  """Puts a record's values in their places; a `sites.Listener`, of one layer.

  Attributes:
    site: where.
    pack: which of the values.
    value: what is put there, of this layer, with the site's axes.
    now: whether this is the layer that is patched.
  """

  site: str
  pack: Pack
  value: jax.Array
  now: jax.Array

  @property
  def found(self) -> dict[str, jax.Array]:
    """Nothing is recorded."""
    return {}

  def hears(self, *names: str) -> bool:
    """Whether one of these is patched."""
    return self.site in names

  def __call__(self, name: str, x: jax.Array) -> jax.Array:
    """`x` as it is, or at its site with the patch in it."""
    if name != self.site:
      return x
    p, letters = self.pack, SITES[name].letters
    if letters[1] == 'T':  # [1, M, …]
      value = self.value[p.row_M, p.position_M][None]
      at_M = lambda which_K: which_K[p.patch_M].reshape(1, -1, *(1,) * (x.ndim - 2))
    else:  # [K·B, N, T, S], in attention
      (K, B, _), value = p.slot_KBT.shape, self.value
      value = jnp.broadcast_to(value, (K, *value.shape)).reshape(x.shape)
      at_M = lambda which_K: jnp.repeat(which_K, B).reshape(-1, *(1,) * (x.ndim - 1))
    here = self.now
    for axis, letter in enumerate(letters):
      along = [-1 if i == axis else 1 for i in range(x.ndim)]
      numbers = jnp.arange(x.shape[axis]).reshape(along)
      if letter == 'T':
        numbers = p.position_M.reshape(1, -1, *(1,) * (x.ndim - 2)) if axis == 1 else numbers
      which_K = {'T': p.position_K, 'N': p.head_K, 'S': None, 'B': None}.get(letter, p.neuron_K)
      if which_K is not None:
        here = here & ((at_M(which_K) == ALL) | (at_M(which_K) == numbers))
    return jnp.where(here, value.astype(x.dtype), x)

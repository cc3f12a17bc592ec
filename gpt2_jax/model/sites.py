"""The places inside the model that have a name: what can be read and changed there, and its letters.

At each site the model asks once, `x = at('resid_mid', x)`. `SILENT` gives back what it is given while
the model is traced, so that a program in which nobody listens is the one without sites. Names are
TransformerLens' where it has one (TransformerLensOrg/TransformerLens `components/`), without
`blocks.{layer}` and `hook_`: docs/interpretability.md has the table.
"""

import dataclasses
from typing import Protocol

import jax

from gpt2_jax.core.errors import UserError, brief, near


@dataclasses.dataclass(frozen=True)
class Site:
  """One of `SITES`.

  Attributes:
    name: of the site.
    letters: of the array there, in one layer: see `gpt2.py`; '1' is an axis of one.
    layered: whether each block has one.
    lens: TransformerLens' name, '' where it has none.
  """

  name: str
  letters: str
  layered: bool
  lens: str


# name, letters, TransformerLens' name; in the order in which the model comes to them
_OUTER = """
  embed              BTD   hook_embed
  pos_embed          BTD   hook_pos_embed
  ln_final.scale     BT1   ln_final.hook_scale
  ln_final.normalized BTD  ln_final.hook_normalized
  logits             BTV   -
"""
_LAYERED = """
  resid_pre          BTD   hook_resid_pre
  ln1.scale          BT1   ln1.hook_scale
  ln1.normalized     BTD   ln1.hook_normalized
  q                  BTNH  attn.hook_q
  k                  BTNH  attn.hook_k
  v                  BTNH  attn.hook_v
  attn_scores        BNTS  attn.hook_attn_scores
  pattern            BNTS  attn.hook_pattern
  z                  BTNH  attn.hook_z
  result             BTND  attn.hook_result
  attn_out           BTD   hook_attn_out
  resid_mid          BTD   hook_resid_mid
  ln2.scale          BT1   ln2.hook_scale
  ln2.normalized     BTD   ln2.hook_normalized
  mlp_pre            BTF   mlp.hook_pre
  mlp_post           BTF   mlp.hook_post
  mlp_out            BTD   hook_mlp_out
  resid_post         BTD   hook_resid_post
"""


def _read(table: str, layered: bool) -> dict[str, Site]:
  rows = (line.split() for line in table.strip().splitlines())
  block = 'blocks.{layer}.' if layered else ''
  return {
    name: Site(name, letters, layered, '' if lens == '-' else block + lens)
    for name, letters, lens in rows
  }


SITES = _read(_OUTER, False) | _read(_LAYERED, True)


def site(name: str) -> Site:
  """The site of a name.

  Raises:
    UserError: there is none; lists those that are.
  """
  if name not in SITES:
    raise UserError(
      f'the model has no site {brief(name)}{near(str(name), SITES)}; it has {", ".join(SITES)}.'
    )
  return SITES[name]


class Listener(Protocol):
  """Who is asked at the sites of one layer, or of what is outside of the layers."""

  @property
  def found(self) -> dict[str, jax.Array]:
    """What is to be kept of what was seen."""
    ...

  def hears(self, *names: str) -> bool:
    """Whether it listens at any of these: what is made for it alone needn't be made."""
    ...

  def __call__(self, name: str, value: jax.Array) -> jax.Array:
    """The value that the model goes on with."""
    ...


class _Silent:
  """Hears nothing."""

  @property
  def found(self) -> dict[str, jax.Array]:
    return {}

  def hears(self, *names: str) -> bool:
    del names
    return False

  def __call__(self, name: str, value: jax.Array) -> jax.Array:
    del name
    return value


SILENT = _Silent()


class Listen(Protocol):
  """Who listens: to each layer by its number, a traced one too, and by None to what is outside."""

  def hears(self, *names: str) -> bool:
    """As of `Listener`, for all layers."""
    ...

  def layer(self, number: jax.Array | int | None) -> Listener:
    """Who is asked in this layer."""
    ...


class _Nobody(_Silent):
  def layer(self, number: jax.Array | int | None) -> Listener:
    del number
    return SILENT


NOBODY = _Nobody()

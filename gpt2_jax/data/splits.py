"""The settings that decide the content of a token store, and which of its documents are held out."""

import dataclasses
import hashlib
from collections.abc import Iterator
from typing import Any

from gpt2_jax.core import bounds
from gpt2_jax.core.bounds import Bool, Choice, Corpus, Float, Int, Place, Text
from gpt2_jax.data.corpora import Document
from gpt2_jax.data.text_files import LongText

SETTINGS: bounds.Table = dict(
  corpus=Corpus(),
  tokenizer=Place(),
  val_fraction=Float(0, 1, open_low=True, open_high=True),
  split_seed=Int(-(2**63), 2**63 - 1),
  split=Choice(('document', 'tail')),
  text_field=Text(1000),
  special=Bool(),
)


@dataclasses.dataclass(frozen=True)
class Settings:
  """The settings that decide the content of a store, beside the text of the corpus."""

  corpus: str
  tokenizer: str
  val_fraction: float = 0.005
  split_seed: int = 0
  split: str = 'document'  # 'document': whole documents; 'tail': the end of each document
  text_field: str = 'text'
  special: bool = False  # whether special tokens count in a text

  def __post_init__(self):
    bounds.check_all(SETTINGS, vars(self))

  def as_json(self) -> dict:
    """Returns them as a manifest has them: a setting that older releases lack only if it is used."""
    return {k: v for k, v in dataclasses.asdict(self).items() if k != 'special' or v}


def _held_out(settings: Settings, piece: int, document: int) -> bool:
  key = f'{settings.split_seed}:{piece}:{document}'.encode()
  draw = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), 'little') / 2**64
  return draw < settings.val_fraction


def split_document(
  document: Document, settings: Settings, piece: int, number: int
) -> Iterator[tuple[str, Any]]:
  """Yields (split, text) for a document: one, or two if its tail is held out."""
  text = document.text
  if not len(text):
    return
  if document.split:
    yield document.split, text
  elif settings.split == 'tail':
    cut = len(text) - max(1, round(len(text) * settings.val_fraction))
    if isinstance(text, LongText):
      parts = text.cut(cut)
    else:
      if isinstance(text, str):  # at the end of a line, where there is one
        cut = text.rfind('\n', 0, cut) + 1 or cut
      parts = text[:cut], text[cut:]
    yield from zip(('train', 'val'), parts)
  else:
    yield 'val' if _held_out(settings, piece, number) else 'train', text

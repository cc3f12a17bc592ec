"""The tables of a byte-level BPE, and the printable characters that stand for bytes in them.

A token's name, in files of Hugging Face's kind and in `Tables`, has a printable character for each of
its bytes; that of an added token is its text.
"""

import dataclasses
import functools
from collections.abc import Iterable, Sequence

EOT = '<|endoftext|>'


@dataclasses.dataclass(frozen=True)
class Added:
  """A token that is found in a text as a whole, before the BPE: Hugging Face's AddedToken.

  `lstrip` and `rstrip`: it takes along the white space before and behind it. `single_word`: not
  inside of a word. `normalized`: looked for after those that are not. `special`: found only where
  that is asked for; so are all that are used as something, and the end of a text.
  """

  id: int
  content: str
  single_word: bool = False
  lstrip: bool = False
  rstrip: bool = False
  normalized: bool = False
  special: bool = True


@dataclasses.dataclass(frozen=True)
class Tables:
  """What the files say.

  Attributes:
    vocab: id of every token by its name, as in the files: an added token's name is its text, any
      other's has a printable character for each byte.
    pairs: the merges by names, the first ones first in priority.
    added: the tokens that are found as a whole, by id.
    roles: what some tokens are used as, for example {'eos_token': '</s>'}.
    prefix_space: whether a text that doesn't begin with a space is given one.
    eot: id of `<|endoftext|>`; without it of the eos_token; without that of `</s>`.
  """

  vocab: dict[str, int]
  pairs: list[tuple[str, str]]
  added: list[Added]
  roles: dict[str, str]
  prefix_space: bool
  eot: int


@functools.cache
def byte_to_char() -> dict[int, str]:
  """Returns GPT-2's printable character for each byte (its `src/encoder.py`), in the order of ids."""
  visible = [
    *range(ord('!'), ord('~') + 1),
    *range(ord('¡'), ord('¬') + 1),
    *range(ord('®'), ord('ÿ') + 1),
  ]
  hidden = [b for b in range(256) if b not in set(visible)]
  return {b: chr(b) for b in visible} | {b: chr(256 + i) for i, b in enumerate(hidden)}


CHAR_TO_BYTE = {char: b for b, char in byte_to_char().items()}


def to_chars(token: bytes) -> str:
  return token.decode('latin-1').translate(byte_to_char())


def to_bytes(name: str) -> bytes | None:
  """Returns the bytes that a token's name stands for; None where it stands for none."""
  try:
    return bytes(map(CHAR_TO_BYTE.__getitem__, name))
  except KeyError:
    return None


def byte_pairs(pairs: Iterable[Sequence[str]]) -> list[tuple[bytes, bytes]]:
  """Merges by the bytes that the names of their tokens stand for."""
  byte = CHAR_TO_BYTE
  return [(bytes(byte[c] for c in left), bytes(byte[c] for c in right)) for left, right in pairs]

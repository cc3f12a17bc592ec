"""Long texts become tokens section by section: the same tokens, in bounded memory."""

import functools
import re
from collections.abc import Iterator

import numpy as np

from gpt2_jax.core.errors import UserError
from gpt2_jax.data import text_files
from gpt2_jax.data.text_files import LongText
from gpt2_jax.tokenizer.bpe import Tokenizer

EDGES = re.compile(r'(?<=\S)\s(?=\S)')
EDGE = 200  # characters on each side of a place where a text may be cut, which decide if it is
TRIED = 100  # places
MAX_WORDLESS = 64 * 2**20  # characters
MAX_BLANK = 900_000  # white spaces in a row; at a million GPT-2's pattern breaks tiktoken


def _separate(tokenizer: Tokenizer, text: str, at: int) -> bool:
  """Whether the tokens before and after a place are those of the whole text."""
  left, right = text[max(0, at - EDGE) : at], text[at : at + EDGE]
  encode = functools.partial(tokenizer.encode, allow_special=True)  # which are then never cut either
  return encode(left + right) == encode(left) + encode(right)


def sections(text: str | LongText, tokenizer: Tokenizer | None = None) -> Iterator[str]:
  """Yields a text in sections whose tokens together are those of the text; a short text as it is.

  A section ends before a single white space, where GPT-2's pattern always parts two tokens, and
  where this tokenizer does.
  """
  if isinstance(text, str) and len(text) <= text_files.LONG:
    yield text
    return
  step = text_files.CHUNK
  rest, starts = '', range(0, len(text), step)
  for part in text.parts() if isinstance(text, LongText) else (text[i : i + step] for i in starts):
    rest += part
    if len(rest) <= text_files.LONG:
      continue
    first = max(1, len(rest) - 2**16)
    edges = [first + edge.start() for edge in EDGES.finditer(rest[first:])][-TRIED:]
    for at in reversed(edges):
      if tokenizer is None or _separate(tokenizer, rest, at):
        yield rest[:at]
        rest = rest[at:]
        break
    if len(rest) > MAX_WORDLESS:
      where = f'{text.path}: ' if isinstance(text, LongText) else ''
      raise UserError(
        f'{where}a document has {len(rest):,} characters without a white space to cut '
        'it at, which is no text to make tokens of. Leave it out, or break its lines.'
      )
  yield rest


def _check_blanks(text: str) -> None:
  """Raises a UserError for a text with more white spaces in a row than GPT-2's pattern can read."""
  step = MAX_BLANK // 3
  if any(text[at : at + step].isspace() for at in range(0, len(text) - step, step)) and any(
    len(blank[0]) >= MAX_BLANK for blank in re.finditer(r'\s+', text)
  ):
    raise UserError(
      f'a document has {MAX_BLANK:,} or more white spaces in a row: shorten them, or leave it out.'
    )


def encode(
  text: str | LongText | np.ndarray,
  tokenizer: Tokenizer,
  allow_special: bool = False,
  held: list[str] | None = None,
) -> Iterator[np.ndarray]:
  """Yields <|endoftext|> and the tokens of a document, in one array; of a long one in several.

  Args:
    text: of the document, or its tokens.
    tokenizer: whose tokens.
    allow_special: whether special tokens count in the text.
    held: is given the special tokens whose text was taken for text, one a section.
  """
  begun = False
  for section in [text] if isinstance(text, np.ndarray) else sections(text, tokenizer):
    if isinstance(section, str):
      if tokenizer.merges and len(section) > MAX_BLANK:
        _check_blanks(section)
      if held is not None and not allow_special and (found := tokenizer.special_in(section)):
        held.append(found)
      section = tokenizer.encode_array(section, allow_special=allow_special)
    yield section if begun else np.concatenate([[tokenizer.eot], section])
    begun = True

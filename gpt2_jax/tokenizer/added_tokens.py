"""Added tokens, found in a text as the package tokenizers finds them.

The leftmost one is taken, of those that begin there the longest; the search goes on behind it. Tokens
that are not `normalized` are looked for first, the others in what is left between them. (Source:
tokenizers/src/tokenizer/added_vocabulary.rs.) That package would take as long for it as for the BPE;
one regular expression takes a thirtieth of that.
"""

import itertools
import re
from collections.abc import Sequence

import regex

from gpt2_jax.tokenizer.tables import Added

WORD = regex.compile(r'[\p{Alphabetic}\p{M}\p{Nd}\p{Pc}\p{Join_Control}]')  # Rust's \w
SPACE = regex.compile(r'\p{White_Space}')  # Rust's \s
DEPTH = 40  # of groups in a pattern; beyond it, its parser would run out of stack

Piece = tuple[Added | None, int, int]  # a token, or None for text between them; where it is


def pattern(words: Sequence[str]) -> str:
  """Returns a regular expression for the longest of some words, which share beginnings in it."""
  return _pattern(sorted(set(words)), 0)


def _pattern(words: list[str], depth: int) -> str:
  """`words`: different ones, sorted."""
  if depth == DEPTH:
    return f'(?:{"|".join(re.escape(word) for word in sorted(words, key=len, reverse=True))})'
  ends = words[0], words[-1]  # what these begin with alike, all do
  n = next((i for i, (a, b) in enumerate(zip(*ends)) if a != b), min(map(len, ends)))
  begin, rest = re.escape(words[0][:n]), [word[n:] for word in words]
  if len(rest) == 1:
    return begin
  may_end = '' if rest[0] else '?'
  ways = [
    _pattern(list(group), depth + 1)
    for _, group in itertools.groupby(filter(None, rest), key=lambda word: word[0])
  ]
  return f'{begin}(?:{"|".join(ways)}){may_end}'


class Finder:
  """Finds some added tokens. Those that are special count only where that is asked for."""

  def __init__(self, added: Sequence[Added]):
    self._added = {token.content: token for token in added}
    rounds = [[t.content for t in added if t.normalized == late] for late in (False, True)]
    self._patterns = [re.compile(pattern(words), re.S) for words in rounds if words]
    self._any_ordinary = any(not token.special for token in added)

  def pieces(self, text: str, special: bool) -> list[Piece]:
    """Returns the parts of a text, in order. With `rstrip`, tokens may take the same blanks.

    Args:
      text: without halves of surrogate pairs.
      special: whether special tokens count. If not they are text, as with transformers'
        `split_special_tokens`: other tokens within one are not looked for.
    """
    pieces: list[Piece] = [(None, 0, len(text))] if text else []
    if not special and not self._any_ordinary:
      return pieces
    for compiled in self._patterns:
      pieces = [
        new
        for piece in pieces
        for new in ([piece] if piece[0] else self._split(text, compiled, special, *piece[1:]))
      ]
    return pieces

  def special(self, text: str) -> Added | None:
    """Returns the first special token that a text holds the text of."""
    found = (token for token, *_ in self.pieces(text, special=True))
    return next((token for token in found if token and token.special), None)

  def _split(
    self, text: str, compiled: re.Pattern, special: bool, low: int, high: int
  ) -> list[Piece]:
    """Returns the pieces of text[low:high], which counts as a text of its own."""
    pieces, done = [], low
    for match in compiled.finditer(text, low, high):
      token, (start, stop) = self._added[match[0]], match.span()
      if token.special and not special:
        continue
      around = text[max(low, start - 1) : start] + text[stop : min(high, stop + 1)]
      if token.single_word and WORD.search(around):
        continue
      if token.lstrip:
        start = max(start, done)  # an earlier one may have taken it as a blank: then there is none
        while start > done and SPACE.match(text[start - 1]):
          start -= 1
      while token.rstrip and stop < high and SPACE.match(text[stop]):
        stop += 1
      if done < start:
        pieces.append((None, done, start))
      if start < stop:
        pieces.append((token, start, stop))
      done = stop
    return pieces + ([(None, done, high)] if done < high else [])

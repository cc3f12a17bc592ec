"""Text as people write it from a benchmark's tokens, and the tokens back.

The paper (section 3.1) scores WikiText, PTB and 1BW through "invertible de-tokenizers": ` @-@ `
becomes `-`, ` .` the end of a sentence. Its rules were never published; these are our own.

They are invertible by construction, on any text. `Rules.split` says which tokens a written word
stands for. Tokens are put together only where it takes the word apart into just these, and a token
that it would take for others is followed by two blanks, which say: as it stands.

What was lost when a benchmark was made does not come back: `<unk>` is scored as the text that it is,
as one of the original units.
"""

import dataclasses
import re
from collections.abc import Iterator, Sequence

ABBREVIATIONS = frozenset(
  'Mr Mrs Ms Dr St Jr Sr Inc Ltd Co Corp Bros vs al No Nos Gen Col Lt Sgt Rev Gov'.split()
)
JOINER = re.compile('@(.)@')


@dataclasses.dataclass(frozen=True)
class Rules:
  """How a benchmark's tokens are written.

  Attributes:
    opening: written -> token that stands before a word, without a blank.
    closing: written -> token that stands behind one.
    suffix: pattern of the end of a word that is a token of its own.
    inside: patterns of what joins two words: `-` for the token `@-@`.
    alone: written -> token, of whole words.
    pad: what stands at both ends of a line that is not empty; an empty one is it, once.
  """

  opening: dict[str, str]
  closing: dict[str, str]
  suffix: str
  inside: tuple[str, ...] = ()
  alone: dict[str, str] = dataclasses.field(default_factory=dict)
  pad: str = ''

  def detokenize(self, text: str) -> str:
    """Returns the text without the blanks that people don't write. Lines stay lines."""
    end = '\n' if text.endswith('\n') else ''
    lines = text.removesuffix('\n').split('\n')
    written = [self._write(line) for line in lines]
    if not (end or written[-1]) and len(lines) > 1:
      written[-1] = ' ' + lines[-1]  # an empty last line is one, and not the end of the one before
    return '\n'.join(written) + end

  def tokenize_back(self, text: str) -> str:
    """Returns the text that `detokenize` was given."""
    end = '\n' if text.endswith('\n') else ''
    return '\n'.join(map(self._read, text.removesuffix('\n').split('\n'))) + end

  def split(self, word: str) -> list[str]:
    """Returns the tokens that a written word stands for."""
    head, tail = [], []
    while len(word) > 1 and word[0] in self.opening:
      head.append(self.opening[word[0]])
      word = word[1:]
    while len(word) > 1:
      if found := re.search(f'(?<=.)({self.suffix})$', word):
        tail.append(found[0])
        word = word[: found.start()]
      elif word[-1] in self.closing and not _abbreviation(word):
        tail.append(self.closing[word[-1]])
        word = word[:-1]
      else:
        break
    return [*head, *self._middle(word), *reversed(tail)]

  def _middle(self, word: str) -> list[str]:
    if set(word) == {'='}:  # around a heading
      return list(word)
    for pattern in self.inside:
      if found := re.search(pattern, word):
        left, right = word[: found.start()], word[found.end() :]
        return [*self._middle(left), f'@{found[0]}@', *self._middle(right)]
    return [self.alone.get(word, word)]

  def _written(self, token: str) -> list[str]:
    """Returns the ways to write a token within a word."""
    tables = (self.opening, self.closing, self.alone)
    return [*(w for table in tables for w, meant in table.items() if meant == token), token]

  def _words(self, tokens: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """Yields written words, and the tokens that each stands for."""
    openers, closers = set(self.opening.values()), set(self.closing.values())
    word, parts = '', []
    quoted = hangs = False  # whether a quotation is open; whether the word waits for what follows
    i = 0
    while i < len(tokens):
      token = tokens[i]
      opens = token in openers and not (quoted and token in closers)
      quoted ^= token in openers and token in closers
      wanted = (
        hangs
        or parts[-1:] == [token] == ['=']
        or (not opens and (token in closers or re.fullmatch(self.suffix, token)))
      )
      used = 1
      tries, more = self._written(token) if word and wanted else [], [token]
      if word and JOINER.fullmatch(token) and i + 1 < len(tokens):
        tries, more, used = [token[1] + tokens[i + 1]], [token, tokens[i + 1]], 2
      for written in tries:
        if self.split(word + written) == [*parts, *more]:
          word, parts = word + written, [*parts, *more]
          break
      else:
        if word:
          yield word, parts
        word, parts, used = self._first(token, opens), [token], 1
      hangs = opens
      i += used
    if word:
      yield word, parts

  def _first(self, token: str, opens: bool) -> str:
    """Returns a token as it is written at the start of a word."""
    table = self.opening if opens else self.alone
    return next((written for written, meant in table.items() if meant == token), token)

  def _write(self, line: str) -> str:
    tokens = _tokens(line, self.pad)
    if tokens is None:  # not a line of the benchmark's: as it stands
      return ' ' + line
    literal = lambda token: token if self.split(token) == [token] else token + ' '
    return ' '.join(
      word if self.split(word) == parts else ' '.join(map(literal, parts))
      for word, parts in self._words(tokens)
    )

  def _read(self, line: str) -> str:
    if line.startswith(' '):
      return line[1:]
    if not line:
      return self.pad
    words, tokens = line.split(' '), []
    for word, after in zip(words, [*words[1:], None]):
      if word:
        tokens += [word] if after == '' else self.split(word)
    return self.pad + ' '.join(tokens) + self.pad


def _tokens(line: str, pad: str) -> list[str] | None:
  """Returns the tokens of a line; None where they are not one blank apart and between two `pad`."""
  if line == pad:
    return []
  if len(line) <= 2 * len(pad) or not (line.startswith(pad) and line.endswith(pad)):
    return None
  tokens = line[len(pad) : len(line) - len(pad)].split(' ')
  return tokens if all(tokens) else None


def _abbreviation(word: str) -> bool:
  """Whether a word's last full stop is its own."""
  stem = word[:-1]
  return word[-1] == '.' and (
    stem in ABBREVIATIONS
    or (len(stem) == 1 and stem.isupper())
    or re.fullmatch(r'(\w+\.)+\w*|\.+', stem) is not None
  )


PUNCTUATION = {c: c for c in ',;:!?.%)]}'}
QUOTE = {'"': '"'}
BRACKETS = {c: c for c in '([{'}
MONEY = {c: c for c in '$£#'}

WIKITEXT = Rules(
  opening=QUOTE | BRACKETS | MONEY,
  closing=QUOTE | PUNCTUATION | {'°': '°', "'": "'"},
  suffix=r"'[A-Za-z]{1,2}|\.\.\.",
  inside=(r'(?<=[\w>])-(?=[\w<])', r'(?<=[\d>]),(?=[\d<])', r'(?<=[\d>])\.(?=[\d<])'),
  pad=' ',
)
# what the paper's N stands for is a number; any would do, since no token is one
PTB = Rules(
  opening=MONEY, closing={'%': '%', "'": "'"}, suffix=r"'[a-z]{1,2}|n't", alone={'1': 'N'}, pad=' '
)
LM1B = Rules(
  opening=QUOTE | BRACKETS | MONEY,
  closing=QUOTE | PUNCTUATION | {"'": "'"},
  suffix=r"'[A-Za-z]{1,2}|\.\.\.",
)
CBT = Rules(
  opening={'"': '``', '(': '-LRB-', '$': '$'},
  closing={'"': "''", ')': '-RRB-'} | {c: c for c in ',;:!?.'},
  suffix=r"'[A-Za-z]{1,2}|n't|\.\.\.",
)

OF = {
  'wikitext-2': WIKITEXT,
  'wikitext-103': WIKITEXT,
  'ptb': PTB,
  'lm1b': LM1B,
  'cbt-cn': CBT,
  'cbt-ne': CBT,
}


def lambada(text: str) -> str:
  """Returns a text of OpenAI's LAMBADA file as OpenAI scored it: straight quotes, on its own line.

  No inverse: which quotes were curly is lost (openai/gpt-2#131).
  """
  for quote in ('“', '”', "''", '``'):
    text = text.replace(quote, '"')
  return '\n' + text.strip()


# lm-evaluation-harness's rules for WikiText, of lm_eval/tasks/wikitext/preprocess_wikitext.py, in its
# order. Not invertible; the second one does nothing, as there.
LM_EVAL_WIKITEXT = (
  ("s '", "s'"),
  (r"/' [0-9]/", "/'[0-9]/"),
  (' @-@ ', '-'),
  (' @,@ ', ','),
  (r' @\.@ ', '.'),
  (' : ', ': '),
  (' ; ', '; '),
  (r' \. ', '. '),
  (' ! ', '! '),
  (r' \? ', '? '),
  (' , ', ', '),
  (r'\(\s*([^\)]*?)\s*\)', r'(\1)'),
  (r'\[\s*([^\]]*?)\s*\]', r'[\1]'),
  (r'{\s*([^}]*?)\s*}', r'{\1}'),
  (r'"\s*([^"]*?)\s*"', r'"\1"'),
  (r"'\s*([^']*?)\s*'", r"'\1'"),
  ('= = = =', '===='),
  ('= = =', '==='),
  ('= =', '=='),
  (' ° ', '°'),
  (' \n', '\n'),
  ('\n ', '\n'),
  (' N ', ' 1 '),
  (" 's", "'s"),
)


def lm_eval_wikitext(page: str) -> str:
  """Returns a page of WikiText as lm-evaluation-harness scores it."""
  for pattern, replacement in LM_EVAL_WIKITEXT:
    page = re.sub(pattern, replacement, page)
  return page

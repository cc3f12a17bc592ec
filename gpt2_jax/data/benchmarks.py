"""Benchmarks that GPT-2 was measured on, by name: `load('wikitext-2')`.

| names | fields of an example |
|---|---|
| wikitext-2, wikitext-103, ptb, lm1b | `text`: all of the file; there is one example |
| enwik8, text8 | `text`: bytes, the last 5,000,000 of the file; there is one example |
| lambada | `text` |
| cbt-cn, cbt-ne | `context`: 20 sentences, `question` with XXXXX, `options`: 10, `answer`: one |
| hellaswag | `query`: activity, colon and context; `endings`: 4, `label`: 0 to 3 |
| winogrande | `sentence` with a _, `option1`, `option2`, `answer`: '1' or '2' |
| wsc273 | `text` with the pronoun in brackets, `options`: 2, `answer`: the right one of them |
| crows-pairs | `sent_more`, `sent_less`, `stereo_antistereo`: 'stereo' or 'antistereo', `bias_type` |
| winobias | `sentence`, no brackets; `pronoun`, `referent`, `stereotyped`: bool, `type`: '1', '2' |

A benchmark is read from files on this machine, or fetched and then read from there: the same bytes,
reader and sha256 either way.
"""

import dataclasses
import hashlib
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from gpt2_jax.core import buckets
from gpt2_jax.core.errors import UserError
from gpt2_jax.data import benchmark_readers, downloads, sources, text_files
from gpt2_jax.data.sources import Source

DEPTH = 3  # folders below the one named in which a file is looked for
SPLITS = {
  'train': 'train',
  'valid': 'validation',
  'validation': 'validation',
  'val': 'validation',
  'dev': 'validation',
  'test': 'test',
  'heldout': 'test',
}  # as files are named


@dataclasses.dataclass(frozen=True)
class Benchmark:
  """The examples of a benchmark, and where they are from.

  Attributes:
    split: as the name of the file says; where it doesn't, the one that is fetched.
    examples: dicts; their fields are in this module's table.
    sha256: of the file that was read, unpacked; of several, of the lines `NAME SHA256`.
    source: path of what was read, or the address it was fetched from.
  """

  name: str
  split: str
  examples: Sequence[dict]
  sha256: str
  source: str


@dataclasses.dataclass(frozen=True)
class Part:
  """A file of a benchmark: in its published archive, and on a user's disk."""

  source: Source
  member: str = ''  # of the archive; '': the source is the file itself
  names: tuple[str, ...] = ()  # further ones that it goes by, preferred in this order

  def is_at(self) -> tuple[str, ...]:
    """Returns patterns for the ends of paths, the best first."""
    return (self.member or self.source.file, *self.names)


@dataclasses.dataclass(frozen=True)
class Published:
  split: str
  read: Callable[[bytes, str], list[dict]]
  parts: tuple[Part, ...]


def _wikitext(name: str, source: Source) -> Published:
  local = ('wiki.test.raw', 'wiki.test.tokens', 'test.txt')
  return Published(
    'test',
    benchmark_readers.text,
    (Part(source, f'{name}-raw/wiki.test.raw', tuple(f'{name}*/{file}' for file in local)),),
  )


def _cbt(kind: str) -> Published:
  file = f'cbtest_{kind}_valid_2000ex.txt'
  return Published(
    'validation', benchmark_readers.cbt, (Part(sources.CBT, f'CBTest/data/{file}', (file,)),)
  )


HELD_OUT = 'news.en.heldout-00000-of-00050'
PUBLISHED = {
  'wikitext-2': _wikitext('wikitext-2', sources.WIKITEXT_2),
  'wikitext-103': _wikitext('wikitext-103', sources.WIKITEXT_103),
  'ptb': Published(
    'test', benchmark_readers.text, (Part(sources.PTB, '', ('ptb*/test.txt', 'penn*/test.txt')),)
  ),
  'enwik8': Published(
    'test', benchmark_readers.last_bytes, (Part(sources.ENWIK8, 'enwik8', ('enwik8/test.txt.raw',)),)
  ),
  'text8': Published(
    'test', benchmark_readers.last_bytes, (Part(sources.TEXT8, 'text8', ('text8/test.txt.raw',)),)
  ),
  'lm1b': Published(
    'test',
    benchmark_readers.text,
    (
      Part(
        sources.LM1B,
        f'{sources.LM1B.file.removesuffix(".tar.gz")}/'
        f'heldout-monolingual.tokenized.shuffled/{HELD_OUT}',
        (HELD_OUT,),
      ),
    ),
  ),
  'cbt-cn': _cbt('CN'),
  'cbt-ne': _cbt('NE'),
  'lambada': Published('test', benchmark_readers.lambada, (Part(sources.LAMBADA),)),
  'hellaswag': Published(
    'validation',
    benchmark_readers.hellaswag,
    (Part(sources.HELLASWAG, '', ('hellaswag_val*.jsonl',)),),
  ),
  'winogrande': Published(
    'validation',
    benchmark_readers.winogrande,
    (Part(sources.WINOGRANDE, 'winogrande_1.1/dev.jsonl', ('winogrande*/dev.jsonl',)),),
  ),
  'wsc273': Published(
    'test',
    benchmark_readers.wsc273,
    (Part(sources.WSC, '', ('wsc273.xml', 'wsc273.json', 'wsc273.jsonl')),),
  ),
  'crows-pairs': Published(
    'test',
    benchmark_readers.crows_pairs,
    (Part(sources.CROWS_PAIRS, '', ('crows_pairs*.csv', 'crows-pairs*.csv')),),
  ),
  'winobias': Published('test', benchmark_readers.winobias, tuple(map(Part, sources.WINOBIAS))),
}
NAMES = tuple(PUBLISHED)


def load(name: str, data: str | None = None) -> Benchmark:
  """Reads a benchmark from `data`: its file, or a folder with it at some depth; None: fetched.

  In a folder the file is found by the name it has in its published archive, or by another that it is
  known by (docs/data.md).

  Raises:
    UserError: there is no such benchmark or file, it can't be fetched, or is not as published.
  """
  if name not in PUBLISHED:
    raise UserError(f'there is no benchmark {name!r}, but {", ".join(NAMES)}.')
  published = PUBLISHED[name]
  if data is None:
    paths = [fetched(part.source, part.member) for part in published.parts]
    source = ' '.join((*part.source.urls, str(path))[0] for part, path in zip(published.parts, paths))
  else:
    with buckets.reading(data):
      here = buckets.fetched(buckets.place(data, '--data')).expanduser()
    paths = _find(name, published, here)
    source = ' '.join(map(str, paths))
  contents = [text_files.read_whole(str(path)) for path in paths]
  hashes = [hashlib.sha256(content).hexdigest() for content in contents]
  examples = [
    example
    for path, content in zip(paths, contents)
    for example in published.read(content, str(path))
  ]
  if not examples:
    raise UserError(f'{source} holds no example of {name}.')
  listing = ''.join(f'{path.name} {sha256}\n' for path, sha256 in zip(paths, hashes))
  sha256 = hashes[0] if len(hashes) == 1 else hashlib.sha256(listing.encode()).hexdigest()
  named = re.search(rf'(?<![a-z])({"|".join(SPLITS)})(?![a-z])', paths[0].name.lower())
  return Benchmark(name, SPLITS[named[1]] if named else published.split, examples, sha256, source)


def fetched(source: Source, member: str = '') -> Path:
  """Returns the path of a published file, or of a member of an archive, fetched if need be."""
  path = downloads.fetch(source)
  return downloads.unpack(path, [member])[0] if member else path


def _find(name: str, published: Published, data: Path) -> list[Path]:
  if data.is_file():
    text_files.kind_of_named(str(data))  # refuses archives
    return [data]
  if not data.is_dir():
    raise UserError(f'{data}: no such file or folder, to read {name} from.')
  data = data.resolve()
  levels = ['/'.join(['*'] * depth) for depth in range(1, DEPTH + 2)]
  ways: dict[Path, Path] = {}  # to each real file the shortest, whatever links there are
  for level in levels:
    for path in sorted(data.glob(level)):
      if path.is_file():
        ways.setdefault(path.resolve(), path)
  there = list(ways.values())
  return [_choose(name, part, data, there) for part in published.parts]


def _choose(name: str, part: Part, data: Path, there: list[Path]) -> Path:
  """Returns the file of a part: the one with the best name, then with the fewest folders above it."""
  for pattern in part.is_at():
    found = [path for path in there if path.match(pattern)] or [
      path for path in there if any(path.match(pattern + suffix) for suffix in text_files.PACKED)
    ]
    least = [path for path in found if len(path.parts) == len(found[0].parts)]
    if len(least) > 1:
      raise UserError(f'{name} may be any of {", ".join(map(str, least))}: name the file.')
    if least:
      return least[0]
  raise UserError(
    f'{data} has no file for {name}: it goes by {", ".join(part.is_at())}. Name the file itself if '
    'it is called otherwise, or get it: '
    f'{" or ".join(part.source.urls) or part.source.steps} (docs/data.md).'
  )

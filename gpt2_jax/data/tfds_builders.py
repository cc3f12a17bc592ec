"""Builders for TensorFlow Datasets of what it lacks: `tfds:wikitext/wikitext-2`, `tfds:text8`, …

They fetch by `downloads.py`, need no TensorFlow, and want file_format='array_record'. Importing this
module makes their names known. Examples stand in the order of the source.
"""

import dataclasses
import io
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from gpt2_jax.data import benchmark_readers, downloads, sources
from gpt2_jax.data.benchmarks import fetched
from gpt2_jax.data.text_files import utf8

SPLITS = {'train': 'train', 'validation': 'valid', 'test': 'test'}  # as files are named
HELD_OUT = benchmark_readers.HELD_OUT_BYTES


class Published(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """The base of the builders, each with a `source` and, for a split, `examples`."""

  VERSION = tfds.core.Version('1.0.0')
  source: sources.Source
  splits: tuple[str, ...] = tuple(SPLITS)

  @property
  def licence(self) -> str:
    return self.source.licence

  @property
  def kind(self) -> str:
    """The name of the config."""
    return self.builder_config.name if self.builder_config else ''

  def fields(self) -> dict:
    return {'text': tfds.features.Text()}

  def examples(self, split: str) -> Iterator[dict]:
    raise NotImplementedError

  def _info(self) -> tfds.core.DatasetInfo:
    return tfds.core.DatasetInfo(
      builder=self,
      description=self.__doc__,
      features=tfds.features.FeaturesDict(self.fields()),
      license=self.licence,
      disable_shuffling=True,
    )

  def _split_generators(self, dl_manager: Any) -> dict:
    del dl_manager  # which resumes nothing and unpacks by TensorFlow
    return {split: self._generate_examples(split) for split in self.splits}

  def _generate_examples(self, split: str) -> Any:
    return enumerate(self.examples(split))


def _configs(**described: str) -> list[tfds.core.BuilderConfig]:
  return [
    tfds.core.BuilderConfig(name=name.replace('_', '-'), description=text)
    for name, text in described.items()
  ]


def articles(text: str) -> list[str]:
  """Cuts WikiText before each title, ` = TITLE = ` between blank lines. Nothing is left out."""
  titles = re.finditer(r'(?<=\n \n) = (?!=).*(?<!=) = \n(?= \n)', text)
  edges = [0, *(title.start() for title in titles), len(text)]
  return [text[start:stop] for start, stop in zip(edges, edges[1:]) if stop > start]


class Wikitext(Published):
  """WikiText, raw: an example is an article."""

  BUILDER_CONFIGS = _configs(wikitext_2='2 million words', wikitext_103='103 million words')

  @property
  def source(self) -> sources.Source:  # pyright: ignore[reportIncompatibleVariableOverride]
    return {'wikitext-2': sources.WIKITEXT_2, 'wikitext-103': sources.WIKITEXT_103}[self.kind]

  def examples(self, split: str) -> Iterator[dict]:
    member = f'{self.kind}-raw/wiki.{SPLITS[split]}.raw'
    for article in articles(_text(fetched(self.source, member))):
      yield {'text': article}


class Ptb(Published):
  """The Penn Treebank as language models were measured on it: an example is a split."""

  source = sources.PTB

  def examples(self, split: str) -> Iterator[dict]:
    file = f'ptb.{SPLITS[split]}.txt'
    yield {'text': _text(downloads.fetch(dataclasses.replace(self.source, file=file)))}


class Enwik8(Published):
  """The first 100 MB of a dump of Wikipedia, cut 90:5:5 where a character ends."""

  source = sources.ENWIK8

  def examples(self, split: str) -> Iterator[dict]:
    content = fetched(self.source, self.source.file.removesuffix('.zip')).read_bytes()
    edges = [0, len(content) - 2 * HELD_OUT, len(content) - HELD_OUT, len(content)]
    start, stop = (_next_character(content, edge) for edge in edges[self.splits.index(split) :][:2])
    yield {'text': content[start:stop]}


class Text8(Enwik8):
  """enwik8's letters, in lower case, and spaces; cut 90:5:5."""

  source = sources.TEXT8


class Cbt(Published):
  """The Children's Book Test: its books, or its questions on common nouns or named entities."""

  source = sources.CBT
  BUILDER_CONFIGS = _configs(books='an example is a book', cn='common nouns', ne='named entities')

  def fields(self) -> dict:
    if self.kind == 'books':
      return super().fields()
    text = tfds.features.Text
    return {
      'context': tfds.features.Sequence(text()),
      'question': text(),
      'answer': text(),
      'options': tfds.features.Sequence(text()),
    }

  def examples(self, split: str) -> Iterator[dict]:
    if self.kind == 'books':
      path = fetched(self.source, f'CBTest/data/cbt_{SPLITS[split]}.txt')
      books = re.split(r'^_BOOK_TITLE_ : .*\n', _text(path), flags=re.M)
      yield from ({'text': book} for book in books if book.strip())
    else:
      size = {'train': '', 'validation': '_2000ex', 'test': '_2500ex'}[split]
      file = f'cbtest_{self.kind.upper()}_{SPLITS[split]}{size}.txt'
      path = fetched(self.source, f'CBTest/data/{file}')
      yield from benchmark_readers.cbt(path.read_bytes(), str(path))


class LambadaOpenai(Published):
  """LAMBADA's test set as OpenAI prepared it for GPT-2: an example is a passage."""

  source = sources.LAMBADA
  splits = ('test',)

  def examples(self, split: str) -> Iterator[dict]:
    path = fetched(self.source)
    yield from benchmark_readers.lambada(path.read_bytes(), str(path))


class Openwebtext(Published):
  """OpenWebText: an example is a page, with its blank lines as in the hub's `openwebtext`."""

  source = sources.OPENWEBTEXT
  splits = ('train',)

  def examples(self, split: str) -> Iterator[dict]:
    for content in _pages(downloads.fetch(self.source)):
      yield {'text': re.sub('\n\n\n+', '\n\n', content).strip()}


def _pages(archive: Path) -> Iterator[str]:
  """Yields the texts in the .xz archives in an archive, in one pass; none goes to the disk."""
  with tarfile.open(archive, 'r|*') as outer:
    for member in outer:
      if member.name.endswith('.xz') and (packed := outer.extractfile(member)):
        with tarfile.open(fileobj=io.BytesIO(packed.read()), mode='r:xz') as inner:
          for page in inner:
            if page.name.endswith('.txt') and (content := inner.extractfile(page)):
              yield utf8(content.read(), page.name)


def _text(path: Path) -> str:
  return utf8(path.read_bytes(), str(path))


def _next_character(content: bytes, at: int) -> int:
  """Returns the first place from `at` on at which a character of UTF-8 begins."""
  while at < len(content) and content[at] & 0xC0 == 0x80:
    at += 1
  return at

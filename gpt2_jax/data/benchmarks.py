"""Benchmarks: the examples of published test sets, from local files."""

import dataclasses
import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path

from gpt2_jax.errors import UserError

FILES = {
    'lambada': ('lambada_test.jsonl',),
    'wikitext-2': ('wikitext-2/test.txt', 'wiki.test.raw', 'wiki.test.tokens', 'test.txt'),
    'hellaswag': ('hellaswag_val*.jsonl',),
}
SPLITS = {'hellaswag': 'validation'}


@dataclasses.dataclass(frozen=True)
class Benchmark:
  """A test set.

  Attributes:
    name: of the benchmark.
    split: which part of it.
    examples: dicts, with the fields of the benchmark.
    sha256: of the file.
    source: the file.
  """

  name: str
  split: str
  examples: Sequence[dict]
  sha256: str
  source: str


def load(name: str, data: str | None = None) -> Benchmark:
  """The examples of a benchmark.

  Args:
    name: of the benchmark.
    data: its file, or a folder that holds it.

  Raises:
    UserError: there is no such benchmark or file, or it can't be read.
  """
  if name not in FILES:
    raise UserError(f'benchmark {name!r} is none of {", ".join(FILES)}.')
  if data is None:
    raise UserError(f'{name}: say with --data where its file is.')
  path = Path(data)
  if path.is_dir():
    found = [file for pattern in FILES[name] for file in sorted(path.glob(pattern))]
    if not found:
      raise UserError(f'{path} holds no file of {name}: wanted {" or ".join(FILES[name])}.')
    path = found[0]
  try:
    content = path.read_bytes()
    text = content.decode()
  except (OSError, UnicodeDecodeError) as e:
    raise UserError(f'cannot read {name} from {path}: {e}.') from None
  examples = [{'text': text}] if name == 'wikitext-2' else _lines(name, path, text)
  return Benchmark(name, SPLITS.get(name, 'test'), examples,
                   hashlib.sha256(content).hexdigest(), str(path))


def _lines(name: str, path: Path, text: str) -> list[dict]:
  wanted = {'lambada': {'text'}, 'hellaswag': {'query', 'endings', 'label'}}[name]
  examples = []
  for i, line in enumerate(re.split('\r?\n', text), 1):
    try:
      examples += [json.loads(line)] if line.strip() else []
      assert not line.strip() or wanted <= examples[-1].keys()
    except (ValueError, AttributeError, AssertionError):
      raise UserError(f'{path}:{i}: wanted an object with {", ".join(sorted(wanted))}.') from None
  return examples

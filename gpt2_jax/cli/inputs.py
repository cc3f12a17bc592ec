"""Prompts, values of options and the opening of a checkpoint, as a user types or stores them."""

import contextlib
import dataclasses
import inspect
import json
import re
import sys
import types
import typing
from collections.abc import Sequence
from types import NoneType
from typing import Annotated, Any

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from gpt2_jax.checkpoints.opening import Opening
from gpt2_jax.core.errors import UserError, brief
from gpt2_jax.core.files import local, parse_json
from gpt2_jax.decoding.options import Options

TYPES = typing.get_type_hints(Options)  # of the options, by name
# what no list of words can spell, with how to write it
AS_JSON = {TYPES['bad_words_ids']: '[[ID,…],…]', TYPES['sequence_bias']: '[[[ID,…],BIAS],…]'}
WORD = re.compile(r"""\s* (?: ("(?:[^"\\]|\\.)*") | '([^']*)' | ([^\s"']\S*) ) (?=\s|$)""", re.X)


@dataclasses.dataclass(frozen=True)
class OpeningFlags(Opening):
  """How --checkpoint is opened; which step of a run stands behind its @."""

  base: Annotated[str | None, tyro.conf.arg(metavar='X')] = None
  """The model that adapters belong to, where the one that they name is not there."""
  ignore_extra: bool = False
  """Take the language model alone from a checkpoint with more in it, such as other heads."""
  step: Annotated[int | str | None, tyro.conf.Suppress] = None


registry = ConstructorRegistry()


@registry.primitive_rule
def _json(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
  if info.type not in AS_JSON:
    return None
  return PrimitiveConstructorSpec(
    nargs=1,
    metavar=AS_JSON[info.type],
    instance_from_str=lambda words: parse_json(words[0]),
    is_instance=lambda value: True,
    str_from_instance=lambda value: [json.dumps(value)],
  )


def given(options: Options) -> dict[str, Any]:
  """Returns the options that are not at their defaults."""
  return {name: value for name, value in vars(options).items() if value != getattr(Options, name)}


def coerce(kind: Any, words: Sequence[str]) -> Any:
  """Returns the value that some words spell, as they would after a flag of a type.

  Raises:
    ValueError: they spell none.
  """
  origin, args = typing.get_origin(kind), typing.get_args(kind)
  if kind in AS_JSON:
    [word] = words
    return parse_json(word)
  if origin in (types.UnionType, typing.Union):
    for arg in sorted(args, key=lambda arg: arg is not NoneType):
      with contextlib.suppress(ValueError):
        return coerce(arg, words)
    raise ValueError
  if origin is tuple and args[-1] is not ...:
    return tuple(coerce(arg, [word]) for arg, word in zip(args, words, strict=True))
  if origin in (tuple, Sequence):
    return (tuple if origin is tuple else list)(coerce(args[0], [word]) for word in words)
  [word] = words
  if kind in (int, float, str):
    return kind(word)
  of_kind = {bool: (True, False), NoneType: (None,)}
  spelled = {str(value): value for value in of_kind.get(kind, args)}  # or of a Literal
  if word not in spelled:
    raise ValueError
  return spelled[word]


def changed(options: Options, name: str, words: Sequence[str]) -> Options:
  """Returns options with one of them as some words say; no words: its default.

  Raises:
    UserError: there is no such option, or they are no value of it.
  """
  name = name.replace('-', '_')
  if not words or name not in TYPES:
    return Options.of(**vars(options) | {name: getattr(Options, name, None)})
  kind: Any = TYPES[name]
  try:
    return dataclasses.replace(options, **{name: coerce(kind, words)})
  except ValueError:
    says = AS_JSON.get(kind) or re.sub(r'\b[a-z.]+\.', '', inspect.formatannotation(kind))
    raise UserError(f'{name} takes {says}, not {" ".join(words)}') from None


def words(line: str) -> list[str]:
  r"""Returns the words of a line. Text in '…' is taken as it is; in "…" it is a JSON string: "\n".

  Raises:
    UserError: a quotation mark has no second one, or JSON knows no such string.
  """
  found, at = [], 0
  while line[at:].strip():
    match = WORD.match(line, at)
    if match is None:
      raise UserError(f'a word is not closed, or not ended by a space: {line[at:].strip()}')
    quoted, plain, bare = match.groups()
    try:
      found.append(json.loads(quoted) if quoted else bare if plain is None else plain)
    except ValueError as e:
      raise UserError(f"{quoted} is no JSON string ({e}); in '…' nothing is escaped.") from None
    at = match.end()
  return found


def utf8(data: bytes, where: str) -> str:
  """Returns the text of some bytes.

  Raises:
    UserError: they are not UTF-8; names the first one that is not.
  """
  try:
    return data.decode()
  except UnicodeDecodeError as e:
    byte = f'byte 0x{data[e.start]:02x} at offset {e.start}'
    raise UserError(f'{where} is not UTF-8: {byte}.') from None


def typed(text: str, where: str) -> str:
  """Returns a text of the system, in which bytes that are no UTF-8 would stand as surrogates."""
  return utf8(text.encode(errors='surrogateescape'), where)


def lines(data: bytes, where: str) -> str:
  """Returns the text of some lines, which may end as Windows ends them, behind a byte order mark."""
  return utf8(data, where).removeprefix('\ufeff').replace('\r\n', '\n')


def piped() -> str:
  """Returns all of standard input."""
  return lines(sys.stdin.buffer.read(), 'standard input')


def ids(text: str) -> list[int]:
  """Returns token ids, with blanks or commas between them, in brackets or not.

  Raises:
    UserError: they are none.
  """
  found = re.fullmatch(r'\s*\[?([\d\s,]+)\]?\s*', text)
  numbers = re.findall(r'\d+', found[1]) if found else []
  if not numbers or max(map(len, numbers)) > 18:
    raise UserError(
      f'--prompt-ids {brief(text)} are no ids: wanted whole numbers with blanks or '
      'commas between them.'
    )
  return [int(number) for number in numbers]


def read_prompts(path: str) -> list[str | list[int]]:
  """Returns the prompts of a file: each line of a .jsonl file has a "prompt", a text or a list of
  ids; elsewhere each line is one.

  Lines with nothing but white space are left out. '-' is standard input.

  Raises:
    UserError: names what can't be read, and where.
  """
  try:
    text = piped() if path == '-' else lines(local(path).read_bytes(), path)
  except OSError as e:
    raise UserError(f'cannot read prompts from {path}: {e.strerror}.') from None
  numbered = [
    (i, line.removesuffix('\r')) for i, line in enumerate(text.split('\n'), 1) if line.strip()
  ]
  if not numbered:
    raise UserError(f'{path} holds no prompt.')
  if not path.endswith('.jsonl'):
    return [line for _, line in numbered]
  prompts = []
  for i, line in numbered:
    try:
      prompt = parse_json(line, {'prompt': (str, list)})['prompt']
    except ValueError:
      prompt = None
    if isinstance(prompt, str):
      prompt = utf8(prompt.encode(errors='surrogatepass'), f'{path}:{i}: the prompt')
    elif not (isinstance(prompt, list) and prompt and all(type(token) is int for token in prompt)):
      raise UserError(
        f'{path}:{i}: wanted {{"prompt": TEXT}} or {{"prompt": [ID, …]}}, not {line[:60]}'
      )
    prompts.append(prompt)
  return prompts

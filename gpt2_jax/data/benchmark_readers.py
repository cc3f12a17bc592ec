"""Benchmarks' files, in the formats they were published in, as lists of examples.

A reader takes a file's bytes and its name (for messages, and where the name says what it holds).
What each gives is told in `benchmarks.py`. Texts are left as they are: to undo a tokenisation is up
to a protocol. A file that is not as published is a UserError with the line.
"""

import contextlib
import csv
import io
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import PurePath

from gpt2_jax.core.errors import UserError, brief
from gpt2_jax.core.files import parse_json
from gpt2_jax.data import text_files
from gpt2_jax.data.text_files import utf8

HELD_OUT_BYTES = 5_000_000  # enwik8 and text8: the last 5 of 100 MB are the test set
WSC = 273  # of the 285 schemas in the collection
PRONOUNS = {'he', 'him', 'his', 'himself', 'she', 'her', 'hers', 'herself'}


@contextlib.contextmanager
def _reading(place: str, wanted: str):
  """Turns an error while an example is parsed into a UserError."""
  try:
    yield
  except (KeyError, IndexError, TypeError, ValueError, AttributeError, RecursionError) as e:
    why = str(e) if len(str(e)) < 300 else f'{str(e)[:280]} …'
    raise UserError(f'{place}: wanted {wanted} ({type(e).__name__}: {why}).') from e


def _texts(*values: object, blank: bool = False) -> None:
  """Raises a ValueError unless all values are texts; blank ones are only with `blank`."""
  for value in values:
    if not isinstance(value, str) or not (blank or value.strip()):
      raise ValueError(f'{brief(value)} is no text, or a blank one')


def _lines(content: bytes, where: str) -> Iterator[tuple[str, str]]:
  """Yields (place, line) of the lines that aren't blank."""
  for number, line in enumerate(utf8(content, where).split('\n'), 1):
    if line.strip():
      yield f'{where}, line {number}', line.removesuffix('\r')


def _words(text: str) -> str:
  return ' '.join(text.split())


def text(content: bytes, where: str) -> list[dict]:
  """Reads a text as one example. In a copy with CRLF, no word ends in a carriage return."""
  whole = utf8(content, where).replace('\r\n', '\n')
  return [{'text': whole}] if whole.strip() else []


def last_bytes(content: bytes, where: str) -> list[dict]:
  """Reads the test set of enwik8 or text8, from all of it or from a file of the test set alone."""
  held_out = content[-HELD_OUT_BYTES:]
  return [{'text': held_out}] if held_out.strip() else []


def lambada(content: bytes, where: str) -> list[dict]:
  examples = []
  for place, line in _lines(content, where):
    with _reading(place, '{"text": TEXT}'):
      passage = parse_json(line)['text']
      _texts(passage)
    examples.append({'text': passage})
  return examples


def cbt(content: bytes, where: str) -> list[dict]:
  """Reads lines `1 SENTENCE` to `20 SENTENCE`, then `21 QUESTION⇥ANSWER⇥⇥OPTION|…|OPTION`."""
  examples, context = [], []
  for place, line in _lines(content, where):
    number, _, sentence = line.partition(' ')
    with _reading(place, f"the line {len(context) + 1} of a question of the Children's Book Test"):
      if int(number) != len(context) + 1:
        raise ValueError(number)
      if len(context) < 20:
        context.append(sentence.strip())
        continue
      question, answer, *_, options = (part.strip() for part in sentence.split('\t'))
      options = options.split('|')
      if 'XXXXX' not in question or answer not in options:
        raise ValueError('the question has no XXXXX, or its answer is not among the options')
    examples.append({'context': context, 'question': question, 'answer': answer, 'options': options})
    context = []
  if context:
    raise UserError(f'{where} ends in the middle of a question: it is cut short.')
  return examples


def _clean(text: str) -> str:
  """Removes WikiHow's marks, as in lm-evaluation-harness' tasks/hellaswag/utils.py."""
  return re.sub(r'\[.*?\]', '', text.strip().replace(' [title]', '. ')).replace('  ', ' ')


def hellaswag(content: bytes, where: str) -> list[dict]:
  """Reads lines as published (`ctx_a`, `ctx_b`, `activity_label`), or with a `query` made of them."""
  examples = []
  for place, line in _lines(content, where):
    with _reading(place, 'an example of HellaSwag with its label'):
      row = parse_json(line)
      query, endings, label = row.get('query'), list(row['endings']), int(row['label'])
      _texts(*endings, blank=True)
      if query is None:
        _texts(row['activity_label'], row['ctx_a'], row['ctx_b'], blank=True)
        query = _clean(f'{row["activity_label"]}: {row["ctx_a"]} {row["ctx_b"].capitalize()}')
        endings = [_clean(ending) for ending in endings]
      _texts(query)
      if len(endings) != 4 or not 0 <= label < 4:
        raise ValueError(f'{len(endings)} endings, label {label}')
    examples.append({'query': query, 'endings': endings, 'label': label})
  return examples


def winogrande(content: bytes, where: str) -> list[dict]:
  examples = []
  for place, line in _lines(content, where):
    with _reading(place, 'an example of Winogrande with its answer, 1 or 2'):
      row = parse_json(line)
      example = {key: row[key] for key in ('sentence', 'option1', 'option2', 'answer')}
      _texts(*example.values())
      if '_' not in example['sentence'] or example['answer'] not in ('1', '2'):
        raise ValueError(f'sentence {brief(example["sentence"])}, answer {brief(example["answer"])}')
    examples.append(example)
  return examples


def _schema(left: str, pronoun: str, right: str, options: list[str], label: int) -> dict:
  left, pronoun, right = _words(left), _words(pronoun), _words(right)
  options = [_words(option) for option in options]
  if not pronoun or len(options) != 2 or not all(options) or label not in (0, 1):
    raise ValueError(f'pronoun {brief(pronoun)}, options {brief(options)}, label {label}')
  gap = '' if len(right) == 1 else ' '  # a full stop
  return {
    'text': f'{left} [{pronoun}]{gap}{right}'.strip(),
    'options': options,
    'answer': options[label],
  }


def wsc273(content: bytes, where: str) -> list[dict]:
  """Reads WSCollection.xml, or the same as JSON, a list or lines.

  The JSON fields are text, pronoun, pronoun_loc, options and label, as in the hub's `winograd_wsc`.
  """
  if content.lstrip().startswith(b'<'):
    return _wsc_xml(content, where)
  whole = content.lstrip().startswith(b'[')
  examples = []
  for place, line in [(where, utf8(content, where))] if whole else _lines(content, where):
    with _reading(place, 'text, pronoun, pronoun_loc, options and label of a Winograd schema'):
      for row in parse_json(line) if whole else [parse_json(line)]:
        at, pronoun, whole_text = int(row['pronoun_loc']), row['pronoun'], row['text']
        _texts(pronoun, whole_text)
        if at < 0 or whole_text[at : at + len(pronoun)] != pronoun:
          raise ValueError(f'{brief(pronoun)} is not at {at} of {brief(whole_text)}')
        examples.append(
          _schema(
            whole_text[:at],
            pronoun,
            whole_text[at + len(pronoun) :],
            list(row['options']),
            int(row['label']),
          )
        )
  return examples[:WSC]


def _wsc_xml(content: bytes, where: str) -> list[dict]:
  try:
    root = ElementTree.fromstring(content)
  except (ElementTree.ParseError, ValueError, LookupError) as e:  # the last two of its encoding
    raise UserError(f'{where} is not well-formed XML ({e}): fetch it again.') from e
  examples = []
  for number, schema in enumerate(root.iter('schema'), 1):
    with _reading(f'{where}, schema {number}', 'txt1, pron, txt2, two answers and correctAnswer'):
      right = re.search('[AB]', schema.findtext('correctAnswer') or '')
      examples.append(
        _schema(
          schema.findtext('text/txt1') or '',
          schema.findtext('text/pron') or '',
          schema.findtext('text/txt2') or '',
          [answer.text or '' for answer in schema.findall('answers/answer')],
          'AB'.index(right[0]) if right else -1,
        )
      )
  return examples[:WSC]


def crows_pairs(content: bytes, where: str) -> list[dict]:
  columns = ('sent_more', 'sent_less', 'stereo_antistereo', 'bias_type')
  examples = []
  csv.field_size_limit(text_files.MAX_RECORD)
  rows = csv.DictReader(io.StringIO(utf8(content, where), newline=''))
  try:
    for number, row in enumerate(rows, 1):
      with _reading(f'{where}, pair {number}', f'the columns {", ".join(columns)}'):
        example = {name: row[name].strip() for name in columns}
        _texts(*example.values())
        if example['stereo_antistereo'] not in ('stereo', 'antistereo'):
          raise ValueError(f'stereo_antistereo is {brief(example["stereo_antistereo"])}')
      examples.append(example)
  except csv.Error as e:
    raise UserError(f'{where}, pair {len(examples) + 1}: {e}. Fetch it again.') from e
  return examples


def winobias(content: bytes, where: str) -> list[dict]:
  """Reads lines `1 [The REFERENT] … [PRONOUN] …`; the file's name has their side and type."""
  named = re.match(r'(pro|anti)_stereotyped_type([12])\.', PurePath(where).name)
  if not named:
    raise UserError(
      f'{where}: a file of WinoBias keeps its name, for example '
      'pro_stereotyped_type1.txt.test, since it alone says what its sentences are.'
    )
  examples = []
  for place, line in _lines(content, where):
    line = re.sub(r'^\d+\s+', '', line).strip()
    marked = [_words(part) for part in re.findall(r'\[(.*?)\]', line)]
    with _reading(place, 'a sentence with a [referent] and its [pronoun]'):
      pronoun = next((part for part in marked if part.lower() in PRONOUNS), None)
      referent = next((part for part in marked if part.lower() not in PRONOUNS), None)
      if not pronoun or not referent:
        raise ValueError(f'in brackets: {brief(marked)}')
    sentence = re.sub(r'\[\s*(.*?)\s*\]', r'\1', line)
    examples.append(
      {
        'sentence': sentence,
        'pronoun': pronoun,
        'referent': referent,
        'stereotyped': named[1] == 'pro',
        'type': named[2],
      }
    )
  return examples

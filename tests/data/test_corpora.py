"""Corpora as people have them: every kind of file, packed, damaged, linked, changing."""

import bz2
import csv
import gzip
import hashlib
import io
import json
import lzma
import os
import sys
import time
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from gpt2_jax.core.errors import UserError
from gpt2_jax.data import (
  corpora,
  corpus_parts,
  labelled_texts,
  listing,
  prepare,
  records,
  sections,
  shards,
  text_files,
  token_store,
)
from gpt2_jax.tokenizer import bpe

pyarrow = pytest.importorskip('pyarrow')
parquet = pytest.importorskip('pyarrow.parquet')
zstandard = pytest.importorskip('zstandard')

TEXTS = ['one "two", three\n\nfour', ' é日本\tx\r\ny ', "it's; 1,000", 'last']
PACKS = {
  '': bytes,
  '.gz': gzip.compress,
  '.zst': zstandard.compress,
  '.xz': lzma.compress,
  '.bz2': bz2.compress,
}


def table(delimiter: str, texts: list[str]) -> bytes:
  f = io.StringIO(newline='')
  csv.writer(f, delimiter=delimiter).writerows([['id', 'text'], *enumerate(texts)])
  return f.getvalue().encode()


def rows(texts: list[str]) -> list[dict]:
  return [{'id': i, 'text': text} for i, text in enumerate(texts)]


def parquet_of(column, **options) -> bytes:
  f = io.BytesIO()
  parquet.write_table(pyarrow.table({'id': range(len(column)), 'text': column}), f, **options)
  return f.getvalue()


def line_of(row: dict) -> str:
  return json.dumps(row, ensure_ascii=False) + '\n'


KINDS = {  # of files that hold TEXTS
  '.jsonl': ''.join(map(line_of, rows(TEXTS))).encode(),
  '.ndjson': '\n'.join(map(json.dumps, rows(TEXTS))).encode(),
  'array.jsonl': json.dumps(rows(TEXTS)).encode(),
  '.json': json.dumps(rows(TEXTS), indent=2).encode(),
  'strings.json': b'\xef\xbb\xbf' + json.dumps(TEXTS).encode(),
  'lines.json': ''.join(map(line_of, rows(TEXTS))).encode(),
  'objects.json': '\n'.join(json.dumps(row, indent=1) for row in rows(TEXTS)).encode(),
  '.csv': b'\xef\xbb\xbf' + table(',', TEXTS),
  '.tsv': table('\t', TEXTS),
}
FILES = {kind + pack: PACKS[pack](content) for kind, content in KINDS.items() for pack in PACKS}
FILES |= {'.txt' + pack: PACKS[pack]('\ufeffHällo,\n wörld\n'.encode()) for pack in PACKS}
FILES |= {
  '.parquet': parquet_of(TEXTS, row_group_size=2),
  'zstd.parquet': parquet_of(TEXTS, compression='zstd'),
  'plain.parquet': parquet_of(TEXTS, use_dictionary=False, write_page_checksum=True),
}


def read(path, field: str = 'text') -> list:
  corpus = corpora.open_corpus(f'text:{path}')
  return [d.text for piece in corpus.pieces for d in corpora.documents(piece, field)]


def refused(path, match: str, field: str = 'text') -> None:
  with pytest.raises(UserError, match=match) as caught:
    read(path, field)
  assert '\n' not in str(caught.value) and len(str(caught.value)) < 700
  assert str(path) in str(caught.value)


def settings(path, **fields) -> prepare.Settings:
  return prepare.Settings(f'text:{path}', **{'tokenizer': 'byte', 'val_fraction': 0.1} | fields)


# --- what is read -----------------------------------------------------------------------------


@pytest.mark.parametrize('name', FILES)
def test_every_kind_holds_the_same_documents(tmp_path, monkeypatch, name):
  monkeypatch.setattr(corpora, 'PIECE_BYTES', 20)
  (tmp_path / f'x{name}').write_bytes(FILES[name])
  want = ['Hällo,\n wörld\n'] if name.startswith('.txt') else TEXTS
  assert read(tmp_path / f'x{name}') == want  # named alone
  assert read(tmp_path) == want  # in a folder
  assert read(f'{tmp_path}/**/x*') == want


def test_a_file_of_several_frames_is_read_to_its_end(tmp_path):
  for pack, packed in list(PACKS.items())[1:]:
    path = tmp_path / f'x.txt{pack}'
    path.write_bytes(packed(b'one ') + packed(b'') + packed(b'two'))
    assert read(path) == ['one two']
    path.write_bytes(path.read_bytes()[:-1])
    refused(path, 'damaged or cut short')


def test_texts_longer_than_what_is_read_at_a_time(tmp_path, monkeypatch):
  monkeypatch.setattr(text_files, 'CHUNK', 7)
  rng = np.random.default_rng(0)
  texts = [''.join(rng.choice(list('ab,"\n\\é日\U0001f600'), 300)) for _ in range(8)]
  for name, content in (
    ('x.json', json.dumps(texts, ensure_ascii=False).encode()),
    ('y.json', ''.join(map(line_of, rows(texts))).encode()),
    ('x.csv', table(',', texts)),
    ('x.tsv.xz', lzma.compress(table('\t', texts))),
  ):
    (tmp_path / name).write_bytes(content)
    assert read(tmp_path / name) == texts


def test_nulls_are_passed_over_and_counted(tmp_path, capsys):
  some = ['a b c', None, 'd e', '']
  (tmp_path / 'a.jsonl').write_text(''.join(line_of(row) for row in rows(some)))
  (tmp_path / 'b.json').write_text(json.dumps(rows(some)))
  (tmp_path / 'c.csv').write_bytes(table(',', some))
  (tmp_path / 'd.parquet').write_bytes(parquet_of(some))
  made = prepare.ensure_store(settings(tmp_path, split='tail'), tmp_path / 's', workers=1)
  assert made.splits['train'].documents == 8
  assert f'text:{tmp_path}: 8 texts are empty or null' in capsys.readouterr().err


@pytest.mark.parametrize(
  'name,content,says',
  [
    ('x.jsonl', b'{"text": "a"}\n{"text": [1]}', r"at byte 14: 'text' is a list, not a text: \[1\]"),
    ('x.jsonl', b'{"text": 3}', "at byte 0: 'text' is a number, not a text: 3.*text_field"),
    ('x.jsonl', b'{"text": {"a": "b"}}', "'text' is an object"),
    ('x.jsonl', b'{"text": true}', "'text' is true or false"),
    ('x.jsonl', b'{"body": "a"}', "has no field 'text'.*text_field"),
    ('x.jsonl', b'3', 'is a number, not an object'),
    ('x.jsonl', b'{"text": "a"', 'not a line of JSON'),
    ('x.jsonl', b'[' * 10**5 + b'\n', 'line 1: not JSON'),
    ('x.jsonl', b'{"text":' + b'[' * 10**5, 'not a line of JSON'),
    ('x.jsonl', b'{"text":' + b'1' * 10**5 + b'}', 'not a line of JSON'),
    (
      'x.jsonl.gz',
      gzip.compress(b'{"text": "a"}\n\n{"text": 1}', mtime=0),
      "line 3: 'text' is a number",
    ),
    ('x.jsonl.gz', b'', 'x.jsonl.gz is damaged or cut short .it is empty'),
    ('x.json', b'[{"text": "a"}', 'line 1: an array goes on with a comma or ends with ]'),
    ('x.json', b'[{"text": "a"},', 'the array has no end'),
    ('x.json', b'[{"text": "a"}\n{"text": "b"}]', 'line 2: an array goes on with a comma'),
    ('x.json', b'[{"text": "a"}] x', 'something stands behind the array'),
    ('x.json', b'[{"text": "a"},\n\n{"text": 1}]', r"record 2 \(line 3\): 'text' is a number"),
    ('x.json', b'{"text": {"0": "a"}}', "record 1 .line 1.: 'text' is an object"),
    ('x.json', b'[["a"]]', 'record 1 .line 1. is a list, not an object'),
    ('x.json', b'This is prose.', 'line 1: not JSON'),
    ('x.csv', b'id,text\n1,a\n2,b,c\n', 'line 3 has 3 columns, the first line 2: .*quotation'),
    ('x.csv', b'id,text\n1,"a\nb"\n2,"c\n', 'line 4: unexpected end of data'),
    ('x.csv', b'id,text\n1,"a"b\n', "line 2: ',' expected after '\"'"),
    ('x.csv', b'id;text\n1;a\n', r"no field 'text', but the columns \['id;text'\]"),
    ('x.csv', b'text,text\na,b\n', "2 columns 'text'"),
    ('x.csv', b'id,text\n1,\xff\n', 'line 2 is not UTF-8 .byte 2: 0xff'),
    ('x.txt', 'né'.encode() * 3 + b'\xe9', r'not UTF-8 \(byte 9: 0xe9\).*iconv'),
    ('x.txt', 'text'.encode('utf-16'), 'not UTF-8 .byte 0: 0xff., but UTF-16.*iconv -f utf-16'),
    ('x.txt.gz', b'no gzip', 'x.txt.gz is damaged'),
    ('x.parquet', b'PAR1 no parquet PAR1', 'x.parquet is damaged'),
    ('x.parquet', parquet_of([['a'], ['b']]), r"row 1: 'text' is a list, not a text: \['a'\]"),
    ('x.parquet', parquet_of([1, 2]), "row 1: 'text' is a number"),
    ('x.tar.gz', gzip.compress(b'x', mtime=0), 'is to be unpacked first'),
    ('x.zip', b'PK', 'is to be unpacked first'),
    ('x.parquet.gz', b'', 'is to be unpacked first'),
  ],
)
def test_what_cannot_be_used_is_one_line(tmp_path, name, content, says):
  (tmp_path / name).write_bytes(content)
  refused(tmp_path / name, says)


@hypothesis.settings(
  deadline=None,
  max_examples=200,
  suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
@hypothesis.given(
  st.sampled_from(sorted(FILES)),
  st.lists(
    st.tuples(
      st.sampled_from(['flip', 'cut', 'insert']),
      st.floats(0, 0.999),
      st.binary(min_size=1, max_size=4),
    ),
    min_size=1,
    max_size=3,
  ),
)
def test_a_damaged_file_is_documents_or_one_line(tmp_path, name, changes):
  content = FILES[name]
  for how, where, what in changes:
    at = int(where * len(content))
    behind = {'flip': content[at + 1 :], 'cut': b'', 'insert': content[at:]}[how]
    content = content[:at] + what * (how != 'cut') + behind
  path = tmp_path / f'x{name}'
  path.write_bytes(content)
  began = time.monotonic()
  try:
    assert all(isinstance(text, str) for text in read(path))
  except UserError as e:
    assert '\n' not in str(e) and str(path) in str(e) and len(str(e)) < 700
  assert time.monotonic() - began < 5


# --- bounds -----------------------------------------------------------------------------------


@pytest.mark.parametrize('pack', ['.gz', '.zst'])
def test_what_is_too_long_is_refused_before_it_is_held(tmp_path, monkeypatch, pack):
  monkeypatch.setattr(text_files, 'MAX_RECORD', 2**16)
  monkeypatch.setattr(text_files, 'CHUNK', 2**12)
  held = []
  check = text_files.check_size
  monkeypatch.setattr(text_files, 'check_size', lambda n, where: (held.append(n), check(n, where)))
  for name, begin, between, end in (
    ('x.jsonl', '{"text": "', 'a' * 100, '"}'),
    ('x.json', '[{"text": "', 'a' * 100, '"}]'),
    ('x.csv', 'text\n', 'a' * 100, '\n'),
    ('y.csv', 'text\n"', 'a\n' * 50, '"\n'),
  ):
    path = tmp_path / (name + pack)
    path.write_bytes(PACKS[pack]((begin + between * 10_000 + end).encode()))
    refused(path, 'line [12]: a row of more than|line [12] is longer than 65,536 bytes')
    (tmp_path / name).write_text(begin + between * 10_000 + end)
    refused(tmp_path / name, 'a row of more than|is longer than 65,536 bytes')
  assert max(held) < 2 * 2**16


def test_a_long_text_gives_the_tokens_it_gives_as_a_whole(tmp_path, monkeypatch):
  monkeypatch.setattr(text_files, 'LONG', 300)
  monkeypatch.setattr(text_files, 'CHUNK', 64)
  rng = np.random.default_rng(0)
  parts = ['the', ' model', '\n', '\n\n', '  ', ' x', "'ll", '日本', '12', '\t', '--', ' \n ', 'é']
  for t in (bpe.load('byte'), bpe.load('gpt2'), bpe.train_bpe(['the model of the model\n'] * 9, 270)):
    for _ in range(5):
      text = ''.join(rng.choice(parts, 900))
      (tmp_path / 'x.txt').write_text(text)
      opened = text_files.plain_text(str(tmp_path / 'x.txt'))
      assert isinstance(opened, text_files.LongText) and len(opened) == len(text)
      assert len(list(sections.sections(opened, t))) > 3
      for form in (text, opened):
        tokens = np.concatenate(list(sections.encode(form, t)))
        assert tokens.tolist() == [t.eot, *t.encode(text)]


@pytest.mark.parametrize('split', ['document', 'tail'])
@pytest.mark.parametrize('name', ['x.txt', 'x.txt.xz'])
def test_a_long_text_makes_the_same_store(tmp_path, monkeypatch, name, split):
  texts = [f'{i}: words of a line \n' * 60 for i in range(6)] + ['one line ' * 99]
  for i, text in enumerate(texts):
    (tmp_path / 'c').mkdir(exist_ok=True)
    (tmp_path / 'c' / f'{i}{name}').write_bytes(
      PACKS[Path(name).suffix.replace('.txt', '')](text.encode())
    )
  s = settings(tmp_path / 'c', split=split, tokenizer='bpe:300', val_fraction=0.4, split_seed=1)
  whole = prepare.ensure_store(s, tmp_path / 'whole', workers=1)
  monkeypatch.setattr(text_files, 'LONG', 100)
  monkeypatch.setattr(text_files, 'CHUNK', 64)
  assert isinstance(
    next(corpora.documents(corpora.open_corpus(s.corpus).pieces[0], '')).text, text_files.LongText
  )
  assert prepare.ensure_store(s, tmp_path / 'parts', workers=1).sha256 == whole.sha256


def test_a_text_without_white_space_is_refused(tmp_path, monkeypatch):
  monkeypatch.setattr(text_files, 'LONG', 100)
  monkeypatch.setattr(text_files, 'CHUNK', 64)
  monkeypatch.setattr(sections, 'MAX_WORDLESS', 1000)
  (tmp_path / 'x.txt').write_text('a' * 5000)
  with pytest.raises(UserError, match=r'x.txt: a document has 1,\d\d\d characters without a white'):
    prepare.ensure_store(settings(tmp_path / 'x.txt', split='tail'), tmp_path / 's', workers=1)


def test_a_million_blanks_are_refused(tmp_path):
  """They make tiktoken panic, with a trace of Rust."""
  (tmp_path / 'x.txt').write_text('a' + ' ' * 1_000_000 + 'b')
  with pytest.raises(UserError, match='900,000 or more white spaces in a row'):
    prepare.ensure_store(
      settings(tmp_path / 'x.txt', split='tail', tokenizer='gpt2'), tmp_path / 's', workers=1
    )
  blanks = (' ' * 800_000 + 'b') * 2
  tokens = np.concatenate(list(sections.encode(blanks, bpe.load('gpt2'))))
  assert bpe.load('gpt2').decode(tokens[1:]) == blanks


# --- which files ------------------------------------------------------------------------------


def names(found) -> list[str]:
  return [os.path.basename(file.path) for file in found[0]]


def test_each_real_file_once_however_many_links(tmp_path):
  """Links to the folder itself, to a sibling, to files in and outside of it, and hard links."""
  data, outside = tmp_path / 'data', tmp_path / 'outside'
  (data / 'run1' / 'deep').mkdir(parents=True)
  outside.mkdir()
  for path in (
    data / 'a.txt',
    data / 'run1' / 'b.txt',
    data / 'run1' / 'deep' / 'c.jsonl',
    outside / 'd.txt',
  ):
    path.write_text('{}')
  for link, target in (
    (data / 'self', '.'),
    (data / 'self2', '.'),
    (data / 'latest', 'run1'),
    (data / 'run1' / 'up', '..'),
    (data / 'more', outside),
    (data / 'again', outside),
    (data / '0.txt', 'a.txt'),
    (data / 'e.txt', 'nowhere'),
    (data / 'loop', 'loop'),
  ):
    link.symlink_to(target)
  os.link(data / 'a.txt', data / 'z.txt')
  (data / 'x.png').write_bytes(b'')
  (data / '.hidden').mkdir()
  began = time.monotonic()
  found = listing.find('text:d', str(data))
  assert [os.path.relpath(file.path, data) for file in found[0]] == [
    'a.txt',
    'again/d.txt',
    'run1/b.txt',
    'run1/deep/c.jsonl',
  ]
  (note,) = found[1]
  assert note == (
    'text:d: files read: 4, passed over: links: 7, broken links: 2, hidden: 1, .png: 1.'
  )
  for pattern in ('**', '**/*', '*/**/*', '**/**/*.*'):
    assert {'b.txt', 'c.jsonl'} <= set(names(listing.find('s', f'{data}/{pattern}')))
    real = [os.path.realpath(file.path) for file in listing.find('s', f'{data}/{pattern}')[0]]
    assert len(set(real)) == len(real)
  assert time.monotonic() - began < 5


def test_patterns_are_those_of_glob(tmp_path, monkeypatch):
  import glob

  for name in ('a/b/x.txt', 'a/y.txt', 'a/.z.txt', 'x.txt', 'y[1].txt', '.h/x.txt', 'a/b/c/x.md'):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text('text')
  monkeypatch.chdir(tmp_path)
  for pattern in (
    '*',
    '**',
    '**/*',
    '*.txt',
    'a/**/*.txt',
    '**/x.*',
    './*',
    f'{tmp_path}/*/*',
    '.h/*',
    'y[[]1].txt',
    '[xy].txt',
    '**/b/**',
    '*/b/?.txt',
    'a/b/x.txt',
    'y[1].txt',
    '.*/x.txt',
  ):
    want = sorted({p for p in glob.glob(pattern, recursive=True) if os.path.isfile(p)})
    want = [pattern] if os.path.isfile(pattern) else want
    assert [file.path for file in listing.find('s', pattern)[0]] == want, pattern


def test_folders_without_text(tmp_path, monkeypatch):
  (tmp_path / 'empty').mkdir()
  os.mkfifo(tmp_path / 'pipe.txt')
  (tmp_path / 'x.txt').mkdir()
  (tmp_path / 'gone').symlink_to('nowhere')
  for match, path in (
    ('no such file or folder, or an empty one', 'empty'),
    ('no such file or folder', 'nowhere*'),
    ('a pipe, a device or a broken link', 'pipe.txt'),
    ('a broken link', 'gone'),
    (r'nothing there is text \(.*pipes and devices: 1', '*.txt'),
    (r'nothing there is text \(.*folders: 1', 'x.t*'),
    ('no such file or folder', 'a\0b'),
  ):
    with pytest.raises(UserError, match=match):
      listing.find('text:x', f'{tmp_path}/{path}')
  (tmp_path / 'x.txt' / 'y.txt').write_text('a')
  assert names(listing.find('text:x', str(tmp_path / 'x.txt'))) == ['y.txt']
  scan = os.scandir

  def refuses(path):
    if str(path).endswith('empty'):
      raise PermissionError(13, 'Permission denied')
    return scan(path)

  monkeypatch.setattr(os, 'scandir', refuses)
  (note,) = listing.find('text:x', str(tmp_path))[1]
  assert 'unreadable folders: 1' in note


def test_a_store_in_the_folder_of_its_texts_is_no_text(tmp_path, monkeypatch):
  for i in range(9):
    (tmp_path / f'{i}.txt').write_text('some words\n' * 9)
  s = settings(tmp_path, split='tail', tokenizer='bpe:260')
  monkeypatch.setattr(corpus_parts, 'encode_all', lambda *_: 1 / 0)
  with pytest.raises(ZeroDivisionError):
    prepare.ensure_store(s, tmp_path / 's', workers=1)
  monkeypatch.undo()
  (tmp_path / 's' / 'tokenizer' / 'done').unlink()  # as if killed before
  made = prepare.ensure_store(s, tmp_path / 's', workers=1)
  assert made.splits['train'].documents == 9
  assert prepare.ensure_store(s, tmp_path / 's').sha256 == made.sha256  # nothing has changed


def test_files_that_vanish_or_change_are_noticed(tmp_path, monkeypatch):
  path = tmp_path / 'a.txt'
  for kind in ('.txt', '.jsonl', '.parquet', '.csv.gz'):
    other = tmp_path / f'b{kind}'
    other.write_bytes(FILES[kind])
    corpus = corpora.open_corpus(f'text:{other}')
    other.unlink()
    with pytest.raises(UserError, match=rf'b{kind} (can\'t be read|is damaged).*No such'):
      list(corpora.documents(corpus.pieces[0], 'text'))
  path.write_text('one two\n' * 50)
  reader = corpora.READERS['text']

  def grows(piece, field):
    yield from reader(piece, field)
    with open(path, 'a') as f:
      f.write('more')

  monkeypatch.setitem(corpora.READERS, 'text', grows)
  s = settings(path, split='tail')
  with pytest.raises(UserError, match='has changed while it was read'):
    prepare.ensure_store(s, tmp_path / 's', workers=1)
  assert not token_store.is_store(tmp_path / 's')
  monkeypatch.setitem(corpora.READERS, 'text', reader)
  made = prepare.ensure_store(s, tmp_path / 's', workers=1)
  assert sum(map(len, made.splits.values())) == 50 * 8 + 4 + 2


def test_an_error_in_another_process_is_the_same_line(tmp_path, monkeypatch):
  monkeypatch.setattr(corpus_parts, 'MIN_PART_BYTES', 1000)
  for i in range(3):
    (tmp_path / f'{i}.jsonl').write_text('{"text": "some words"}\n' * 100)
  (tmp_path / '2.jsonl').write_text('{"text": "a"}\n{"text": 7}\n' + ' ' * 3000)
  with pytest.raises(UserError, match=r"2.jsonl at byte 14: 'text' is a number, not a text: 7"):
    prepare.ensure_store(settings(tmp_path), tmp_path / 's', workers=2)


# --- stores that were made before -------------------------------------------------------------


def _words(seed: int, n: int) -> str:
  words = "the of token loss é 日本 x1 'll 2024 -- <|endoftext|> a\n b  c\n\n".split(' ')
  draws = hashlib.shake_128(str(seed).encode()).digest(n)
  return ' '.join(words[i % len(words)] for i in draws) + '\n'


GOLDEN = {  # of commit 7cef8f4
  ('byte', 'document'): 'e4a48e147be32c14adb5749eda290908cf6f3bec64adb1f8031433ffbd57c888',
  ('byte', 'tail'): '73b0da839471c8dedd98d0e3dbbdfb5bc21e6ef675e9f573af3fdb9437f4fae1',
  ('gpt2', 'document'): 'ed40be1cfbbd85b4ae76d4807549334443b48157a62f1c6a0a5ab9b341ef9fae',
  ('gpt2', 'tail'): 'fe5c4f40095adcb6bd3d2cc130a2b769bedfe7231e033f115d521c9f09881c8b',
}


@pytest.mark.parametrize('kind', ['byte', 'gpt2'])
@pytest.mark.parametrize('split', ['document', 'tail'])
def test_stores_are_those_of_the_first_release(tmp_path, monkeypatch, kind, split):
  monkeypatch.setattr(corpora, 'PIECE_BYTES', 5000)
  (tmp_path / 'c' / 'deep').mkdir(parents=True)
  write = lambda name, content: (tmp_path / 'c' / name).write_bytes(content)
  lines = ''.join(
    json.dumps({'text': _words(i, 40) if i % 7 else ''}, ensure_ascii=bool(i % 2))
    + '\n' * (1 + (i % 11 == 0))
    for i in range(150)
  ).encode()
  write('a.txt', ('\ufeff' + _words(1000, 3000)).encode())
  write('deep/b.md', _words(1001, 2000).encode())
  write('deep/c.py', _words(1002, 500).replace('\n', '\r\n').encode())
  write('.hidden.txt', b'never')
  write('empty.txt', b'')
  write('d.jsonl', lines)
  write('e.jsonl.gz', gzip.compress(lines[: lines.index(b'\n', 4000)]))
  write('f.jsonl.zst', zstandard.compress(lines[: lines.index(b'\n', 6000)]))
  write(
    'g.parquet', parquet_of([_words(i, 30) if i % 5 else None for i in range(60)], row_group_size=16)
  )
  made = prepare.ensure_store(
    settings(tmp_path / 'c', split=split, tokenizer=kind), tmp_path / 's', workers=1
  )
  assert made.sha256 == GOLDEN[kind, split]


def test_a_new_corpus_is_two_rows(tmp_path, monkeypatch):
  """As docs/extending.md says: texts of which this library knows nothing."""

  def open_numbers(spec: str, rest: str) -> corpora.Corpus:
    pieces = [corpora.Piece('number', '', i, i + 1, 10) for i in range(int(rest))]
    return corpora.Corpus(spec, 'CC0', {'numbers': int(rest)}, pieces)

  def read_number(piece: corpora.Piece, field: str):
    yield corpora.Document(f'{field} {piece.start}')

  monkeypatch.setitem(corpora.CORPORA, 'numbers', ('COUNT', open_numbers))
  monkeypatch.setitem(corpora.READERS, 'number', read_number)
  wanted = prepare.Settings('numbers:20', 'byte', val_fraction=0.3)
  made = prepare.ensure_store(wanted, tmp_path / 's', workers=1)
  texts = []
  for split in made.splits.values():
    tokens = split.read(0, len(split))
    starts = [*np.flatnonzero(tokens == made.eot), len(tokens)]
    texts += [made.tokenizer.decode(tokens[a + 1 : b]) for a, b in zip(starts, starts[1:])]
  assert sorted(texts) == sorted(f'text {i}' for i in range(20))
  assert made.manifest['source']['licence'] == 'CC0' and made.manifest['source']['numbers'] == 20
  assert prepare.ensure_store(wanted, tmp_path / 's').sha256 == made.sha256
  for spec in ('numbers', 'letters:3'):
    with pytest.raises(UserError, match=r'none of: .*, bin:FOLDER, numbers:COUNT\.'):
      corpora.open_corpus(spec)


# --- other doors ------------------------------------------------------------------------------


def data_section(path):
  from configs import base

  data = base.get_config().data
  data.update(corpus=f'text:{path}', val_fraction=0.4)
  return data


def test_labelled_texts_in_every_kind_of_table(tmp_path):
  examples = [(f'text "{i}",\nof é', 'ab'[i % 2]) for i in range(20)]
  as_rows = [{'text': text, 'label': label} for text, label in examples]
  f = io.StringIO(newline='')
  csv.writer(f).writerows([('label', 'text'), *((b, a) for a, b in examples)])
  g = io.BytesIO()
  parquet.write_table(
    pyarrow.table({'text': [a for a, _ in examples], 'label': [b for _, b in examples]}), g
  )
  files = {
    'a.csv': f.getvalue().encode(),
    'a.parquet': g.getvalue(),
    'a.json': json.dumps(as_rows).encode(),
    'a.jsonl': ''.join(map(line_of, as_rows)).encode(),
    'a.jsonl.gz': gzip.compress(''.join(map(line_of, as_rows)).encode()),
  }
  opened = {}
  for name, content in files.items():
    (tmp_path / name).write_bytes(content)
    opened[name] = labelled_texts.open_labelled(data_section(tmp_path / name), bpe.load('byte'), 8)
  assert len({data.sha256 for data in opened.values()}) == 1
  assert {data.labels for data in opened.values()} == {('a', 'b')}


@pytest.mark.parametrize(
  'name,content,match',
  [
    ('a.jsonl', '{"text": "a", "label": null}\n', "line 1: 'label' is null"),
    ('a.jsonl', '{"text": "a", "label": {"b": 1}}\n', "line 1: 'label' is an object"),
    ('a.jsonl', '{"text": "a", "label": 0.5}\n', "line 1: 'label' is a number"),
    ('a.jsonl', '"a"\n', 'line 1 is a text, not an object'),
    ('a.csv', 'text,label\na,x\nb,\n', "line 3: 'label' is null"),
    ('a.csv', 'text,class\na,x\n', r"no field 'label', but the columns \['text', 'class'\]"),
    ('a.txt', 'prose', 'a classifier learns from text:FILE.* is another file'),
  ],
)
def test_labelled_files_that_cannot_be_used(tmp_path, name, content, match):
  (tmp_path / name).write_text(content)
  with pytest.raises(UserError, match=match):
    labelled_texts.label_names(data_section(tmp_path / name))


def test_labelled_nulls_are_counted(tmp_path):
  texts = [{'text': f'{i}' if i % 4 else None, 'label': i % 2} for i in range(40)]
  (tmp_path / 'a.jsonl').write_text(''.join(map(line_of, texts)))
  opened = labelled_texts.open_labelled(data_section(tmp_path / 'a.jsonl'), bpe.load('byte'), 8)
  assert sum(map(len, opened.splits.values())) == 30
  assert opened.notes == (f'text:{tmp_path}/a.jsonl: 10 texts are null, and passed over.',)


@pytest.mark.parametrize(
  'content,says',
  [
    (
      np.array([shards.LLMC_MAGIC, 1, 99, *[0] * 253], '<i4').tobytes() + b'12' * 7,
      'has 7 tokens, but its header says 99',
    ),
    (np.array([shards.LLMC_MAGIC, 1, -5, *[0] * 253], '<i4').tobytes(), 'header says -5'),
    (np.array([shards.LLMC_MAGIC, 1, 0, *[0] * 253], '<i4').tobytes(), 'has 0 tokens'),
    (np.array([shards.LLMC_MAGIC, 1, 2, *[0] * 253], '<i4').tobytes() + b'12345', 'has 2.5 tokens'),
    (np.array([shards.LLMC_LLAMA, 7, 2, *[0] * 253], '<i4').tobytes() + b'12345678', 'of Llama 3'),
    (b'', 'has 0 bytes'),
    (b'123', 'has 3 bytes'),
  ],
)
def test_token_files_that_lie(tmp_path, content, says):
  (tmp_path / 'x_train_1.bin').write_bytes(content)
  with pytest.raises(UserError, match=says):
    token_store.open_store(tmp_path)
  with pytest.raises(UserError, match=says):
    list(corpora.documents(corpora.open_corpus(f'bin:{tmp_path}').pieces[0], ''))


def test_the_split_of_a_token_file_is_that_of_its_pattern(tmp_path):
  for name in ('carnival_train_1.bin', 'carnival_val_1.bin'):
    (tmp_path / name).write_bytes(np.array([shards.GPT2_EOT, 1, 2], '<u2').tobytes())
  pieces = corpora.open_corpus(f'bin:{tmp_path}').pieces
  assert [d.split for piece in pieces for d in corpora.documents(piece, '')] == ['train', 'val']
  (tmp_path / 'train.bin').mkdir()
  with pytest.raises(UserError, match='train.bin is no file'):
    corpora.open_corpus(f'bin:{tmp_path}')


def test_a_prepared_dataset_that_is_damaged_is_one_line(monkeypatch):
  class Source:
    def __getitem__(self, i):
      raise RuntimeError('array_record: CRC\nat 12')

  class Builder:
    def as_data_source(self, split):
      return Source()

  monkeypatch.setattr(corpora, '_tfds_builder', lambda name: Builder())
  piece = corpora.Piece('tfds', 'x', 0, 2, 9)
  with pytest.raises(UserError, match=r'^tfds:x can\'t be read: RuntimeError: array_record: CRC\. '):
    list(corpora.documents(piece, 'text'))
  monkeypatch.setattr(Source, '__getitem__', lambda self, i: {'text': [1]})
  with pytest.raises(UserError, match="tfds:x 0: 'text' is a list"):
    list(corpora.documents(piece, 'text'))


def test_every_reader_of_records_has_its_suffix():
  assert set(text_files.FORMATS.values()) == {'text', *records.READERS}


def test_tensorflow_datasets_are_an_extra(monkeypatch, tmp_path):
  monkeypatch.setitem(sys.modules, 'tensorflow_datasets', None)
  settings = prepare.Settings('tfds:text8', 'byte', 0.1, 0, 'tail', 'text', False)
  with pytest.raises(UserError, match=r"tfds:text8 needs .*pip install 'gpt2_jax\[tfds\]'") as e:
    prepare.ensure_store(settings, tmp_path / 'store')
  assert '\n' not in str(e.value)

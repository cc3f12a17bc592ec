"""Benchmarks: their files as published, and how they are fetched, over real sockets."""

import dataclasses
import gzip
import hashlib
import http.server
import io
import json
import os
import re
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from support.processes import environment

from gpt2_jax.core.errors import UserError
from gpt2_jax.data import benchmark_readers, benchmarks, corpora, downloads, sources, tfds_builders

REAL = Path(os.environ.get('GPT2_JAX_TEST_DATA', '/nowhere'))

# --- samples in the published formats -----------------------------------------------------------

CBT = '\n'.join(f'{n} Sentence {n} , said the fox .' for n in range(1, 21)) + (
  '\n21 The XXXXX ran away .\tfox\t\tfox|hen|cow|dog|cat|owl|bee|ant|pig|rat\n\n'
)
HELLASWAG = {
  'ind': 24,
  'activity_label': 'Roof shingle removal',
  'ctx_a': 'A man is on a roof.',
  'ctx_b': 'he',
  'ctx': 'A man is on a roof. he',
  'split': 'val',
  'split_type': 'indomain',
  'label': 3,
  'source_id': 'activitynet~v_-JhWjGDPHMY',
  'endings': ['is using wrap.', 'is ripping tiles.', 'holds a cube.', 'starts [step] up.'],
}
WIKIHOW = HELLASWAG | {
  'activity_label': 'Pets',
  'ctx_b': '',
  'ctx_a': '[header] How to feed a cat [title] Buy food. [step] Any will do.',
}
WSC = """<?xml version="1.0" encoding="UTF-8"?>
<collection>
<schema><text><txt1>The city councilmen refused the demonstrators
 a permit because</txt1><pron>they</pron><txt2>feared violence.</txt2></text>
<quote><quote1></quote1><pron>they</pron><quote2>feared violence</quote2></quote>
<answers><answer>The city councilmen</answer><answer>The demonstrators</answer></answers>
<correctAnswer>A</correctAnswer><source>(Winograd 1972)</source></schema>
<schema><text><txt1>Ann gave Sue a card for</txt1><pron>her</pron><txt2>.</txt2></text>
<answers><answer>Ann</answer><answer> Sue </answer></answers>
<correctAnswer> B. </correctAnswer></schema>
</collection>"""
CROWS = (
  ',sent_more,sent_less,stereo_antistereo,bias_type,annotations,anon_writer,anon_annotators\n'
  '0,"He said ""no"", twice.","She said ""no"", twice.",antistereo,gender,[],a1,"[\'a2\', 3]"\n'
  '1,Old people nap.,Young people nap.,stereo,age,[],a1,[]\n'
)
WINOBIAS = (
  '1 [The developer] argued with the designer because [she] did not like the design.\n'
  '2 The secretary asked [the  sheriff] to move [his] car and accused [him].\n'
)


@pytest.mark.parametrize(
  'name,file,content,wanted',
  [
    (
      'wikitext-2',
      'wikitext-2-raw/wiki.test.raw',
      ' \n = A = \n \n "B @-@ c" \n',
      {'text': ' \n = A = \n \n "B @-@ c" \n'},
    ),
    (
      'wikitext-103',
      'x/wikitext-103/wiki.test.tokens',
      ' = A = \n <unk> \n',
      {'text': ' = A = \n <unk> \n'},
    ),
    ('ptb', 'data/ptb.test.txt', " no it was n't <unk> N \n", {'text': " no it was n't <unk> N \n"}),
    ('enwik8', 'enwik8', '<page>ü</page>', {'text': '<page>ü</page>'.encode()}),
    ('text8', 'text8', ' anarchism originated as', {'text': b' anarchism originated as'}),
    (
      'lm1b',
      'a/b/news.en.heldout-00000-of-00050',
      'A line .\nAnother .\n',
      {'text': 'A line .\nAnother .\n'},
    ),
    (
      'lambada',
      'lambada_test.jsonl',
      json.dumps({'text': 'A “b”\u2028 c'}, ensure_ascii=False),
      {'text': 'A “b”\u2028 c'},
    ),
    (
      'cbt-ne',
      'CBTest/data/cbtest_NE_valid_2000ex.txt',
      CBT,
      {
        'context': [f'Sentence {n} , said the fox .' for n in range(1, 21)],
        'question': 'The XXXXX ran away .',
        'answer': 'fox',
        'options': 'fox hen cow dog cat owl bee ant pig rat'.split(),
      },
    ),
    (
      'hellaswag',
      'hellaswag_val.jsonl',
      json.dumps(HELLASWAG),
      {
        'query': 'Roof shingle removal: A man is on a roof. He',
        'label': 3,
        'endings': ['is using wrap.', 'is ripping tiles.', 'holds a cube.', 'starts up.'],
      },
    ),
    (
      'hellaswag',
      'hellaswag_val_10.jsonl',
      json.dumps(WIKIHOW),
      {
        'query': 'Pets: How to feed a cat. Buy food. Any will do.',
        'label': 3,
        'endings': ['is using wrap.', 'is ripping tiles.', 'holds a cube.', 'starts up.'],
      },
    ),
    (
      'hellaswag',
      'hellaswag_val_1.jsonl',
      json.dumps({'ind': 1, 'query': 'A: b [c]', 'endings': list('defg'), 'label': 0}),
      {'query': 'A: b [c]', 'endings': list('defg'), 'label': 0},
    ),
    (
      'winogrande',
      'winogrande_1.1/dev.jsonl',
      json.dumps(
        {
          'qID': '1',
          'sentence': 'A hit B, so _ cried.',
          'option1': 'A',
          'option2': 'B',
          'answer': '2',
        }
      ),
      {'sentence': 'A hit B, so _ cried.', 'option1': 'A', 'option2': 'B', 'answer': '2'},
    ),
    (
      'wsc273',
      'WSCollection.xml',
      WSC,
      {
        'text': 'The city councilmen refused the demonstrators a permit because [they] feared '
        'violence.',
        'options': ['The city councilmen', 'The demonstrators'],
        'answer': 'The city councilmen',
      },
    ),
    (
      'wsc273',
      'wsc273.json',
      json.dumps(
        [
          {
            'text': 'Ann gave Sue a card for her.',
            'pronoun': 'her',
            'pronoun_loc': 24,
            'options': ['Ann', 'Sue'],
            'label': 1,
            'quote': 'for her',
          }
        ]
      ),
      {'text': 'Ann gave Sue a card for [her].', 'options': ['Ann', 'Sue'], 'answer': 'Sue'},
    ),
    (
      'crows-pairs',
      'crows_pairs_anonymized.csv',
      CROWS,
      {
        'sent_more': 'He said "no", twice.',
        'sent_less': 'She said "no", twice.',
        'stereo_antistereo': 'antistereo',
        'bias_type': 'gender',
      },
    ),
  ],
)
def test_files_as_published(tmp_path, name, file, content, wanted):
  """From a folder, by the name it has, and from the file itself."""
  path = tmp_path / file
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_bytes(content.encode())
  loaded = benchmarks.load(name, str(tmp_path))
  assert loaded.examples[0] == wanted
  assert loaded.sha256 == hashlib.sha256(content.encode()).hexdigest()
  assert (loaded.source, loaded.name) == (str(path), name)
  assert loaded.split == benchmarks.PUBLISHED[name].split
  assert benchmarks.load(name, str(path)) == loaded
  if isinstance(wanted.get('text'), bytes):
    return  # enwik8 and text8 are bytes
  path.write_bytes(content.replace('\n', '\r\n').encode())  # as a checkout on Windows has it
  assert benchmarks.load(name, str(path)).examples == loaded.examples


def test_what_follows_the_first_example():
  questions = benchmark_readers.cbt((CBT + CBT.replace('fox\t', 'rat\t')).encode(), 'x')
  assert [q['answer'] for q in questions] == ['fox', 'rat']
  assert benchmark_readers.wsc273(WSC.encode(), 'x')[1] == {
    'text': 'Ann gave Sue a card for [her].',
    'options': ['Ann', 'Sue'],
    'answer': 'Sue',
  }
  schemas = WSC[WSC.index('<schema>') : WSC.index('</collection>')]
  many = WSC.replace(schemas, schemas * 140)
  assert len(benchmark_readers.wsc273(many.encode(), 'x')) == 273
  assert benchmark_readers.crows_pairs(CROWS.encode(), 'x')[1]['bias_type'] == 'age'


def test_winobias_is_four_files(tmp_path):
  names = [source.file for source in sources.WINOBIAS]
  assert len(set(names)) == 4
  for name in names:
    (tmp_path / name).write_text(WINOBIAS)
  loaded = benchmarks.load('winobias', str(tmp_path))
  assert [(e['stereotyped'], e['type']) for e in loaded.examples[::2]] == [
    (True, '1'),
    (False, '1'),
    (True, '2'),
    (False, '2'),
  ]
  assert loaded.examples[0]['sentence'] == (
    'The developer argued with the designer because she did not like the design.'
  )
  assert [(e['referent'], e['pronoun']) for e in loaded.examples[:2]] == [
    ('The developer', 'she'),
    ('the sheriff', 'his'),
  ]
  hashed = hashlib.sha256(WINOBIAS.encode()).hexdigest()
  assert (
    loaded.sha256
    == hashlib.sha256(''.join(f'{name} {hashed}\n' for name in names).encode()).hexdigest()
  )
  with pytest.raises(UserError, match='keeps its name'):
    benchmark_readers.winobias(WINOBIAS.encode(), 'dev.txt')


def test_the_last_five_million_bytes(tmp_path):
  content = np.random.default_rng(0).integers(0, 256, 5_100_001, np.uint8).tobytes()
  (tmp_path / 'enwik8').write_bytes(content)
  [example] = benchmarks.load('enwik8', str(tmp_path)).examples
  assert example['text'] == content[100_001:]


def test_the_file_says_its_split(tmp_path):
  for file, split in (
    ('wiki.valid.raw', 'validation'),
    ('ptb.train.txt', 'train'),
    ('a.txt', 'test'),
  ):
    (tmp_path / file).write_text('text')
    assert benchmarks.load('ptb', str(tmp_path / file)).split == split
  (tmp_path / 'cbtest_CN_test_2500ex.txt').write_text(CBT)
  assert benchmarks.load('cbt-cn', str(tmp_path / 'cbtest_CN_test_2500ex.txt')).split == 'test'


def test_which_file_of_several(tmp_path):
  for folder in ('wikitext-103-raw', 'wikitext-2-raw', 'wikitext-2', 'old/wikitext-2-raw'):
    (tmp_path / folder).mkdir(parents=True)
    (tmp_path / folder / 'wiki.test.raw').write_text(folder)
  for folder, found in (('', 'wikitext-2-raw'), ('wikitext-2', 'wikitext-2')):
    [example] = benchmarks.load('wikitext-2', str(tmp_path / folder)).examples
    assert example['text'] == found
  for name in ('hellaswag_val_a.jsonl', 'hellaswag_val_b.jsonl'):
    (tmp_path / name).write_text('{}')
  with pytest.raises(UserError, match='may be any of .*_a.jsonl, .*_b.jsonl: name the file'):
    benchmarks.load('hellaswag', str(tmp_path))


@pytest.mark.parametrize(
  'name,content,says',
  [
    ('lambada', b'{"text": "a"}\n{"txt": "b"}', r'line 2: wanted {"text": TEXT} \(KeyError'),
    ('lambada', b'\n', 'holds no example of lambada'),
    ('lambada', b'\xff', 'is not UTF-8'),
    ('lambada', b'{"text": null}', r'line 1: wanted .*None is no text'),
    ('lambada', b'{"text": " "}', 'is no text, or a blank one'),
    ('lambada', b'[' * 10**5, 'line 1: wanted .* nested too deeply'),
    ('ptb', b' \n', 'holds no example of ptb'),
    ('text8', b'', 'holds no example of text8'),
    (
      'hellaswag',
      json.dumps({'query': 3, 'endings': list('defg'), 'label': 0}).encode(),
      'line 1: wanted .*3 is no text',
    ),
    ('hellaswag', json.dumps(HELLASWAG | {'endings': [1, 2, 3, 4]}).encode(), '1 is no text'),
    ('winogrande', b'{"sentence": ["_"], "option1": "a", "option2": "b", "answer": "1"}', 'no text'),
    ('wsc273', b'<?xml version="1.0" encoding="no-such"?><a/>', 'not well-formed XML'),
    ('crows-pairs', CROWS.replace(',stereo,', ',"stereo,').encode(), 'pair 2: wanted the columns'),
    ('crows-pairs', CROWS.replace(' nap.', ' \r nap.').encode(), 'pair 2: '),
    ('cbt-cn', CBT.replace('7 S', '8 S', 1).encode(), 'line 7: wanted the line 7 of a question'),
    ('cbt-cn', CBT.replace('\tfox\t', '\telk\t').encode(), 'its answer is not among the options'),
    ('cbt-cn', CBT.encode() + b'1 And then', 'ends in the middle'),
    ('hellaswag', json.dumps(HELLASWAG | {'label': ''}).encode(), 'line 1: wanted .* with its label'),
    ('winogrande', b'{"sentence": "_", "option1": "a", "option2": "b"}', 'with its answer'),
    ('wsc273', WSC[:300].encode(), 'not well-formed XML'),
    ('wsc273', WSC.replace('>A<', '>C<').encode(), 'schema 1: wanted .*correctAnswer'),
    (
      'wsc273',
      b'{"text": "a it", "pronoun": "it", "pronoun_loc": 0, "options": [], "label": 0}',
      "'it' is not at 0",
    ),
    (
      'crows-pairs',
      CROWS.replace('stereo_antistereo', 'direction').encode(),
      'pair 1: wanted the columns',
    ),
  ],
)
def test_files_that_are_not_as_published(tmp_path, name, content, says):
  (tmp_path / 'file').write_bytes(content)
  with pytest.raises(UserError, match=says):
    benchmarks.load(name, str(tmp_path / 'file'))


@hypothesis_settings(deadline=None, max_examples=100)
@given(st.data())
def test_a_damaged_benchmark_is_examples_or_one_line(data):
  lambada = json.dumps({'text': 'A “b” c'}).encode()
  read, content = data.draw(
    st.sampled_from(
      [
        (benchmark_readers.lambada, lambada),
        (benchmark_readers.cbt, CBT.encode()),
        (benchmark_readers.wsc273, WSC.encode()),
        (benchmark_readers.hellaswag, json.dumps(HELLASWAG).encode()),
        (benchmark_readers.crows_pairs, CROWS.encode()),
        (benchmark_readers.winobias, WINOBIAS.encode()),
        (benchmark_readers.text, b'a b'),
      ]
    )
  )
  for _ in range(data.draw(st.integers(1, 3))):
    at = data.draw(st.integers(0, len(content)))
    behind = at + data.draw(st.integers(0, 3))
    content = content[:at] + data.draw(st.binary(max_size=3)) + content[behind:]
  try:
    read(content, 'pro_stereotyped_type1.txt.test')
  except UserError as e:
    assert '\n' not in str(e) and 'pro_stereotyped' in str(e)


def test_packed_benchmarks_are_those_they_hold(tmp_path):
  """The sha256 too; an archive would be taken for text, and is refused; links count once."""
  (tmp_path / 'lambada_test.jsonl').write_text('{"text": "a b"}')
  plain = benchmarks.load('lambada', str(tmp_path))
  (tmp_path / 'packed').mkdir()
  packed = tmp_path / 'packed' / 'lambada_test.jsonl.gz'
  packed.write_bytes(gzip.compress(b'{"text": "a b"}'))
  for place in (packed, tmp_path / 'packed'):
    loaded = benchmarks.load('lambada', str(place))
    assert (loaded.examples, loaded.sha256) == (plain.examples, plain.sha256)
  packed.write_bytes(packed.read_bytes()[:-3])
  with pytest.raises(UserError, match='lambada_test.jsonl.gz is damaged or cut short'):
    benchmarks.load('lambada', str(packed))
  (tmp_path / 'enwik8.zip').write_bytes(b'PK')
  with pytest.raises(UserError, match='enwik8.zip is to be unpacked first'):
    benchmarks.load('enwik8', str(tmp_path / 'enwik8.zip'))
  (tmp_path / 'again').symlink_to('.')
  (tmp_path / 'twice').symlink_to('packed')
  assert benchmarks.load('lambada', str(tmp_path)).source == plain.source


@pytest.mark.parametrize(
  'name,data,says',
  [
    ('wikitext', None, "no benchmark 'wikitext', but wikitext-2, "),
    ('ptb', '/nowhere', 'no such file or folder, to read ptb from'),
    ('ptb', '.', 'goes by ptb.test.txt, .*catalog.ldc.upenn.edu'),
    ('ptb', None, 'not for a program to fetch: .*LDC99T42.*save it as .*ptb.test.txt'),
  ],
)
def test_benchmarks_that_are_not_there(tmp_path, monkeypatch, name, data, says):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
  with pytest.raises(UserError, match=says):
    benchmarks.load(name, data)


def test_a_file_saved_by_hand_is_as_good_as_fetched(tmp_path, monkeypatch):
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
  downloads.cache().mkdir(parents=True)
  (downloads.cache() / 'ptb.test.txt').write_text('no it was')
  loaded = benchmarks.load('ptb')
  assert loaded.examples == [{'text': 'no it was'}] and loaded.source.endswith('/ptb.test.txt')


@pytest.mark.skipif(not REAL.is_dir(), reason='GPT2_JAX_TEST_DATA is not set')
@pytest.mark.parametrize(
  'name,examples,sha256',
  [('lambada', 5153, sources.LAMBADA.sha256), ('hellaswag', 1000, None), ('wikitext-2', 1, None)],
)
def test_real_files(name, examples, sha256):
  loaded = benchmarks.load(name, str(REAL))
  assert len(loaded.examples) == examples and sha256 in (None, loaded.sha256)


# --- fetching -----------------------------------------------------------------------------------


class Site(http.server.BaseHTTPRequestHandler):
  """Serves `files`; breaks off, stalls and ignores ranges as it is told to."""

  files: dict[str, bytes]
  asked: list[tuple[str, str | None]]
  faults: list[str]  # of the next requests: 'cut', 'stall', '503', 'whole'

  def do_GET(self):
    name, wanted = self.path.lstrip('/'), self.headers['Range']
    self.asked.append((name, wanted))
    fault = self.faults.pop(0) if self.faults else ''
    content = self.files.get(name)
    start = int(re.fullmatch(r'bytes=(\d+)-', wanted)[1]) if wanted and fault != 'whole' else 0
    status = (
      404
      if content is None
      else 503
      if fault == '503'
      else 416
      if start and start >= len(content)
      else 206
      if start
      else 200
    )
    body = content[start:] if status < 300 else b''
    self.send_response(status)
    self.send_header('Content-Length', str(len(body)))
    if status == 206:
      self.send_header('Content-Range', f'bytes {start}-{len(content) - 1}/{len(content)}')
    self.end_headers()
    half = body[: len(body) // 2] if fault in ('cut', 'stall') else body
    self.wfile.write(half)
    self.wfile.flush()
    if fault == 'stall':
      self.server.stalled.wait(20)
    self.close_connection = True

  def log_message(self, format, *args):
    pass


@pytest.fixture
def site(tmp_path, monkeypatch):
  """A handler class to set up, with its address in `url`; the cache is a new folder."""
  handler = type('Handler', (Site,), {'files': {}, 'asked': [], 'faults': []})
  server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler)
  server.stalled = threading.Event()
  threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
  handler.url = f'http://127.0.0.1:{server.server_port}/'
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
  monkeypatch.setattr(downloads, 'WAIT_S', 0.001)
  monkeypatch.setattr(downloads, 'TIMEOUT_S', 0.3)
  yield handler
  server.stalled.set()
  server.shutdown()
  server.server_close()


CONTENT = np.random.default_rng(1).integers(0, 256, 300_001, np.uint8).tobytes()


def published(site, name: str = 'a.bin', content: bytes = CONTENT, **changes) -> sources.Source:
  site.files[name] = content
  source = sources.Source(
    name, (site.url + name,), len(content), hashlib.sha256(content).hexdigest(), 'this test', 'none'
  )
  return dataclasses.replace(source, **changes)


@pytest.mark.parametrize(
  'faults',
  [
    [],
    ['cut'],
    ['cut', 'cut', 'cut'] * 3,
    ['stall'],
    ['503', '503'],
    ['cut', 'whole'],
    ['cut', '503', 'stall', 'cut'],
  ],
  ids='-'.join,
)
def test_transfers_that_break_off_are_resumed(site, faults):
  source = published(site)
  site.faults.extend(faults)
  path = downloads.fetch(source)
  assert path.read_bytes() == CONTENT and not site.faults
  starts = [int(wanted[6:-1]) if wanted else 0 for _, wanted in site.asked]
  assert starts == sorted(starts) and len(starts) == len(faults) + ('whole' not in faults)
  downloads.fetch(source)
  assert len(site.asked) == len(starts), 'what is there is not fetched again'


FETCH = """
from gpt2_jax.data import downloads
from gpt2_jax.data.sources import Source
print(len(downloads.fetch({!r}).read_bytes()))
"""


def test_what_a_killed_process_had_is_not_fetched_again(site):
  source = published(site)
  site.faults.append('stall')
  process = subprocess.Popen([sys.executable, '-c', FETCH.format(source)], env=environment())
  part = downloads.cache() / 'a.bin.part'
  while not part.exists() or part.stat().st_size < len(CONTENT) // 2:
    assert process.poll() is None
    time.sleep(0.01)
  process.kill()
  process.wait()
  assert downloads.fetch(source).read_bytes() == CONTENT
  assert site.asked == [('a.bin', None), ('a.bin', f'bytes={len(CONTENT) // 2}-')]


@pytest.mark.parametrize(
  'part',
  [b'x' * 1000, b'x' * len(CONTENT), CONTENT + b'more'],
  ids=['other', 'other of the same size', 'longer'],
)
def test_a_part_of_another_file_does_no_harm(site, part):
  source = published(site)
  downloads.cache().mkdir(parents=True)
  (downloads.cache() / 'a.bin.part').write_bytes(part)
  assert downloads.fetch(source).read_bytes() == CONTENT


def test_a_wrong_file_is_never_taken(site):
  source = published(site)
  site.files['a.bin'] = CONTENT[:-1] + b'x'
  with pytest.raises(UserError, match=r'can.t be fetched:\n  http.*sha256 is .*, not .*this test'):
    downloads.fetch(source)
  site.files['a.bin'] = CONTENT + b'x'
  with pytest.raises(UserError, match='it has 300,002 bytes there, not 300,001'):
    downloads.fetch(source)
  assert not list(downloads.cache().glob('a.bin')) + list(downloads.cache().glob('*.part'))
  site.files['good'] = CONTENT
  mirrored = dataclasses.replace(source, urls=(*source.urls, site.url + 'none', site.url + 'good'))
  assert downloads.fetch(mirrored).read_bytes() == CONTENT


def test_addresses_that_do_not_serve(site):
  source = published(site, urls=(site.url + 'none', 'http://127.0.0.1:9/a.bin'))
  with pytest.raises(UserError) as e:
    downloads.fetch(source)
  assert 'HTTP 404' in str(e.value) and 'refused' in str(e.value)
  assert f'save it as {downloads.cache() / "a.bin"}' in str(e.value)
  assert site.asked == [('none', None)], 'what is not there is not asked for again'


def test_a_file_without_a_known_hash_is_trusted_once(site):
  source = published(site, size=None, sha256=None)
  site.faults.append('cut')
  path = downloads.fetch(source)
  assert path.read_bytes() == CONTENT
  assert site.asked == [('a.bin', None)] * 2, 'nothing unchecked is pieced together'
  path.unlink()
  assert downloads.fetch(source).read_bytes() == CONTENT
  path.unlink()
  site.files['a.bin'] = b'another'
  with pytest.raises(UserError, match='when it was first fetched'):
    downloads.fetch(source)


def test_a_file_put_there_by_hand_is_checked(site):
  source = published(site)
  downloads.cache().mkdir(parents=True)
  path = downloads.cache() / 'a.bin'
  path.write_bytes(CONTENT[:-1])
  with pytest.raises(UserError, match='is another file: its sha256 is .*Remove it'):
    downloads.fetch(source)
  path.write_bytes(CONTENT)
  assert downloads.fetch(source) == path and not site.asked


def test_two_processes_fetch_once(site):
  source = published(site)
  both = [
    subprocess.Popen(
      [sys.executable, '-c', FETCH.format(source)],
      env=environment(),
      text=True,
      stdout=subprocess.PIPE,
    )
    for _ in range(2)
  ]
  assert [process.communicate(timeout=100)[0] for process in both] == [f'{len(CONTENT)}\n'] * 2
  assert len(site.asked) == 1


# --- archives -----------------------------------------------------------------------------------


def zipped(members: dict[str, str]) -> bytes:
  out = io.BytesIO()
  with zipfile.ZipFile(out, 'w', zipfile.ZIP_DEFLATED) as archive:
    for name, text in members.items():
      archive.writestr(name, text)
  return out.getvalue()


def tarred(members: dict[str, str | bytes], kind: str = 'gz') -> bytes:
  out = io.BytesIO()
  with tarfile.open(fileobj=out, mode=f'w:{kind}') as archive:
    for name, text in members.items():
      content = text.encode() if isinstance(text, str) else text
      info = tarfile.TarInfo(name)
      info.size = len(content)
      archive.addfile(info, io.BytesIO(content))
  return out.getvalue()


@pytest.mark.parametrize('pack,file', [(zipped, 'a.zip'), (tarred, 'a.tgz')])
def test_only_what_is_named_is_unpacked(tmp_path, pack, file):
  folder = tmp_path / 'in'
  folder.mkdir()
  (folder / file).write_bytes(
    pack({'../evil': 'x', '/abs': 'x', 'top/b.txt': 'b', 'top/c.txt': 'c', '../../top/b.txt': 'evil'})
  )
  [path] = downloads.unpack(folder / file, ['top/b.txt'])
  assert path.read_text() == 'b'
  assert {p for p in tmp_path.rglob('*') if p.is_file()} == {folder / file, path}
  with pytest.raises(UserError, match='has no top/d.txt'):
    downloads.unpack(folder / file, ['top/d.txt'])
  (folder / file).write_bytes((folder / file).read_bytes()[:90])
  assert downloads.unpack(folder / file, ['top/b.txt']) == [path], 'unpacked once'
  with pytest.raises(UserError, match='is damaged|cut short'):
    downloads.unpack(folder / file, ['top/c.txt'])


def test_a_link_in_an_archive_is_not_followed(tmp_path):
  (tmp_path / 'secret').write_text('secret')
  with tarfile.open(tmp_path / 'a.tar', 'w') as archive:
    link = tarfile.TarInfo('top/b.txt')
    link.type, link.linkname = tarfile.SYMTYPE, str(tmp_path / 'secret')
    archive.addfile(link)
  with pytest.raises(UserError, match='has no top/b.txt|is damaged'):
    downloads.unpack(tmp_path / 'a.tar', ['top/b.txt'])


# --- all of it ----------------------------------------------------------------------------------


def serve(site, monkeypatch, name: str, content: bytes) -> None:
  """Makes the site the place where a benchmark's file is fetched from."""
  parts = benchmarks.PUBLISHED[name].parts
  made = tuple(
    dataclasses.replace(part, source=published(site, part.source.file, content)) for part in parts
  )
  monkeypatch.setitem(
    benchmarks.PUBLISHED, name, dataclasses.replace(benchmarks.PUBLISHED[name], parts=made)
  )


@pytest.mark.parametrize(
  'name,content,pack',
  [
    ('wikitext-2', ' = A = \n', zipped),
    ('text8', 'anarchism', zipped),
    ('cbt-cn', CBT, tarred),
    ('lm1b', 'A line .\n', tarred),
    ('lambada', '{"text": "a"}', None),
    ('winobias', WINOBIAS, None),
  ],
)
def test_fetched_or_from_disk_it_is_the_same(site, monkeypatch, tmp_path, name, content, pack):
  part = benchmarks.PUBLISHED[name].parts[0]
  serve(site, monkeypatch, name, pack({part.member: content}) if pack else content.encode())
  site.faults.append('cut')
  fetched = benchmarks.load(name)
  assert fetched.source.startswith(site.url)
  here = benchmarks.load(name, str(downloads.cache()))
  assert dataclasses.replace(here, source=fetched.source) == fetched
  asked = len(site.asked)
  assert benchmarks.load(name) == fetched and len(site.asked) == asked


ARTICLES = ' \n = A = \n \n x \n = = B = = \n \n z = y = \n \n = C = \n \n c \n'


@given(
  st.lists(
    st.sampled_from([' \n = A = \n \n', ' \n = = B = = \n \n', ' x y \n', ' x y \n = z = \n x \n']),
    max_size=12,
  )
)
def test_articles_joined_are_the_text(parts):
  pieces = tfds_builders.articles(''.join(parts))
  assert ''.join(pieces) == ''.join(parts) and all(pieces)
  later = [i for i, part in enumerate(parts) if 'A' in part and i]
  assert len(pieces) == len(later) + bool(parts)


@pytest.mark.skipif(not REAL.is_dir(), reason='GPT2_JAX_TEST_DATA is not set')
@pytest.mark.parametrize('split', ['valid', 'test'])
def test_wikitext_has_sixty_articles(split):
  """Two lines of the test split are formulas that look like titles."""
  text = (REAL / 'wikitext-2' / f'{split}.txt').read_text(encoding='utf-8')
  pieces = tfds_builders.articles(text)
  assert len(pieces) == 60 and ''.join(pieces) == text
  assert not any(piece.startswith(' = 1 <unk>') for piece in pieces)


def test_builders_without_tensorflow(site, tmp_path):
  """All that TensorFlow Datasets lacks, prepared by it from a site; `prepare` reads the result."""
  pages = tarred({f'p{i}.txt': f'\n\n\n\n{i}\n\n\nx ' for i in range(2)} | {'p.lock': ''}, 'xz')
  questions = {
    f'CBTest/data/cbtest_CN_{split}.txt': CBT for split in ('train', 'valid_2000ex', 'test_2500ex')
  }
  books = {
    f'CBTest/data/cbt_{split}.txt': '_BOOK_TITLE_ : A.txt\nonce\n_BOOK_TITLE_ : B.txt\nupon\n'
    for split in ('train', 'valid', 'test')
  }
  text8 = 'ab ' * 4_000_000
  made = {
    'WIKITEXT_2': zipped(
      {f'wikitext-2-raw/wiki.{split}.raw': ARTICLES for split in ('train', 'valid', 'test')}
    ),
    'TEXT8': zipped({'text8': text8}),
    'CBT': tarred(questions | books),
    'LAMBADA': b'{"text": "a"}\n{"text": "b"}',
    'OPENWEBTEXT': tarred({'openwebtext/urlsf_subset00-1_data.xz': pages}, 'xz'),
  }
  replaced = {
    name: published(site, getattr(sources, name).file, content) for name, content in made.items()
  }
  downloads.cache().mkdir(parents=True)
  for split in ('train', 'valid', 'test'):
    (downloads.cache() / f'ptb.{split}.txt').write_text(f'{split} <unk>')
  code = f"""
import sys
from gpt2_jax.data import sources
from gpt2_jax.data.sources import Source
for name, source in {replaced!r}.items():
  setattr(sources, name, source)
from gpt2_jax.data import corpora, prepare, tfds_builders
import tensorflow_datasets as tfds
tfds.disable_progress_bar()
for name, split in (('wikitext/wikitext-2', 'test'), ('ptb', 'validation'), ('text8', 'train'),
                    ('text8', 'test'), ('cbt/books', 'train'), ('cbt/cn', 'test'),
                    ('lambada_openai', 'test'), ('openwebtext', 'train')):
  builder = tfds.builder(name, file_format='array_record', data_dir={str(tmp_path)!r})
  builder.download_and_prepare()
  source = builder.as_data_source(split)
  text = [e.get('text', e.get('answer')) for e in source]
  print(name, [t if len(t) < 99 else len(t) for t in text])
builder = tfds.builder('wikitext/wikitext-2', data_dir={str(tmp_path)!r})
s = prepare.Settings('tfds:' + str(builder.data_path), 'byte', val_fraction=0.1, split='tail')
opened = prepare.ensure_store(s, {str(tmp_path / 's')!r}, workers=1)
print(opened.splits['train'].documents, 'tensorflow' in sys.modules)
"""
  result = subprocess.run(
    [sys.executable, '-c', code], env=environment(), capture_output=True, text=True, timeout=200
  )
  lines = [line for line in result.stdout.splitlines() if 'dataset' not in line.lower()]
  a = ARTICLES.index(' = C')
  assert lines == [
    f'wikitext/wikitext-2 {[ARTICLES[:a].encode(), ARTICLES[a:].encode()]}',
    "ptb [b'valid <unk>']",
    'text8 [2000000]',
    'text8 [5000000]',
    r"cbt/books [b'once\n', b'upon\n']",
    "cbt/cn [b'fox']",
    "lambada_openai [b'a', b'b']",
    r"openwebtext [b'0\n\nx', b'1\n\nx']",
    '2 False',
  ], result.stderr


def test_text_is_cut_where_a_character_ends():
  content = 'aüb€c'.encode()
  for at in range(len(content) + 1):
    edge = tfds_builders._next_character(content, at)
    assert content[:edge].decode() + content[edge:].decode() == 'aüb€c' and at <= edge < at + 3


def test_a_corpus_that_needs_a_licence_says_so(tmp_path, monkeypatch):
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
  monkeypatch.setenv('TFDS_DATA_DIR', str(tmp_path / 'tfds'))
  with pytest.raises(UserError, match=r'ptb.train.txt is not for a program to fetch: .*LDC99T42'):
    corpora.open_corpus('tfds:ptb')

"""Corpora, labelled texts and tokenizers in a bucket: as on a disk, or one line."""

import gzip
import json
import os
from pathlib import Path

import ml_collections
import pytest
from support import bucket

from gpt2_jax.core import bucket_copies, buckets
from gpt2_jax.core.errors import UserError
from gpt2_jax.data import corpora, labelled_texts, listing, prepare, token_store
from gpt2_jax.tokenizer import bpe

LINES = [f'document {i}: ' + 'words ' * 20 for i in range(200)]
RECORDS = ''.join(json.dumps({'text': line}) + '\n' for line in LINES)


@pytest.fixture
def there(tmp_path):
  with bucket.emulated(tmp_path) as found:
    yield found


@pytest.fixture
def here(tmp_path) -> Path:
  """A folder of texts of every kind, and things that are none."""
  folder = tmp_path / 'here'
  for name in ('a/one.txt', 'a/b/two.md', 'a/.hidden.txt', 'a/.git/three.txt', 'a/picture.png'):
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(f'{name}: ' + 'line of text\n' * 50)
  (folder / 'a' / 'c.jsonl').write_text(RECORDS)
  (folder / 'a' / 'd.jsonl.gz').write_bytes(gzip.compress(RECORDS.encode(), mtime=0))
  (folder / 'a' / 'e.csv').write_text('text,label\n' + ''.join(f'{line},x\n' for line in LINES))
  (folder / 'a' / 'f.json').write_text(json.dumps([{'text': line} for line in LINES]))
  parquet = pytest.importorskip('pyarrow.parquet')
  import pyarrow

  table = pyarrow.table({'text': LINES})
  parquet.write_table(table, folder / 'a' / 'g.parquet', row_group_size=64)
  for name in ('tokenizer/vocab.json', 'manifest.json', 'more.txt'):
    path = folder / 'a' / 'store' / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text('{}')
  return folder


PATTERNS = (
  'a',
  '',
  'a/*',
  'a/*.txt',
  '**/*.md',
  'a/**',
  'a/**/*.txt',
  'a/[cd]*',
  'a/one.txt',
  'a/.*',
)


def test_a_pattern_names_the_files_that_it_names_on_a_disk(here, there):
  buckets.upload(here, buckets.place(there.url))
  for pattern in PATTERNS:
    near, _ = listing.find('x', f'{here}/{pattern}')
    far, _ = listing.find('x', f'{there.url}/{pattern}')
    names = [os.path.relpath(file.path, here) for file in near]
    assert [file.path for file in far] == [f'{there.url}/{name}' for name in names], pattern
    assert [(f.kind, f.size) for f in far] == [(f.kind, f.size) for f in near]
  for pattern in ('nothing', 'a/*.xyz', 'a/picture.png*'):
    with pytest.raises(UserError, match='no such file|nothing there is text'):
      listing.find('x', f'{there.url}/{pattern}')


def test_the_same_store_from_a_bucket_within_a_limit(here, there, tmp_path, monkeypatch):
  """No more than the largest file and what is being read lies on this disk at a time."""
  monkeypatch.setattr(corpora, 'PIECE_BYTES', 4000)
  monkeypatch.setenv(bucket_copies.LIMIT, '1e-6')  # a kB
  buckets.upload(here, buckets.place(there.url))
  make = lambda where, name: prepare.ensure_store(
    prepare.Settings(f'text:{where}/a', 'byte', 0.1), tmp_path / name, 1
  )
  near, far = make(here, 'near'), make(there.url, 'far')
  assert far.sha256 == near.sha256 and sum(len(split) for split in far.splits.values()) > 60_000
  sizes = [p.stat().st_size for p in bucket_copies.home().rglob('*') if p.is_file()]
  assert sum(sizes) <= max(p.stat().st_size for p in (here / 'a').iterdir())
  assert make(there.url, 'far').sha256 == far.sha256
  (buckets.place(there.url) / 'a' / 'one.txt').write_text('changed')
  with pytest.raises(UserError, match='has changed since'):
    make(there.url, 'far')


def test_errors_name_the_address(there, tmp_path):
  (buckets.place(there.url) / 'bad.jsonl').write_text('{"text": "good"}\n{"text": ')
  with pytest.raises(UserError, match='gs://bucket/bad.jsonl .* not a line of JSON') as raised:
    corpus = f'text:{there.url}/*.jsonl'
    prepare.ensure_store(prepare.Settings(corpus, 'byte'), tmp_path / 's', 1)
  assert str(bucket_copies.home()) not in str(raised.value)


def test_tokens_tokenizers_and_labels(there, tmp_path):
  root, tokens = buckets.place(there.url), b'\x01\x00\x50\xc4' * 500
  for split in ('train', 'val'):
    (root / 'nano' / f'{split}.bin').write_bytes(tokens)
  made = prepare.ensure_store(prepare.Settings(f'bin:{there.url}/nano', 'gpt2'), tmp_path / 's', 1)
  assert [len(split) for split in made.splits.values()] == [1000, 1000]
  own = bpe.train_bpe(LINES, 280)
  own.save(tmp_path / 'own')
  buckets.upload(tmp_path / 'own', root / 'own')
  assert bpe.load(f'{there.url}/own').sha256 == own.sha256
  with pytest.raises(UserError, match='gs://bucket/other'):
    bpe.load(f'{there.url}/other')
  (root / 'labels.tsv').write_text('text\tlabel\n' + 'good\tyes\nbad\tno\n' * 20)
  data = ml_collections.ConfigDict(
    dict(corpus=f'text:{there.url}/labels.tsv', text_field='text', label_field='label')
  )
  assert labelled_texts.label_names(data) == ('no', 'yes')
  assert token_store.is_store(tmp_path / 's')

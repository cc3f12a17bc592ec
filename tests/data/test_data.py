"""From text to batches: nothing lost, nothing twice, whatever is killed."""

import gzip
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from support import forked
from support.arrays import mesh_of
from support.processes import ROOT, environment, run
from support.texts import make_text

from gpt2_jax.core.errors import UserError
from gpt2_jax.data import (
  corpora,
  corpus_parts,
  prepare,
  shards,
  store_job,
  token_batches,
  token_store,
)
from gpt2_jax.parallel import sharding
from gpt2_jax.parallel.sharding import make_mesh
from gpt2_jax.tokenizer import bpe


def settings(folder, **fields) -> prepare.Settings:
  fields = {'tokenizer': 'byte', 'val_fraction': 0.1} | fields
  return prepare.Settings(f'text:{folder}', **fields)


def texts_of(opened: token_store.TokenStore) -> dict[str, list[str]]:
  """The documents of a store, by split, decoded."""
  t = opened.tokenizer
  out = {}
  for name, split in opened.splits.items():
    ids = split.read(0, len(split)).tolist() if len(split) else []
    starts = [i for i, token in enumerate(ids) if token == t.eot] + [len(ids)]
    out[name] = [t.decode(ids[a + 1 : b]) for a, b in zip(starts, starts[1:])]
  return out


@pytest.fixture(scope='module')
def byte_store(text_folder, tmp_path_factory) -> token_store.TokenStore:
  return prepare.ensure_store(settings(text_folder), tmp_path_factory.mktemp('store') / 's')


# --- prepare ----------------------------------------------------------------------------------


def test_every_document_is_in_exactly_one_split(text_folder, byte_store):
  splits = texts_of(byte_store)
  want = sorted(path.read_text() for path in text_folder.iterdir())
  assert sorted(splits['train'] + splits['val']) == want
  assert 0 < len(splits['val']) < len(want) / 2
  assert byte_store.splits['train'].documents == len(splits['train'])


def test_the_manifest_says_what_the_store_is(byte_store):
  m = byte_store.manifest
  assert m['tokenizer']['vocab_size'] == 257 and m['source']['licence'] == 'unstated'
  assert m['settings']['split_seed'] == 0 and m['dtype'] == '<u2'
  for split in m['splits'].values():
    for shard in split['shards']:
      content = (byte_store.path / shard['file']).read_bytes()
      index = (byte_store.path / shard['index']).read_bytes()
      assert hashlib.sha256(content + index).hexdigest() == shard['sha256']


def test_workers_change_no_byte(text_folder, tmp_path, monkeypatch):
  monkeypatch.setattr(corpus_parts, 'MIN_PART_BYTES', 20_000)
  serial = prepare.ensure_store(settings(text_folder), tmp_path / 'a', workers=1)
  parallel = prepare.ensure_store(settings(text_folder), tmp_path / 'b', workers=2)
  assert len(serial.splits['train'].shards) > 3
  assert serial.sha256 == parallel.sha256
  files = lambda folder: {p.name: p.read_bytes() for p in folder.glob('*.*') if p.is_file()}
  assert files(tmp_path / 'a') == files(tmp_path / 'b')


def test_special_tokens_of_documents(tmp_path, capsys):
  """Text, which is said; or the tokens, where that is asked for, in a store of another name."""
  for i in range(3):
    (tmp_path / f'{i}.txt').write_text(f'one{bpe.EOT}two {i}\n' * 4)
  plain, special = (settings(tmp_path / '*.txt', split='tail', special=on) for on in (False, True))
  assert prepare.store_name(special) == prepare.store_name(plain) + '-special'
  stores = {}
  for name, each in (('plain', plain), ('special', special)):
    stores[name] = prepare.ensure_store(each, tmp_path / name, workers=1)
    said = capsys.readouterr().err
    assert ('6 texts hold the text of a special' in said and '--special' in said) == (name == 'plain')
  ends = [
    int((s.splits['train'].read(0, len(s.splits['train'])) == s.eot).sum()) for s in stores.values()
  ]
  assert ends == [3, 3 + 9]  # of each document the last line is held out
  assert 'special' not in stores['plain'].manifest['settings']  # as older releases wrote it
  for one, other in ((plain, 'special'), (special, 'plain')):
    with pytest.raises(UserError, match='special: '):
      prepare.ensure_store(one, tmp_path / other)
  assert stores['special'].sha256 != stores['plain'].sha256


def test_a_store_from_before_added_tokens_were_looked_for(tmp_path):
  """Its ids are not those of its tokenizer, whose hash says so."""
  folder = tmp_path / 'tokenizer'
  bpe.load('byte').save(folder)
  content = json.loads((folder / 'tokenizer.json').read_text())
  content['added_tokens'].append(
    content['added_tokens'][0] | {'id': 257, 'content': 'COVID-19', 'special': False}
  )
  (folder / 'tokenizer.json').write_text(json.dumps(content))
  (tmp_path / 'a.txt').write_text('of COVID-19\n' * 20)
  wanted = settings(tmp_path / 'a.txt', split='tail', tokenizer=str(folder))
  made = prepare.ensure_store(wanted, tmp_path / 's', workers=1)
  assert 257 in made.splits['train'].read(0, 40)
  assert prepare.ensure_store(wanted, tmp_path / 's').sha256 == made.sha256
  path = tmp_path / 's' / token_store.MANIFEST
  manifest = json.loads(path.read_text())
  manifest['tokenizer']['sha256'] = old = '0' * 64
  shards = [s['sha256'] for split in manifest['splits'].values() for s in split['shards']]
  manifest['sha256'] = hashlib.sha256('\n'.join([old, *shards]).encode()).hexdigest()
  path.write_text(json.dumps(manifest))
  with pytest.raises(UserError, match='ordinary added tokens in texts.*to prepare it anew'):
    prepare.ensure_store(wanted, tmp_path / 's')


def test_the_split_follows_its_seed(text_folder, tmp_path, byte_store):
  again = prepare.ensure_store(settings(text_folder), tmp_path / 'again')
  other = prepare.ensure_store(settings(text_folder, split_seed=1), tmp_path / 'other')
  assert again.sha256 == byte_store.sha256
  assert texts_of(other)['val'] != texts_of(again)['val']


def test_a_tail_can_be_held_out(tmp_path):
  (tmp_path / 'one.txt').write_text('line of text\n' * 100)
  opened = prepare.ensure_store(settings(tmp_path / 'one.txt', split='tail'), tmp_path / 's')
  splits = texts_of(opened)
  assert splits['train'] + splits['val'] == ['line of text\n' * 90, 'line of text\n' * 10]


@pytest.mark.slow
def test_a_killed_prepare_goes_on(tmp_path):
  """SIGKILL in the midst: no store is seen, finished parts are kept, the end is the same."""
  rng = np.random.default_rng(1)
  for i in range(10):
    (tmp_path / f'{i}.txt').write_text(make_text(rng, 2000) * 400)
  command = [
    '-m',
    'gpt2_jax',
    'prepare',
    '--corpus',
    f'text:{tmp_path}/*.txt',
    '--tokenizer',
    'byte',
    '--split',
    'tail',
    '--output',
    str(tmp_path / 'store'),
  ]
  process = forked.Popen([sys.executable, *command], env=environment())
  deadline = time.monotonic() + 60
  while not list((tmp_path / 'store').glob('part-*.json')) and time.monotonic() < deadline:
    time.sleep(0.005)
  os.kill(process.pid, signal.SIGKILL)
  process.wait()
  done = {p.name: p.stat().st_mtime_ns for p in (tmp_path / 'store').glob('train-*.bin')}
  assert done and not token_store.is_store(tmp_path / 'store')
  with pytest.raises(UserError, match='was not finished'):
    token_store.open_store(tmp_path / 'store')

  result = run(*command)
  assert result.returncode == 0, result.stderr
  opened = token_store.open_store(tmp_path / 'store')
  kept = [name for name, t in done.items() if (tmp_path / 'store' / name).stat().st_mtime_ns == t]
  assert kept, 'finished parts are made again'
  whole = prepare.ensure_store(opened_settings(opened), tmp_path / 'whole')
  assert opened.sha256 == whole.sha256
  assert not list((tmp_path / 'store').glob('*.tmp'))


def opened_settings(opened: token_store.TokenStore) -> prepare.Settings:
  return prepare.Settings(**opened.manifest['settings'])


def test_two_at_once_do_the_work_once(text_folder, tmp_path):
  command = [
    sys.executable,
    '-m',
    'gpt2_jax',
    'prepare',
    '--corpus',
    f'text:{text_folder}',
    '--tokenizer',
    'bpe:300',
    '--val-fraction',
    '0.1',
    '--output',
    str(tmp_path / 's'),
  ]
  both = [
    forked.Popen(command, env=environment(), stdout=subprocess.PIPE, text=True) for _ in range(2)
  ]
  outputs = [process.communicate()[0] for process in both]
  assert [process.returncode for process in both] == [0, 0]
  assert outputs[0] == outputs[1]


def test_a_store_of_something_else_is_left_alone(text_folder, tmp_path, byte_store):
  with pytest.raises(UserError, match="tokenizer: 'byte' there, 'gpt2' asked for"):
    prepare.ensure_store(settings(text_folder, tokenizer='gpt2'), byte_store.path)
  (tmp_path / 'mine').mkdir()
  (tmp_path / 'mine' / 'thesis.txt').write_text('precious')
  with pytest.raises(UserError, match='is no token store'):
    prepare.ensure_store(settings(text_folder), tmp_path / 'mine')
  assert (tmp_path / 'mine' / 'thesis.txt').read_text() == 'precious'


def test_a_changed_corpus_is_noticed(tmp_path):
  (tmp_path / 'a.txt').write_text('one two\n' * 50)
  s = settings(tmp_path / 'a.txt', split='tail')
  prepare.ensure_store(s, tmp_path / 's')
  (tmp_path / 'a.txt').write_text('one two three\n' * 50)
  with pytest.raises(UserError, match='has changed since'):
    prepare.ensure_store(s, tmp_path / 's')
  (tmp_path / 'a.txt').unlink()  # the text may go, the tokens are here
  prepare.ensure_store(s, tmp_path / 's')


def test_a_full_disk_is_said_and_loses_nothing(text_folder, tmp_path):
  folder = tmp_path / 's'
  (folder / 'tokenizer').mkdir(parents=True)
  corpus = corpora.open_corpus(f'text:{text_folder}')
  s = settings(text_folder)
  job = store_job.json_of({'settings': s.as_json(), 'corpus': corpus.identity})
  (folder / 'job.json').write_text(json.dumps(job))
  (folder / 'val-00000.bin.tmp').symlink_to('/dev/full')
  with pytest.raises(UserError, match='cannot write the token store .* No space left'):
    prepare.ensure_store(s, folder)
  (folder / 'val-00000.bin.tmp').unlink()
  assert prepare.ensure_store(s, folder).splits['val'].documents


# --- corpora ----------------------------------------------------------------------------------

LINES = [f'document {i}: ' + 'words ' * 20 for i in range(200)]


def write(folder: Path, suffix: str) -> str:
  path, rows = folder / f'x{suffix}', [json.dumps({'body': text}) for text in LINES]
  content = ('\n'.join(rows) + '\n').encode()
  if suffix == '.jsonl':
    path.write_bytes(content)
  elif suffix == '.jsonl.gz':
    path.write_bytes(gzip.compress(content))
  elif suffix == '.jsonl.zst':
    path.write_bytes(pytest.importorskip('zstandard').compress(content))
  else:
    parquet = pytest.importorskip('pyarrow.parquet')
    import pyarrow

    parquet.write_table(pyarrow.table({'body': LINES}), path, row_group_size=64)
  return str(path)


@pytest.mark.parametrize('suffix', ['.jsonl', '.jsonl.gz', '.jsonl.zst', '.parquet'])
def test_formats_hold_the_same_documents(tmp_path, monkeypatch, suffix):
  monkeypatch.setattr(corpora, 'PIECE_BYTES', 1000)  # .jsonl is cut at any byte
  corpus = corpora.open_corpus(f'text:{write(tmp_path, suffix)}')
  read = [d.text for piece in corpus.pieces for d in corpora.documents(piece, 'body')]
  assert read == LINES
  if suffix in ('.jsonl', '.parquet'):
    assert len(corpus.pieces) > 3
  with pytest.raises(UserError, match="'text'.*text_field"):
    list(corpora.documents(corpus.pieces[0], 'text'))


def test_folders_and_globs_find_the_same_files(text_folder):
  (text_folder / 'image.png').write_bytes(b'\x89PNG')
  as_folder, as_glob = (corpora.open_corpus(f'text:{text_folder}{end}') for end in ('', '/**/*'))
  assert [p.path for p in as_folder.pieces] == [p.path for p in as_glob.pieces]
  assert len(as_folder.pieces) == 40
  (text_folder / 'image.png').unlink()


def test_stdlib_is_this_pythons_source():
  corpus = corpora.open_corpus('stdlib')
  paths = {Path(piece.path).name for piece in corpus.pieces}
  assert {'argparse.py', 'dataclasses.py'} <= paths and corpus.licence == 'PSF-2.0'
  assert sum(piece.bytes for piece in corpus.pieces) > 5e6
  assert not any('site-packages' in piece.path for piece in corpus.pieces)


def test_tfds_without_tensorflow(tmp_path):
  code = f"""
import sys; sys.path.insert(0, {str(ROOT / 'tests')!r})
from tiny_tfds import tiny_text
builder = tiny_text.TinyText(data_dir={str(tmp_path)!r}, file_format='array_record')
builder.download_and_prepare()
from gpt2_jax.data import prepare
s = prepare.Settings('tfds:' + str(builder.data_path), 'byte', val_fraction=0.1)
opened = prepare.ensure_store(s, {str(tmp_path / 's')!r}, workers=1)
print(sum(split.documents for split in opened.splits.values()), 'tensorflow' in sys.modules)
"""
  result = run('-c', code)
  assert result.stdout.strip().endswith('50 False'), result.stderr


def write_tokens(path: Path, tokens: np.ndarray, llmc: bool) -> None:
  header = np.zeros(256, '<i4')
  header[:3] = shards.LLMC_MAGIC, 1, len(tokens)
  path.write_bytes((header.tobytes() if llmc else b'') + tokens.astype('<u2').tobytes())


@pytest.mark.parametrize(
  'names', [('train.bin', 'val.bin'), ('fineweb_train_000001.bin', 'fineweb_val_000000.bin')]
)
def test_token_files_of_others(tmp_path, names):
  eot = shards.GPT2_EOT
  train, val = np.array([eot, 1, 2, 3, eot, 4, 5]), np.array([eot, 7, 8])
  for name, tokens in zip(names, (train, val)):
    write_tokens(tmp_path / name, tokens, llmc=name.startswith('fineweb'))
  opened = token_store.open_store(tmp_path)
  np.testing.assert_array_equal(opened.splits['train'].read(0, 7), train)
  np.testing.assert_array_equal(opened.splits['val'].read(0, 3), val)
  made = prepare.ensure_store(
    prepare.Settings(f'bin:{tmp_path}', 'gpt2'), tmp_path / 'made', workers=1
  )
  np.testing.assert_array_equal(made.splits['train'].read(0, 7), train)
  np.testing.assert_array_equal(made.splits['val'].read(0, 3), val)
  assert made.splits['train'].documents == 2


@pytest.mark.parametrize(
  'content,says',
  [
    (b'\xff\xfe\x00bad', r'bad.txt is not UTF-8 \(byte 0: 0xff\).*iconv'),
    (b'', 'holds no text: every document is empty'),
    (b'one short document', 'none of them fell into the held-out split.*split=tail'),
  ],
)
def test_text_that_cannot_be_used(tmp_path, content, says):
  (tmp_path / 'bad.txt').write_bytes(content)
  with pytest.raises(UserError, match=says):
    prepare.ensure_store(settings(tmp_path / 'bad.txt'), tmp_path / 's')


@pytest.mark.parametrize(
  'spec,says',
  [
    ('text:/nowhere/*.txt', 'no such file or folder'),
    ('nothing', 'is none of: stdlib'),
    ('text:', 'is none of'),
    ('bin:/nowhere', 'no train.bin'),
    ('tfds:no_such_dataset_at_all', "can't be had"),
  ],
)
def test_corpora_that_are_not_there(spec, says):
  with pytest.raises(UserError, match=says):
    corpora.open_corpus(spec)


def test_damage_is_named(tmp_path, byte_store):
  copy = tmp_path / 'copy'
  shutil.copytree(byte_store.path, copy)
  shard = next(copy.glob('train-*.bin'))
  whole = shard.read_bytes()
  shard.write_bytes(whole[:-100])
  with pytest.raises(UserError, match=rf'{shard.name} has {len(whole) - 100:,} bytes'):
    token_store.open_store(copy)
  shard.unlink()
  with pytest.raises(UserError, match=f'{shard.name} is missing'):
    token_store.open_store(copy)
  (copy / 'manifest.json').write_text('{"version": 1')
  with pytest.raises(UserError, match='manifest.json is damaged'):
    token_store.open_store(copy)
  (tmp_path / 'odd').mkdir()
  (tmp_path / 'odd' / 'train.bin').write_bytes(b'123')
  with pytest.raises(UserError, match='no whole number of uint16'):
    token_store.open_store(tmp_path / 'odd')


# --- loader -----------------------------------------------------------------------------------


def test_an_epoch_sees_each_window_once(byte_store):
  split = byte_store.splits['train']
  load = token_batches.TokenBatches(split, T=50, G=7, seed=3, vocab_size=257)
  rows = [load.row(i // 7, i % 7) for i in range(2 * load.windows)]
  windows = [split.read(i * 50, i * 50 + 51).tobytes() for i in range(load.windows)]
  first, second = ([row.tobytes() for row in rows[i : i + load.windows]] for i in (0, load.windows))
  assert sorted(first) == sorted(windows) == sorted(second)
  assert first != second and first != windows


def test_a_batch_is_a_function_of_seed_and_step(byte_store):
  split = byte_store.splits['train']
  sharded = NamedSharding(make_mesh(8, 1, 1), P(None, sharding.BATCH))
  make = lambda seed: token_batches.TokenBatches(split, T=32, G=16, seed=seed, vocab_size=257)
  batches = lambda seed, start, stop, A: [
    np.asarray(b).reshape(16, 33) for b in make(seed).batches(start, stop, A, sharded)
  ]
  whole = batches(0, 0, 6, 1)
  for resumed, want in zip(batches(0, 4, 6, 1), whole[4:], strict=True):
    np.testing.assert_array_equal(resumed, want)
  for split_up, want in zip(batches(0, 0, 6, 2), whole, strict=True):
    np.testing.assert_array_equal(split_up, want)
  assert not np.array_equal(batches(1, 0, 1, 1)[0], whole[0])


def test_processes_share_a_batch(byte_store):
  """Each of n processes reads its own rows only; together they are the batch of one process."""
  load = token_batches.TokenBatches(byte_store.splits['train'], T=32, G=16, seed=0, vocab_size=257)
  whole = np.stack([load.row(2, r) for r in range(16)]).reshape(2, 8, 33)
  devices = jax.devices()
  for n in (1, 2, 4):
    seen = []
    for process in range(n):
      mine = devices[process * 8 // n : (process + 1) * 8 // n]
      layout = NamedSharding(make_mesh(8, 1, 1), P(None, sharding.BATCH))
      rows = set()
      for device, index in layout.devices_indices_map((2, 8, 1)).items():
        if device in mine:
          rows.update(a * 8 + m for a in range(2) for m in range(8)[index[1]])
      assert len(rows) == 16 // n
      seen += [(r, load.row(2, r)) for r in sorted(rows)]
    together = np.stack([row for _, row in sorted(seen, key=lambda item: item[0])])
    np.testing.assert_array_equal(together.reshape(2, 8, 33), whole)


@pytest.mark.parametrize('T,R', [(50, 8), (33, 16), (4096, 8)])
def test_evaluation_counts_each_token_once(byte_store, T, R):
  split = byte_store.splits['val']
  with mesh_of(8, 1, 1) as _:
    layout = NamedSharding(make_mesh(8, 1, 1), P(None, sharding.BATCH))
    targets, batches = [], 0
    for tokens, weights in token_batches.TokenBatches.eval_batches(split, T, R, layout):
      targets.append(np.asarray(tokens)[..., 1:][np.asarray(weights) == 1])
      batches += 1
  np.testing.assert_array_equal(np.concatenate(targets), split.read(1, len(split)))
  assert batches == token_batches.TokenBatches.eval_size(split, T, R)


def test_documents_of_a_window_are_found(byte_store):
  split = byte_store.splits['train']
  begins = np.fromfile(split.shards[0].index, '<u8').astype(int)
  third = begins[2]
  assert split.documents_in(third, third + 10) == ['train-00000:2']
  assert split.documents_in(third - 1, third + 1) == ['train-00000:1', 'train-00000:2']


def test_an_id_beyond_the_vocabulary_is_refused(tmp_path, byte_store):
  with pytest.raises(UserError, match="beyond the model's vocabulary of 200"):
    byte_store.check_vocabulary(200)
  write_tokens(tmp_path / 'train.bin', np.array([1, 2, 60000, 4]), llmc=False)
  split = token_store.open_store(tmp_path).splits['train']
  with pytest.raises(UserError, match='token id 60000, beyond'):
    token_batches.TokenBatches(split, 3, 1, 0, 50257).row(0, 0)


def test_a_split_too_short_is_refused(byte_store):
  with pytest.raises(UserError, match='too few for a window'):
    token_batches.TokenBatches(byte_store.splits['val'], 10**6, 1, 0, 257)


def test_shards_read_as_one_run(text_folder, tmp_path, monkeypatch):
  monkeypatch.setattr(corpus_parts, 'MIN_PART_BYTES', 20_000)
  split = prepare.ensure_store(settings(text_folder), tmp_path / 's', workers=1).splits['train']
  whole = np.concatenate([np.asarray(shard.array()) for shard in split.shards])
  rng = np.random.default_rng(0)
  for start, stop in rng.integers(0, len(split), (50, 2)):
    if start < stop:
      np.testing.assert_array_equal(split.read(start, stop), whole[start:stop])
  assert bpe.load('byte').eot == split.read(0, 1)[0]

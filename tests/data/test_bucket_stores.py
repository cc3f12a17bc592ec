"""Token stores in a bucket: the bytes and batches of a disk, whatever breaks, and whole or absent."""

import concurrent.futures
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from support import bucket
from support.processes import ROOT, environment, run
from support.runs import arguments, plain
from support.texts import make_text

from gpt2_jax.cli import main
from gpt2_jax.core import bucket_copies, buckets
from gpt2_jax.core.errors import UserError
from gpt2_jax.data import corpus_parts, prepare, token_batches, token_store, verify
from gpt2_jax.parallel import sharding


@pytest.fixture
def there(tmp_path):
  with bucket.emulated(tmp_path) as found:
    yield found


@pytest.fixture
def near(text_folder, tmp_path, monkeypatch) -> token_store.TokenStore:
  """A store of several shards on this disk."""
  monkeypatch.setattr(corpus_parts, 'MIN_PART_BYTES', 20_000)
  return prepare.ensure_store(settings(text_folder), tmp_path / 'near', 1)


@pytest.fixture
def far(near, there) -> token_store.TokenStore:
  """The same in a bucket."""
  folder = buckets.place(there.url) / 'store'
  buckets.upload(near.path, folder, lambda name: name == token_store.MANIFEST)
  return token_store.open_store(folder)


def settings(folder, **fields) -> prepare.Settings:
  return prepare.Settings(f'text:{folder}', **{'tokenizer': 'byte', 'val_fraction': 0.1} | fields)


def batches_of(opened, T=64, G=8) -> token_batches.TokenBatches:
  return token_batches.TokenBatches(opened.splits['train'], T, G, 3, 300)


def layout() -> NamedSharding:
  return NamedSharding(sharding.make_mesh(fsdp=8), P(None, sharding.BATCH))


def in_bucket(there) -> dict[str, bytes]:
  """The content of a bucket."""
  root = buckets.place(there.url)
  return {name: (root / name).read_bytes() for name in buckets.listing(root)}


def copies() -> list[Path]:
  return sorted(path for path in bucket_copies.home().glob('*/*.bin'))


def copy_all(far: token_store.TokenStore) -> None:
  """Lets the training split be copied, and waits for it."""
  far.splits['train'].at_random.expect(10**6, 130)
  until = time.monotonic() + 60
  while len(copies()) < len(far.splits['train'].shards):
    assert time.monotonic() < until
    time.sleep(0.05)


# --- reading ----------------------------------------------------------------------------------


@pytest.mark.parametrize('way', ['ranges', 'copies', 'ranges and copies', 'copies that go'])
def test_batches_are_those_of_a_disk(near, far, monkeypatch, way):
  monkeypatch.setenv(bucket_copies.LIMIT, {'ranges': '0', 'ranges and copies': '5e-5'}.get(way, '1'))
  assert far.sha256 == near.sha256 and far.tokenizer.sha256 == near.tokenizer.sha256
  assert len(far.splits['train'].shards) > 3
  want, have = batches_of(near), batches_of(far)
  if way.startswith('copies'):
    copy_all(far)
  for step, batch in enumerate(have.batches(0, 12, 1, layout())):
    rows = want.rows(step, range(8))[None]
    assert (np.asarray(batch) == rows).all()
    if way == 'copies that go' and step == 5:
      for path in copies():
        path.unlink()
  if way in ('ranges', 'copies'):
    assert bool(copies()) == (way == 'copies')
  want, have = near.splits['val'], far.splits['val']
  assert (have.read(0, len(have)) == want.read(0, len(want))).all()
  assert have.documents_in(0, len(have)) == want.documents_in(0, len(want))


def test_shards_are_copied_where_it_is_cheaper(far, there):
  """Few rows of a store are fetched by themselves; in a longer run each shard comes once."""
  batches, size = batches_of(far), sum(shard.size for shard in far.splits['train'].shards)
  far.splits['train'].at_random.expect(size // 2**18 or 0, 130)
  batches.rows(0, range(8))
  assert not copies() and any('bytes=' in line and 'train' in line for line in there.asked())
  copy_all(far)
  fetched = lambda: sum('/download/' in line and 'train' in line for line in there.asked())
  before = fetched()
  batches.rows(1, range(8))
  assert fetched() == before


def test_reads_that_break_are_made_again(near, far, there, monkeypatch):
  monkeypatch.setenv(bucket_copies.LIMIT, '0')
  there.faults(failing=0.15)
  want, have = batches_of(near), batches_of(far)
  with concurrent.futures.ThreadPoolExecutor(4) as pool:
    for step, rows in enumerate(pool.map(lambda step: have.rows(step, range(8)), range(4))):
      assert (rows == want.rows(step, range(8))).all()


def test_wrong_content_is_named(near, far, there):
  """By its hash, where a shard is copied, and where all is read again."""
  shard = far.splits['val'].shards[0]
  content = bytearray((near.path / shard.path.name).read_bytes())
  content[100] ^= 1
  shard.path.write_bytes(bytes(content))
  assert verify.verify(far) == len(near.splits['train'].shards) + len(near.splits['val'].shards)
  for read in (lambda: far.splits['val'].read(0, 10), lambda: verify.verify(far, again=True)):
    with pytest.raises(UserError, match=f'{shard.path} .*SHA-256'):
      read()
  shard.path.write_bytes(bytes(content[:-2]))
  with pytest.raises(UserError, match=f'{shard.path} has .* bytes, not '):
    token_store.open_store(far.path)


def test_copies_stay_within_their_limit(near, far, monkeypatch):
  """The least recently used go; what is held by a reader, in any process, stays."""
  sizes = [shard.size for shard in far.splits['train'].shards[:4]]
  monkeypatch.setenv(bucket_copies.LIMIT, str((sum(sizes[:3]) + 10) / 1e9))
  first, second, third, fourth = far.splits['train'].shards[:4]
  get = lambda shard: bucket_copies.fetch(shard.path, shard.key, shard.size)
  with bucket_copies.held(first.path):
    get(second)
    assert get(third)
    bucket_copies.find(second.key, second.path.name, second.size)
    assert get(fourth)
    names = {path.name for path in copies()}
    assert names == {first.path.name, second.path.name, fourth.path.name}
  assert bucket_copies.fetch(third.path, third.key, third.size, keep=[second.key, fourth.key])
  assert sum(path.stat().st_size for path in copies()) <= sum(sizes[:3]) + 10
  assert bucket_copies.fetch(near.path, 'x', sum(sizes) + 100) is None


def test_token_files_of_others(there, tmp_path):
  tokens = np.random.default_rng(0).integers(0, 50257, 5000, np.uint16)
  folder = buckets.place(there.url) / 'nano'
  for split in ('train', 'val'):
    (folder / f'{split}.bin').write_bytes(tokens.tobytes())
  opened = token_store.open_store(folder)
  assert (opened.splits['train'].rows([0, 3000], 2000) == [tokens[:2000], tokens[3000:]]).all()
  assert (opened.splits['val'].read(0, 5000) == tokens).all()


# --- a bucket that is slow --------------------------------------------------------------------


@pytest.mark.slow
def test_batches_come_ahead_of_their_steps(far, there, monkeypatch):
  """Rows by ranges alone, 50 ms an answer, one in fifty of which breaks: while a step runs, however
  long, the batches of the next ones come.
  """
  monkeypatch.setenv(bucket_copies.LIMIT, '0')
  there.faults(latency_s=0.05, failing=0.02)
  batches, ready = batches_of(far, T=128, G=16), set()
  rows = batches.rows
  monkeypatch.setattr(batches, 'rows', lambda step, of: (rows(step, of), ready.add(step))[0])
  for step, _ in enumerate(batches.batches(0, 40, 1, layout())):
    until = time.monotonic() + 60
    while not ready.issuperset(range(step, min(step + 8, 40))):  # the step
      assert time.monotonic() < until, (step, ready)
      time.sleep(0.01)


# --- preparing --------------------------------------------------------------------------------


def test_prepare_to_a_bucket_makes_the_same_store(near, there, text_folder):
  made = prepare.ensure_store(settings(text_folder), f'{there.url}/s', 2)
  want = {p.relative_to(near.path).as_posix(): p for p in near.path.rglob('*') if p.is_file()}
  have = {name.removeprefix('s/'): content for name, content in in_bucket(there).items()}
  assert made.sha256 == near.sha256 and have.keys() == want.keys() - {'verified.json'}
  assert all(have[name] == path.read_bytes() for name, path in want.items() if name in have)
  asked = len(there.asked())
  assert prepare.ensure_store(settings(text_folder), f'{there.url}/s').sha256 == near.sha256
  assert not any(line.startswith(('POST', 'PUT')) for line in there.asked()[asked:])
  with pytest.raises(UserError, match='something else'):
    prepare.ensure_store(settings(text_folder, split_seed=1), f'{there.url}/s')


SHARE = """
import sys
from gpt2_jax.data import corpus_parts, prepare
corpus_parts.MIN_PART_BYTES = 20_000
corpus, tokenizer, folder, i, n = sys.argv[1:]
s = prepare.Settings(corpus, tokenizer, 0.2)
print(prepare.ensure_store(s, folder, 1, (int(i), int(n))).sha256)
"""


@pytest.mark.parametrize('place', ['disk', pytest.param('bucket', marks=pytest.mark.slow)])
def test_several_processes_make_one_store(text_folder, tmp_path, there, place, monkeypatch):
  """The bytes of one process, with a tokenizer that is trained on the text."""
  monkeypatch.setattr(corpus_parts, 'MIN_PART_BYTES', 20_000)
  s = settings(text_folder, tokenizer='bpe:300', val_fraction=0.2)
  want = prepare.ensure_store(s, tmp_path / 'one', 1)
  folder = f'{there.url}/s' if place == 'bucket' else str(tmp_path / 's')
  others = [
    subprocess.Popen(
      [sys.executable, '-c', SHARE, s.corpus, s.tokenizer, folder, str(i), '3'],
      env=environment(**there.env | {'XDG_CACHE_HOME': str(tmp_path / f'cache{i}')}),
      stdout=subprocess.PIPE,
      text=True,
    )
    for i in (2, 1, 0)
  ]
  told = [other.communicate(timeout=120)[0].strip() for other in others]
  assert told == [want.sha256] * 3
  files = {p.relative_to(want.path).as_posix(): p.read_bytes() for p in want.path.rglob('*.*')}
  if place == 'bucket':
    have = {name.removeprefix('s/'): content for name, content in in_bucket(there).items()}
  else:
    have = {str(p.relative_to(folder)): p.read_bytes() for p in Path(folder).rglob('*.*')}
  assert {n: c for n, c in have.items() if '.' in n} == files


def test_shares_one_after_another(text_folder, tmp_path, there, monkeypatch, capsys):
  """On one machine, in any order after the first; another job's remains are not taken for its own."""
  monkeypatch.setattr(corpus_parts, 'MIN_PART_BYTES', 20_000)
  s, folder = settings(text_folder), f'{there.url}/s'
  assert not prepare.do_share(settings(text_folder, split_seed=9), folder, 1, (0, 2))
  assert not prepare.do_share(s, folder, 1, (0, 3))
  assert 'something else is replaced' in capsys.readouterr().out
  assert not prepare.do_share(s, folder, 1, (2, 3))
  with pytest.raises(UserError, match='no manifest.json'):
    token_store.open_store(folder)
  assert prepare.do_share(s, folder, 1, (1, 3))
  assert token_store.open_store(folder).sha256 == prepare.ensure_store(s, tmp_path / 'x').sha256
  with pytest.raises(UserError, match="--part '3/3' must be I/N"):
    main.Prepare('stdlib', 'x', part='3/3').run()


@pytest.mark.slow
def test_shares_that_are_killed_go_on(tmp_path, there, monkeypatch):
  """SIGKILL of both of two processes, again and again: no store is seen until all is there."""
  monkeypatch.setattr(corpus_parts, 'MIN_PART_BYTES', 20_000)
  rng = np.random.default_rng(1)
  for i in range(24):
    (tmp_path / f'{i}.txt').write_text(make_text(rng, 2000) * 30)
  s, folder = settings(tmp_path / '*.txt', val_fraction=0.2), f'{there.url}/s'
  there.faults(latency_s=0.02, failing=0.02)

  def start(i: int) -> subprocess.Popen:
    env = environment(**there.env | {'XDG_CACHE_HOME': str(tmp_path / f'cache{i}')})
    command = [sys.executable, '-c', SHARE, s.corpus, s.tokenizer, folder, str(i), '2']
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)

  shares, kills, least = [start(0), start(1)], 0, 0
  records = lambda: sum('part-' in name for name in buckets.listing(buckets.place(folder)))
  while kills < 4:
    found = records()
    if found > least:
      least, which = found, kills % 2
      shares[which].send_signal(signal.SIGKILL)
      shares[which].communicate()
      kills += 1
      assert not token_store.is_store(buckets.place(folder))
      shares[which] = start(which)
    time.sleep(0.05)
  told = {share.communicate(timeout=200)[0].strip() for share in shares}
  there.faults()
  assert told == {prepare.ensure_store(s, tmp_path / 'one').sha256}
  opened = token_store.open_store(folder)
  assert verify.verify(opened, again=True) > 10


@pytest.mark.slow
def test_two_hosts_train_from_a_bucket(finished, text_folder, tmp_path, there):
  """They prepare the store together, from texts in the bucket, and train as one does from a disk."""
  buckets.upload(text_folder, buckets.place(there.url) / 'texts')
  with socket.socket() as free:
    free.bind(('127.0.0.1', 0))
    port = free.getsockname()[1]
  hosts = []
  for i in range(2):
    store = {'data.corpus': f'text:{there.url}/texts', 'data.store': f'{there.url}/store'}
    command = arguments(text_folder, tmp_path / 'run', train__micro_batch_rows=1, **store)
    flags = [f'--coordinator=127.0.0.1:{port}', '--num_processes=2', f'--process_id={i}']
    env = environment(2, **there.env | {'XDG_CACHE_HOME': str(tmp_path / f'cache{i}')})
    process = subprocess.Popen(
      [sys.executable, *command, *flags], cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True
    )
    hosts.append(process)
  said = [host.communicate(timeout=300)[1] for host in hosts]
  assert [host.returncode for host in hosts] == [0, 0], said
  for have, want in zip(plain(tmp_path / 'run'), plain(finished[0]), strict=True):
    assert have == pytest.approx(want, rel=2e-5)
  assert token_store.open_store(f'{there.url}/store').manifest['source']['corpus'].endswith('texts')
  done = run(
    '-m', 'gpt2_jax', 'evaluate', f'--checkpoint={tmp_path / "run"}',
    f'--tasks=store:{there.url}/store', **there.env,
  )  # fmt: skip
  assert done.returncode == 0 and 'loss' in done.stdout, done.stderr

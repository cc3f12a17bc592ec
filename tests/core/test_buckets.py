"""Buckets: which paths name them, local copies, and what is written there."""

import hashlib
import json
import threading
from pathlib import Path

import pytest
from support import bucket

from gpt2_jax.checkpoints import manifest
from gpt2_jax.core import buckets, files
from gpt2_jax.core.errors import UserError


@pytest.fixture(scope='module')
def cloud(tmp_path_factory):
  pytest.importorskip('gcsfs')
  with bucket.emulated(tmp_path_factory.mktemp('cloud')) as there:
    yield there


@pytest.mark.parametrize(
  'named,means',
  [
    ('a:b', Path('a:b')),
    ('/x//y:z', Path('/x/y:z')),
    ('file:///tmp/x', Path('/tmp/x')),
    ('gs://bucket/a/b/', 'gs://bucket/a/b'),
    (Path('gs://bucket/a'), 'gs://bucket/a'),
    ('GS://bucket/a', 'gs://bucket/a'),
  ],
)
def test_what_a_path_means(named, means):
  pytest.importorskip('gcsfs')
  found = buckets.place(named)
  assert found == means if isinstance(means, Path) else str(found) == means
  assert buckets.is_bucket(found) == isinstance(means, str)
  assert str(buckets.place(found)) == str(found)


@pytest.mark.parametrize(
  'named,says',
  [
    ('gs://', 'names no bucket'),
    ('gs://b/a', r"needs gcsfs: pip install 'gpt2_jax\[gcs\]'"),
    ('s3://b/a', r"needs s3fs: pip install 'gpt2_jax\[s3\]'"),
    ('hf://b/a', 'not supported: name a local path'),
  ],
)
def test_a_path_that_cannot_be_had_is_refused_by_name(named, says, monkeypatch):
  monkeypatch.setattr(buckets.importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(UserError, match=f'--x .*{named}.*{says}'):
    buckets.place(named, '--x')


def test_a_local_copy_follows_the_bucket(cloud):
  there = buckets.place(f'{cloud.url}/copy')
  contents = {'a.txt': b'one', 'sub/b.bin': bytes(range(256)) * 5000, 'skip/c': b'no'}
  for name, content in contents.items():
    (there / name).write_bytes(content)
  wanted = lambda name: not name.startswith('skip/')

  def copied():
    folder = buckets.fetched(there, wanted)
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob('*') if p.is_file()}

  assert copied() == {'a.txt': contents['a.txt'], 'sub/b.bin': contents['sub/b.bin']}
  asked = len(cloud.asked())
  copied()
  assert not [line for line in cloud.asked()[asked:] if 'b.bin' in line]  # it has not changed
  (there / 'a.txt').write_bytes(b'two')  # as long as before
  (there / 'sub' / 'b.bin').unlink()
  assert copied() == {'a.txt': b'two'}
  assert buckets.fetched(there / 'a.txt').read_bytes() == b'two'
  with pytest.raises(UserError, match='gs://bucket/copy/none is not there'):
    buckets.fetched(there / 'none')
  with pytest.raises(UserError, match='there is no bucket gs://other'):
    buckets.fetched(buckets.place('gs://other/x'))


def test_a_folder_is_written_whole_and_its_index_last(cloud):
  target = f'{cloud.url}/out/model'
  with pytest.raises(RuntimeError), files.whole(target) as path:
    path.mkdir()
    (path / 'config.json').write_text('{}')
    raise RuntimeError
  assert not buckets.place(target).exists()
  with files.whole(target) as path:
    path.mkdir()
    for name in ('config.json', 'model.bin', 'z.bin'):
      (path / name).write_text(name)
  sent = [line for line in cloud.asked() if 'upload' in line]
  assert sorted(buckets.listing(buckets.place(target))) == ['config.json', 'model.bin', 'z.bin']
  with pytest.raises(UserError, match='out/model is there already'), files.whole(target):
    pass
  assert sent
  files.write_whole(buckets.place(f'{cloud.url}/out/x.json'), '{"a": 1}')
  assert files.read_json(buckets.place(f'{cloud.url}/out/x.json')) == {'a': 1}


def test_faults_on_the_way_change_nothing(cloud):
  """A quarter of the answers fail, are cut in the middle, or never come."""
  there = buckets.place(f'{cloud.url}/faulty')
  contents = {f'{n}.bin': hashlib.sha256(bytes([n])).digest() * 3000 for n in range(3)}
  cloud.faults(failing=0.25)
  try:
    for name, content in contents.items():
      (there / name).write_bytes(content)
    folder = buckets.fetched(there)
  finally:
    cloud.faults()
  assert {path.name: path.read_bytes() for path in folder.iterdir()} == contents


def test_a_bucket_that_is_away_for_a_moment_is_waited_for(cloud, capfd):
  there = buckets.place(f'{cloud.url}/away/x')
  there.write_text('here')
  cloud.stop()
  back = threading.Timer(1, cloud.start)
  back.start()
  assert there.exists() and there.read_text() == 'here'
  back.join()


def test_a_manifest_in_a_bucket_reads_nothing_again(cloud):
  step = buckets.place(f'{cloud.url}/run/checkpoints/1')
  (step / 'params' / 'd').write_bytes(b'x' * 1000)
  (step / 'meta').write_bytes(b'{}')
  asked = len(cloud.asked())
  manifest.write(step)
  assert manifest.damage(step) is None
  reads = [line for line in cloud.asked()[asked:] if 'alt=media' in line or '/download/' in line]
  assert all('manifest.json' in line for line in reads)
  made = json.loads((step / manifest.FILE).read_text())['files']
  assert made['params/d'] == {'bytes': 1000, 'md5': hashlib.md5(b'x' * 1000).hexdigest()}
  (step / 'params' / 'd').write_bytes(b'y' * 1000)
  assert 'params/d has other content' in str(manifest.damage(step))
  (step / 'params' / 'd').unlink()
  assert manifest.damage(step) == 'params/d is missing'


def test_a_manifest_goes_with_its_checkpoint_from_bucket_to_disk_and_back(cloud, tmp_path):
  step = buckets.place(f'{cloud.url}/moved/checkpoints/1')
  (step / 'params' / 'd').write_bytes(b'x' * 1000)
  manifest.write(step)
  here = buckets.fetched(step)
  assert manifest.damage(here) is None
  (here / manifest.FILE).unlink()
  manifest.write(here)
  back = buckets.place(f'{cloud.url}/back/checkpoints/1')
  buckets.upload(here, back)
  assert manifest.damage(back) is None
  (here / 'params' / 'd').write_bytes(b'z' * 1000)
  assert 'other content' in str(manifest.damage(here))

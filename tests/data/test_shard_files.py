"""Rows of large files: nothing else is read, few files are open, and damage is one line."""

import concurrent.futures
import dataclasses
import os
import pickle
import resource
from pathlib import Path

import numpy as np
import pytest
from support.processes import run

from gpt2_jax.core.errors import UserError
from gpt2_jax.data import shard_files
from gpt2_jax.data.shards import Shard, Split


@pytest.fixture
def split(tmp_path) -> Split:
  """Nine shards of 1,000 tokens, which count up through all of them."""
  found = []
  for i in range(9):
    path = tmp_path / f'train-{i:05d}.bin'
    np.arange(1000 * i, 1000 * (i + 1), dtype='<u2').tofile(path)
    found.append(Shard(path, 1000, '<u2'))
  return Split('train', tuple(found))


def test_rows_lie_across_shards(split):
  starts = [0, 995, 2500, 8990, 1]
  for length in (1, 10, 2001 - 1000):
    some = [start for start in starts if start + length <= 9000]
    want = np.array([range(start, start + length) for start in some])
    rows = split.rows(some, length)
    assert rows.dtype == np.int32 and (rows == want).all()
  assert (split.read(0, 9000) == np.arange(9000)).all()
  assert split.rows([], 5).shape == (0, 5)


def test_threads_share_a_few_open_files(split, monkeypatch):
  monkeypatch.setattr(shard_files, 'OPEN_FILES', 2)
  opened = lambda: sum(
    os.path.realpath(f'/proc/self/fd/{fd}').endswith('.bin') for fd in os.listdir('/proc/self/fd')
  )
  right = lambda seed: all(
    (split.rows([start], 1500)[0] == np.arange(start, start + 1500)).all()
    for start in np.random.default_rng(seed).integers(0, 7500, 200).tolist()
  )
  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    assert all(pool.map(right, range(8)))
  assert opened() == 2
  assert (pickle.loads(pickle.dumps(split)).rows([7], 3) == [[7, 8, 9]]).all()


FORK = """
import os, threading
from pathlib import Path
from gpt2_jax.data.shards import Shard, Split
paths = [Path('FOLDER') / f'train-{i:05d}.bin' for i in range(9)]
split = Split('train', tuple(Shard(path, 1000, '<u2') for path in paths))
right = lambda at: split.rows([at], 900).tolist() == [list(range(at, at + 900))]
def go_on():
  while True:
    right(8000)
for _ in range(4):
  threading.Thread(target=go_on, daemon=True).start()
children = []
for i in range(8):
  if not (child := os.fork()):
    os._exit(not all(map(right, range(0, 8100, 100))))
  children.append(child)
assert all(map(right, range(0, 8100, 100)))
assert [os.waitpid(child, 0)[1] for child in children] == [0] * 8
"""


def test_forked_processes_read_the_same_files(split):
  """While threads of their parent are in the midst of a read."""
  done = run('-W', 'ignore', '-c', FORK.replace('FOLDER', str(split.shards[0].path.parent)))
  assert done.returncode == 0, done.stderr


def test_what_is_cut_short_or_gone_is_one_line(split):
  first, last = split.shards[0].path, split.shards[8].path
  split.rows([8500], 10)
  os.truncate(last, 1100)  # while it is open
  for read in (lambda: split.rows([8500, 8600], 10), lambda: split.read(8500, 8600)):
    with pytest.raises(UserError, match=f'{last} has 1,100 bytes, too few: .*damaged'):
      read()
  first.unlink()
  with pytest.raises(UserError, match=f'{first} is missing'):
    split.rows([0], 10)


@pytest.mark.skipif(not os.path.exists('/proc/self/io'), reason='Linux says what was read')
def test_little_is_read_beside_the_rows(tmp_path):
  """Where the test's folder lies in memory this holds too, and shows nothing."""
  path, size = tmp_path / 'train.bin', 2**26
  path.write_bytes(np.random.default_rng(0).bytes(size))
  split = Split('train', (Shard(path, size // 2, '<u2'),))
  with open(path, 'rb') as file:
    os.fsync(file.fileno())
    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
  read = lambda: int(Path('/proc/self/io').read_text().split('read_bytes: ')[1].split()[0])
  before, page = read(), resource.getpagesize()
  split.rows(list(range(0, size // 2 - 2000, size // 200)), 1025)
  assert read() - before <= 100 * (2050 + 2 * page) + 2**18  # and what leads to the file's blocks


def test_shards_of_other_widths(tmp_path):
  tokens = np.arange(70_000, dtype='<u4')
  tokens.tofile(tmp_path / 'a.bin')
  shard = Shard(tmp_path / 'a.bin', 70_000, '<u4')
  halves = [dataclasses.replace(shard, tokens=30_000), dataclasses.replace(shard, tokens=40_000)]
  halves[1] = dataclasses.replace(halves[1], offset=120_000)
  rows = Split('train', tuple(halves)).rows([29_990, 69_000], 1000)
  assert (rows == [tokens[29_990:30_990], tokens[69_000:]]).all()

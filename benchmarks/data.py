"""Tokenizing and loading on one core, beside what they are made of and what a step needs.

    python -m benchmarks.data [--tokenizers gpt2 bpe:4096 byte] [--need TOKENS_PER_S] [--json FILE]

Preparation: text a second from the standard library's files to a finished token store, by one worker
on one core. Beside it, on the same text, which it has in memory, tiktoken's `encode_ordinary_batch`
with the same vocabulary on one core, and the package tokenizers: the first is the limit. A
tokenizer that is trained is so beforehand; what training takes is a row of its own.

Loader: tokens a second from a store to the first device, on one core, beside a loop in the form of
nanoGPT's `get_batch` (a memmap, random slices, two arrays of int64; it places nothing). `need`: how
many tokens a second the fastest step takes. 400,000 is 124M on one H100 at 35 % of its bfloat16 peak.
The loader is to feed 20 times as many.

Cold rows: the same loader on two cores, from a store that the system has nothing of in memory (the
file's pages are dropped before each turn), beside random slices of a memmap of it. To feed: 4 million
tokens a second. The store is written to --cold-folder, which must lie on a disk, not in memory.
"""

import argparse
import itertools
import os
import statistics
import tempfile

import numpy as np

from benchmarks.common import Worker, ratio, report, take_turns

ONE_CORE = {'RAYON_NUM_THREADS': '1', 'TOKENIZERS_PARALLELISM': 'false'}
PIN = 'os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n'
PREPARE = (
  PIN
  + """
import tempfile
from gpt2_jax.data import corpora, prepare
from gpt2_jax.tokenizer import bpe
def train(corpus, size, folder):
  texts = [d.text for piece in corpora.open_corpus(corpus).pieces
           for d in corpora.documents(piece, 'text')]
  began = time.perf_counter()
  bpe.train_bpe(texts, size).save(bpe.Path(folder))
  return {'seconds': time.perf_counter() - began}
def run(corpus, spec, folder=None):
  if size := bpe.trained_size(spec):
    return train(corpus, size, folder)
  with tempfile.TemporaryDirectory() as root:
    began = time.perf_counter()
    store = prepare.ensure_store(prepare.Settings(corpus, spec, split='tail'), f'{root}/store', 1)
    return {'seconds': time.perf_counter() - began, 'bytes': store.manifest['source']['bytes'],
            'tokens': sum(map(len, store.splits.values()))}
"""
)
BARE = (
  PIN
  + """
from gpt2_jax.data import corpora
from gpt2_jax.tokenizer import bpe
texts, encode = [], None
def run(package, corpus=None, spec=None):
  global texts, encode
  if corpus:
    texts = [d.text for piece in corpora.open_corpus(corpus).pieces
             for d in corpora.documents(piece, 'text')]
    made = bpe.load(spec)
    if package == 'tiktoken':
      encode = lambda: made._encoding.encode_ordinary_batch(texts, num_threads=1)
    else:
      encode = lambda: made._theirs_without_added.encode_batch_fast(texts)
  began = time.perf_counter()
  encode()
  return {'seconds': time.perf_counter() - began}
"""
)
LOADER = (
  PIN
  + """
import jax
from jax.sharding import NamedSharding, PartitionSpec
from gpt2_jax.data import token_batches, token_store
from gpt2_jax.parallel import sharding
layout = NamedSharding(sharding.make_mesh(devices=jax.devices()[:1]),
                       PartitionSpec(None, sharding.BATCH))
def run(folder, rows, T, steps):
  split = token_store.open_store(folder).splits['train']
  batches = token_batches.TokenBatches(split, T, rows, 0, 50257).batches(0, steps + 1, 1, layout)
  next(batches)  # starts the threads
  began = time.perf_counter()
  for batch in batches:
    jax.block_until_ready(batch)
  return {'seconds': (time.perf_counter() - began) / steps}
"""
)
SLICES = (
  PIN
  + """
import numpy as np
def run(folder, rows, T, steps):
  began = time.perf_counter()
  for _ in range(steps):
    data = np.memmap(f'{folder}/train.bin', np.uint16, 'r')
    starts = np.random.randint(len(data) - T, size=rows)
    x = np.stack([data[i:i + T].astype(np.int64) for i in starts])
    y = np.stack([data[i + 1:i + 1 + T].astype(np.int64) for i in starts])
  return {'seconds': (time.perf_counter() - began) / steps}
"""
)
COLD = """
import os
os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from gpt2_jax.data import token_batches, token_store
from gpt2_jax.parallel import sharding
layout = NamedSharding(sharding.make_mesh(devices=jax.devices()[:1]),
                       PartitionSpec(None, sharding.BATCH))
def ours(folder, rows, T, steps, turn):
  split = token_store.open_store(folder).splits['train']
  batches = token_batches.TokenBatches(split, T, rows, turn, 50257)
  for batch in batches.batches(0, steps, 1, layout):
    jax.block_until_ready(batch)
def memmap(folder, rows, T, steps, turn):
  data, random = np.memmap(f'{folder}/train.bin', np.uint16, 'r'), np.random.default_rng(turn)
  for _ in range(steps):
    starts = random.integers(0, len(data) - T, rows)
    np.stack([data[i:i + T + 1].astype(np.int32) for i in starts])
def run(side, folder, rows, T, steps, turn):
  fd = os.open(f'{folder}/train.bin', os.O_RDONLY)
  os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
  os.close(fd)
  began = time.perf_counter()
  {'ours': ours, 'memmap': memmap}[side](folder, rows, T, steps, turn)
  return {'seconds': (time.perf_counter() - began) / steps}
"""


def asker(worker: Worker, **asked):
  return lambda: worker.ask(**asked)['seconds']


def prepare(corpus: str, spec: str, repeats: int, folder: str):
  """Yields rows: the training of a tokenizer, then text to tokens."""
  with (
    Worker(PREPARE, **ONE_CORE) as ours,
    Worker(BARE, **ONE_CORE) as tiktoken,
    Worker(BARE, **ONE_CORE) as tokenizers,
  ):
    first = ours.ask(corpus=corpus, spec='byte')  # which also reads the files into memory
    size, trained = first['bytes'], spec
    if spec.startswith('bpe:'):
      trained = folder
      seconds = ours.ask(corpus=corpus, spec=spec, folder=folder)['seconds']
      yield dict(
        what='train', tokenizer=spec, bytes=size, seconds=[seconds], bytes_per_second=size / seconds
      )
    sides = {'ours': asker(ours, corpus=corpus, spec=trained)}
    if spec != 'byte':  # which is a table of 256 entries
      for package, worker in (('tiktoken', tiktoken), ('tokenizers', tokenizers)):
        worker.ask(package=package, corpus=corpus, spec=trained)
        sides[package] = asker(worker, package=package)
    seconds = take_turns(sides, repeats)
  row = dict(
    what='prepare',
    tokenizer=spec,
    bytes=size,
    seconds=seconds['ours'],
    bytes_per_second=size / statistics.median(seconds['ours']),
  )
  for package in sides.keys() - {'ours'}:
    row[f'{package}_bytes_per_second'] = size / statistics.median(seconds[package])
    row[f'of_{package}'] = ratio(seconds[package], seconds['ours'])
  yield row


def load(rows: int, T: int, tokens: int, repeats: int, need: float, folder: str) -> dict:
  with Worker(LOADER) as ours, Worker(SLICES) as slices:
    asked = dict(folder=folder, rows=rows, T=T, steps=max(1, tokens // (rows * T)))
    sides = {'ours': asker(ours, **asked), 'slices': asker(slices, **asked)}
    take_turns(sides, 1)
    seconds = take_turns(sides, repeats)
  rate = {side: rows * T / statistics.median(each) for side, each in seconds.items()}
  return dict(
    what='load',
    rows=rows,
    T=T,
    seconds=seconds['ours'],
    tokens_per_second=rate['ours'],
    slices_tokens_per_second=rate['slices'],
    times_need=rate['ours'] / need,
    need=need,
    of_slices=ratio(seconds['slices'], seconds['ours']),
  )


def cold(rows: int, T: int, size: int, repeats: int, root: str | None) -> dict:
  """Measures rows from a file of `size` bytes of which nothing is in memory."""
  with tempfile.TemporaryDirectory(dir=root) as folder, Worker(COLD) as worker:
    random = np.random.default_rng(0)
    with open(f'{folder}/train.bin', 'wb') as file:
      for _ in range(size >> 24):
        file.write(random.integers(0, 50257, 1 << 23, np.uint16).tobytes())
      os.fsync(file.fileno())
    random.integers(0, 50257, 1 << 12, np.uint16).tofile(f'{folder}/val.bin')
    turns = itertools.count()
    ask = dict(folder=folder, rows=rows, T=T)
    sides = {
      'ours': lambda: worker.ask(side='ours', steps=32, turn=next(turns), **ask)['seconds'],
      'memmap': lambda: worker.ask(side='memmap', steps=2, turn=next(turns), **ask)['seconds'],
    }
    take_turns(sides, 1)
    seconds = take_turns(sides, repeats)
  rate = {side: rows * T / statistics.median(each) for side, each in seconds.items()}
  return dict(
    what='cold',
    rows=rows,
    T=T,
    bytes=size,
    seconds=seconds['ours'],
    tokens_per_second=rate['ours'],
    memmap_tokens_per_second=rate['memmap'],
    of_memmap=ratio(seconds['memmap'], seconds['ours']),
  )


def main() -> None:
  flags = argparse.ArgumentParser(description=(__doc__ or '').splitlines()[0])
  flags.add_argument('--corpus', default='stdlib')
  flags.add_argument('--tokenizers', nargs='*', default=['gpt2', 'bpe:4096', 'byte'])
  flags.add_argument('--shapes', nargs='*', default=['8x1024', '4x256'], help='rows x tokens')
  flags.add_argument('--need', type=float, default=4e5, help='tokens a second of the fastest step')
  flags.add_argument('--tokens', type=int, default=1 << 23, help='loaded a turn')
  flags.add_argument('--repeats', type=int, default=3, help='turns of each side')
  flags.add_argument('--cold', nargs='*', default=['512x1024'], help='rows x tokens')
  flags.add_argument('--cold-bytes', type=int, default=2 << 30, help='size of the store for it')
  flags.add_argument('--cold-folder', help='on a disk; default: the one for temporary files')
  flags.add_argument('--json')
  args = flags.parse_args()
  with report(args.json) as rows, tempfile.TemporaryDirectory() as folder:
    print(
      f'{"tokenizer":12s}{"MB/s":>8s}{"tiktoken":>10s}{"of it":>8s}{"tokenizers":>12s}{"of it":>8s}',
      flush=True,
    )
    for spec in args.tokenizers:
      for row in prepare(args.corpus, spec, args.repeats, f'{folder}/{spec.replace(":", "-")}'):
        rows.append(row)
        name = f'{spec}, training' if row['what'] == 'train' else spec
        print(
          f'{name:20s}'[: max(12, len(name))]
          + f'{row["bytes_per_second"] / 1e6:8.2f}'
          + ''.join(
            f'{row[f"{package}_bytes_per_second"] / 1e6:{width}.2f}{row[f"of_{package}"][0]:8.2f}'
            for package, width in (('tiktoken', 10), ('tokenizers', 12))
            if f'of_{package}' in row
          ),
          flush=True,
        )
    tokens = np.random.default_rng(0).integers(0, 50257, 1 << 24, np.uint16)
    for split in ('train', 'val'):
      tokens.tofile(f'{folder}/{split}.bin')
    print(f'{"batch":12s}{"M tokens/s":>12s}{"needs":>8s}{"memmap slices":>15s}{"of it":>8s}')
    for R, T in (map(int, shape.split('x')) for shape in args.shapes):
      row = load(R, T, args.tokens, args.repeats, args.need, folder)
      rows.append(row)
      print(
        f'{f"{R}x{T}":12s}{row["tokens_per_second"] / 1e6:12.1f}{row["times_need"]:7.0f}x'
        f'{row["slices_tokens_per_second"] / 1e6:15.1f}{row["of_slices"][0]:8.2f}',
        flush=True,
      )
    print(f'{"cold batch":12s}{"M tokens/s":>12s}{"memmap":>15s}{"of it":>8s}')
    for R, T in (map(int, shape.split('x')) for shape in args.cold):
      row = cold(R, T, args.cold_bytes, args.repeats, args.cold_folder)
      rows.append(row)
      print(
        f'{f"{R}x{T}":12s}{row["tokens_per_second"] / 1e6:12.1f}'
        f'{row["memmap_tokens_per_second"] / 1e6:15.1f}{row["of_memmap"][0]:8.1f}',
        flush=True,
      )


if __name__ == '__main__':
  main()

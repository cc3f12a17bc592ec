"""The parts of a corpus: a worker makes a shard of each split from a part, then `part-00000.json`."""

import concurrent.futures
import concurrent.futures.process
import contextlib
import functools
import json
import multiprocessing
import os
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from gpt2_jax.core import buckets, verified
from gpt2_jax.core.errors import UserError, saving
from gpt2_jax.core.files import misfit, read_json, write_whole
from gpt2_jax.core.progress import track
from gpt2_jax.data import corpora, sections, token_store
from gpt2_jax.data.shard_writer import ShardWriter
from gpt2_jax.data.shards import Shard, size_of
from gpt2_jax.data.splits import split_document
from gpt2_jax.data.store_job import Job
from gpt2_jax.tokenizer.bpe import Tokenizer, load

MIN_PART_BYTES, MAX_PART_BYTES, MAX_PARTS = 4 * 2**20, 256 * 2**20, 64

Part = list[tuple[int, corpora.Piece]]  # consecutive pieces of a corpus, with their numbers


def group(pieces: list[corpora.Piece]) -> list[Part]:
  """Returns the pieces of a corpus in order, grouped to parts of similar size."""
  total = sum(piece.bytes for piece in pieces)
  size = min(max(total // MAX_PARTS, MIN_PART_BYTES), MAX_PART_BYTES)
  parts, bytes_left = [], 0  # bytes that the last part may still take
  for numbered in enumerate(pieces):
    if bytes_left <= 0:
      parts.append([])
      bytes_left = size
    parts[-1].append(numbered)
    bytes_left -= numbered[1].bytes
  return parts


def record_name(number: int) -> str:
  """Returns the name of the file that says that a part is finished."""
  return f'part-{number:05d}.json'


def dtype_of(tokenizer: Tokenizer) -> str:
  """Returns the type of a token in a store, as NumPy writes it."""
  return '<u2' if tokenizer.vocab_size <= 2**16 else '<u4'


def encode_all(job: Job, tokenizer: Tokenizer, parts: list[Part], workers: int) -> dict[int, dict]:
  """Makes the shards of this process's parts that are not finished yet.

  Args:
    job: which store.
    tokenizer: of the store, which lies in its scratch too.
    parts: of the corpus; those of process i of n are i, i + n, ….
    workers: processes on this machine.

  Returns:
    The records of the process's parts, by number.

  Raises:
    UserError: a worker was ended from outside, or can't read or write.
  """
  mine = range(job.process[0], len(parts), job.process[1])
  sizes = {n: sum(piece.bytes for _, piece in parts[n]) for n in mine}
  records = _finished_parts(job, mine, tokenizer)
  todo = [n for n in mine if n not in records]
  done, what = sum(sizes[n] for n in records), f'tokenizing {job.settings.corpus}'
  with track(what, sum(sizes.values()), 'bytes', done=done) as advance:
    if workers <= 1 or len(todo) <= 1:
      for n in todo:
        records[n] = _encode(job, tokenizer, n, parts[n])
        advance(sizes[n])
      return records
    with concurrent.futures.ProcessPoolExecutor(
      min(workers, len(todo)), multiprocessing.get_context('spawn'), _end_with_parent
    ) as pool:
      futures = {pool.submit(_encode_in_worker, job, n, parts[n]): n for n in todo}
      try:
        for future in concurrent.futures.as_completed(futures):
          records[futures[future]] = future.result()
          advance(sizes[futures[future]])
      except concurrent.futures.process.BrokenProcessPool as e:
        raise UserError(
          f'a process that tokenized {job.settings.corpus!r} was ended, perhaps for want '
          'of memory. Run the same command again, with fewer --workers: what was '
          'finished is kept.'
        ) from e
      except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        raise
  return records


def _finished_parts(job: Job, numbers: Iterable[int], tokenizer: Tokenizer) -> dict[int, dict]:
  """Returns the records of the parts that an earlier try finished, and that are not damaged."""
  sizes: dict[str, int] | None = None
  if not isinstance(job.folder, Path):
    sizes = {name: int(about['size']) for name, about in buckets.listing(job.folder).items()}
    numbers = [n for n in numbers if record_name(n) in sizes]
  with concurrent.futures.ThreadPoolExecutor(buckets.THREADS) as pool:
    found = pool.map(lambda n: (n, _finished(job, n, tokenizer, sizes)), numbers)
    return {n: record for n, record in found if record is not None}


def record_of(job: Job, number: int) -> dict:
  """Returns the record of a part of the job.

  Raises:
    UserError: there is none.
  """
  record = read_json(
    job.folder / record_name(number), {'train': _is_shard, 'val': _is_shard, 'job': str}
  )
  if record['job'] != job.key:
    raise UserError(f'{job.folder / record_name(number)} is of another corpus or other settings.')
  return record


def _finished(
  job: Job, number: int, tokenizer: Tokenizer, sizes: dict[str, int] | None
) -> dict | None:
  """Returns the record of a part; None if there is none, or damage.

  Args:
    sizes: of the files in a bucket, which are not read again; None: they are on a disk.
  """
  try:
    record = record_of(job, number)
    for s in filter(None, (record['train'], record['val'])):
      shard = Shard.of_manifest(job.folder, s, dtype_of(tokenizer))
      shard.check(size_of if sizes is None else lambda path: sizes.get(path.name, -1))
      paths = [job.scratch / s['file'], job.scratch / s['index']]
      if sizes is None and verified.digest(paths) != s['sha256']:
        return None
  except (UserError, OSError):
    return None
  return record


def _is_shard(value: Any) -> bool:
  return value is None or (misfit(value, token_store.SHARD) is None and value['tokens'] > 0)


# --- In a worker ------------------------------------------------------------------------------


def _end_with_parent() -> None:
  """Lets this process end when its parent does, however that is killed."""
  parent = multiprocessing.parent_process()
  if parent is not None:
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


@functools.cache
def _tokenizer_of(folder: Path) -> Tokenizer:
  return load(folder / 'tokenizer')


def _encode_in_worker(job: Job, number: int, part: Part) -> dict:
  return _encode(job, _tokenizer_of(job.scratch), number, part)


def _encode(job: Job, tokenizer: Tokenizer, number: int, part: Part) -> dict:
  """Writes the shards of a part, then its record, which it returns."""
  with_special = empty = 0  # texts: with special tokens' text in them that is text; without any text
  settings = job.settings
  with saving('the token store', job.folder), contextlib.ExitStack() as open_files:
    writers = {
      split: open_files.enter_context(
        ShardWriter(job.scratch, f'{split}-{number:05d}', dtype_of(tokenizer))
      )
      for split in ('train', 'val')
    }
    for piece_number, piece in part:
      for i, document in enumerate(corpora.documents(piece, settings.text_field)):
        empty += not len(document.text)
        for split, text in split_document(document, settings, piece_number, i):
          special = []
          for k, tokens in enumerate(sections.encode(text, tokenizer, settings.special, special)):
            writers[split].add(tokens, begins=k == 0)
          with_special += bool(special)
    record = {split: writer.finish() for split, writer in writers.items()}
    for shard in filter(None, record.values()):
      _move(job, shard['file'], shard['index'])
    record |= {'special': with_special, 'empty': empty, 'job': job.key}
    write_whole(job.folder / record_name(number), json.dumps(record))
  return record


def _move(job: Job, *names: str) -> None:
  """Moves files from the scratch of a job to its bucket."""
  if not isinstance(job.folder, Path):
    for name in names:
      buckets.upload(job.scratch / name, job.folder / name)
      (job.scratch / name).unlink()

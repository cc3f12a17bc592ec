"""The parts of a corpus: a worker makes a shard of each split from a part, then `part-00000.json`."""

import concurrent.futures
import concurrent.futures.process
import contextlib
import functools
import json
import multiprocessing
import os
import threading
from pathlib import Path
from typing import Any

from gpt2_jax.core import verified
from gpt2_jax.core.errors import UserError, saving
from gpt2_jax.core.files import misfit, read_json, write_whole
from gpt2_jax.core.progress import track
from gpt2_jax.data import corpora, sections, token_store
from gpt2_jax.data.shard_writer import ShardWriter
from gpt2_jax.data.shards import Shard, size_of
from gpt2_jax.data.splits import Settings, split_document
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


def encode_all(
  folder: Path, settings: Settings, tokenizer: Tokenizer, parts: list[Part], workers: int
) -> list[dict]:
  """Makes the shards of the parts that are not finished yet. Returns the records of all parts.

  Args:
    folder: of the store; the tokenizer lies in it.
    settings: of the store.
    tokenizer: of the store.
    parts: of the corpus.
    workers: processes.

  Raises:
    UserError: a worker was ended from outside, or can't read or write.
  """
  sizes = [sum(piece.bytes for _, piece in part) for part in parts]
  records = {n: found for n in range(len(parts)) if (found := _finished(folder, n, tokenizer))}
  todo = [n for n in range(len(parts)) if n not in records]
  done = sum(sizes[n] for n in records)
  with track(f'tokenizing {settings.corpus}', sum(sizes), 'bytes', done=done) as advance:
    if workers <= 1 or len(todo) <= 1:
      for n in todo:
        records[n] = _encode(folder, settings, tokenizer, n, parts[n])
        advance(sizes[n])
      return [records[n] for n in range(len(parts))]
    with concurrent.futures.ProcessPoolExecutor(
      min(workers, len(todo)), multiprocessing.get_context('spawn'), _end_with_parent
    ) as pool:
      futures = {pool.submit(_encode_in_worker, folder, settings, n, parts[n]): n for n in todo}
      try:
        for future in concurrent.futures.as_completed(futures):
          records[futures[future]] = future.result()
          advance(sizes[futures[future]])
      except concurrent.futures.process.BrokenProcessPool as e:
        raise UserError(
          f'a process that tokenized {settings.corpus!r} was ended, perhaps for want '
          'of memory. Run the same command again, with fewer --workers: what was '
          'finished is kept.'
        ) from e
      except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        raise
  return [records[n] for n in range(len(parts))]


def _finished(folder: Path, number: int, tokenizer: Tokenizer) -> dict | None:
  """Returns the record of a part that an earlier try finished; None if there is none, or damage."""
  try:
    record = read_json(folder / record_name(number), {'train': _is_shard, 'val': _is_shard})
    for s in filter(None, (record['train'], record['val'])):
      shard = Shard.of_manifest(folder, s, dtype_of(tokenizer))
      shard.check(size_of)
      if verified.digest([folder / s['file'], folder / s['index']]) != s['sha256']:
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


def _encode_in_worker(folder: Path, settings: Settings, number: int, part: Part) -> dict:
  return _encode(folder, settings, _tokenizer_of(folder), number, part)


def _encode(folder: Path, settings: Settings, tokenizer: Tokenizer, number: int, part: Part) -> dict:
  """Writes the shards of a part, then its record, which it returns."""
  with_special = empty = 0  # texts: with special tokens' text in them that is text; without any text
  with saving('the token store', folder), contextlib.ExitStack() as open_files:
    writers = {
      split: open_files.enter_context(
        ShardWriter(folder, f'{split}-{number:05d}', dtype_of(tokenizer))
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
    record |= {'special': with_special, 'empty': empty}
    write_whole(folder / record_name(number), json.dumps(record))
  return record

"""From a corpus to a token store: in parallel, resumable, and never half a store.

The pieces of the corpus are grouped into parts; a worker turns a part into a shard of each split
and then writes `part-00000.json`. A preparation that was killed goes on behind the last finished
part. The manifest is written when all parts are there. Which documents are held out, and every
byte of the store, depend on the corpus and the settings alone, not on the number of workers.
"""

import concurrent.futures
import concurrent.futures.process
import contextlib
import dataclasses
import importlib.metadata
import json
import multiprocessing
import os
import platform
import shutil
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import filelock
import numpy as np

from gpt2_jax import tokenizer as tokenizers
from gpt2_jax import verified
from gpt2_jax.data import corpora, sections, store
from gpt2_jax.data.shard_writer import ShardWriter
from gpt2_jax.data.splits import Settings, split_document
from gpt2_jax.errors import UserError, saving
from gpt2_jax.files import local, misfit, read_json, write_whole
from gpt2_jax.progress import track

MIN_PART_BYTES, MAX_PART_BYTES, MAX_PARTS = 4 * 2**20, 256 * 2**20, 64
BPE_TRAINING_BYTES = 64 * 2**20
JOB = 'job.json'


def store_name(settings: Settings) -> str:
  """The usual name of a store's folder."""
  name = f'{corpora.slug(settings.corpus)}-{corpora.slug(settings.tokenizer)}'
  return name + '-special' * settings.special


def _parts(pieces: list[corpora.Piece]) -> list[list[tuple[int, corpora.Piece]]]:
  """Consecutive pieces with their numbers, grouped to parts of similar size."""
  total = sum(piece.bytes for piece in pieces)
  size = min(max(total // MAX_PARTS, MIN_PART_BYTES), MAX_PART_BYTES)
  parts, room = [], 0
  for numbered in enumerate(pieces):
    if room <= 0:
      parts.append([])
      room = size
    parts[-1].append(numbered)
    room -= numbered[1].bytes
  return parts


# --- workers ----------------------------------------------------------------------------------

_worker: dict = {}


def _start_worker(
  folder: Path, settings: Settings, tokenizer: tokenizers.Tokenizer | None = None
) -> None:
  parent = multiprocessing.parent_process()
  if parent is not None:  # a worker must not outlive a killed parent
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
  _worker.update(
    folder=folder, settings=settings, tokenizer=tokenizer or tokenizers.load(folder / 'tokenizer')
  )


def _encode_part(number: int, part: list[tuple[int, corpora.Piece]]) -> dict:
  folder, settings, tokenizer = (_worker[key] for key in ('folder', 'settings', 'tokenizer'))
  held = 0  # texts with special tokens in them that are text
  with saving('the token store', folder), contextlib.ExitStack() as open_files:
    writers = {
      split: open_files.enter_context(ShardWriter(folder, f'{split}-{number:05d}', _dtype(tokenizer)))
      for split in ('train', 'val')
    }
    empty = 0
    for piece_number, piece in part:
      for i, document in enumerate(corpora.documents(piece, settings.text_field)):
        empty += not len(document.text)
        for split, text in split_document(document, settings, piece_number, i):
          special = []
          for k, tokens in enumerate(sections.encode(text, tokenizer, settings.special, special)):
            writers[split].add(tokens, begins=k == 0)
          held += bool(special)
    record = {split: writer.finish() for split, writer in writers.items()} | {
      'special': held,
      'empty': empty,
    }
    write_whole(folder / _part_name(number), json.dumps(record))
  return record


def _part_name(number: int) -> str:
  return f'part-{number:05d}.json'


def _dtype(tokenizer: tokenizers.Tokenizer) -> str:
  return '<u2' if tokenizer.vocab_size <= 2**16 else '<u4'


# --- the whole --------------------------------------------------------------------------------


def _training_texts(pieces: list[corpora.Piece], settings: Settings) -> Iterator[str]:
  """Texts of the training split to train a tokenizer on: all, or pieces spread over the corpus."""
  total = sum(piece.bytes for piece in pieces)
  stride = max(1, -(-total // BPE_TRAINING_BYTES))
  with track('training the tokenizer: reading', total / stride, 'bytes') as advance:
    for piece_number in range(0, len(pieces), stride):
      piece = pieces[piece_number]
      for i, document in enumerate(corpora.documents(piece, settings.text_field)):
        for split, text in split_document(document, settings, piece_number, i):
          if isinstance(text, np.ndarray):
            raise UserError("a corpus of tokens (bin:) can't train a tokenizer.")
          if split == 'train':
            yield from sections.sections(text)
      advance(piece.bytes)


def _make_tokenizer(settings: Settings, pieces: list[corpora.Piece]) -> tokenizers.Tokenizer:
  size = tokenizers.trained_size(settings.tokenizer)
  if settings.corpus.startswith('bin:') and settings.tokenizer != 'gpt2':
    raise UserError(
      f"the tokens of {settings.corpus!r} are GPT-2's: tokenizer "
      f"{settings.tokenizer!r} can't be applied to them. Set it to gpt2."
    )
  if size is None:
    return tokenizers.load(settings.tokenizer)
  return tokenizers.train_bpe(_training_texts(pieces, settings), size)


def _manifest(settings, corpus, tokenizer, records) -> dict:
  splits = {}
  for split in ('train', 'val'):
    shards = [record[split] for record in records if record[split]]
    splits[split] = {
      'tokens': sum(s['tokens'] for s in shards),
      'documents': sum(s['documents'] for s in shards),
      'shards': shards,
    }
  if not splits['train']['tokens']:
    raise UserError(f'corpus {settings.corpus!r} holds no text: every document is empty.')
  if not splits['val']['tokens']:
    raise UserError(
      f'corpus {settings.corpus!r} has {splits["train"]["documents"]} documents, and none of them '
      f'fell into the held-out split of {settings.val_fraction:g}. Raise config.data.val_fraction '
      '(--val-fraction), or hold out the end of each document: config.data.split=tail '
      '(--split tail).'
    )
  manifest = {
    'version': store.VERSION,
    'dtype': _dtype(tokenizer),
    'sha256': '',
    'tokenizer': {
      'spec': settings.tokenizer,
      'vocab_size': tokenizer.vocab_size,
      'eot': tokenizer.eot,
      'sha256': tokenizer.sha256,
    },
    'source': {
      'corpus': settings.corpus,
      'licence': corpus.licence,
      'bytes': sum(piece.bytes for piece in corpus.pieces),
      **corpus.identity,
    },
    'settings': settings.as_json(),
    'made_with': {
      'gpt2_jax': importlib.metadata.version('gpt2_jax'),
      'python': platform.python_version(),
    },
    'splits': splits,
  }
  return manifest | {'sha256': store.content_sha256(manifest)}


def _json(value: dict) -> dict:
  """`value` as it comes back from JSON."""
  return json.loads(json.dumps(value))


def _begin(folder: Path, job: dict) -> None:
  """Makes the folder ready for this job, keeping the finished parts of an earlier try at it."""
  path = folder / JOB
  with contextlib.suppress(UserError):  # there is none, or a broken one: then all is made anew
    if read_json(path) == job:
      return
  rest = [p for p in folder.iterdir() if p.name not in (JOB, f'{JOB}.tmp')] if folder.exists() else []
  if rest:
    if not path.exists():
      raise UserError(f'{folder} exists and is no token store: choose another folder.')
    print(f'{folder}: an unfinished preparation of something else is replaced.')
    for old in rest:  # the job last, so that a kill in between leaves it
      shutil.rmtree(old) if old.is_dir() else old.unlink()
  folder.mkdir(parents=True, exist_ok=True)
  write_whole(path, json.dumps(job))


def _finished(folder: Path, number: int, dtype: str) -> dict | None:
  """What a part left that an earlier try has finished; None where it isn't finished, or not whole."""
  try:
    record = read_json(folder / _part_name(number), {'train': _is_record, 'val': _is_record})
    for s in filter(None, (record['train'], record['val'])):
      store.Shard(
        folder / s['file'], s['tokens'], dtype, index=folder / s['index'], documents=s['documents']
      ).check()
      if verified.digest([folder / s['file'], folder / s['index']]) != s['sha256']:
        return None
  except (UserError, OSError):
    return None
  return record


def _is_record(value: Any) -> bool:
  return value is None or (misfit(value, store.SHARD) is None and value['tokens'] > 0)


def _prepare(settings: Settings, folder: Path, corpus: corpora.Corpus, workers: int) -> None:
  for note in corpus.notes:
    _note(note)
  _begin(folder, _json({'settings': settings.as_json(), 'corpus': corpus.identity}))
  if (folder / 'tokenizer' / 'done').exists():
    tokenizer = tokenizers.load(folder / 'tokenizer')
  else:
    tokenizer = _make_tokenizer(settings, corpus.pieces)
    tokenizer.save(folder / 'tokenizer')
    write_whole(folder / 'tokenizer' / 'done', '')
  parts = _parts(corpus.pieces)
  made = _encode_all(folder, settings, tokenizer, parts, workers)
  records = [made[n] for n in range(len(parts))]
  if empty := sum(record.get('empty', 0) for record in records):
    _note(f'{settings.corpus}: {empty:,} texts are empty or null, and passed over.')
  if held := sum(record.get('special', 0) for record in records):
    _note(
      f'{settings.corpus}: {held:,} texts hold the text of a special token, which is text here. '
      'To have the token itself: config.data.special=True (--special).'
    )
  if not settings.corpus.startswith('tfds:') and (
    corpora.open_corpus(settings.corpus).identity != corpus.identity
  ):
    raise UserError(
      f'the corpus {settings.corpus!r} has changed while it was read: run the same '
      'command again when its files are whole.'
    )
  manifest = _manifest(settings, corpus, tokenizer, records)
  write_whole(folder / store.MANIFEST, json.dumps(manifest, indent=1))
  for name in [JOB, *(_part_name(n) for n in range(len(parts)))]:
    (folder / name).unlink()


def _note(text: str) -> None:
  print(text, file=sys.stderr, flush=True)


def _encode_all(
  folder: Path, settings: Settings, tokenizer: tokenizers.Tokenizer, parts: list, workers: int
) -> dict[int, dict]:
  """Makes the parts that are not there yet. Returns what all of them left, by number."""
  size = lambda number: sum(piece.bytes for _, piece in parts[number])
  records = {
    n: record
    for n in range(len(parts))
    if (record := _finished(folder, n, _dtype(tokenizer))) is not None
  }
  todo = [n for n in range(len(parts)) if n not in records]
  with track(
    f'tokenizing {settings.corpus}',
    sum(map(size, range(len(parts)))),
    'bytes',
    done=sum(map(size, records)),
  ) as advance:
    if workers <= 1 or len(todo) <= 1:
      _start_worker(folder, settings, tokenizer)
      for n in todo:
        records[n] = _encode_part(n, parts[n])
        advance(size(n))
      return records
    with concurrent.futures.ProcessPoolExecutor(
      min(workers, len(todo)), multiprocessing.get_context('spawn'), _start_worker, (folder, settings)
    ) as pool:
      futures = {pool.submit(_encode_part, n, parts[n]): n for n in todo}
      try:
        for future in concurrent.futures.as_completed(futures):
          records[futures[future]] = future.result()
          advance(size(futures[future]))
      except concurrent.futures.process.BrokenProcessPool as e:
        raise UserError(
          f'a process that tokenized {settings.corpus!r} was ended, perhaps for want '
          'of memory. Run the same command again, with fewer --workers: what was '
          'finished is kept.'
        ) from e
      except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        raise
  return records


def _check_same(opened: store.TokenStore, settings: Settings) -> None:
  """Raises a UserError where a finished store is of another corpus, or of other settings."""
  want, have = _json(dataclasses.asdict(settings)), {'special': False} | opened.manifest['settings']
  if tokenizers.trained_size(settings.tokenizer) is None:  # it is the ids that count, not their name
    if tokenizers.load(settings.tokenizer).sha256 == opened.tokenizer.sha256:
      have['tokenizer'] = settings.tokenizer
    elif have['tokenizer'] == settings.tokenizer:
      have['tokenizer'] += f' with sha256 {opened.tokenizer.sha256[:16]}'
  differ = [
    f'{k}: {have.get(k)!r} there, {v!r} asked for' for k, v in want.items() if v != have.get(k)
  ]
  if differ:
    raise UserError(
      f'{opened.path} is a token store of something else ({"; ".join(differ)}). Choose '
      'another folder, or remove this one.'
    )
  try:
    now = _json(corpora.open_corpus(settings.corpus).identity)
  except UserError:
    return  # the text is gone; its tokens are here
  source = opened.manifest['source']
  changed = [key for key, value in now.items() if value != source.get(key)]
  if changed:
    raise UserError(
      f'the corpus {settings.corpus!r} has changed since {opened.path} was made from it ('
      f'{", ".join(changed)} differ). Remove that folder to prepare it anew, or choose another '
      'with config.data.store (--output).'
    )


def ensure_store(settings: Settings, folder: str | Path, workers: int | None = None):
  """Opens the store at `folder`, preparing it first where it isn't there yet.

  A lock beside the folder makes a second process wait for the first one's work.

  Args:
    settings: which corpus and tokenizer, and how to split.
    folder: where the store is, or is to be.
    workers: processes, default the number of cores.

  Raises:
    UserError: the corpus can't be read, another store is there, or the disk is full.
  """
  folder = local(folder)
  with saving('the token store', folder):
    folder.parent.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=folder.parent).close()  # the lock waits for ever where none can be
    with filelock.FileLock(f'{folder}.lock'):
      if store.is_store(folder):
        opened = store.open_store(folder)
        _check_same(opened, settings)
        return opened
      corpus = corpora.open_corpus(settings.corpus)
      _prepare(settings, folder, corpus, workers or os.cpu_count() or 1)
  return store.open_store(folder)

"""From a corpus to a token store: in parallel, resumable, and never half a store.

The pieces of the corpus are grouped into parts, of which workers make shards (`corpus_parts.py`). A
preparation that was killed goes on after the parts that are finished. The manifest is written when
all of them are. Which documents are held out, and every byte of the store, depend on the corpus and
the settings alone, not on the number of workers, nor of the processes that do it together
(`store_job.py`). Shards for a bucket are written on this machine, from where each goes there as it is
finished.
"""

import dataclasses
import importlib.metadata
import json
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import filelock
import numpy as np

from gpt2_jax.core import buckets
from gpt2_jax.core.buckets import AnyPath
from gpt2_jax.core.errors import UserError, saving
from gpt2_jax.core.files import read_json, write_whole
from gpt2_jax.core.progress import track
from gpt2_jax.data import corpora, corpus_parts, sections, store_job, token_store
from gpt2_jax.data.splits import Settings, split_document
from gpt2_jax.data.store_job import JOB, Job, json_of
from gpt2_jax.tokenizer import bpe as tokenizers

BPE_TRAINING_BYTES = 64 * 2**20


def store_name(settings: Settings) -> str:
  """Returns the usual name of a store's folder."""
  name = f'{corpora.slug(settings.corpus)}-{corpora.slug(settings.tokenizer)}'
  return f'{name}-special' if settings.special else name


def ensure_store(
  settings: Settings,
  folder: str | AnyPath,
  workers: int | None = None,
  process: tuple[int, int] = (0, 1),
) -> token_store.TokenStore:
  """Opens the store at `folder`, and prepares it first if it is not there yet.

  Args:
    settings: which corpus and tokenizer, and how to split.
    folder: where the store is, or is to be.
    workers: processes, default the number of cores.
    process: which process this is of how many that see the folder and do this together.

  Raises:
    UserError: the corpus can't be read, another store is there, or the disk is full.
  """
  folder = buckets.place(folder)
  if not do_share(settings, folder, workers, process):
    store_job.wait(lambda: token_store.is_store(folder), folder, 'the shares of other processes')
  return token_store.open_store(folder)


def do_share(
  settings: Settings,
  folder: str | AnyPath,
  workers: int | None = None,
  process: tuple[int, int] = (0, 1),
) -> bool:
  """Does the share of one process in a store, unless it is there. Returns whether it is there now.

  A lock makes a second process with the same share wait for the work of the first. For the arguments
  and errors see `ensure_store`.
  """
  folder = buckets.place(folder)
  with saving('the token store', folder):
    lock = buckets.kept(folder) / 'prepare' if buckets.is_bucket(folder) else Path(folder)
    if process[1] > 1:
      lock = lock.with_name('{}.{}-of-{}'.format(lock.name, *process))
    lock.parent.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=lock.parent).close()  # the lock waits for ever where none can be
    with filelock.FileLock(f'{lock}.lock'):
      if token_store.is_store(folder):
        _check_same(token_store.open_store(folder), settings, process[1] > 1)
        return True
      corpus = corpora.open_corpus(settings.corpus)
      for note in corpus.notes if process[0] == 0 else ():
        _note(note)
      job = Job(folder, settings, corpus.identity, process)
      return _prepare(job, corpus, workers or os.cpu_count() or 1)


def _prepare(job: Job, corpus: corpora.Corpus, workers: int) -> bool:
  folder, settings = job.folder, job.settings
  tokenizer = _begin(job, corpus)
  parts = corpus_parts.group(corpus.pieces)
  records = corpus_parts.encode_all(job, tokenizer, parts, workers)
  if corpora.open_corpus(settings.corpus).identity != corpus.identity:
    raise UserError(
      f'the corpus {settings.corpus!r} has changed while it was read: run the same '
      'command again when its files are whole.'
    )
  if job.scratch != folder:
    shutil.rmtree(job.scratch)
  if not job.share_done() and not token_store.is_store(folder):
    return False
  try:
    records |= {n: corpus_parts.record_of(job, n) for n in range(len(parts)) if n not in records}
    job = dataclasses.replace(job, corpus=read_json(folder / JOB, {'corpus': dict})['corpus'])
  except UserError:
    if not token_store.is_store(folder):
      raise
    job.clean()  # another process has finished it meanwhile
    return True
  records = [records[n] for n in range(len(parts))]
  if empty := sum(record.get('empty', 0) for record in records):
    _note(f'{settings.corpus}: {empty:,} texts are empty or null, and passed over.')
  if special := sum(record.get('special', 0) for record in records):
    _note(
      f'{settings.corpus}: {special:,} texts hold the text of a special token, which is text here. '
      'To have the token itself: config.data.special=True (--special).'
    )
  manifest = _manifest(job, corpus, tokenizer, records)
  write_whole(folder / token_store.MANIFEST, json.dumps(manifest, indent=1))
  job.clean()
  return True


def _begin(job: Job, corpus: corpora.Corpus) -> tokenizers.Tokenizer:
  """Makes the folder ready, and returns the tokenizer as all find it; process 0 makes it."""
  if job.process[0] == 0:
    job.begin()
  else:
    store_job.wait(job.begun, job.folder, 'process 0, which makes the tokenizer')
  job.scratch.mkdir(parents=True, exist_ok=True)
  folder, mine = job.folder / 'tokenizer', job.scratch / 'tokenizer'
  if not job.has_tokenizer():
    _make_tokenizer(job.settings, corpus).save(mine)
    if mine != folder:
      buckets.upload(mine, folder)
    write_whole(folder / 'done', '')
  elif mine != folder:
    shutil.rmtree(mine, ignore_errors=True)
    shutil.copytree(buckets.fetched(folder), mine)
  return tokenizers.load(mine)


def _make_tokenizer(settings: Settings, corpus: corpora.Corpus) -> tokenizers.Tokenizer:
  size = tokenizers.trained_size(settings.tokenizer)
  if corpus.is_tokens and settings.tokenizer != 'gpt2':
    raise UserError(
      f"the tokens of {settings.corpus!r} are GPT-2's: tokenizer "
      f"{settings.tokenizer!r} can't be applied to them. Set it to gpt2."
    )
  if size is None:
    return tokenizers.load(settings.tokenizer)
  return tokenizers.train_bpe(_training_texts(corpus.pieces, settings), size)


def _training_texts(pieces: list[corpora.Piece], settings: Settings) -> Iterator[str]:
  """Yields texts of the training split for a tokenizer to learn from: of all pieces, or of as many as
  `BPE_TRAINING_BYTES` allows, spread over the corpus.
  """
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


def _manifest(
  job: Job, corpus: corpora.Corpus, tokenizer: tokenizers.Tokenizer, records: list[dict]
) -> dict:
  settings, splits = job.settings, {}
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
    'version': token_store.VERSION,
    'dtype': corpus_parts.dtype_of(tokenizer),
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
      **job.corpus,
    },
    'settings': settings.as_json(),
    'made_with': {
      'gpt2_jax': importlib.metadata.version('gpt2_jax'),
      'python': platform.python_version(),
    },
    'splits': splits,
  }
  return manifest | {'sha256': token_store.content_sha256(manifest)}


def _note(text: str) -> None:
  print(text, file=sys.stderr, flush=True)


def _check_same(opened: token_store.TokenStore, settings: Settings, copies: bool) -> None:
  """Raises a UserError if a finished store is of another corpus, or of other settings.

  Args:
    copies: whether its files may have been written at other times, as copies on other hosts are.
  """
  want, have = json_of(dataclasses.asdict(settings)), {'special': False} | opened.manifest['settings']
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
    now = json_of(corpora.open_corpus(settings.corpus).identity)
  except UserError:
    return  # the text is gone; its tokens are here
  source = opened.manifest['source']
  if copies:
    now, source = (store_job.timeless({'corpus': said})['corpus'] for said in (now, source))
  changed = [key for key, value in now.items() if value != source.get(key)]
  if changed:
    raise UserError(
      f'the corpus {settings.corpus!r} has changed since {opened.path} was made from it ('
      f'{", ".join(changed)} differ). Remove that folder to prepare it anew, or choose another '
      'with config.data.store (--output).'
    )

"""From a corpus to a token store: in parallel, resumable, and never half a store.

The pieces of the corpus are grouped into parts, of which workers make shards (`corpus_parts.py`). A
preparation that was killed goes on after the parts that are finished. The manifest is written when
all of them are. Which documents are held out, and every byte of the store, depend on the corpus and
the settings alone, not on the number of workers.
"""

import contextlib
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

from gpt2_jax.core.errors import UserError, saving
from gpt2_jax.core.files import local, read_json, write_whole
from gpt2_jax.core.progress import track
from gpt2_jax.data import corpora, corpus_parts, sections, token_store
from gpt2_jax.data.splits import Settings, split_document
from gpt2_jax.tokenizer import bpe as tokenizers

BPE_TRAINING_BYTES = 64 * 2**20
JOB = 'job.json'


def store_name(settings: Settings) -> str:
  """Returns the usual name of a store's folder."""
  name = f'{corpora.slug(settings.corpus)}-{corpora.slug(settings.tokenizer)}'
  return f'{name}-special' if settings.special else name


def ensure_store(
  settings: Settings, folder: str | Path, workers: int | None = None
) -> token_store.TokenStore:
  """Opens the store at `folder`, and prepares it first if it is not there yet.

  A lock beside the folder makes a second process wait for the work of the first.

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
      if token_store.is_store(folder):
        opened = token_store.open_store(folder)
        _check_same(opened, settings)
        return opened
      corpus = corpora.open_corpus(settings.corpus)
      _prepare(settings, folder, corpus, workers or os.cpu_count() or 1)
  return token_store.open_store(folder)


def _prepare(settings: Settings, folder: Path, corpus: corpora.Corpus, workers: int) -> None:
  for note in corpus.notes:
    _note(note)
  _begin(folder, _json({'settings': settings.as_json(), 'corpus': corpus.identity}))
  if (folder / 'tokenizer' / 'done').exists():
    tokenizer = tokenizers.load(folder / 'tokenizer')
  else:
    tokenizer = _make_tokenizer(settings, corpus)
    tokenizer.save(folder / 'tokenizer')
    write_whole(folder / 'tokenizer' / 'done', '')
  records = corpus_parts.encode_all(
    folder, settings, tokenizer, corpus_parts.group(corpus.pieces), workers
  )
  if empty := sum(record.get('empty', 0) for record in records):
    _note(f'{settings.corpus}: {empty:,} texts are empty or null, and passed over.')
  if special := sum(record.get('special', 0) for record in records):
    _note(
      f'{settings.corpus}: {special:,} texts hold the text of a special token, which is text here. '
      'To have the token itself: config.data.special=True (--special).'
    )
  if corpora.open_corpus(settings.corpus).identity != corpus.identity:
    raise UserError(
      f'the corpus {settings.corpus!r} has changed while it was read: run the same '
      'command again when its files are whole.'
    )
  manifest = _manifest(settings, corpus, tokenizer, records)
  write_whole(folder / token_store.MANIFEST, json.dumps(manifest, indent=1))
  for name in [JOB, *(corpus_parts.record_name(n) for n in range(len(records)))]:
    (folder / name).unlink()


def _begin(folder: Path, job: dict) -> None:
  """Makes the folder ready for a job, and keeps the finished parts of an earlier try at the same."""
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
  settings: Settings, corpus: corpora.Corpus, tokenizer: tokenizers.Tokenizer, records: list[dict]
) -> dict:
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
      **corpus.identity,
    },
    'settings': settings.as_json(),
    'made_with': {
      'gpt2_jax': importlib.metadata.version('gpt2_jax'),
      'python': platform.python_version(),
    },
    'splits': splits,
  }
  return manifest | {'sha256': token_store.content_sha256(manifest)}


def _json(value: dict) -> dict:
  """Returns `value` as it comes back from JSON."""
  return json.loads(json.dumps(value))


def _note(text: str) -> None:
  print(text, file=sys.stderr, flush=True)


def _check_same(opened: token_store.TokenStore, settings: Settings) -> None:
  """Raises a UserError if a finished store is of another corpus, or of other settings."""
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

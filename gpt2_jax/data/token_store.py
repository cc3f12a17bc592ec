"""Token stores: tokens in files, with a manifest that says what they are.

A store is a folder:

    manifest.json        written last; without it the folder is not a store
    tokenizer/           in Hugging Face's files
    train-00000.bin      tokens, little-endian uint16 (uint32 from 65,537 ids on)
    train-00000.idx      where its documents begin, little-endian uint64
    val-00000.bin …      the held-out documents

Each document begins with <|endoftext|>. `manifest.json` lists, per split, the shards with their
counts, largest id and sha256, and beside it the tokenizer, the source with its licence, and how the
split was made.

Folders of nanoGPT (`train.bin`, `val.bin`: uint16) and of llm.c (`*_train_*.bin`, `*_val_*.bin`:
a header of 256 int32, magic 20240520, then uint16) open as stores too. They don't say which
tokenizer made them: it is GPT-2's.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import shlex

from gpt2_jax.core import buckets
from gpt2_jax.core.buckets import AnyPath
from gpt2_jax.core.errors import UserError, brief
from gpt2_jax.core.files import misfit, name_of_file, parse_json, whole_number
from gpt2_jax.data.shards import (
  GPT2_EOT,
  Shard,
  Split,
  bad_token,
  foreign_files,
  foreign_shard,
  size_of,
)
from gpt2_jax.tokenizer import bpe
from gpt2_jax.tokenizer.bpe import Tokenizer

MANIFEST = 'manifest.json'
VERSION = 1
SHARD = {
  'file': name_of_file,
  'index': name_of_file,
  'tokens': whole_number,
  'documents': whole_number,
  'max_token': whole_number,
  'sha256': str,
}
SHAPE = {  # of a manifest, see `files.misfit`
  'version': whole_number,
  'dtype': ('<u2', '<u4').__contains__,
  'sha256': str,
  'tokenizer': {'spec': str, 'vocab_size': whole_number, 'eot': whole_number, 'sha256': str},
  'source': {'corpus': str, 'licence': (str, type(None))},
  'settings': dict,
  'splits': {'train': {'shards': [SHARD]}, 'val': {'shards': [SHARD]}},
}


@dataclasses.dataclass(frozen=True, repr=False)
class TokenStore:
  """An open store."""

  path: AnyPath
  manifest: dict
  splits: dict[str, Split]
  unit: str = 'tokens'
  labels: tuple[str, ...] = ()

  def __repr__(self) -> str:
    sizes = ', '.join(f'{name} {len(split):,}' for name, split in self.splits.items())
    return f'TokenStore({str(self.path)!r}, tokens: {sizes})'

  @property
  def sha256(self) -> str:
    """Names the content: equal for stores with equal tokens, documents and tokenizer."""
    return self.manifest['sha256']

  @property
  def eot(self) -> int:
    """The id that begins a document."""
    return self.manifest['tokenizer']['eot']

  @property
  def tokenizer(self) -> Tokenizer:
    return self._tokenizer

  @functools.cached_property
  def _tokenizer(self) -> Tokenizer:
    folder = self.path / 'tokenizer'
    found = bpe.load(folder if folder.exists() else 'gpt2')
    if found.sha256 != self.manifest['tokenizer'].get('sha256', found.sha256):
      raise UserError(
        f'{folder} is not the tokenizer that made the tokens in {self.path} (its hash is another '
        f'than that in {MANIFEST}): it was changed, or the store is of a release that did not look '
        'for ordinary added tokens in texts. Restore its files, or remove the folder of the store '
        'to prepare it anew.'
      )
    return found

  def check_tokenizer(self, own: Tokenizer | None, whose: str, way: str) -> None:
    """Raises a UserError if the ids in the store are those of another tokenizer.

    A store that does not say whose its ids are is taken for GPT-2's, but not if `own` has fewer ids:
    then an id that is too large shows it.

    Args:
      own: the tokenizer; None: none is known.
      whose: for the message, what the tokenizer belongs to.
      way: the flag by which a user who knows better says that the ids are right.
    """
    said = self.manifest['tokenizer']
    unknown = 'sha256' not in said and own is not None and own.vocab_size < bpe.GPT2_SIZE
    if own is None or unknown or ('sha256' in said and said['sha256'] == own.sha256):
      return
    if self.tokenizer.sha256 != own.sha256:
      folder = self.path / 'tokenizer'
      raise UserError(
        f'{self.path} was made with another tokenizer ({brief(said["spec"])}, sha256 '
        f'{self.tokenizer.sha256[:16]}) than that of {whose} (sha256 {own.sha256[:16]}): its ids '
        f'stand for other texts. Prepare the text with that one; if the ids are right all the '
        f'same, say so: {way}={shlex.quote(str(folder)) if folder.exists() else "gpt2"}'
      )

  def check_vocabulary(self, vocab_size: int) -> None:
    """Raises a UserError if a shard is known to hold an id of `vocab_size` or more."""
    for split in self.splits.values():
      for shard in split.shards:
        if shard.max_token is not None and shard.max_token >= vocab_size:
          raise bad_token(shard.max_token, shard.path, vocab_size)

  def remarks(self) -> tuple[str, ...]:
    """None: all of a store is used."""
    return ()


def _open_foreign(folder: AnyPath, files: dict[str, list[AnyPath]]) -> TokenStore:
  splits = {
    name: Split(name, tuple(foreign_shard(p) for p in paths)) for name, paths in files.items()
  }
  sizes = {shard.path.name: shard.size for split in splits.values() for shard in split.shards}
  manifest = {
    'sha256': f'sizes {json.dumps(sizes, sort_keys=True)}',  # not read whole: may be 100 GB
    'tokenizer': {'spec': 'gpt2', 'vocab_size': bpe.GPT2_SIZE, 'eot': GPT2_EOT},
    'source': {'corpus': f'bin:{folder}', 'licence': 'unstated'},
  }
  return TokenStore(folder, manifest, splits)


def is_store(folder: AnyPath) -> bool:
  """Whether the folder holds a whole store, of this project's kind."""
  return (folder / MANIFEST).exists()


def content_sha256(manifest: dict) -> str:
  """Returns the hash of a store's tokens, documents and tokenizer, from those in its manifest."""
  hashes = [manifest['tokenizer']['sha256']] + [
    shard['sha256'] for split in manifest['splits'].values() for shard in split['shards']
  ]
  return hashlib.sha256('\n'.join(hashes).encode()).hexdigest()


def _read_manifest(folder: AnyPath) -> dict:
  """Reads a store's manifest, and checks everything in it that is used."""
  path = folder / MANIFEST
  try:
    manifest = parse_json(path.read_bytes(), {'version': whole_number})
    if manifest['version'] == VERSION:
      wrong = misfit(manifest, SHAPE)
      if wrong or content_sha256(manifest) != manifest['sha256']:
        raise ValueError(wrong or 'its hashes contradict each other')
  except (OSError, ValueError) as e:
    raise UserError(
      f'{path} is damaged ({e}): restore it, or remove the folder and prepare it again.'
    ) from e
  if manifest['version'] != VERSION:
    raise UserError(
      f'{folder} is a token store of version {manifest["version"]}, this program '
      f'reads version {VERSION}: prepare it again.'
    )
  return manifest


def open_store(folder: str | AnyPath) -> TokenStore:
  """Opens a store and checks that its files have the sizes they should have.

  Raises:
    UserError: there is no store, it is unfinished, damaged, or of a newer version.
  """
  folder = buckets.place(folder)
  with buckets.reading(folder) if buckets.is_bucket(folder) else contextlib.nullcontext():
    return _open(folder)


def _open(folder: AnyPath) -> TokenStore:
  if not is_store(folder):
    files = foreign_files(folder) if folder.is_dir() else {}
    if files.get('train'):
      return _open_foreign(folder, files)
    raise UserError(
      f'{folder} is not a token store: '
      + (
        f'it has no {MANIFEST}, so its preparation was not finished; run it again.'
        if folder.is_dir()
        else 'there is no such folder. Make one with gpt2-jax prepare.'
      )
    )
  manifest, splits, sizes = _read_manifest(folder), {}, size_of
  if buckets.is_bucket(folder):
    there = buckets.listing(folder)
    sizes = lambda path: int(there.get(path.name, {'size': -1})['size'])
  for name, split in manifest['splits'].items():
    shards = tuple(Shard.of_manifest(folder, shard, manifest['dtype']) for shard in split['shards'])
    for shard in shards:
      shard.check(sizes)
    splits[name] = Split(name, shards)
  return TokenStore(folder, manifest, splits)

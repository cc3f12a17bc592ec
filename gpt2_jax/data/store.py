"""Token stores: tokens in files, memory-mapped, with a manifest that says what they are.

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

import bisect
import dataclasses
import functools
import hashlib
import itertools
import json
import shlex
from pathlib import Path

import numpy as np

from gpt2_jax import tokenizer
from gpt2_jax.errors import UserError, brief
from gpt2_jax.files import local, misfit, name_of_file, parse_json, whole_number
from gpt2_jax.tokenizer import Tokenizer

MANIFEST = 'manifest.json'
VERSION = 1
GPT2_EOT = tokenizer.GPT2_SIZE - 1
LLMC_MAGIC, LLMC_HEADER_BYTES = 20240520, 1024
LLMC_LLAMA = 20240801  # magic number of llm.c's files for Llama 3: uint32, another vocabulary
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


@dataclasses.dataclass(frozen=True)
class Shard:
  """A run of tokens in a file."""

  path: Path
  tokens: int
  dtype: str
  offset: int = 0  # bytes before the first token
  index: Path | None = None
  documents: int = 0
  max_token: int | None = None
  sha256: str | None = None  # of its tokens and its index, where it is known: see verify.py

  def array(self) -> np.ndarray:
    tokens = np.memmap(self.path, self.dtype, 'r', self.offset, (self.tokens,))
    return np.asarray(tokens)  # a slice of a memmap takes ten times as long as one of an array

  def check(self) -> None:
    """Raises a UserError unless the files have exactly as many bytes as they should have."""
    want = self.offset + self.tokens * np.dtype(self.dtype).itemsize
    self._check_size(self.path, want)
    if self.index is not None:
      self._check_size(self.index, 8 * self.documents)

  def _check_size(self, path: Path, want: int) -> None:
    have = path.stat().st_size if path.is_file() else -1
    if have != want:
      raise UserError(
        f'{path} '
        + ('is missing' if have < 0 else f'has {have:,} bytes, not {want:,}')
        + f': the token store is damaged. Remove the folder {self.path.parent} and prepare it again '
        '(or restore the file).'
      )


@dataclasses.dataclass(frozen=True)
class Split:
  """The shards of a split, as one run of `len(split)` tokens."""

  name: str
  shards: tuple[Shard, ...]

  @functools.cached_property
  def _ends(self) -> list[int]:
    return list(itertools.accumulate(shard.tokens for shard in self.shards))

  @functools.cached_property
  def _arrays(self) -> list[np.ndarray]:
    return [shard.array() for shard in self.shards]

  def __len__(self) -> int:
    return self._ends[-1] if self.shards else 0

  @property
  def documents(self) -> int:
    """Number of documents, 0 where it isn't known."""
    return sum(shard.documents for shard in self.shards)

  def read(self, start: int, stop: int) -> np.ndarray:
    """Tokens [start, stop) as int32, across shards."""
    out, done, i = np.empty(stop - start, np.int32), 0, bisect.bisect_right(self._ends, start)
    while done < len(out):
      first = start + done - self._ends[i] + self.shards[i].tokens
      part = self._arrays[i][first : first + len(out) - done]
      out[done : done + len(part)] = part
      done, i = done + len(part), i + 1
    return out

  def documents_in(self, start: int, stop: int) -> list[str]:
    """Names of the documents that tokens [start, stop) belong to: `shard:number`."""
    names = []
    for i, shard in enumerate(self.shards):
      base = self._ends[i] - shard.tokens
      if shard.index is None or stop <= base or start >= self._ends[i]:
        continue
      begins = np.fromfile(shard.index, '<u8')
      first = int(np.searchsorted(begins, max(0, start - base), 'right')) - 1
      last = int(np.searchsorted(begins, stop - base, 'left'))
      names += [f'{shard.path.stem}:{n}' for n in range(max(0, first), last)]
    return names


@dataclasses.dataclass(frozen=True)
class TokenStore:
  """An open store."""

  path: Path
  manifest: dict
  splits: dict[str, Split]

  @property
  def sha256(self) -> str:
    """Names the content: equal for stores with equal tokens, documents and tokenizer."""
    return self.manifest['sha256']

  @property
  def eot(self) -> int:
    """The id that begins a document."""
    return self.manifest['tokenizer']['eot']

  @functools.cached_property
  def tokenizer(self) -> Tokenizer:
    folder = self.path / 'tokenizer'
    found = tokenizer.load(folder if folder.exists() else 'gpt2')
    if found.sha256 != self.manifest['tokenizer'].get('sha256', found.sha256):
      raise UserError(
        f'{folder} is not the tokenizer that made the tokens in {self.path} (its hash is another '
        f'than that in {MANIFEST}): it was changed, or the store is of a release that did not look '
        'for ordinary added tokens in texts. Restore its files, or remove the folder of the store '
        'to prepare it anew.'
      )
    return found

  def check_tokenizer(self, own: Tokenizer | None, whose: str, way: str) -> None:
    """Raises a UserError where the ids are not a tokenizer's: its texts would be others. A store that
    doesn't say whose they are is GPT-2's, unless the tokenizer has fewer ids: those beyond tell.

    Args:
      own: the tokenizer; None: none is known.
      whose: it is, for the message.
      way: the flag by which one who knows better says that the ids are the store's.
    """
    said = self.manifest['tokenizer']
    unknown = 'sha256' not in said and own is not None and own.vocab_size < tokenizer.GPT2_SIZE
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
    """Raises a UserError where a shard is known to hold an id of `vocab_size` or more."""
    for split in self.splits.values():
      for shard in split.shards:
        if shard.max_token is not None and shard.max_token >= vocab_size:
          raise bad_token(shard.max_token, shard.path, vocab_size)


def bad_token(token: int, where, vocab_size: int) -> UserError:
  return UserError(
    f"{where} holds token id {token}, beyond the model's vocabulary of {vocab_size}. Set "
    'config.model.vocab_size to the size of the tokenizer that made the data, or prepare the data '
    'with the tokenizer of this model.'
  )


def foreign_files(folder: Path) -> dict[str, list[Path]]:
  """nanoGPT's or llm.c's token files in a folder, by split; empty lists where there are none."""
  splits = {}
  for split in ('train', 'val'):
    own = folder / f'{split}.bin'
    splits[split] = [own] if own.exists() else sorted(folder.glob(f'*_{split}_*.bin'))
  return splits


def foreign_shard(path: Path) -> Shard:
  """A token file of nanoGPT or llm.c, told apart by llm.c's magic number."""
  if not path.is_file():
    raise UserError(f'{path} is no file of tokens, but a folder, pipe or device.')
  try:
    header, size = np.fromfile(path, '<i4', 256), path.stat().st_size
  except OSError as e:
    raise UserError(f"{path} can't be read: {e.strerror}.") from e
  if len(header) and header[0] == LLMC_LLAMA:
    raise UserError(f'{path} has tokens of Llama 3, which no GPT-2 knows. Tokenize its text anew.')
  if len(header) == 256 and header[0] == LLMC_MAGIC:
    if header[1] != 1:
      raise UserError(f"{path}: version {header[1]} of llm.c's token files is not known, only 1.")
    tokens, there = int(header[2]), (size - LLMC_HEADER_BYTES) / 2
    if tokens != there or not tokens:
      raise UserError(
        f'{path} has {there:,.10g} tokens, but its header says {tokens:,}: it is '
        'empty, damaged or cut short. Make or fetch it again.'
      )
    return Shard(path, tokens, '<u2', offset=LLMC_HEADER_BYTES)
  if size == 0 or size % 2:
    raise UserError(
      f'{path} has {size} bytes, which is no whole number of uint16 tokens: it is '
      'empty or cut short. Make it again.'
    )
  return Shard(path, size // 2, '<u2')


def _open_foreign(folder: Path, files: dict[str, list[Path]]) -> TokenStore:
  splits = {
    name: Split(name, tuple(foreign_shard(p) for p in paths)) for name, paths in files.items()
  }
  sizes = {p.name: p.stat().st_size for paths in files.values() for p in paths}
  manifest = {
    'sha256': f'sizes {json.dumps(sizes, sort_keys=True)}',  # not read whole: may be 100 GB
    'tokenizer': {'spec': 'gpt2', 'vocab_size': tokenizer.GPT2_SIZE, 'eot': GPT2_EOT},
    'source': {'corpus': f'bin:{folder}', 'licence': 'unstated'},
  }
  return TokenStore(folder, manifest, splits)


def is_store(folder: Path) -> bool:
  """Whether the folder holds a whole store, of this project's kind."""
  return (folder / MANIFEST).exists()


def content_sha256(manifest: dict) -> str:
  """The hash of a store's tokens, documents and tokenizer, from the hashes in its manifest."""
  hashes = [manifest['tokenizer']['sha256']] + [
    shard['sha256'] for split in manifest['splits'].values() for shard in split['shards']
  ]
  return hashlib.sha256('\n'.join(hashes).encode()).hexdigest()


def _read_manifest(folder: Path) -> dict:
  """A store's manifest, with everything in it that is used as it should be."""
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


def open_store(folder: str | Path) -> TokenStore:
  """Opens a store and checks that its files have the sizes they should have.

  Raises:
    UserError: there is no store, it is unfinished, damaged, or of a newer version.
  """
  folder = local(folder)
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
  manifest = _read_manifest(folder)
  splits = {
    name: Split(
      name,
      tuple(
        Shard(
          folder / s['file'],
          s['tokens'],
          manifest['dtype'],
          index=folder / s['index'],
          documents=s['documents'],
          max_token=s['max_token'],
          sha256=s['sha256'],
        )
        for s in split['shards']
      ),
    )
    for name, split in manifest['splits'].items()
  }
  for split in splits.values():
    for shard in split.shards:
      shard.check()
  return TokenStore(folder, manifest, splits)

"""Writes a shard of a token store: tokens, where documents begin, its entry in the manifest."""

import hashlib
import os
from pathlib import Path

import numpy as np

from gpt2_jax.core.files import write_whole


class ShardWriter:
  """A context that writes a shard under a temporary name; `finish` gives it its own."""

  def __init__(self, folder: Path, name: str, dtype: str):
    self.folder, self.name, self.dtype = folder, name, dtype
    self.file = open(folder / f'{name}.bin.tmp', 'wb')
    self.begins: list[int] = []
    self.tokens, self.max_token, self.hash = 0, 0, hashlib.sha256()

  def __enter__(self) -> 'ShardWriter':
    return self

  def __exit__(self, *_) -> None:
    self.file.close()

  def add(self, tokens: np.ndarray, *, begins: bool = True) -> None:
    """Adds a document, or with `begins=False` more of the last one."""
    if begins:
      self.begins.append(self.tokens)
    content = tokens.astype(self.dtype).tobytes()
    self.file.write(content)
    self.hash.update(content)
    self.tokens += len(tokens)
    self.max_token = max(self.max_token, int(tokens.max()))

  def finish(self) -> dict | None:
    """Returns the shard's entry for the manifest; None if nothing was added."""
    bin_path, idx_path = (self.folder / f'{self.name}{suffix}' for suffix in ('.bin', '.idx'))
    self.file.flush()
    os.fsync(self.file.fileno())
    self.file.close()
    if not self.tokens:
      os.remove(f'{bin_path}.tmp')
      return None
    index = np.asarray(self.begins, '<u8').tobytes()
    self.hash.update(index)
    write_whole(idx_path, index)
    os.replace(f'{bin_path}.tmp', bin_path)
    return {
      'file': bin_path.name,
      'index': idx_path.name,
      'tokens': self.tokens,
      'documents': len(self.begins),
      'max_token': self.max_token,
      'sha256': self.hash.hexdigest(),
    }

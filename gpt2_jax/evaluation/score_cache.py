"""Keeps an evaluation's results in a file, so that they outlive a process that is killed.

Each line is JSON, a key and its result, appended and flushed when a batch is done. A line that a kill
cut short is dropped when the file is read. A key names all that a result follows from: parameters,
numerics, version, request.
"""

import hashlib
import importlib.metadata
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from gpt2_jax.core.errors import UserError, saving
from gpt2_jax.core.files import parse_json
from gpt2_jax.model import text_batches
from gpt2_jax.model.pretrained_model import Model, params_of
from gpt2_jax.parallel import sharding


def fingerprint(model: Model) -> str:
  """Returns a name for what a model computes: SHA-256 of its config and parameters, on any mesh."""
  digest = hashlib.sha256(repr(model.config).encode())
  params: Any = params_of(model)
  with sharding.mesh_of(params):
    for path, leaf in sorted(flatten_dict(params).items(), key=lambda item: repr(item[0])):
      value = np.ascontiguousarray(text_batches.fetch(leaf))
      digest.update(f'{path} {value.dtype} {value.shape}'.encode())
      digest.update(value.view(np.uint8).data)
  return digest.hexdigest()


class Kept:
  """Results by key, in memory and in a file.

  Args:
    path: of the file; None: in memory only.
    identity: of the model, as `fingerprint` gives it.

  Raises:
    UserError: the file holds something else.
  """

  def __init__(self, path: Path | None, identity: str):
    self.path = path
    numerics = jax.default_backend(), jax.device_count(), jax.__version__
    self.identity = f'{identity} {numerics} {importlib.metadata.version("gpt2_jax")}'
    self._found: dict[str, Any] = {}
    if path is not None and path.exists():
      whole = path.read_bytes().rpartition(b'\n')[0]
      if len(whole) + 1 < path.stat().st_size:  # a line was cut short: the next one begins anew
        with saving('scores', path), open(path, 'r+b') as f:
          f.truncate(len(whole) + 1 if whole else 0)
      try:
        self._found = dict(parse_json(line) for line in whole.splitlines())
      except (ValueError, TypeError) as e:
        raise UserError(f'{path} holds no scores that were kept ({e}): remove it.') from None

  def key(self, *parts: Any) -> str:
    """Returns a name for a question to the model; parts are numbers, texts or arrays of int32."""
    digest = hashlib.sha256(self.identity.encode())
    for part in parts:
      data = np.asarray(part, np.int32).tobytes() if not isinstance(part, str) else part.encode()
      digest.update(f'{len(data)} '.encode() + data)
    return digest.hexdigest()[:32]

  def get(self, key: str) -> Any:
    """Returns the result of a key, None where there is none."""
    return self._found.get(key)

  def add(self, found: Mapping[str, Any]) -> None:
    """Keeps results; their values are those of JSON."""
    self._found.update(found)
    if self.path is None:
      return
    lines = ''.join(json.dumps(item, separators=(',', ':')) + '\n' for item in found.items())
    with saving('scores', self.path), open(self.path, 'ab') as f:
      f.write(lines.encode())
      f.flush()
      os.fsync(f.fileno())

  def remove(self) -> None:
    """Removes the file, once its results stand elsewhere."""
    if self.path is not None:
      self.path.unlink(missing_ok=True)

"""Files of `torch.save`, written without torch."""

import math
import pickle
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gpt2_jax.checkpoints.formats.torch_files import STORAGES
from gpt2_jax.checkpoints.tensors import Tensor

ALIGNMENT = 64  # bytes, of tensors


def write(path: Path, value: Any) -> None:
  """Writes what `torch.load(path, weights_only=True)` reads. One tensor is in memory at a time.

  Args:
    path: a new file.
    value: dicts, lists, tuples, str, int, float, bool, None, and tensors as `Tensor`; one that
      occurs twice is written once.
  """
  keys: dict[Tensor, str] = {}
  program = b'\x80\x02' + _pickled(value, keys) + b'.'
  with open(path, 'wb') as file, zipfile.ZipFile(file, 'w', zipfile.ZIP_STORED) as archive:

    def entry(name: str, data) -> None:
      info = zipfile.ZipInfo(f'archive/{name}')
      info.file_size = len(data)
      pad = -(file.tell() + 30 + len(info.filename) + 4) % ALIGNMENT
      info.extra = struct.pack('<2sH', b'FB', pad) + bytes(pad)  # as torch pads
      with archive.open(info, 'w') as out:
        out.write(data)

    entry('data.pkl', program)
    entry('byteorder', b'little')
    for tensor, key in keys.items():
      array = np.ascontiguousarray(tensor.read(), tensor.dtype)
      entry(f'data/{key}', array.reshape(-1).view(np.uint8).data)
    entry('version', b'3\n')


def _pickled(value: Any, keys: dict[Tensor, str]) -> bytes:
  """Returns a program that makes a value, in pickle's protocol 2; adds its tensors to `keys`."""
  many = lambda values: b'(' + b''.join(_pickled(v, keys) for v in values)
  if isinstance(value, Mapping):
    return b'}' + many(x for item in value.items() for x in item) + b'u'
  if isinstance(value, list):
    return b']' + many(value) + b'e'
  if isinstance(value, tuple):
    return many(value) + b't'
  if isinstance(value, Tensor):
    key = keys.setdefault(value, str(len(keys)))
    kind = next(name for name, dtype in STORAGES.items() if dtype == value.dtype)
    numel = math.prod(value.shape)
    strides = tuple(math.prod(value.shape[i + 1 :]) for i in range(len(value.shape)))
    storage = (
      b'('
      + _pickled('storage', keys)
      + f'ctorch\n{kind}\n'.encode()
      + b''.join(_pickled(v, keys) for v in (key, 'cpu', numel))
      + b'tQ'
    )
    return (
      b'ctorch._utils\n_rebuild_tensor_v2\n('
      + storage
      + b''.join(_pickled(v, keys) for v in (0, value.shape, strides, False))
      + b'ccollections\nOrderedDict\n)RtR'
    )
  if isinstance(value, float):
    return b'G' + struct.pack('>d', value)
  if isinstance(value, str):
    data = value.encode()
    return b'X' + struct.pack('<I', len(data)) + data
  if value is None or isinstance(value, bool):
    return {None: b'N', True: b'\x88', False: b'\x89'}[value]
  if isinstance(value, int):
    data = pickle.encode_long(value)
    return b'\x8a' + bytes([len(data)]) + data
  raise TypeError(f"{type(value).__name__} can't be written")

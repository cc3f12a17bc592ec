"""Files of safetensors, read and written one tensor at a time."""

import contextlib
import json
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from gpt2_jax.checkpoints.tensors import Tensor
from gpt2_jax.core.files import unreadable

DTYPES = {'F32': 'float32', 'BF16': 'bfloat16', 'F16': 'float16', 'F64': 'float64'}


def read(path: Path) -> dict[str, Tensor]:
  """Returns the tensors of a file, read later; it is opened for each, so as not to stay mapped."""

  @contextlib.contextmanager
  def opened() -> Iterator[Any]:
    try:
      with safe_open(path, 'np') as file:
        yield file
    except (SafetensorError, OSError) as e:
      raise unreadable(path, e) from e

  def reader(name: str):
    def read() -> np.ndarray:
      with opened() as file:
        return file.get_tensor(name)

    return read

  with opened() as file:
    headers = {name: file.get_slice(name) for name in file.keys()}
    return {
      name: Tensor(
        tuple(header.get_shape()),
        DTYPES.get(header.get_dtype(), str(header.get_dtype())),
        reader(name),
      )
      for name, header in headers.items()
    }


def write(path: Path, tensors: Mapping[str, Tensor]) -> int:
  """Writes tensors one by one, where the library wants all of them at once; returns their bytes.

  Format: an 8-byte length, a JSON header, the tensors (github.com/huggingface/safetensors, README).
  """
  names = {ours: theirs for theirs, ours in DTYPES.items()}
  header: dict[str, Any] = {'__metadata__': {'format': 'pt'}}
  offset = 0
  for name, tensor in tensors.items():
    size = tensor.nbytes
    header[name] = {
      'dtype': names[tensor.dtype],
      'shape': list(tensor.shape),
      'data_offsets': [offset, offset + size],
    }
    offset += size
  text = json.dumps(header).encode()
  text += b' ' * (-len(text) % 8)
  with open(path, 'wb') as file:
    file.write(struct.pack('<Q', len(text)) + text)
    for tensor in tensors.values():
      file.write(np.ascontiguousarray(tensor.read()).view(np.uint8).data)
  return offset

"""Files of `torch.save`, read without torch, and without running what they say.

Such a file is a pickle, a program that may call anything. Here it may build dicts, lists, tuples and
tensors: each other global that it names, and each opcode that makes objects, is an error.

Two formats, as torch 2.13 writes them (`torch/serialization.py`):

- a zip archive: NAME/data.pkl, and per storage NAME/data/KEY with its bytes, uncompressed, each with
  its CRC-32, which is checked when an entry is first read (torch itself does not look); all are 0
  where it was told to write none;
- the legacy one, before torch 1.6: five pickles (a magic number, the protocol, the system, the
  object, the keys of storages), then per storage its number of elements (int64) and its bytes.

A tensor is a view of a storage: offset, shape and strides, in elements.
"""

import dataclasses
import io
import math
import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import numpy as np

from gpt2_jax.checkpoints.tensors import Tensor
from gpt2_jax.core.errors import UserError
from gpt2_jax.core.files import unreadable

STORAGES = {
  'FloatStorage': 'float32',
  'HalfStorage': 'float16',
  'BFloat16Storage': 'bfloat16',
  'DoubleStorage': 'float64',
  'LongStorage': 'int64',
  'IntStorage': 'int32',
  'ByteStorage': 'uint8',
  'BoolStorage': 'bool',
}
MAGIC = 0x1950A86A20F9469CFC6C
MAX_PICKLE = 2**24  # bytes; that of a GPT-2 XL with its optimizer has less than 2**20
CHUNK = 2**20  # bytes that are read at a time to be checked: they stay in the processor's cache


@dataclasses.dataclass(eq=False)
class _Storage:
  """A one-dimensional array in a file."""

  path: Path
  dtype: str
  numel: int
  start: int = -1  # byte in the file; -1: not known yet
  crc: int | None = None  # of its bytes, where the file has one; None once it was checked

  @property
  def nbytes(self) -> int:
    return self.numel * np.dtype(self.dtype).itemsize

  def check(self) -> None:
    """Compares the bytes with their CRC-32, the first time.

    Raises:
      OSError, ValueError: they can't be read, or are others than were written.
    """
    if self.crc is None:
      return
    found, left = 0, self.nbytes
    with open(self.path, 'rb') as file:
      file.seek(self.start)
      while left and (part := file.read(min(left, CHUNK))):
        found, left = zlib.crc32(part, found), left - len(part)
    if found != self.crc:
      raise ValueError('a tensor has other bytes than were written (CRC-32)')
    self.crc = None


@dataclasses.dataclass(frozen=True)
class _View:
  """Reads a tensor. Equal views are the same tensor, such as a tied head and its embedding."""

  storage: _Storage
  offset: int
  shape: tuple[int, ...]
  strides: tuple[int, ...]

  @property
  def span(self) -> int:
    """Counts the elements of the storage from the view's first to its last."""
    if 0 in self.shape:
      return 0
    return 1 + sum((n - 1) * stride for n, stride in zip(self.shape, self.strides))

  def __call__(self) -> np.ndarray:
    dtype = np.dtype(self.storage.dtype)
    start = self.storage.start + self.offset * dtype.itemsize
    try:
      self.storage.check()
      flat = np.fromfile(self.storage.path, np.uint8, self.span * dtype.itemsize, offset=start)
      flat = flat.view(dtype)
    except (OSError, ValueError) as e:
      raise unreadable(self.storage.path, e) from e
    if len(flat) < self.span:
      raise unreadable(self.storage.path, 'it ends within a tensor')
    strides = [stride * dtype.itemsize for stride in self.strides]
    return np.asarray(np.lib.stride_tricks.as_strided(flat, self.shape, strides), order='C')


def _rebuild(storage: _Storage, offset: int, shape: tuple, strides: tuple, *_) -> Tensor:
  """Stands in for torch._utils._rebuild_tensor_v2."""
  view = _View(storage, offset, shape, strides)
  if not (
    isinstance(storage, _Storage)
    and type(shape) is tuple
    and len(shape) == len(strides)
    and all(type(n) is int and 0 <= n < 2**59 for n in (offset, *shape, *strides))
    and offset + view.span <= storage.numel
    and math.prod(shape) <= storage.numel
  ):
    raise ValueError('a tensor reaches beyond its storage')
  return Tensor(shape, storage.dtype, view)


def _parameter(tensor: Tensor, *_) -> Tensor:
  """Stands in for torch._utils._rebuild_parameter."""
  return tensor


GLOBALS = {
  ('collections', 'OrderedDict'): dict,
  ('torch._utils', '_rebuild_tensor_v2'): _rebuild,
  ('torch._utils', '_rebuild_parameter'): _parameter,
  **{('torch', name): dtype for name, dtype in STORAGES.items()},
}


class _Unpickler(pickle._Unpickler):
  """Unpickles what GLOBALS allow. The Python one: the C one trusts a file with its memory."""

  # Without what torch.save has no use for; and BUILD, which sets attributes, drops them: those of an
  # OrderedDict are `_metadata`, which nobody needs.
  dispatch: ClassVar[dict[int, Callable[[Any], None]]] = {
    op: load
    for op, load in pickle._Unpickler.dispatch.items()
    if bytes([op])
    not in (
      pickle.NEWOBJ,
      pickle.NEWOBJ_EX,
      pickle.EXT1,
      pickle.EXT2,
      pickle.EXT4,
      pickle.BYTEARRAY8,
      pickle.NEXT_BUFFER,
      pickle.READONLY_BUFFER,
    )
  } | {pickle.BUILD[0]: lambda self: self.stack.pop()}

  def __init__(self, file: BinaryIO, path: Path):
    super().__init__(file, encoding='utf-8')
    self.path = path
    self.storages: dict[str, _Storage] = {}

  def find_class(self, module: str, name: str) -> Any:
    if (module, name) not in GLOBALS:
      raise UserError(
        f'{self.path} wants to call {f"{module}.{name}"[:100]!r} when it is opened. A checkpoint '
        'needs no such thing, so it was not read and nothing was run: get it from a source that '
        'you trust, or save its state_dict() alone.'
      )
    return GLOBALS[module, name]

  def persistent_load(self, pid: Any) -> _Storage:
    kind, dtype, key, _, numel, *view = pid
    if kind != 'storage' or dtype not in STORAGES.values() or any(v is not None for v in view):
      raise ValueError('it holds a storage of an unknown kind')
    if type(key) is not str or type(numel) is not int or numel < 0:
      raise ValueError('it has a storage without a name or size')
    storage = self.storages.setdefault(key, _Storage(self.path, dtype, numel))
    if (storage.dtype, storage.numel) != (dtype, numel):
      raise ValueError(f'the storage {key} has two types')
    return storage


def is_torch_file(path: Path) -> bool:
  """Whether a file starts like one of `torch.save`, in either format."""
  try:
    with open(path, 'rb') as file:
      head = file.read(300)
  except OSError:
    return False
  if head.startswith(b'PK\3\4'):  # the first entry's name
    return b'/data.pkl' in head
  return head[:1] == b'\x80' and MAGIC.to_bytes(10, 'little') in head[:30]


def read(path: Path) -> Any:
  """Returns the object in a file, with a `Tensor` in place of each tensor. Nothing is executed.

  Raises:
    UserError: it is broken, or holds something else than plain values and tensors.
  """
  try:
    with open(path, 'rb') as file:
      load = _read_zip if file.read(4) == b'PK\3\4' else _read_legacy
      file.seek(0)
      value, storages = load(file, path)
      size = file.seek(0, 2)
  except UserError:
    raise
  except Exception as e:  # whatever a file makes the unpickler do
    why = str(e) if type(e) is ValueError else f'{type(e).__name__}: {e}'
    raise unreadable(path, why[:200]) from e
  for key, storage in storages.items():
    if storage.start < 0 or storage.start + storage.nbytes > size:
      raise unreadable(path, f'it ends within the storage {key}')
  return value


def _read_zip(file: BinaryIO, path: Path) -> tuple[Any, dict[str, _Storage]]:
  with zipfile.ZipFile(file) as archive:
    entries = {info.filename: info for info in archive.infolist()}
  has_crc = any(info.CRC for info in entries.values())  # torch.serialization.set_crc32_options
  found = [name for name in entries if name.count('/') == 1 and name.endswith('/data.pkl')]
  if len(found) != 1:
    raise ValueError(f'it has {len(found)} entries data.pkl instead of one')
  folder = found[0].removesuffix('data.pkl')

  def start(name: str) -> int:
    """Returns an entry's first byte: after a local header of 30 bytes, its name and extra field."""
    info = entries.get(folder + name)
    if info is None:
      raise ValueError(f'it has no {name}')
    if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
      raise ValueError(f'{name} is compressed')
    file.seek(info.header_offset)
    magic, extent = struct.unpack('<4s22xI', file.read(30))
    if magic != b'PK\3\4':
      raise ValueError(f'{name} is not where it should be')
    return info.header_offset + 30 + (extent & 0xFFFF) + (extent >> 16)

  def content(name: str, limit: int) -> bytes:
    file.seek(start(name))
    if (size := entries[folder + name].file_size) > limit:
      raise ValueError(f'{name} has {size:,} bytes, more than {limit:,}')
    read = file.read(size)
    if has_crc and zlib.crc32(read) != entries[folder + name].CRC:
      raise ValueError(f'{name} has other bytes than were written (CRC-32)')
    return read

  if folder + 'byteorder' in entries and content('byteorder', 10) != b'little':
    raise ValueError('its numbers are big-endian, from another kind of machine')
  unpickler = _Unpickler(io.BytesIO(content('data.pkl', MAX_PICKLE)), path)
  value = unpickler.load()
  for key, storage in unpickler.storages.items():
    storage.start = start(f'data/{key}')
    storage.crc = entries[f'{folder}data/{key}'].CRC if has_crc else None
    if entries[f'{folder}data/{key}'].file_size != storage.nbytes:
      raise ValueError(f'the storage {key} has another size than it says')
  return value, unpickler.storages


def _read_legacy(file: BinaryIO, path: Path) -> tuple[Any, dict[str, _Storage]]:
  pickles = io.BytesIO(file.read(MAX_PICKLE))
  load = lambda: _Unpickler(pickles, path).load()
  if load() != MAGIC:
    raise ValueError('it is no file of torch.save')
  protocol, system = load(), load()
  if protocol != 1001 or not system['little_endian']:
    raise ValueError('its protocol is unknown, or its numbers are big-endian')
  unpickler = _Unpickler(pickles, path)
  value, keys = unpickler.load(), load()
  file.seek(pickles.tell())
  for key in keys:
    storage = unpickler.storages[str(key)]
    if struct.unpack('<q', file.read(8)) != (storage.numel,):
      raise ValueError(f'the storage {key} has another size than it says')
    storage.start = file.tell()
    file.seek(storage.nbytes, 1)
  return value, unpickler.storages

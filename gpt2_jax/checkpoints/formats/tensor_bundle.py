"""TensorFlow's checkpoint format, V2 ("tensor bundle"), read and written without TensorFlow.

`PREFIX.data-00000-of-00001` (or several shards) holds the tensors' bytes. `PREFIX.index` is a sorted
table of LevelDB's kind: name -> a protocol buffer that says where the bytes are; the name '' has a
header. Sources: tensorflow `core/util/tensor_bundle/tensor_bundle.h`, `core/protobuf/
tensor_bundle.proto`, and leveldb `doc/table_format.md`.

Every block of the index and every tensor has a checksum, which is verified when it is read. Names of
files come from the prefix alone, never from what a file says.
"""

import functools
import math
import struct
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gpt2_jax.checkpoints.formats.crc32c import masked_crc32c
from gpt2_jax.checkpoints.tensors import Tensor
from gpt2_jax.core.errors import UserError
from gpt2_jax.core.files import unreadable

# tensorflow `core/framework/types.proto`; tensors of other types can be listed, not read
DTYPES = {1: 'float32', 2: 'float64', 3: 'int32', 9: 'int64', 14: 'bfloat16', 19: 'float16'}
MAGIC = 0xDB4775248B80FB57
FOOTER = 48  # bytes: two handles, zeros, MAGIC
TRAILER = 5  # bytes after a block: kind of compression, checksum
BLOCK = 256 * 1024  # bytes of a block that is full, as TensorFlow has it
RESTART = 16  # entries of a block between two whole keys
MAX_INDEX, MAX_KEY, MAX_RANK = 2**22, 512, 254  # against files made to fill the memory


def read(prefix: Path) -> dict[str, Tensor]:
  """Returns the tensors of a checkpoint, none of them read yet.

  Args:
    prefix: the files' common path, without `.index`.

  Returns:
    name -> tensor; its dtype is 'DT_7' or the like where it is none of DTYPES.

  Raises:
    UserError: a file is missing, cut short, broken or of a kind that is not supported. A tensor's
      `read` raises it too, for one whose checksum is wrong.
  """
  index = prefix.with_name(f'{prefix.name}.index')
  try:
    return _read(prefix, index)
  except UserError:
    raise
  except (OSError, ValueError, struct.error) as e:
    raise unreadable(index, e) from e


def _read(prefix: Path, index: Path) -> dict[str, Tensor]:
  if not index.is_file():
    raise UserError(f'{index} is not there: fetch it too.')
  if index.stat().st_size > MAX_INDEX:
    raise ValueError(f'an index has at most {MAX_INDEX:,} bytes')
  entries = dict(_table(index.read_bytes()))
  header = _message(entries.pop(b'', b''))
  count = header.get((1, 0), 0)
  if header.get((2, 0), 0) != 0:
    raise UserError(
      f'{index} is of a big-endian machine, which is not supported: save it again on another.'
    )
  sizes: dict[Path, int] = {}
  tensors = {}
  for key, value in entries.items():
    if key.startswith(b'\0'):  # a slice of a variable, which has an entry too
      continue
    name, entry = key.decode(), _message(value)
    if (7, 2) in entry:
      raise UserError(
        f'{index}: the variable {name!r} is saved in slices (a partitioned variable), '
        'which is not supported: save it again without a partitioner.'
      )
    dtype = DTYPES.get(entry.get((1, 0), 0), f'DT_{entry.get((1, 0), 0)}')
    shape = _shape(entry.get((2, 2), b''))
    shard, offset, size = (entry.get((i, 0), 0) for i in (3, 4, 5))
    if shard >= count:
      raise ValueError(f'{name} is in shard {shard} of {count}')
    file = prefix.with_name(f'{prefix.name}.data-{shard:05d}-of-{count:05d}')
    if file not in sizes:
      if not file.is_file():
        raise UserError(f'{file} is not there, but {index.name} needs it: fetch it too.')
      sizes[file] = file.stat().st_size
    if dtype in DTYPES.values() and size != math.prod(shape) * np.dtype(dtype).itemsize:
      raise ValueError(f'{name} has {size} bytes, but is {dtype} {list(shape)}')
    if offset + size > sizes[file]:
      raise unreadable(file, f'{name} ends at byte {offset + size:,} of {sizes[file]:,}')
    tensors[name] = Tensor(
      shape,
      dtype,
      functools.partial(_tensor, file, name, dtype, shape, offset, size, entry.get((6, 5), 0)),
    )
  return tensors


def _tensor(
  file: Path, name: str, dtype: str, shape: tuple[int, ...], offset: int, size: int, checksum: int
) -> np.ndarray:
  if dtype not in DTYPES.values():
    raise UserError(f"{file}: {name} is of the type {dtype}, which can't be read.")
  try:
    raw = np.fromfile(file, np.uint8, size, offset=offset)
  except OSError as e:
    raise unreadable(file, e) from e
  if len(raw) != size:
    raise unreadable(file, f'it ends within {name}')
  if masked_crc32c(raw) != checksum:
    raise unreadable(file, f'the checksum of {name} is wrong')
  return raw.view(dtype).reshape(shape)


def write(prefix: Path, tensors: Mapping[str, Tensor]) -> None:
  """Writes a checkpoint in one shard, tensor by tensor, as TensorFlow would.

  Args:
    prefix: the files' common path.
    tensors: by name, of dtypes that DTYPES has.
  """
  kinds = {dtype: number for number, dtype in DTYPES.items()}
  entries = [(b'', b'\x08\x01\x1a\x02\x08\x01')]  # num_shards: 1, version { producer: 1 }
  offset = 0
  with open(prefix.with_name(f'{prefix.name}.data-00000-of-00001'), 'wb') as file:
    for name, tensor in sorted(tensors.items(), key=lambda item: item[0].encode()):
      raw = np.ascontiguousarray(tensor.read(), tensor.dtype).reshape(-1).view(np.uint8)
      file.write(raw.data)
      dims = b''.join(_field(2, _field(1, n) if n else b'') for n in tensor.shape)
      entry = _field(1, kinds[tensor.dtype]) + _field(2, dims)
      entry += _field(4, offset) if offset else b''
      entry += _field(5, len(raw)) if len(raw) else b''
      entry += b'\x35' + struct.pack('<I', masked_crc32c(raw))
      entries.append((name.encode(), entry))
      offset += len(raw)
  prefix.with_name(f'{prefix.name}.index').write_bytes(_to_table(entries))


# Protocol buffers (protobuf.dev/programming-guides/encoding), as much of them as is needed here.


def _varint(data: bytes, at: int) -> tuple[int, int]:
  """Returns a number of 64 bits and where it ends."""
  value = 0
  for shift in range(0, 64, 7):
    if at >= len(data):
      break
    value |= (data[at] & 127) << shift
    at += 1
    if data[at - 1] < 128:
      return value % 2**64, at
  raise ValueError('a number has no end')


def _to_varint(value: int) -> bytes:
  head = b''
  while value > 127:
    head += bytes([value & 127 | 128])
    value >>= 7
  return head + bytes([value])


def _field(number: int, value: int | bytes) -> bytes:
  if isinstance(value, int):
    return _to_varint(number << 3) + _to_varint(value)
  return _to_varint(number << 3 | 2) + _to_varint(len(value)) + value


def _fields(data: bytes) -> Iterator[tuple[tuple[int, int], Any]]:
  """Yields ((number, wire type), value) of each field of a message."""
  at = 0
  while at < len(data):
    tag, at = _varint(data, at)
    kind = tag & 7
    if kind == 0:
      value, at = _varint(data, at)
    elif kind in (1, 2, 5):
      size, at = _varint(data, at) if kind == 2 else ({1: 8, 5: 4}[kind], at)
      value, at = data[at : at + size], at + size
      if at > len(data):
        raise ValueError('a field has no end')
      value = value if kind == 2 else int.from_bytes(value, 'little')
    else:
      raise ValueError(f'a field is of the unknown kind {kind}')
    yield (tag >> 3, kind), value


def _message(data: bytes) -> dict[tuple[int, int], Any]:
  return dict(_fields(data))


def _shape(data: bytes) -> tuple[int, ...]:
  """Returns the shape that a TensorShapeProto describes."""
  dims = [_message(value).get((1, 0), 0) for key, value in _fields(data) if key == (2, 2)]
  if len(dims) > MAX_RANK:
    raise ValueError(f'a tensor has {len(dims)} dimensions')
  return tuple(dims)


# LevelDB's table.


def _table(data: bytes) -> Iterator[tuple[bytes, bytes]]:
  """Yields the entries of a table, in order."""
  if len(data) < FOOTER or data[-8:] != struct.pack('<Q', MAGIC):
    raise ValueError('it does not end as a table does')
  footer = data[-FOOTER:]
  _, at = _handle(footer, 0)  # of a block that is empty
  last = None
  for _, where in _entries(_block(data, _handle(footer, at)[0])):
    for key, value in _entries(_block(data, _handle(where, 0)[0])):
      if last is not None and key <= last:
        raise ValueError('its keys are not in order')
      yield key, value
      last = key


def _handle(data: bytes, at: int) -> tuple[tuple[int, int], int]:
  """Returns (offset, size) of a block, and where the handle ends."""
  offset, at = _varint(data, at)
  size, at = _varint(data, at)
  return (offset, size), at


def _block(data: bytes, handle: tuple[int, int]) -> bytes:
  offset, size = handle
  end = offset + size + TRAILER
  if end > len(data) - FOOTER:
    raise ValueError(f'a block ends at byte {end:,} of {len(data):,}')
  kind, checksum = struct.unpack('<BI', data[end - TRAILER : end])
  if masked_crc32c(np.frombuffer(data, np.uint8, size + 1, offset)) != checksum:
    raise ValueError('the checksum of a block is wrong')
  if kind != 0:
    raise ValueError(f"it is compressed (kind {kind}), which TensorFlow's Saver never does")
  return data[offset : offset + size]


def _entries(block: bytes) -> Iterator[tuple[bytes, bytes]]:
  """Yields the entries of a block: a key shares its first bytes with the key before."""
  restarts = int.from_bytes(block[-4:], 'little')
  end = len(block) - 4 - 4 * restarts
  if end < 0:
    raise ValueError('a block is too short')
  at, key = 0, b''
  while at < end:
    shared, at = _varint(block, at)
    own, at = _varint(block, at)
    size, at = _varint(block, at)
    if shared > len(key) or at + own + size > end or shared + own > MAX_KEY:
      raise ValueError('an entry of a block is broken')
    key = key[:shared] + block[at : at + own]
    at += own + size
    yield key, block[at - size : at]


def _to_table(entries: Iterable[tuple[bytes, bytes]]) -> bytes:
  """Returns a table of entries that are in order."""
  data, blocks, block = bytearray(), [], []

  def put(block: list[tuple[bytes, bytes]], restart: int) -> bytes:
    """Appends a block; returns its handle."""
    content = _to_block(block, restart) + b'\0'  # not compressed
    handle = _to_varint(len(data)) + _to_varint(len(content) - 1)
    data.extend(content + struct.pack('<I', masked_crc32c(np.frombuffer(content, np.uint8))))
    return handle

  size = 0
  for key, value in entries:
    block.append((key, value))
    size += len(key) + len(value)
    if size >= BLOCK:
      blocks.append((key, put(block, RESTART)))
      block, size = [], 0
  if block:
    after = bytes(byte + 1 for byte in block[-1][0][:1])  # any key does that is not before the last
    blocks.append((after, put(block, RESTART)))
  footer = put([], RESTART) + put(blocks, 1)
  return bytes(data) + footer.ljust(FOOTER - 8, b'\0') + struct.pack('<Q', MAGIC)


def _to_block(entries: list[tuple[bytes, bytes]], restart: int) -> bytes:
  data, restarts, last = bytearray(), [], b''
  for i, (key, value) in enumerate(entries):
    shared = 0
    if i % restart == 0:
      restarts.append(len(data))
    else:
      while shared < min(len(key), len(last)) and key[shared] == last[shared]:
        shared += 1
    data += b''.join(map(_to_varint, (shared, len(key) - shared, len(value))))
    data += key[shared:] + value
    last = key
  restarts = restarts or [0]
  return bytes(data) + struct.pack(f'<{len(restarts) + 1}I', *restarts, len(restarts))

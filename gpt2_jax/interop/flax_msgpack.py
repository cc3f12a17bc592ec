"""`flax_model.msgpack` of transformers' Flax models, which its version 5 removed, both ways.

The bytes are those of `flax.serialization.to_bytes`: nested maps whose leaves are arrays. An array is
extension 1 with (shape, dtype, bytes), or, above 1 GiB, a map of flat pieces. We walk over the heads
of the values and skip the arrays, which msgpack's own readers would load.

FlaxConv1D has its kernel as [out, in]; the Dense of an untied head as [in, out].
"""

import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import msgpack
import numpy as np

from gpt2_jax.errors import UserError
from gpt2_jax.files import check_place, read_json, unreadable
from gpt2_jax.interop import huggingface
from gpt2_jax.interop.opening import PLAIN, Opening
from gpt2_jax.interop.tensors import DTYPES, Source, Tensor, shapes

FILE = 'flax_model.msgpack'
CHUNK = 2**30  # bytes of an array that is written in one piece
CHUNKED = '__msgpack_chunked_array__'
NDARRAY = 1  # the extension's code
MAX_KEY = 1000  # bytes

# What transformers' `FlaxGPT2LMHeadModel` computed, as of its last version.
ACTIVATIONS = ('gelu', 'gelu_new', 'gelu_pytorch_tanh', 'quick_gelu', 'relu', 'silu', 'swish', 'tanh')
SAME = {
  'head': 'lm',
  'scale_attn_weights': True,
  'scale_attn_by_inverse_layer_idx': False,
  'reorder_and_upcast_attn': False,
}

# First byte -> (kind, bytes of the size or value behind it); github.com/msgpack/msgpack, spec.md.
HEADS = {
  0xC4: ('bin', 1),
  0xC5: ('bin', 2),
  0xC6: ('bin', 4),
  0xC7: ('ext', 1),
  0xC8: ('ext', 2),
  0xC9: ('ext', 4),
  0xCC: ('int', 1),
  0xCD: ('int', 2),
  0xCE: ('int', 4),
  0xCF: ('int', 8),
  0xD9: ('str', 1),
  0xDA: ('str', 2),
  0xDB: ('str', 4),
  0xDC: ('array', 2),
  0xDD: ('array', 4),
  0xDE: ('map', 2),
  0xDF: ('map', 4),
}


@dataclasses.dataclass(frozen=True)
class _Array:
  """An array in a file."""

  path: Path
  shape: tuple[int, ...]
  dtype: str
  pieces: tuple[tuple[int, int], ...]  # (first byte, number of bytes)

  def read(self) -> np.ndarray:
    try:
      data = [np.fromfile(self.path, np.uint8, size, offset=start) for start, size in self.pieces]
      return np.concatenate(data).view(self.dtype).reshape(self.shape)
    except (OSError, ValueError) as e:
      raise unreadable(self.path, e) from e


def recognises(path: Path) -> bool:
  """Whether this is such a file, or a folder with one."""
  return (path / FILE).is_file() or (path.name == FILE and path.is_file())


def open_source(path: Path, opening: Opening = PLAIN) -> Source:
  """A folder with `flax_model.msgpack` and `config.json`, or the file in such a folder.

  Raises:
    UserError: names the file, and what about it can't be read or honoured.
  """
  folder = path if path.is_dir() else path.parent
  for name in ('config.json', FILE):
    check_place(folder / name)
  keys = read_json(folder / 'config.json')
  tensors = {}
  for place, array in _arrays(folder / FILE).items():
    name, _, kind = '.'.join(place).rpartition('.')
    name += '.bias' if kind == 'bias' else '.weight'
    shape, read = array.shape, array.read
    if kind == 'kernel':
      shape, read = shape[::-1], lambda read=read: read().T
    tensors[name] = Tensor(shape, array.dtype, read)
  return huggingface.assemble(folder, keys, tensors, opening)


def _arrays(path: Path) -> dict[tuple[str, ...], _Array]:
  """Place -> array of all leaves of a file."""
  try:
    with open(path, 'rb') as file:
      leaves = dict(_walk(file, path))
      if file.read(1):
        raise ValueError('it goes on behind its end')
    for place in [place[:-1] for place in leaves if place and place[-1] == CHUNKED]:
      leaves[place] = _joined(place, leaves)
  except (OSError, ValueError, RecursionError) as e:
    raise unreadable(path, e) from e
  if other := [place for place, leaf in leaves.items() if not isinstance(leaf, _Array)]:
    raise unreadable(path, f'{"/".join(other[0])} is no array')
  return leaves


def _joined(place: tuple[str, ...], leaves: dict[tuple[str, ...], Any]) -> _Array:
  """An array that stands in a file in flat pieces; takes them from `leaves`."""

  def series(key: str) -> list[Any]:
    found = []
    while (item := (*place, key, str(len(found)))) in leaves:
      found.append(leaves.pop(item))
    return found

  del leaves[*place, CHUNKED]
  shape, pieces = series('shape'), series('chunks')
  if not (
    pieces
    and all(isinstance(piece, _Array) for piece in pieces)
    and all(type(n) is int for n in shape)
    and len({piece.dtype for piece in pieces}) == 1
    and math.prod(shape) == sum(math.prod(piece.shape) for piece in pieces)
  ):
    raise ValueError(f'{"/".join(place)} is not the sum of its pieces')
  extents = tuple(extent for piece in pieces for extent in piece.pieces)
  return _Array(pieces[0].path, tuple(shape), pieces[0].dtype, extents)


def _walk(file: BinaryIO, path: Path, place: tuple[str, ...] = ()) -> Iterator[tuple[tuple, Any]]:
  """(place, value) of each leaf of the value that the file stands at."""
  kind, n = _head(file)
  if kind == 'map':
    for _ in range(n):
      yield from _walk(file, path, (*place, _text(file)))
  elif kind == 'ext':
    yield place, _array(file, path, n)
  elif kind in ('int', 'bool'):
    yield place, n
  else:
    raise ValueError(f'{"/".join(place) or "it"} is a {kind}, no map of arrays')


def _array(file: BinaryIO, path: Path, size: int) -> _Array:
  """An array whose bytes are skipped."""
  if _exactly(file, 1)[0] != NDARRAY:
    raise ValueError('it holds an extension of another kind than arrays')
  end = file.tell() + size
  (outer, n), (inner, rank) = _head(file), _head(file)
  if (outer, n, inner) != ('array', 3, 'array') or rank > 8:
    raise ValueError('it holds an array without a shape')
  shape, dtype, (kind, nbytes) = [_head(file) for _ in range(rank)], _text(file), _head(file)
  if dtype not in (*DTYPES, 'float64'):
    raise ValueError(f'it holds an array of dtype {dtype}, but {", ".join(DTYPES)} can be read')
  wanted = math.prod(n for _, n in shape) * np.dtype(dtype).itemsize
  if {kind for kind, _ in shape} - {'int'} or (kind, nbytes, file.tell() + nbytes) != (
    'bin',
    wanted,
    end,
  ):
    raise ValueError('it holds an array whose size its shape contradicts')
  start = file.tell()
  if file.seek(0, 2) < end:
    raise ValueError('it ends within an array')
  file.seek(end)
  return _Array(path, tuple(n for _, n in shape), dtype, ((start, nbytes),))


def _head(file: BinaryIO) -> tuple[str, int]:
  """The kind of the next value and its size; its value where it is an int or bool.

  An 'ext' has its code behind that.
  """
  byte = _exactly(file, 1)[0]
  for limit, kind, mask in (
    (0x80, 'int', 0x7F),
    (0x90, 'map', 0xF),
    (0xA0, 'array', 0xF),
    (0xC0, 'str', 0x1F),
  ):
    if byte < limit:
      return kind, byte & mask
  if byte in (0xC2, 0xC3):
    return 'bool', byte - 0xC2
  if 0xD4 <= byte <= 0xD8:
    return 'ext', 2 ** (byte - 0xD4)
  if byte not in HEADS:
    raise ValueError(f'it holds a value of type {byte:#x}, no array')
  kind, width = HEADS[byte]
  return kind, int.from_bytes(_exactly(file, width), 'big')


def _text(file: BinaryIO) -> str:
  kind, n = _head(file)
  if kind != 'str' or n > MAX_KEY:
    raise ValueError('it holds a map whose keys are no names')
  return _exactly(file, n).decode()


def _exactly(file: BinaryIO, n: int) -> bytes:
  data = file.read(n)
  if len(data) < n:
    raise ValueError('it ends too early')
  return data


def write(source: Source, target: Path) -> None:
  """Writes a folder that `FlaxGPT2LMHeadModel.from_pretrained` of transformers 4 loads.

  Args:
    source: the model.
    target: the folder, not there yet.

  Raises:
    UserError: transformers' Flax GPT-2 can't express the model.
  """
  c = source.config
  wrong = [
    f'{name} = {getattr(c, name)!r}' for name, value in SAME.items() if getattr(c, name) != value
  ]
  if c.activation_function not in ACTIVATIONS:
    wrong.append(f'activation_function = {c.activation_function!r}')
  if wrong:
    raise UserError(
      f"transformers' Flax GPT-2 can't express {', '.join(wrong)}: it would compute "
      "another function. Write Hugging Face's format instead (hf)."
    )
  tree: dict[str, Any] = {}
  for name in shapes(c):
    full = name if name.startswith('lm_head') else f'transformer.{name}'
    *places, last = full.split('.')
    node = tree
    for key in places:
      node = node.setdefault(key, {})
    if last == 'weight':
      module = places[-1]
      last = (
        'embedding' if module in ('wte', 'wpe') else 'scale' if module.startswith('ln_') else 'kernel'
      )
    node[last] = name
  target.mkdir()
  (target / 'config.json').write_text(
    json.dumps(huggingface.config_to_dict(source), indent=2) + '\n', encoding='utf-8'
  )
  if source.tokenizer is not None:
    source.tokenizer.save(target)
  with open(target / FILE, 'wb') as file:
    _write_map(file, tree, source)


def _packed(value: Any) -> bytes:
  return msgpack.packb(value) or b''


def _map_head(n: int) -> bytes:
  return msgpack.Packer().pack_map_header(n) or b''


def _write_map(file: BinaryIO, tree: dict[str, Any], source: Source) -> None:
  file.write(_map_head(len(tree)))
  for key, value in tree.items():
    file.write(_packed(key))
    if isinstance(value, dict):
      _write_map(file, value, source)
      continue
    tensor = source.tensor(value)
    _write_leaf(file, np.ascontiguousarray(tensor.T if key == 'kernel' else tensor))


def _write_leaf(file: BinaryIO, array: np.ndarray) -> None:
  if array.nbytes <= CHUNK:
    _write_array(file, array)
    return
  count = CHUNK // array.dtype.itemsize
  pieces = range(0, array.size, count)
  shape = {str(i): n for i, n in enumerate(array.shape)}
  file.write(_map_head(3) + b''.join(map(_packed, (CHUNKED, True, 'shape', shape, 'chunks'))))
  file.write(_map_head(len(pieces)))
  for i, start in enumerate(pieces):
    file.write(_packed(str(i)))
    _write_array(file, array.reshape(-1)[start : start + count])


def _write_array(file: BinaryIO, array: np.ndarray) -> None:
  def sized(n: int, codes: tuple[int, int, int]) -> bytes:
    width, code = next((w, c) for w, c in zip((1, 2, 4), codes) if n < 256**w)
    return bytes([code]) + n.to_bytes(width, 'big')

  head = (
    b'\x93'
    + _packed(array.shape)
    + _packed(array.dtype.name)  # an array of three
    + sized(array.nbytes, (0xC4, 0xC5, 0xC6))
  )
  size = len(head) + array.nbytes
  fixed = {2**i: bytes([0xD4 + i]) for i in range(5)}
  file.write(fixed.get(size) or sized(size, (0xC7, 0xC8, 0xC9)))
  file.write(bytes([NDARRAY]) + head)
  file.write(array.reshape(-1).view(np.uint8).data)

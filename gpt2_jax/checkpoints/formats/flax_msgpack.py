"""`flax_model.msgpack` of transformers' Flax models, which its version 5 removed, both ways.

The bytes are those of `flax.serialization.to_bytes`: nested maps whose leaves are arrays. An array is
extension 1 with (shape, dtype, bytes), or, above 1 GiB, a map of flat pieces. Flax itself would hold
a second model in memory; here the package msgpack finds the leaves, which are handled one by one.

FlaxConv1D has its kernel as [out, in]; the Dense of an untied head as [in, out].
"""

import contextlib
import functools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import msgpack
import numpy as np
from flax.serialization import msgpack_serialize

from gpt2_jax.checkpoints.formats import huggingface
from gpt2_jax.checkpoints.formats.huggingface_config import config_to_dict
from gpt2_jax.checkpoints.opening import PLAIN, Opening
from gpt2_jax.checkpoints.tensors import DTYPES, Source, Tensor, shapes
from gpt2_jax.core.errors import UserError
from gpt2_jax.core.files import check_place, read_json, unreadable

FILE = 'flax_model.msgpack'
CHUNK = 2**30  # bytes of an array that is written in one piece
CHUNKED = '__msgpack_chunked_array__'
NDARRAY = 1  # the extension's code
LARGEST = 2**31 - 1  # bytes of a value that is read

# What transformers' `FlaxGPT2LMHeadModel` computed, as of its last version.
ACTIVATIONS = ('gelu', 'gelu_new', 'gelu_pytorch_tanh', 'quick_gelu', 'relu', 'silu', 'swish', 'tanh')
SAME = {
  'head': 'lm',
  'scale_attn_weights': True,
  'scale_attn_by_inverse_layer_idx': False,
  'reorder_and_upcast_attn': False,
}


def recognises(path: Path) -> bool:
  """Whether this is such a file, or a folder with one."""
  return (path / FILE).is_file() or (path.name == FILE and path.is_file())


def open_source(path: Path, opening: Opening = PLAIN) -> Source:
  """Opens a folder with `flax_model.msgpack` and `config.json`, or the file in such a folder.

  Raises:
    UserError: names the file, and what about it can't be read or honoured.
  """
  folder = path if path.is_dir() else path.parent
  for name in ('config.json', FILE):
    check_place(folder / name)
  keys = read_json(folder / 'config.json')
  tensors = {}
  with _errors_of(folder / FILE), open(folder / FILE, 'rb') as file:
    unpacker = msgpack.Unpacker(file, read_size=2**20, max_buffer_size=LARGEST, ext_hook=_array)
    for place, start, array in _leaves(unpacker):
      name, _, kind = '.'.join(place).rpartition('.')
      name += '.bias' if kind == 'bias' else '.weight'
      extent = start, unpacker.tell() - start
      read = functools.partial(_read, folder / FILE, extent, transposed=kind == 'kernel')
      shape = array.shape[::-1] if kind == 'kernel' else array.shape
      tensors[name] = Tensor(shape, str(array.dtype), read)
    if unpacker.tell() < file.seek(0, 2):
      raise ValueError('it goes on behind its end')
  return huggingface.assemble(folder, keys, tensors, opening)


def _leaves(unpacker: Any, place: tuple[str, ...] = ()) -> Iterator[tuple[tuple, int, np.ndarray]]:
  """Yields the place, the first byte and the array of each leaf of the value that comes next."""
  start = unpacker.tell()
  try:
    size = unpacker.read_map_header()
  except ValueError:  # no map
    yield place, start, _leaf(unpacker.unpack(), place)
    return
  for i in range(size):
    key = unpacker.unpack()
    if not isinstance(key, str):
      raise ValueError('it holds a map whose keys are no names')
    if (i, key) == (0, CHUNKED):
      values = [unpacker.unpack() for _ in range(2 * size - 1)]
      yield place, start, _leaf({key: values[0]} | dict(zip(values[1::2], values[2::2])), place)
      return
    yield from _leaves(unpacker, (*place, key))


def _leaf(value: Any, place: tuple[str, ...] = ()) -> np.ndarray:
  """Returns an array as it is unpacked, or the sum of its pieces."""
  if isinstance(value, dict):
    try:
      flat = np.concatenate(list(value['chunks'].values()))
      value = flat.reshape(list(value['shape'].values()))
    except (AttributeError, KeyError, TypeError, ValueError) as e:
      raise ValueError(f'{"/".join(place)} is not the sum of its pieces') from e
  if not isinstance(value, np.ndarray):
    raise ValueError(f'{"/".join(place) or "it"} is no array')
  return value


def _array(code: int, data: bytes) -> np.ndarray:
  """Returns an array from the bytes of an extension."""
  if code != NDARRAY:
    raise ValueError('it holds an extension of another kind than arrays')
  shape, dtype, content = msgpack.unpackb(data)
  if dtype not in (*DTYPES, 'float64'):
    raise ValueError(f'it holds an array of dtype {dtype}, but {", ".join(DTYPES)} can be read')
  array = np.frombuffer(content, dtype)
  if not all(type(n) is int and n >= 0 for n in shape) or array.size != math.prod(shape):
    raise ValueError('it holds an array whose size its shape contradicts')
  return array.reshape(shape)


def _read(path: Path, extent: tuple[int, int], *, transposed: bool) -> np.ndarray:
  """Reads a leaf again: (first byte, number of bytes) of a file."""
  with _errors_of(path), open(path, 'rb') as file:
    file.seek(extent[0])
    array = _leaf(msgpack.unpackb(file.read(extent[1]), ext_hook=_array))
  return array.T if transposed else array


@contextlib.contextmanager
def _errors_of(path: Path) -> Iterator[None]:
  """Turns whatever a broken file makes the reader raise into one error that names the file."""
  try:
    yield
  except UserError:
    raise
  except msgpack.OutOfData as e:
    raise unreadable(path, 'it ends too early') from e
  except (OSError, ValueError, TypeError, RecursionError, msgpack.UnpackException) as e:
    raise unreadable(path, e) from e


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
    json.dumps(config_to_dict(source), indent=2) + '\n', encoding='utf-8'
  )
  if source.tokenizer is not None:
    source.tokenizer.save(target)
  with open(target / FILE, 'wb') as file:
    _write_map(file, tree, source)


def _map_head(n: int) -> bytes:
  return msgpack.Packer().pack_map_header(n) or b''


def _write_map(file: BinaryIO, tree: dict[str, Any], source: Source) -> None:
  file.write(_map_head(len(tree)))
  for key, value in tree.items():
    file.write(msgpack_serialize(key))
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
  file.write(
    _map_head(3) + b''.join(map(msgpack_serialize, (CHUNKED, True, 'shape', shape, 'chunks')))
  )
  file.write(_map_head(len(pieces)))
  for i, start in enumerate(pieces):
    file.write(msgpack_serialize(str(i)))
    _write_array(file, array.reshape(-1)[start : start + count])


def _write_array(file: BinaryIO, array: np.ndarray) -> None:
  """Writes what flax writes; of a large array without its two copies of it."""
  if array.nbytes < 2**16:
    file.write(msgpack_serialize(array))
    return
  head = b'\x93' + msgpack_serialize(list(array.shape)) + msgpack_serialize(array.dtype.name)
  head += b'\xc6' + array.nbytes.to_bytes(4, 'big')  # an array of three, the last in binary
  size = len(head) + array.nbytes
  file.write(b'\xc9' + size.to_bytes(4, 'big') + bytes([NDARRAY]) + head)
  file.write(array.reshape(-1).view(np.uint8).data)

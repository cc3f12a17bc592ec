"""What all formats have in common: a checkpoint as tensors under Hugging Face's names, one at a time.

A format's module opens a checkpoint as a `Source`, and writes a `Source`. In between stand the
tensors of a `GPT2LMHeadModel` (without the prefix `transformer.`) in its shapes: `wte.weight` is
[V, D], `h.3.attn.c_attn.weight` [D, 3·D] and so on. Ours differ from them in that layers are
stacked, merged axes are apart (`c_attn.weight` is [L, D, 3, N, H]) and the vocabulary is padded.

Nothing is ever whole in memory but the parameters themselves.
"""

import dataclasses
import itertools
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from gpt2_jax.core.bounds import DType
from gpt2_jax.core.errors import UserError
from gpt2_jax.core.progress import track
from gpt2_jax.model.activations import TANH_GELU
from gpt2_jax.model.config import GPTConfig
from gpt2_jax.model.gpt2 import Params, make_params
from gpt2_jax.model.parameters import TABLE, Row, row_of
from gpt2_jax.parallel.sharding import P, mesh_of, on_devices, reshard
from gpt2_jax.tokenizer.bpe import Tokenizer

DTYPES = ('float32', 'bfloat16', 'float16')  # of tensors in files
# ends of names of matrices that are [in, out]; torch's Linear is [out, in]
CONV1D = tuple(row.name.removeprefix('h.') for row in TABLE if row.hidden)


@dataclasses.dataclass(frozen=True)
class Tensor:
  """A tensor that stands in a file and is read when it is needed."""

  shape: tuple[int, ...]
  dtype: str
  read: Callable[[], np.ndarray]

  @property
  def nbytes(self) -> int:
    return math.prod(self.shape) * np.dtype(self.dtype).itemsize


@dataclasses.dataclass(frozen=True, eq=False)
class Source:
  """An opened checkpoint of any format: its header was read and checked, its tensors were not.

  Attributes:
    config: of the model.
    read: name -> tensor, of the file's dtype, in the shape that `shapes(config)` says.
    dtype: of the file's tensors, a name of DTYPES.
    where: the file or folder, for messages.
    tokenizer: None where there is none that we can use.
    keys: what its config.json says beside `config`: ids of special tokens, names of labels, …
    generation: what its generation_config.json says.
    record: of the run that made it.
    base: the model that its adapters were made for.
    replaced: names of tensors that are not that model's, but stand beside its adapters.
    load: where a format has a way of its own onto the mesh: config -> parameters, or None where it
      can't make them for that config.
  """

  config: GPTConfig
  read: Callable[[str], np.ndarray]
  dtype: str
  where: str
  tokenizer: Tokenizer | None = None
  keys: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  generation: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  record: Mapping[str, Any] | None = None
  base: str | None = None
  replaced: tuple[str, ...] = ()
  load: Callable[[GPTConfig], Params | None] | None = None

  def tensor(self, name: str) -> np.ndarray:
    """A tensor, of the dtype `dtype`.

    Raises:
      UserError: it holds a NaN or an infinity.
    """
    with np.errstate(over='ignore', invalid='ignore'):
      tensor = self.read(name).astype(self.dtype, copy=False)
      finite = np.isfinite(tensor)
    if not finite.all():
      raise UserError(
        f'{self.where}: the tensor {name} has {int((~finite).sum()):,} values that are '
        f'NaN or infinite in {self.dtype}: use another checkpoint or a wider dtype.'
      )
    return tensor

  @property
  def eos_token_id(self) -> int | list[int] | None:
    """The id or ids that end a text, as its files say; None where they don't."""
    said = self.generation.get('eos_token_id', self.keys.get('eos_token_id'))
    return said if said != [] else None

  def astype(self, dtype: Any) -> 'Source':
    """The same with tensors of another dtype: one of DTYPES, or what `jnp.dtype` takes for it."""
    return dataclasses.replace(self, dtype=DType(DTYPES).check('dtype', dtype))


def _rows(config: GPTConfig) -> dict[str, Row]:
  """Name -> row of all tensors of a config, in the order of Hugging Face's state dict."""
  found = {}
  for stacked, group in itertools.groupby(config.parameters(), key=lambda row: row.stacked):
    rows = list(group)
    for layer in range(config.n_layer) if stacked else [None]:
      found |= {row.tensor(layer): row for row in rows}
  return found


def _all_shapes(config: GPTConfig) -> dict[str, tuple[int, ...]]:
  """Name -> shape of all tensors of a config, in that order."""
  sizes = config.sizes | {'V': config.vocab_size}
  return {name: row.theirs(sizes) for name, row in _rows(config).items()}


def full_name(name: str) -> str:
  """The name of a tensor in the file of a model with a head."""
  return name if row_of(name.split('.')).head else f'transformer.{name}'


def shapes(config: GPTConfig) -> dict[str, tuple[int, ...]]:
  """Name -> shape of the tensors of a model, its adapters aside."""
  return _all_shapes(dataclasses.replace(config, lora=None))


def adapter_shapes(config: GPTConfig) -> dict[str, tuple[int, ...]]:
  """Name -> shape of a model's adapters: `h.0.attn.c_attn.lora_A` [r, in], `….lora_B` [out, r]."""
  return {name: shape for name, shape in _all_shapes(config).items() if '.lora_' in name}


def check_tensors(
  config: GPTConfig, have: Mapping[str, Iterable[int]], where: str | os.PathLike
) -> None:
  """Checks that a file has the tensors of a config, all of them and no others.

  Args:
    config: what it says it is.
    have: name -> shape of the tensors there, under Hugging Face's names.
    where: the file.

  Raises:
    UserError: names what is missing, left over or of another shape.
  """
  if config.n_layer > len(have):  # a number of layers that would fill the memory with names
    raise UserError(f'{where} has {len(have)} tensors, too few for n_layer = {config.n_layer}.')
  check_shapes(shapes(config), have, where)


def check_shapes(
  want: Mapping[str, tuple[int, ...]], have: Mapping[str, Iterable[int]], where: str | os.PathLike
) -> None:
  """As `check_tensors`, against the shapes in `want`."""
  there = {name: tuple(shape) for name, shape in have.items()}
  for problem, names in (
    ('lacks the tensors', [n for n in want if n not in there]),
    ('has tensors that this GPT-2 does not', [n for n in there if n not in want]),
    (
      'has tensors of a shape that its config contradicts',
      [
        f'{n} {list(there[n])} instead of {list(want[n])}'
        for n in want
        if n in there and there[n] != want[n]
      ],
    ),
  ):
    if names:
      more = f', … and {len(names) - 5} more' if len(names) > 5 else ''
      raise UserError(f'{where} {problem}: {", ".join(names[:5])}{more}.')


def common_dtype(tensors: Iterable[Tensor], where: str | os.PathLike) -> str:
  """The dtype of a file: the widest of its tensors'.

  Raises:
    UserError: one is neither float32, bfloat16 nor float16.
  """
  found = {tensor.dtype for tensor in tensors}
  if other := sorted(found - set(DTYPES)):
    raise UserError(
      f'{where} has tensors of dtype {", ".join(other)}; {", ".join(DTYPES)} can be read.'
    )
  return found.pop() if len(found) == 1 else 'float32'


def load_params(source: Source, dtype: str = 'float32') -> Params:
  """The parameters of a checkpoint, in place on the mesh that is set or on one device.

  Streams: each process holds one tensor of the file, and its own shards of one parameter, at a time;
  the largest come first, while there is room.

  Args:
    source: the checkpoint.
    dtype: of the parameters.

  Raises:
    UserError: a tensor holds NaN, or can't be read.
  """
  if source.load and (loaded := source.load(source.config)) is not None:
    return jax.tree.map(lambda x: x.astype(dtype), loaded)
  params = {}
  leaves = on_devices(flatten_dict(jax.eval_shape(lambda: make_params(source.config, 0))))
  total = sum(leaf.size for leaf in leaves.values())
  with track('loading', total, 'parameters') as advance:
    for path, leaf in sorted(leaves.items(), key=lambda item: -item[1].size):
      params[path] = _load(source, path, leaf, jnp.dtype(dtype))
      advance(leaf.size)
  return unflatten_dict(params)


def _load(source: Source, path: tuple[str, ...], leaf, dtype) -> jax.Array:
  """One parameter: this process's shards of it."""
  row = row_of(path)
  stacked, shape = row.stacked, leaf.shape[1:] if row.stacked else leaf.shape
  key = lambda index: tuple((part.start or 0, part.stop) for part in index)
  local = leaf.sharding.addressable_devices_indices_map(leaf.shape).values()
  indices = {key(index): index for index in local}
  shards = {
    k: np.empty([len(range(n)[part]) for n, part in zip(leaf.shape, index)], dtype)
    for k, index in indices.items()
  }
  for layer in range(leaf.shape[0]) if stacked else [None]:
    tensor = source.tensor(row.tensor(layer))
    if row.transposed:
      tensor = tensor.T
    if row.padded:
      tensor = np.pad(tensor, ((0, shape[0] - len(tensor)), (0, 0)))
    tensor = tensor.reshape(shape)
    for k, index in indices.items():
      shards[k][layer if stacked else ...] = tensor[index[1:] if stacked else index]
  made = jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda index: shards[key(index)])
  return jax.block_until_ready(made)  # lest the shards be kept while the next ones are read


def source_of(config: GPTConfig, params: Params, where: str, **fields) -> Source:
  """Parameters as a `Source`, to be written.

  Raises:
    UserError: they are quantized.
  """
  if config.form != 'train':
    raise UserError(
      f"a model in the form {config.form!r} can't be saved: save the one that it was made from."
    )

  arrays: Any = flatten_dict(params)
  sizes = config.sizes | {'V': config.vocab_size}

  def read(name: str) -> np.ndarray:
    row = row_of(name.split('.'))
    value = arrays[row.path]
    with mesh_of(value):
      if row.stacked:
        value = value[int(name.split('.')[1])]
      value = np.asarray(value if value.is_fully_addressable else reshard(value, P()))
    if row.padded:
      value = value[: config.vocab_size]
    shape = row.theirs(sizes)
    return value.reshape(shape[::-1]).T if row.transposed else value.reshape(shape)

  dtype = str(jax.tree.leaves(params)[0].dtype)
  return Source(config, read, fields.pop('dtype', dtype), where, **fields)


def check_plain(
  config: GPTConfig, kind: str, *, activations: Sequence[str] = TANH_GELU, kept: Sequence[str] = ()
) -> None:
  """Checks that a model is one that a format without options, such as nanoGPT's, can express.

  Args:
    config: of the model.
    kind: the format's name, for messages.
    activations: functions that it may have.
    kept: fields that the format does keep.

  Raises:
    UserError: names what would be computed otherwise there.
  """
  plain = {
    'head': 'lm',
    'tie_word_embeddings': True,
    'n_inner': 4 * config.n_embd,
    'layer_norm_epsilon': 1e-5,
    'scale_attn_weights': True,
    'scale_attn_by_inverse_layer_idx': False,
    'reorder_and_upcast_attn': False,
  }
  have = {name: config.F if name == 'n_inner' else getattr(config, name) for name in plain}
  wrong = [
    f'{name} = {have[name]!r}' for name in plain if have[name] != plain[name] and name not in kept
  ]
  if config.activation_function not in activations:
    wrong.append(f'activation_function = {config.activation_function!r}')
  if wrong:
    raise UserError(
      f"{kind} can't express {', '.join(wrong)}: it would compute another function. "
      "Write Hugging Face's format instead (hf)."
    )

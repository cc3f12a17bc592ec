"""Every parameter of a GPT-2, in one table.

From a parameter's row follows all else that one has to know of it: its shape and its layout on the
mesh, whether its weight decays and how muP scales its steps, how it lies when a model decodes,
whether it can have an adapter, what Hugging Face calls it, and how much memory it takes. A parameter
without a row is an error.

Letters: see `gpt2.py`; also `K` labels of a classifier and `R` the rank of an adapter.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
from jax.sharding import PartitionSpec as P

# The axis of the mesh that splits an axis of a parameter, by its letter. Vectors are small: their D
# is whole on every device.
SPLIT = {'D': 'fsdp', 'N': 'tensor', 'F': 'tensor', 'V': 'tensor'}


@dataclasses.dataclass(frozen=True)
class Row:
  """What is known of a parameter.

  Attributes:
    name: Hugging Face's name, without the number of a layer: 'h.attn.c_attn.weight'.
    letters: those of its axes. A parameter of the blocks, 'h.…', has the axis L before them.
    kind: 'matrix', 'embedding', 'norm', 'bias', 'adapter' (LoRA's), or 'scale' (of int8 weights).
    contracted: the axes that its product sums over; of positions, which are only looked up, the rows.
    transposed: Hugging Face has it as torch's Linear, [out, in], and not as Conv1D, [in, out].
    head: the kind of head whose models alone have it, a name of `config.HEADS`; '': all models.
  """

  name: str
  letters: str
  kind: str
  contracted: str = ''
  transposed: bool = False
  head: str = ''

  @property
  def path(self) -> tuple[str, ...]:
    """Its keys in the nested dict of parameters."""
    return tuple(self.name.split('.'))

  @property
  def module(self) -> str:
    """The name of what it is a parameter of: 'h.attn.c_attn'."""
    return self.name.rpartition('.')[0]

  @property
  def stacked(self) -> bool:
    """Whether it is of the blocks: one array for all layers, with the axis L first."""
    return self.name.startswith('h.')

  @property
  def padded(self) -> bool:
    """Whether it has rows beyond the vocabulary, which no file has."""
    return 'V' in self.letters

  @property
  def decays(self) -> bool:
    """Whether weight decay applies to it: to what multiplies, not to biases and layer norms."""
    return self.kind in ('matrix', 'embedding', 'adapter')

  @property
  def hidden(self) -> bool:
    """Whether it is a matrix within a block, both of whose sides grow with the width: see muP."""
    return self.kind == 'matrix' and self.stacked

  @property
  def layout(self) -> P:
    """Where it lies on the mesh, L aside."""
    whole = '' if self.decays else 'D'
    return P(*(None if letter in whole else SPLIT.get(letter) for letter in self.letters))

  def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """Its shape, L aside, for sizes by letter (`GPTConfig.sizes`)."""
    return tuple(sizes[letter] for letter in self.letters)

  def whole(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """Its shape for all layers: `shape`, in a block with L before it."""
    return (sizes['L'], *self.shape(sizes)) if self.stacked else self.shape(sizes)

  def theirs(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """The shape of Hugging Face's tensor of one layer: axes that come in, or go out, are one."""
    groups = itertools.groupby(self.letters, key=lambda letter: letter in self.contracted)
    shape = tuple(math.prod(sizes[letter] for letter in group) for _, group in groups)
    return shape[::-1] if self.transposed else shape

  def tensor(self, layer: int | None) -> str:
    """The name of Hugging Face's tensor of a layer; None: it is of no layer."""
    return self.name if layer is None else f'h.{layer}.{self.name.removeprefix("h.")}'


def _norm(module: str) -> Iterator[Row]:
  for name in ('weight', 'bias'):
    yield Row(f'{module}.{name}', 'D', 'norm')


def _table(module: str, head: str = '') -> Iterator[Row]:
  yield Row(f'{module}.weight', 'VD', 'embedding', 'D', head=head)
  yield Row(f'{module}.scale', 'V', 'scale', head=head)


def _linear(module: str, ins: str, outs: str) -> Iterator[Row]:
  yield Row(f'{module}.weight', ins + outs, 'matrix', ins)
  yield Row(f'{module}.bias', outs, 'bias')
  yield Row(f'{module}.scale', outs, 'scale')
  yield Row(f'{module}.lora_A', ins + 'R', 'adapter', ins, transposed=True)
  yield Row(f'{module}.lora_B', 'R' + outs, 'adapter', 'R', transposed=True)


# In the order of Hugging Face's state dict.
TABLE = (
  *_table('wte'),
  Row('wpe.weight', 'TD', 'embedding', 'T'),
  *_norm('h.ln_1'),
  *_linear('h.attn.c_attn', 'D', 'CNH'),
  *_linear('h.attn.c_proj', 'NH', 'D'),
  *_norm('h.ln_2'),
  *_linear('h.mlp.c_fc', 'D', 'F'),
  *_linear('h.mlp.c_proj', 'F', 'D'),
  *_norm('ln_f'),
  *_table('lm_head', head='lm'),
  Row('score.weight', 'DK', 'matrix', 'D', transposed=True, head='sequence_classification'),
  Row('classifier.weight', 'DK', 'matrix', 'D', transposed=True, head='token_classification'),
  Row('classifier.bias', 'K', 'bias', head='token_classification'),
)
ROWS = {row.name: row for row in TABLE}

# Modules of a block that can have an adapter: 'attn.c_attn', …
ADAPTABLE = tuple(row.module.removeprefix('h.') for row in TABLE if row.name.endswith('.lora_A'))


def row_of(path: Iterable[Any]) -> Row:
  """The row of a parameter.

  Args:
    path: its keys in a nested dict of parameters, with or without the number of a layer.

  Raises:
    LookupError: it has none.
  """
  name = '.'.join(part for part in map(str, path) if not part.isdecimal())
  if name not in ROWS:
    raise LookupError(
      f'the parameter {name} has no row in the table of gpt2_jax/model/parameters.py, so that '
      'nothing is known of its layout, its weight decay or its name elsewhere: give it one.'
    )
  return ROWS[name]


def map_rows(f: Callable[[Row, Any], Any], params: Any) -> Any:
  """`f(row, leaf)` for each leaf of a nested dict that has the keys of parameters.

  Raises:
    LookupError: one has no row.
  """
  of = lambda path, leaf: f(row_of(key.key for key in path), leaf)
  return jax.tree_util.tree_map_with_path(of, params)

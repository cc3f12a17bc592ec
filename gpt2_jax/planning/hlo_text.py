"""Reads compiled programs from their text (`compiled.as_text()`): instructions, shapes, groups of
devices, trip counts.

The text is XLA's HLO as its compilers for CPU, CUDA and TPU print it after scheduling.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Sequence

import numpy as np

BYTES = {
  'pred': 1,
  's4': 0.5,
  'u4': 0.5,
  's8': 1,
  'u8': 1,
  's16': 2,
  'u16': 2,
  's32': 4,
  'u32': 4,
  's64': 8,
  'u64': 8,
  'f16': 2,
  'bf16': 2,
  'f32': 4,
  'f64': 8,
  'c64': 8,
  'c128': 16,
}
ARRAY = re.compile(r'\b([a-z]\w*)\[([\d,]*)\](\{[^{}]*\})?')
COMPUTATION = re.compile(r'^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$')
INSTRUCTION = re.compile(r'^\s+(ROOT )?%?([\w.\-]+) = ')


@dataclasses.dataclass(frozen=True)
class Array:
  """An array of a shape as the text has it."""

  dtype: str
  dims: tuple[int, ...]
  space: int  # memory space: 0 is the device's main memory; TPUs have others on the chip
  order: tuple[int, ...] = ()  # of the axes in memory, the last one of a row first
  tile: tuple[int, ...] = ()  # what its last axes in memory are rounded up to, the outer one first

  @property
  def bytes(self) -> int:
    """The size without padding; an unknown dtype (token, opaque) has none, float8 one byte each."""
    return self._bytes(self.dims)

  @property
  def padded(self) -> int:
    """The size in a TPU's memory, whose tiles are filled up: a head's width of 64 to 128."""
    dims = list(self.dims)
    for axis, size in zip(self.order, reversed(self.tile)):
      dims[axis] = -(-dims[axis] // size) * size
    return self._bytes(dims)

  def _bytes(self, dims: Sequence[int]) -> int:
    each = BYTES.get(self.dtype, 1 if self.dtype.startswith('f8') else 0)
    return math.ceil(each * math.prod(dims))


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One line of a computation."""

  name: str
  op: str
  arrays: tuple[Array, ...]  # its results: one, or those of a tuple
  operands: tuple[str, ...]  # names of instructions
  attributes: str  # the rest of the line
  root: bool

  @property
  def bytes(self) -> int:
    return sum(array.bytes for array in self.arrays)

  def attribute(self, name: str) -> str | None:
    """Returns the word after `name=`: a computation's name, or a number."""
    found = re.search(rf'\b{name}=%?([\w.\-]+)', self.attributes)
    return found[1] if found else None

  def callees(self) -> list[str]:
    """Returns the computations that it calls, or that are a conditional's branches."""
    found = re.search(r'branch_computations=\{([^}]*)\}', self.attributes)
    names = [name.strip().lstrip('%') for name in found[1].split(',')] if found else []
    keys = ('true_computation', 'false_computation', 'to_apply', 'calls')
    return names + [name for key in keys if (name := self.attribute(key))]


@dataclasses.dataclass(frozen=True)
class Module:
  """A program: computation -> its instructions by name, in order."""

  computations: dict[str, dict[str, Instruction]]
  entry: str

  def root(self, computation: str) -> Instruction:
    return next(i for i in self.computations[computation].values() if i.root)


def _closing(text: str, start: int) -> int:
  """Returns the index behind the parenthesis that closes the one at `start`."""
  depth = 0
  for at in range(start, len(text)):
    depth += (text[at] == '(') - (text[at] == ')')
    if depth == 0:
      return at + 1
  raise ValueError(f'no end of {text[start : start + 40]!r}')


def arrays_of(shape: str) -> tuple[Array, ...]:
  """Returns the arrays in the text of a shape, those of tuples in one row."""
  found = []
  for dtype, dims, layout in ARRAY.findall(shape):
    space, tile = re.search(r'S\((\d+)\)', layout), re.search(r':T\(([\d,]+)\)', layout)
    order = layout[1:].partition(':')[0].rstrip('}')
    ints = lambda text: tuple(int(n) for n in text.split(',') if n)
    place = int(space[1]) if space else 0
    found.append(Array(dtype, ints(dims), place, ints(order), ints(tile[1]) if tile else ()))
  return tuple(found)


def _instruction(line: str) -> Instruction | None:
  if not (head := INSTRUCTION.match(line)):
    return None
  rest = line[head.end() :]
  end = _closing(rest, 0) if rest.startswith('(') else rest.index(' ')
  shape, rest = rest[:end], rest[end:].lstrip()
  paren = rest.index('(')
  end = _closing(rest, paren)
  op, inside = rest[:paren], rest[paren + 1 : end - 1]
  named = () if op in ('constant', 'parameter') else tuple(re.findall(r'%([\w.\-]+)', inside))
  attributes = rest[end:]
  if op in ('constant', 'parameter'):
    attributes = f', value={inside}{attributes}'
  return Instruction(head[2], op, arrays_of(shape), named, attributes, bool(head[1]))


def parse(text: str) -> Module:
  """Returns a program from its text."""
  computations: dict[str, dict[str, Instruction]] = {}
  entry, current = '', None
  for line in text.splitlines():
    if found := COMPUTATION.match(line):
      current = computations[found[2]] = {}
      entry = found[2] if found[1] else entry
    elif current is not None and (instruction := _instruction(line)):
      current[instruction.name] = instruction
  return Module(computations, entry)


def trip_count(module: Module, loop: Instruction) -> int | None:
  """Returns how often a while loop runs; None where the text doesn't say.

  This is XLA's own count where it prints one, else the constant that the condition compares a counter
  with.
  """
  if found := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes):
    return int(found[1])
  condition = module.computations[loop.attribute('condition') or '']
  last = next(i for i in condition.values() if i.root)
  inside = last
  if last.op in ('fusion', 'call') and (name := (last.callees() or [''])[0]):
    inside = module.root(name)
  if inside.op != 'compare' or inside.attribute('direction') != 'LT':
    return None
  bounds = {
    int(value)
    for i in condition.values()
    if i.op == 'constant' and (value := i.attribute('value')) and value.isdigit()
  }
  return bounds.pop() if len(bounds) == 1 else None


def _iota(dims: str, permutation: str | None) -> np.ndarray:
  """Returns all device numbers in an array of some sizes, '2,4', with its axes permuted, '1,0'."""
  ints = lambda part: [int(n) for n in part.split(',')]
  ids = np.arange(math.prod(ints(dims))).reshape(ints(dims))
  return ids.transpose(ints(permutation)) if permutation else ids


def _mesh_groups(text: str) -> np.ndarray:
  """Groups of "mesh['a'=2,'b'=4] {'b'}": along axes of a mesh or parts of them ('b':(1)2).

  In front of the axes may stand the order of the devices, "device_ids=([2,4]T(1,0))" or a list.
  """
  found = re.match(r'mesh\[([^\]]*)\](.*?)\{(.*?)\}', text)
  assert found is not None, text
  sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", found[1])}
  ids = np.arange(math.prod(sizes.values()))
  if given := re.search(r'device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\)', found[2]):
    ids = _iota(given[1], given[2]).reshape(-1)
  elif given := re.search(r'device_ids=\(([\d,]+)\)', found[2]):
    ids = np.array([int(n) for n in given[1].split(',')])
  elif 'device_ids' in found[2]:
    raise ValueError(f'the order of the devices in {text}')
  parts: dict[str, list[tuple[int, int]]] = {}
  for name, before, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", found[3]):
    parts.setdefault(name, []).append((int(before or 1), int(size or sizes[name])))
  shape, chosen = [], []
  for name, size in sizes.items():  # an axis falls into what lies before, in and after a part
    done = 1
    for before, part in sorted(parts.get(name, [])):
      shape += [before // done, part]
      chosen.append(len(shape) - 1)
      done = before * part
    shape.append(size // done)
  others = [axis for axis in range(len(shape)) if axis not in chosen]
  ids = ids.reshape(shape).transpose(others + chosen)
  return ids.reshape(-1, math.prod(shape[axis] for axis in chosen))


@functools.lru_cache(4096)
def _groups(text: str, devices: int) -> tuple[tuple[int, ...], ...]:
  if text.startswith('mesh['):
    return tuple(map(tuple, _mesh_groups(text).tolist()))
  if found := re.match(r'\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?', text):
    shape = [int(n) for n in found[1].split(',')]
    return tuple(map(tuple, _iota(found[2], found[3]).reshape(shape).tolist()))
  found = re.findall(r'\{([\d,]+)\}', text)
  groups = tuple(tuple(int(n) for n in group.split(',')) for group in found)
  return groups or (tuple(range(devices)),)


def groups_of(instruction: Instruction, devices: int) -> tuple[tuple[int, ...], ...]:
  """Returns the device numbers that a collective joins; a collective-permute's (from, to) pairs.

  Args:
    instruction: the collective.
    devices: how many there are, for a collective that joins all.
  """
  number = r'(mesh\[.*?\].*?\{.*?\}|\[[\d,]+\]<=\[[\d,]+\](?:T\([\d,]+\))?|\{(?:\{[\d,]*\},?)*\})'
  found = re.search(rf'(?:replica_groups|source_target_pairs)={number}', instruction.attributes)
  return _groups(found[1] if found else '{}', devices)

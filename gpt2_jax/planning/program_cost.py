"""Counts what a compiled program does in one run, from its text: FLOPs, memory traffic, collectives.

XLA's own `cost_analysis()` counts the body of a loop once. Here a loop's body counts as often as it
runs, where the text says how often, else once.
"""

import dataclasses
import json
import re
from collections.abc import Sequence

import numpy as np

from gpt2_jax.core.bounds import shortened
from gpt2_jax.planning.hlo_text import Array, Instruction, Module, groups_of, parse, trip_count

COLLECTIVES = ('all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all', 'collective-permute')
# Attention kernels, by the beginning of their name or target: how many products of T x S they make.
ATTENTION = {
  'splash_mha_fwd': 2,
  'splash_mha_dq': 3,
  'splash_mha_dkv': 4,
  '__cudnn$fmha': 2,
  '__cudnn$fmhaSoftmaxBackward': 5,
}
MEGASCALE = re.compile(r'_xla_megascale_transfer_type="(\w+)"')
NO_TRAFFIC = {
  'parameter',
  'constant',
  'tuple',
  'get-tuple-element',
  'bitcast',
  'after-all',
  'while',
  'conditional',
  'call',
  'async-start',
  'async-update',
  'async-done',
  'partition-id',
  'replica-id',
  'opt-barrier',
  'copy-done',
  'slice-done',
  'domain',
  'iota',
}


@dataclasses.dataclass
class Traffic:
  """Collectives of one kind."""

  count: int = 0
  bytes: float = 0  # of the whole arrays that a device takes part in: what it gathers, reduces, …
  ici: float = 0  # that a device sends inside its slice or host
  dcn: float = 0  # and to others


@dataclasses.dataclass
class Cost:
  """What one device does in one run of the program."""

  flops: float = 0  # of matrix products, those in attention kernels too
  hbm_bytes: float = 0  # read and written in main memory by fusions and other instructions
  cycles: float = 0  # the TPU compiler's own estimates summed: without collectives and kernels
  kernels: dict[str, int] = dataclasses.field(default_factory=dict)  # custom calls, by target
  collectives: dict[str, Traffic] = dataclasses.field(default_factory=dict)
  endless: int = 0  # loops of which the text doesn't say how often they run


def sent(
  kind: str, operand: float, groups: Sequence[Sequence[int]], slices: Sequence[int]
) -> tuple[float, float]:
  """Returns the bytes that a device sends: inside of its slice, and to others.

  In a group of n = k·m devices, m on each of k slices, an operand of b bytes goes along rings, inside
  of the slices and between them. An all-gather sends (n - 1)·b in all, (k - 1)·b of it to other
  slices; a reduce-scatter (n - 1)/n·b, (k - 1)/n·b of it to other slices; an all-reduce twice that.
  """
  if kind == 'collective-permute':
    return (0, operand) if any(slices[a] != slices[b] for a, b in groups) else (operand, 0)
  group = groups[0]
  n, k = len(group), len({slices[device] for device in group})
  if kind == 'all-gather':
    return operand * (n - k), operand * (k - 1)
  if kind == 'all-to-all':
    return operand * (n / k - 1) / n, operand * (n - n / k) / n
  times = 2 if kind == 'all-reduce' else 1
  return times * operand * (1 - k / n), times * operand * (k - 1) / n


def _product_flops(i: Instruction, operands: list[tuple[Array, ...]]) -> float:
  """Returns the FLOPs of a dot, or of the convolution that the TPU compiler makes of one."""
  out = i.arrays[0].dims
  if i.op == 'dot':
    left = operands[0][0].dims
    axes = re.search(r'lhs_contracting_dims=\{([\d,]*)\}', i.attributes)
    summed = [left[int(n)] for n in axes[1].split(',') if n] if axes else []
    return 2 * float(np.prod(out, dtype=float)) * float(np.prod(summed, dtype=float))
  labels = re.search(r'dim_labels=(\w+)_(\w+)->(\w+)', i.attributes)
  assert labels is not None
  (left, right), (a, w, y) = (o[0].dims for o in operands[:2]), labels.groups()
  groups = int(i.attribute('feature_group_count') or 1)
  total = 2.0 * out[y.index('b')] * out[y.index('f')] * left[a.index('f')] / groups
  total /= int(i.attribute('batch_group_count') or 1)
  window = dict(
    re.findall(r'(\w+)=([\dx_\-]+)', (re.search(r'window=\{([^}]*)\}', i.attributes) or ['', ''])[1])
  )
  axes = [label for label in w if label.isdigit()]
  setting = lambda name, at: int(window[name].split('x')[at]) if name in window else 1
  for label in axes:
    n, size, outs = int(label), left[a.index(label)], out[y.index(label)]
    low = int(window['pad'].split('x')[n].split('_')[0]) if 'pad' in window else 0
    dilated = setting('lhs_dilate', n)
    at = (
      np.arange(outs)[:, None] * setting('stride', n)
      - low
      + np.arange(right[w.index(label)]) * setting('rhs_dilate', n)
    )
    total *= int(((at >= 0) & (at <= (size - 1) * dilated) & (at % dilated == 0)).sum())
  return total


def _library_flops(i: Instruction, target: str, operands: list[tuple[Array, ...]]) -> float:
  """Returns the FLOPs of a cuBLAS call or an attention kernel (the causal half too), 0 for others."""
  names = [name for name in ATTENTION if i.name.startswith(name) or target.startswith(name)]
  heads = [arrays[0].dims for arrays in operands if len(arrays[0].dims) == 4]
  if names and len(heads) > 1:  # q and k, each with batch, heads and positions, or positions first
    products = ATTENTION[max(names, key=len)]
    return products * 2 * float(np.prod(heads[0], dtype=float)) * max(heads[1][1:3])
  found = re.search(r'"lhs_contracting_dimensions":(\[[^\]]*\])', i.attributes)
  if not found or not ('gemm' in target or 'matmul' in target):
    return 0
  summed = np.prod([operands[0][0].dims[int(n)] for n in json.loads(found[1])])
  return 2 * float(np.prod(i.arrays[0].dims, dtype=float)) * float(summed)


def _main(arrays: Sequence[Array]) -> float:
  return sum(array.bytes for array in arrays if array.space == 0)


class UnknownProgram(Exception):
  """A program's text has a form that this module does not know: that of another compiler, perhaps."""


class _Count:
  """Walks through a program and adds up its cost."""

  def __init__(self, module: Module, slices: Sequence[int]):
    self.module, self.slices, self.cost = module, slices, Cost()

  def computation(
    self, name: str, times: float, *, fused: str | None = None, seen: set | None = None
  ) -> None:
    """Adds a computation that runs so many times; `fused` names the fusion that it is the body of.

    A TPU splits a collective into steps, one in each of several fusions: `seen` has the collectives
    that were counted already in this run of a loop's body.
    """
    body, seen = self.module.computations[name], set() if seen is None else seen
    for i in body.values():
      operands = [body[o].arrays for o in i.operands if o in body]
      if found := re.search(r'"estimated_cycles":"(\d+)"', i.attributes):
        self.cost.cycles += times * int(found[1])
      if i.op in ('dot', 'convolution'):
        self.cost.flops += times * _product_flops(i, operands)
      kind = i.op.removesuffix('-start')
      if kind in COLLECTIVES:
        self._collective(i, kind, operands, times, fused, seen)
      if i.op == 'send' and (found := MEGASCALE.search(i.attributes)):
        self._between_slices(found[1].lower().replace('_', '-'), operands, times)
      if i.op == 'custom-call':
        target = i.attributes.split('custom_call_target="')[-1].split('"')[0]
        self.cost.flops += times * _library_flops(i, target, operands)
        self.cost.kernels[target] = self.cost.kernels.get(target, 0) + int(times)
      if fused is None and i.op not in NO_TRAFFIC:
        self.cost.hbm_bytes += times * self._traffic(i, operands)
      if i.op == 'while':
        trips = trip_count(self.module, i)
        self.cost.endless += trips is None
        self.computation(i.attribute('body') or '', times * (1 if trips is None else trips))
      elif i.op == 'fusion':
        for callee in i.callees():
          self.computation(callee, times, fused=f'{i.name} {callee}', seen=seen)
      elif i.op in ('call', 'conditional', 'async-start'):
        for callee in i.callees():
          self.computation(callee, times, fused=fused, seen=seen)

  def _between_slices(self, kind: str, operands, times) -> None:
    """A TPU's collective between slices is a send to the host, whose runtime does the rest."""
    k, operand = len(set(self.slices)), sum(map(_main, operands))
    _, dcn = sent(kind, operand, (tuple(range(k)),), tuple(range(k)))
    self._add(kind, times, operand * (k if kind == 'all-gather' else 1), 0, dcn)

  def _add(self, kind: str, times, bytes_: float, ici: float, dcn: float) -> None:
    traffic = self.cost.collectives.setdefault(kind, Traffic())
    traffic.count += int(times)
    traffic.bytes += times * bytes_
    traffic.ici += times * ici
    traffic.dcn += times * dcn

  def _collective(self, i, kind, operands, times, fused, seen) -> None:
    channel = i.attribute('channel_id')
    if fused and channel:
      if (kind, channel) in seen:
        return
      seen.add((kind, channel))
    if kind == 'all-reduce' and fused and 'all-reduce-scatter' in fused:
      kind = 'reduce-scatter'
    operand = sum(array.bytes for arrays in operands for array in arrays)
    groups = groups_of(i, len(self.slices))
    if kind != 'collective-permute' and len(groups[0]) < 2:
      return
    ici, dcn = sent(kind, operand, groups, self.slices)
    self._add(kind, times, operand * (len(groups[0]) if kind == 'all-gather' else 1), ici, dcn)

  def _traffic(self, i: Instruction, operands: list[tuple[Array, ...]]) -> float:
    """Returns the bytes of main memory that an instruction reads and writes, or of its slice."""
    if i.op in ('dynamic-slice', 'slice', 'gather'):
      return 2 * _main(i.arrays)
    if i.op == 'dynamic-update-slice':
      return 2 * _main(operands[1])
    if i.op in ('copy-start', 'slice-start'):  # to another memory space; the tuple has both ends
      source, target = i.arrays[:2]
      return target.bytes * ((source.space == 0) + (target.space == 0))
    if i.op == 'custom-call' and not operands:  # a buffer
      return 0
    if i.op != 'fusion':
      return _main(i.arrays) + sum(map(_main, operands))
    return self._fusion_traffic(i, operands)

  def _fusion_traffic(self, i: Instruction, operands: list[tuple[Array, ...]]) -> float:
    body = self.module.computations[i.callees()[0]]
    root = next(inner for inner in body.values() if inner.root)
    ends = [body[name] for name in root.operands] if root.op == 'tuple' else [root]
    total = 0.0
    for end, array in zip(ends, i.arrays):
      while end.op == 'bitcast' and end.operands[0] in body:
        end = body[end.operands[0]]
      if array.space or end.op == 'parameter':  # on the chip, or passed through
        continue
      updates = end.op == 'dynamic-update-slice'
      total += body[end.operands[1]].bytes if updates else array.bytes
    for number, arrays in enumerate(operands):
      if whole := _main(arrays):
        total += min(whole, self._read(i.callees()[0], number))
    return total

  def _read(self, fusion: str, number: int) -> float:
    """Returns the bytes that a fusion reads of an input: all, or those of its slices."""
    body = self.module.computations[fusion]
    source = next(
      (
        inner
        for inner in body.values()
        if inner.op == 'parameter' and inner.attribute('value') == str(number)
      ),
      None,
    )
    return 0 if source is None else self._taken(body, source)

  def _taken(self, body: dict[str, Instruction], source: Instruction) -> float:
    total = 0.0
    for user in body.values():
      if source.name not in user.operands:
        continue
      first = user.operands[0] == source.name
      if user.op in ('dynamic-slice', 'slice', 'gather') and first:
        total += user.bytes
      elif user.op == 'bitcast':
        total += self._taken(body, user)
      elif user.op == 'fusion':
        total += self._read(user.callees()[0], user.operands.index(source.name))
      elif user.op != 'tuple' and not (user.op == 'dynamic-update-slice' and first):
        return source.bytes
    return total


def count(text: str, slices: Sequence[int], *, one_turn: bool = False) -> Cost:
  """Returns the cost of a compiled program.

  Args:
    text: the program, `compiled.as_text()`.
    slices: the slice (TPU) or host (GPU) of each device, in the order of the mesh.
    one_turn: whether to count one turn of its endless loop alone, where it has one.

  Raises:
    UnknownProgram: the text can't be read.
  """
  try:
    return _count(parse(text), slices, one_turn)
  except Exception as e:  # of any kind, in a text that no line here was written for
    raise UnknownProgram(
      "this compiler's program can't be read, so that its time is not known "
      f'({type(e).__name__}: {shortened(str(e), 200)}). --dump DIR keeps the text.'
    ) from e


def _count(module: Module, slices: Sequence[int], one_turn: bool) -> Cost:
  counting = _Count(module, slices)
  start = counting.module.entry
  if one_turn:
    loops = [
      i
      for i in counting.module.computations[start].values()
      if i.op == 'while' and trip_count(counting.module, i) is None
    ]
    start = (loops[0].attribute('body') or start) if loops else start
  counting.computation(start, 1)
  return counting.cost

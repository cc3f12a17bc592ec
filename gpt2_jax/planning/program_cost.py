"""Counts what a compiled program does in one run, from its text: FLOPs, memory traffic, collectives.

XLA's own `cost_analysis()` counts the body of a loop once. Here a loop's body counts as often as it
runs, where the text says how often, else once.
"""

import dataclasses
import itertools
import re
from collections.abc import Sequence

from gpt2_jax.core.bounds import shortened
from gpt2_jax.planning import op_flops
from gpt2_jax.planning.hlo_text import Instruction, Module, groups_of, parse, trip_count
from gpt2_jax.planning.memory_traffic import MemoryTraffic
from gpt2_jax.planning.places import COLLECTIVES, place_of

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
  exposed: float = 0  # of ici, by what no product is beside


@dataclasses.dataclass
class Use:
  """What some instructions use."""

  flops: float = 0  # of matrix products, those in attention kernels too
  hbm_bytes: float = 0  # read and written in main memory by fusions and other instructions
  padded_bytes: float = 0  # the same, with what tiles are filled up with
  cycles: float = 0  # the TPU compiler's own estimates summed: without collectives and kernels
  launches: float = 0  # instructions that use main memory: on a GPU each is a kernel


@dataclasses.dataclass
class Cost(Use):
  """What one device does in one run of the program."""

  kernel_flops: float = 0  # part of flops: of attention kernels
  places: dict[str, Use] = dataclasses.field(default_factory=dict)  # by `places.place_of`
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


class UnknownProgram(Exception):
  """A program's text has a form that this module does not know: that of another compiler, perhaps."""


class _Count:
  """Walks through a program and adds up its cost."""

  def __init__(self, module: Module, slices: Sequence[int]):
    self.module, self.slices, self.cost = module, slices, Cost()
    self.traffic = MemoryTraffic(module, padded=False)
    self.padded_traffic = MemoryTraffic(module, padded=True)
    self.place = ''  # of the instruction that is looked at, with all that is fused into it

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
      if fused is None:
        self.place = place_of(i, self.module)
      if found := re.search(r'"estimated_cycles":"(\d+)"', i.attributes):
        self._spend(cycles=times * int(found[1]))
      if i.op in ('dot', 'convolution'):
        self._spend(flops=times * op_flops.of_product(i, operands))
      kind = i.op.removesuffix('-start')
      if kind in COLLECTIVES:
        hidden = self._hidden(body, i, fused)
        self._collective(i, kind, operands, times, fused, seen, hidden)
      if i.op == 'send' and (found := MEGASCALE.search(i.attributes)):
        self._between_slices(found[1].lower().replace('_', '-'), operands, times)
      if i.op == 'custom-call':
        target = i.attributes.split('custom_call_target="')[-1].split('"')[0]
        flops = times * op_flops.of_library(i, target, operands)
        self._spend(flops=flops)
        self.cost.kernel_flops += flops
        self.cost.kernels[target] = self.cost.kernels.get(target, 0) + int(times)
      if fused is None and i.op not in NO_TRAFFIC:
        self._spend(
          hbm_bytes=times * self.traffic.of(i, operands),
          padded_bytes=times * self.padded_traffic.of(i, operands),
          launches=int(times),
        )
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

  def _spend(self, **used: float) -> None:
    for use in (self.cost, self.cost.places.setdefault(self.place, Use())):
      for name, amount in used.items():
        setattr(use, name, getattr(use, name) + amount)

  def _between_slices(self, kind: str, operands, times) -> None:
    """A TPU's collective between slices is a send to the host, whose runtime does the rest."""
    k, operand = (
      len(set(self.slices)),
      sum(a.bytes for arrays in operands for a in arrays if not a.space),
    )
    _, dcn = sent(kind, operand, (tuple(range(k)),), tuple(range(k)))
    self._add(kind, times, operand * (k if kind == 'all-gather' else 1), 0, dcn)

  def _hidden(self, body: dict[str, Instruction], i: Instruction, fused: str | None) -> bool:
    """Whether a product is made while a collective is on its way: between its start and its end, or
    on a TPU in the fusion that it is a step of.
    """
    if fused is not None:
      return 'all-reduce-scatter' not in fused
    if not i.op.endswith('-start'):
      return False
    names = list(body)
    since = names[names.index(i.name) + 1 :]
    end = next((n for n, name in enumerate(since) if i.name in body[name].operands), 0)
    return any(self._multiplies(body[name]) for name in since[:end])

  def _multiplies(self, i: Instruction) -> bool:
    if i.op == 'fusion':
      inside = (self.module.computations[name].values() for name in i.callees())
      return any(map(self._multiplies, itertools.chain(*inside)))
    return i.op in ('dot', 'convolution', 'custom-call')

  def _add(self, kind: str, times, bytes_: float, ici: float, dcn: float, hidden=True) -> None:
    traffic = self.cost.collectives.setdefault(kind, Traffic())
    traffic.count += int(times)
    traffic.bytes += times * bytes_
    traffic.ici += times * ici
    traffic.dcn += times * dcn
    traffic.exposed += 0 if hidden else times * ici

  def _collective(self, i, kind, operands, times, fused, seen, hidden) -> None:
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
    whole = operand * (len(groups[0]) if kind == 'all-gather' else 1)
    self._add(kind, times, whole, ici, dcn, hidden)


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

"""How much main memory an instruction of a compiled program reads and writes."""

from collections.abc import Sequence

from gpt2_jax.planning.hlo_text import Array, Instruction, Module


class MemoryTraffic:
  """The bytes of main memory that instructions of a program read and write."""

  def __init__(self, module: Module, *, padded: bool):
    """`padded`: as a TPU's memory holds arrays, with tiles filled up."""
    self.module, self.padded = module, padded

  def _size(self, array: Array) -> int:
    return array.padded if self.padded else array.bytes

  def _whole(self, arrays: Sequence[Array]) -> int:
    return sum(map(self._size, arrays))

  def _main(self, arrays: Sequence[Array]) -> int:
    return sum(self._size(array) for array in arrays if array.space == 0)

  def of(self, i: Instruction, operands: list[tuple[Array, ...]]) -> float:
    """Returns the bytes of main memory that an instruction reads and writes, or of its slice."""
    if i.op in ('dynamic-slice', 'slice', 'gather'):
      return 2 * self._main(i.arrays)
    if i.op == 'dynamic-update-slice':
      return 2 * self._main(operands[1])
    if i.op in ('copy-start', 'slice-start'):  # to another memory space; the tuple has both ends
      source, target = i.arrays[:2]
      return self._size(target) * ((source.space == 0) + (target.space == 0))
    if i.op == 'custom-call' and not operands:  # a buffer
      return 0
    if i.op != 'fusion':
      return self._main(i.arrays) + sum(map(self._main, operands))
    return self._fusion(i, operands)

  def _fusion(self, i: Instruction, operands: list[tuple[Array, ...]]) -> float:
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
      total += self._whole(body[end.operands[1]].arrays) if updates else self._size(array)
    for number, arrays in enumerate(operands):
      if whole := self._main(arrays):
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
        total += self._whole(user.arrays)
      elif user.op == 'bitcast':
        total += self._taken(body, user)
      elif user.op == 'fusion':
        total += self._read(user.callees()[0], user.operands.index(source.name))
      elif user.op != 'tuple' and not (user.op == 'dynamic-update-slice' and first):
        return self._whole(source.arrays)
    return total

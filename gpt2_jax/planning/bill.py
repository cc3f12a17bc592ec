"""What a training step spends in main memory, place by place, beside what it could not do without."""

from typing import Any

from gpt2_jax.model.config import GPTConfig
from gpt2_jax.model.sizes import num_params
from gpt2_jax.planning.program_cost import Use

GB = 1e9


def ideal(c: GPTConfig, mesh: Any, tokens: int, micro_batches: int) -> dict[str, float]:
  """The bytes that a device must read and write in a step, by place; what is not named needs none.

  A product reads its operands and writes its result, once in the forward and once in each product of
  the backward pass; biases, activation functions, residual adds and changes of layout go with them.
  Attention's kernels read queries, keys and values and write the output, and back. A layer norm with
  its residual add reads and writes two arrays each way. Logits stay on the chip. The optimizer reads
  gradient, parameter and two moments and writes the latter three, and the norm that clips reads the
  gradient once more.

  Args:
    c: the model.
    mesh: the devices, `mesh.shape` by axis.
    tokens: of a device, in a step.
    micro_batches: that it comes in.
  """
  b, split = 2 if c.dtype == 'bfloat16' else 4, mesh.shape['tensor']
  D, N, F, V = c.n_embd, c.n_embd // split, c.F // split, c.padded_vocab_size // split
  state = 4 * num_params(c) / split / mesh.shape['fsdp']
  of_weights = (2 * b + 4) * micro_batches  # of a number: read in both passes, its gradient written
  layer = {
    # x, q·k·v, attention's output, its projection; back dy and operands for both products each
    'attention products': b * tokens * (8 * D + 10 * N) + of_weights * 4 * D * N,
    'attention kernels': b * tokens * 12 * N,
    'MLP products': b * tokens * (6 * D + 6 * F) + of_weights * 2 * D * F,
    'layer norms': b * tokens * 16 * D,
  }
  return {place: c.n_layer * bytes_ for place, bytes_ in layer.items()} | {
    'loss': b * tokens * 3 * D + of_weights * D * V,
    'embeddings': b * tokens * 2 * D,
    'weight casts': state * (1 + b / 4) * micro_batches,
    'optimizer': 8 * state,
    'collectives': 2 * state * (mesh.size > split),
  }


def table(places: dict[str, Use], needed: dict[str, float]) -> str:
  """The bill as lines for a reader, the largest first."""
  names = sorted({*places, *needed}, key=lambda name: -places.get(name, Use()).padded_bytes)
  lines = ['bill         GB (padded)   ideal      x kernels  TFLOP  Mcycles  place']

  def line(name: str, use: Use, ideal_bytes: float) -> str:
    ratio = f'{use.padded_bytes / ideal_bytes:6.2f}' if ideal_bytes else '     –'
    return (
      f'{use.hbm_bytes / GB:15.2f} {use.padded_bytes / GB:8.2f} {ideal_bytes / GB:7.2f} {ratio} '
      f'{use.launches:7,.0f} {use.flops / 1e12:6.2f} {use.cycles / 1e6:8.2f}  {name}'
    )

  whole = Use()
  for name in names:
    use = places.get(name, Use())
    lines.append(line(name, use, needed.get(name, 0)))
    for field, amount in vars(use).items():
      setattr(whole, field, getattr(whole, field) + amount)
  return '\n'.join([*lines, line('in all', whole, sum(needed.values()))])

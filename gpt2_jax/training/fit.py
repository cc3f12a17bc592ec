"""What fits on a device: estimates of a step's memory, and the mesh and micro-batches that follow."""

import contextlib
import math
import os
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from gpt2_jax import kernels, sharding
from gpt2_jax.config import Config, GPTConfig
from gpt2_jax.counts import num_params, num_trained
from gpt2_jax.errors import UserError
from gpt2_jax.hardware import chip_of
from gpt2_jax.loss import num_chunks

Parts = dict[str, float]  # bytes a device by what they are for


def memory_limit(device: Any) -> int:
  """Bytes that a run may plan with on a device; of a CPU, its share of half the machine's RAM."""
  if device.platform == 'cpu':
    ram = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
    return ram // 2 // jax.local_device_count()
  with contextlib.suppress(jax.errors.JaxRuntimeError):  # a device that is only described has none
    if (stats := device.memory_stats()) and 'bytes_limit' in stats:
      return int(0.9 * stats['bytes_limit'])
  if (chip := chip_of(device.device_kind)) is None:
    raise UserError(f'how much memory has a {device.device_kind}? Say train.micro_batch_rows.')
  return int(0.9 * chip.hbm)


def estimate_bytes(c: GPTConfig, mesh: Mesh, T: int, rows: int, ema: bool) -> int:
  """About the bytes a device needs for a step with micro-batches of `rows` rows over all devices."""
  return int(sum(estimate_parts(c, mesh, T, rows, ema).values()))


def estimate_parts(c: GPTConfig, mesh: Mesh, T: int, rows: int, ema: bool) -> Parts:
  """The bytes of `estimate_bytes` by what they are for.

  State: float32 parameters, gradients, their accumulator and AdamW's two moments. Activations: what
  the remat policy keeps of each layer, the temporaries of one layer. Logits: those of a chunk of
  tokens (`loss.py`) and their gradient, the table gathered, its gradient, that of the hidden states.
  """
  tensor, split = mesh.shape['tensor'], mesh.shape['fsdp'] * mesh.shape['tensor']
  b, D, F = jnp.dtype(c.dtype).itemsize, c.n_embd, c.F // tensor
  state = 4 * ((2 if ema else 1) * num_params(c) + 4 * num_trained(c)) / split
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    attends = kernels.choose(c, T, drops=True)[0]
    V, tokens = c.padded_vocab_size // tensor, rows * T // (mesh.size // tensor)  # of a device
    chunk = -(-tokens // num_chunks(tokens, V))
  # pairs of a query and a key, a token: those kept for the backward pass, and those there at a time
  pairs = (c.n_head // tensor) * T
  kept_pairs, most = {'xla': (pairs, pairs), 'blocks': (0, pairs * kernels.block_size(T) // T)}.get(
    attends, (0, 0)
  )
  whole = b * (8 * D + 3 * F) + 8 * D + most * (4 + 2 * b)
  products = b * (6 * D + F)
  kept = {'none': products + 4 * kept_pairs, 'dots': products, 'full': b * D}[c.remat]
  logits = (4 + b) * V * (chunk + D) + tokens * b * D
  return {
    'state': state,
    'activations': tokens * (c.n_layer * kept + 2 * whole),
    'logits': logits if c.head == 'lm' else 0,
  }


def choose_mesh(asked: Config, model: GPTConfig, devices: list) -> Mesh:
  """The mesh that `config.mesh` asks for. Where it leaves both `data` and `fsdp` open, parameters are
  split no further than to fit: over as few devices as keep the state in a quarter of a device's
  memory, since a split costs a gather in each layer; `data` takes the rest.
  """
  sizes = dict(asked)
  rest, over = len(devices) // max(1, sizes['tensor'] * sizes['seq']), sizes['slices_over']
  if sizes['data'] is None and sizes['fsdp'] == -1:
    slices = sharding.num_slices(devices)
    crossing = lambda f: {'data': rest // f, 'fsdp': f}.get(over, slices)
    fits = [
      f
      for f in range(1, rest + 1)
      if rest % f == 0 and model.n_embd % f == 0 and crossing(f) % slices == 0
    ]
    enough = [
      f
      for f in fits
      if 16 * num_params(model) / (f * max(1, sizes['tensor'])) <= memory_limit(devices[0]) / 4
    ]
    sizes['fsdp'] = (enough[:1] or fits[-1:] or [-1])[0]
  if sizes['data'] is None:
    sizes['data'] = 1 if sizes['fsdp'] == -1 else -1
  return sharding.make_mesh(**sizes, devices=devices)


def divisors(n: int) -> list[int]:
  """The divisors of a positive number, in order."""
  small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
  return sorted({*small, *(n // d for d in small)})


def micro_batches(config: Config, model: GPTConfig, mesh: Mesh, T: int, G: int) -> int:
  """The number A of micro-batches: as asked, or the fewest whose estimate fits the device."""
  split = mesh.shape['data'] * mesh.shape['fsdp']
  if G % split:
    raise UserError(
      f'a batch of {G} rows (train.global_batch_tokens = {config.train.global_batch_tokens} / '
      f"{T}) can't be split over mesh.data·mesh.fsdp = {split}: make the rows a multiple of "
      f'{split}, or the mesh smaller (divisors of {G}).'
    )
  fits = [A for A in divisors(G) if (G // A) % split == 0]
  asked = config.train.micro_batch_rows
  if asked is not None:
    if asked < 1 or G % (asked * split):
      rows = sorted(G // A // split for A in fits)
      raise UserError(
        f"train.micro_batch_rows = {asked} rows a device don't divide the batch of "
        f'{G} rows on {split} parts; it may be one of {rows}.'
      )
    return G // (asked * split)
  limit = memory_limit(sharding.own_device(mesh))
  ema = config.optim.ema_decay > 0
  return next((A for A in fits if estimate_bytes(model, mesh, T, G // A, ema) <= limit), fits[-1])

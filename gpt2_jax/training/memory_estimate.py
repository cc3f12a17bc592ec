"""Estimates of a step's memory on a device, and the mesh and micro-batches that fit it."""

import contextlib
import dataclasses
import math
import os
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from gpt2_jax.core.chips import COMPUTE, LINKS, chip_of
from gpt2_jax.core.errors import UserError
from gpt2_jax.model import attention_kernels
from gpt2_jax.model.config import Config, GPTConfig
from gpt2_jax.model.cross_entropy import num_chunks
from gpt2_jax.model.remat import REMAT_POLICIES
from gpt2_jax.model.sizes import flops_per_token, num_params, num_trained
from gpt2_jax.parallel import sharding
from gpt2_jax.training.optimizer import averages, moments

Parts = dict[str, float]  # bytes a device, by their use
LANES = 128  # a TPU's memory holds rows of a multiple of so many numbers


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


def estimate_bytes(c: GPTConfig, mesh: Mesh, T: int, rows: int, optim: Config) -> int:
  """About the bytes a device needs for a step with micro-batches of `rows` rows over all devices."""
  return int(sum(estimate_parts(c, mesh, T, rows, optim).values()))


def estimate_parts(c: GPTConfig, mesh: Mesh, T: int, rows: int, optim: Config) -> Parts:
  """The bytes of `estimate_bytes`, by their use; `optim` is that section of the run's config.

  State: float32 parameters, their average, gradients, accumulated gradients, the optimizer's moments.
  Activations: the values of each layer that the remat policy keeps, and the temporaries of one layer.
  Logits: of a chunk of tokens (`cross_entropy.py`), the table, the hidden states, their gradients.
  """
  tensor, split = mesh.shape['tensor'], mesh.shape['fsdp'] * mesh.shape['tensor']
  b, D, F = jnp.dtype(c.dtype).itemsize, c.n_embd, c.F // tensor
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    attention = attention_kernels.choose(c, T, drops=True)[0]
    V, tokens = c.padded_vocab_size // tensor, rows * T // (mesh.size // tensor)  # of a device
    chunk = -(-tokens // num_chunks(tokens, V))

  held = (2 if averages(optim) else 1) * num_params(c)
  updated = (2 + moments(optim, c)) * num_trained(c)  # gradients twice

  # bytes a token and layer; pairs are of a query and a key
  pairs = c.n_head // tensor * T
  pairs_kept = pairs if attention == 'xla' else 0
  pairs_at_once = {'xla': pairs, 'blocks': pairs * attention_kernels.block_size(T) // T}.get(
    attention, 0
  )
  products = b * (3 * D + D + D + D + F)  # q, k and v, attention, its projection, the MLP's, its c_fc
  # what fills up the rows of q, k and v in a TPU's memory
  lanes = -c.H % LANES / c.H * b * 3 * D if attention == 'splash' else 0
  kept = {'none': products + lanes + 4 * pairs_kept, 'dots': products, 'full': b * D}[c.remat]
  values = b * (8 * D + 3 * F)  # of a block, with their gradients
  norm = 4 * 2 * D  # a layer norm's, in float32
  scores = (4 + 2 * b) * pairs_at_once  # in float32, their exp and gradients in the dtype
  temporary = 2 * (values + norm + scores)

  chunk_logits = (4 + b) * chunk * V  # float32, their gradient in the dtype
  table = (b + 4) * V * D  # gathered in the dtype, its gradient float32
  hidden_gradient = b * tokens * D
  return {
    'state': 4 * (held + updated) / split,
    'activations': tokens * (c.n_layer * kept + temporary),
    'logits': chunk_logits + table + hidden_gradient if c.head == 'lm' else 0,
  }


def choose_mesh(config: Config, model: GPTConfig, devices: list) -> Mesh:
  """The mesh that `config.mesh` asks for. Where it leaves both `data` and `fsdp` open, parameters are
  split no further than to fit: over as few devices as keep the state in a quarter of a device's
  memory, since a split costs a gather in each layer; `data` takes the rest.
  """
  sizes = dict(config.mesh)
  if sizes['data'] is None and sizes['fsdp'] == -1:
    tensor, slices = max(1, sizes['tensor']), sharding.num_slices(devices)
    rest = len(devices) // max(1, sizes['tensor'] * sizes['seq'])

    def fills_slices(f):  # the size of the axis that crosses slices, a multiple of their number
      return {'data': rest // f, 'fsdp': f}.get(sizes['slices_over'], slices) % slices == 0

    # float32 parameters, gradients and moments
    state = 4 * (2 + moments(config.optim, model)) * num_params(model)
    possible = [f for f in divisors(rest) if model.n_embd % f == 0 and fills_slices(f)]
    for f in possible:
      sizes['fsdp'] = f  # the last one, where none is enough
      if state / (f * tensor) <= memory_limit(devices[0]) / 4:
        break
  if sizes['data'] is None:
    sizes['data'] = 1 if sizes['fsdp'] == -1 else -1
  return sharding.make_mesh(**sizes, devices=devices)


def divisors(n: int) -> list[int]:
  """The divisors of a positive number, in order."""
  small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
  return sorted({*small, *(n // d for d in small)})


# What makes a way to run a step slower, as shares of its time.
RECOMPUTED = {'none': 0.0, 'dots': 0.1, 'full': 0.33}  # of the FLOPs, by remat policy
FEW_ROWS = 0.02  # each halving of the micro-batch, by hand


def slowness(c: GPTConfig, mesh: Mesh, T: int, rows: int) -> float:
  """How much slower a step is with `c.remat` and micro-batches of so many rows a device, and gathers
  of all weights in each: as if nothing hid them.
  """
  chip, fsdp, gather = chip_of(mesh.devices.flat[0].device_kind), mesh.shape['fsdp'], 0.0
  if chip is not None and fsdp > 1:
    # in the activations' dtype for each of two passes, and the sum of float32 gradients
    sent = (2 * jnp.dtype(c.dtype).itemsize + 4) * num_params(c) / mesh.shape['tensor']
    sent *= (fsdp - 1) / fsdp
    compute = flops_per_token(c, T) * T * rows / mesh.shape['tensor'] / (COMPUTE * chip.flops)
    gather = sent / (LINKS * chip.ici) / compute
  return RECOMPUTED[c.remat] + gather - FEW_ROWS * math.log2(rows)


def fitted(config: Config, model: GPTConfig, mesh: Mesh, T: int, G: int) -> tuple[GPTConfig, int]:
  """The model with a remat policy, and the number A of micro-batches: as asked for, or those that are
  fastest (`slowness`) of the ones whose estimate fits the device, or the smallest.
  """
  possible, limit = _micro_batches(config, mesh, T, G), memory_limit(sharding.own_device(mesh))
  policies = REMAT_POLICIES if config.model.remat == 'auto' else [config.model.remat]
  ways = [(dataclasses.replace(model, remat=remat), A) for remat in policies for A in possible]

  def need(way: tuple[GPTConfig, int]) -> float:
    parts = estimate_parts(way[0], mesh, T, G // way[1], config.optim)
    # and a copy of the state, of a step that is made twice
    return sum(parts.values()) + (parts['state'] if config.train.verify_every else 0)

  fits = [way for way in ways if need(way) <= limit] or ways[-1:]
  rows = G // mesh.shape['data'] // mesh.shape['fsdp']  # of a device
  return min(fits, key=lambda way: slowness(way[0], mesh, T, rows // way[1]))


def _micro_batches(config: Config, mesh: Mesh, T: int, G: int) -> list[int]:
  """The numbers of micro-batches that a batch of G rows may come in; one, where it is asked for."""
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
    return [G // (asked * split)]
  return fits

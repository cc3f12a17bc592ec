"""What follows from a config before any data is read: sizes, mesh, micro-batches, memory."""

import dataclasses
import functools
import os
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gpt2_jax import sharding, tokenizer
from gpt2_jax.config import Config, GPTConfig
from gpt2_jax.errors import UserError
from gpt2_jax.model import flops_per_token, num_params
from gpt2_jax.training.optimizer import make_optimizer, make_schedule
from gpt2_jax.training.step import TrainState, init_state, make_eval_step, make_train_step


@dataclasses.dataclass(frozen=True)
class Plan:
  """A run as its config and its devices determine it."""

  config: Config
  model: GPTConfig
  mesh: Mesh
  T: int  # tokens a row
  G: int  # rows of a global batch
  A: int  # micro-batches that a global batch is split into
  eval_rows: int  # rows of an evaluation batch
  tx: optax.GradientTransformation
  schedule: optax.Schedule

  @property
  def batch_sharding(self) -> NamedSharding:
    return NamedSharding(self.mesh, P(None, sharding.BATCH))

  def init_state(self) -> TrainState:
    optim = self.config.optim
    return init_state(self.model, self.tx, self.config.train.seed, optim.ema_decay > 0)

  def abstract_state(self) -> TrainState:
    """Shapes and layouts of the state; nothing is allocated."""
    return sharding.on_devices(jax.eval_shape(self.init_state))

  def compile_train_step(self):
    """The compiled step: `(state, tokens [A, G/A, T + 1]) -> state, metrics`."""
    c = self.config
    step = make_train_step(self.model, self.tx, self.schedule,
                           seed=c.train.seed, ema_decay=c.optim.ema_decay)
    tokens = jax.ShapeDtypeStruct(
        (self.A, self.G // self.A, self.T + 1), jnp.int32, sharding=self.batch_sharding)
    with out_of_memory_advice(self):
      return jax.jit(step, donate_argnums=0).lower(self.abstract_state(), tokens).compile()

  def eval_step(self):
    return jax.jit(make_eval_step(self.model))

  def describe(self) -> str:
    """Some lines for a reader."""
    c, shape = self.model, 'x'.join(f'{name}={size}' for name, size in self.mesh.shape.items())
    device = self.mesh.devices.flat[0]
    rows = self.G // self.A
    return '\n'.join([
        f'model    {num_params(c):,} parameters: {c.n_layer} layers, width {c.n_embd}, '
        f'{c.n_head} heads, vocabulary {c.vocab_size:,} (inside {c.padded_vocab_size:,})',
        f'         {flops_per_token(c, self.T):,} FLOPs a token (6·P + 12·L·D·T), {c.dtype}, '
        f'remat {c.remat}',
        f'mesh     {shape} of {self.mesh.size} x {device.device_kind}',
        f'batch    {self.G * self.T:,} tokens a step = {self.A} micro-batches x {rows} rows x '
        f'{self.T} tokens, {self.config.train.steps:,} steps, '
        f'{self.G * self.T * self.config.train.steps:,} tokens'])


class out_of_memory_advice:
  """A context that turns the compiler's or device's 'out of memory' into advice."""

  def __init__(self, plan: Plan):
    self.plan = plan

  def __enter__(self):
    return self

  def __exit__(self, kind, error, _):
    if isinstance(error, jax.errors.JaxRuntimeError) and 'RESOURCE_EXHAUSTED' in str(error):
      rows = self.plan.G // self.plan.A
      raise UserError(
          f'the device ran out of memory with micro-batches of {rows} rows x {self.plan.T} tokens '
          f'({str(error).splitlines()[0][:200]}). Three knobs, cheapest first: '
          '--config.train.micro_batch_rows smaller, --config.model.remat=dots or full, '
          '--config.mesh.fsdp larger.') from error


def memory_limit(device: Any) -> int:
  """Bytes that a run may plan with on a device; of a CPU, its share of half the machine's RAM."""
  stats = device.memory_stats() if device.platform != 'cpu' else None
  if stats and 'bytes_limit' in stats:
    return int(0.9 * stats['bytes_limit'])
  return os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') // 2 // jax.local_device_count()


def estimate_bytes(c: GPTConfig, mesh: Mesh, T: int, rows: int, ema: bool) -> int:
  """About the bytes a device needs for a step with micro-batches of `rows` rows over all devices.

  State: float32 parameters, gradients, their accumulator and AdamW's two moments. Activations: what
  the remat policy keeps of each layer, the temporaries of one layer, logits and their gradient.
  """
  tensor, split = mesh.shape['tensor'], mesh.shape['fsdp'] * mesh.shape['tensor']
  b, D, F = jnp.dtype(c.dtype).itemsize, c.n_embd, c.F // tensor
  state = num_params(c) * 4 * (6 if ema else 5) / split
  attention = (c.n_head // tensor) * T * (4 + 2 * b)  # scores and weights, a token
  whole = b * (8 * D + 3 * F) + 8 * D + attention
  kept = {'none': whole, 'dots': b * (6 * D + F), 'full': b * D}[c.remat]
  logits = 3 * 4 * c.padded_vocab_size / tensor
  per_device = rows / (mesh.shape['data'] * mesh.shape['fsdp'])
  return int(state + per_device * T * (c.n_layer * kept + 2 * whole + logits))


def _micro_batches(config: Config, model: GPTConfig, mesh: Mesh, T: int, G: int) -> int:
  """The number A of micro-batches: as asked, or the fewest whose estimate fits the device."""
  split = mesh.shape['data'] * mesh.shape['fsdp']
  if G % split:
    raise UserError(
        f'a batch of {G} rows (train.global_batch_tokens = {config.train.global_batch_tokens} / '
        f'{T}) can\'t be split over mesh.data·mesh.fsdp = {split}: make the rows a multiple of '
        f'{split}, or the mesh smaller (divisors of {G}).')
  fits = [A for A in range(1, G + 1) if G % A == 0 and (G // A) % split == 0]
  asked = config.train.micro_batch_rows
  if asked is not None:
    if asked < 1 or G % (asked * split):
      rows = sorted(G // A // split for A in fits)
      raise UserError(f'train.micro_batch_rows = {asked} rows a device don\'t divide the batch of '
                      f'{G} rows on {split} parts; it may be one of {rows}.')
    return G // (asked * split)
  limit = memory_limit(mesh.local_devices[0])
  ema = config.optim.ema_decay > 0
  return next((A for A in fits if estimate_bytes(model, mesh, T, G // A, ema) <= limit), fits[-1])


def make_plan(config: Config, devices=None) -> Plan:
  """Checks a config against the devices and derives the rest.

  Raises:
    UserError: the config contradicts itself or doesn't fit the devices.
  """
  fields = dict(config.model)
  if fields['vocab_size'] is None:
    fields['vocab_size'] = tokenizer.vocab_size(config.data.tokenizer)
  if fields['dtype'] == 'auto':
    fields['dtype'] = 'float32' if jax.default_backend() == 'cpu' else 'bfloat16'
  model = GPTConfig(**fields)
  mesh = sharding.make_mesh(**config.mesh, devices=devices)
  sharding.check_divisible(mesh, model.divisible())
  T = model.n_positions if config.data.sequence_length is None else config.data.sequence_length
  if not 1 <= T <= model.n_positions:
    raise UserError(f'data.sequence_length = {T} is longer than the model\'s context '
                    f'(model.n_positions = {model.n_positions}): shorten it or enlarge the model.')
  G, remainder = divmod(config.train.global_batch_tokens, T)
  if remainder or not G:
    raise UserError(f'train.global_batch_tokens = {config.train.global_batch_tokens} is no multiple '
                    f'of the row length {T}; the nearest is {max(1, G) * T}.')
  for section, key in (('train', 'steps'), ('checkpoint', 'every'), ('checkpoint', 'keep'),
                       ('evaluate', 'every')):
    if config[section][key] < 1:
      raise UserError(f'{section}.{key} = {config[section][key]} must be at least 1.')
  A = _micro_batches(config, model, mesh, T, G)
  split = mesh.shape['data'] * mesh.shape['fsdp']
  eval_rows = config.evaluate.batch_rows
  if eval_rows is None:
    eval_rows = max(split, G // A)
  elif eval_rows % split:
    raise UserError(f'evaluate.batch_rows = {eval_rows} must be a multiple of mesh.data·mesh.fsdp '
                    f'= {split}.')
  schedule = make_schedule(config.optim, config.train.steps)
  return Plan(config, model, mesh, T, G, A, eval_rows,
              make_optimizer(config.optim, schedule), schedule)


def dry_run(plan: Plan) -> str:
  """Compiles the training step without allocating anything; says what it would need."""
  with jax.set_mesh(plan.mesh):
    memory: Any = plan.compile_train_step().memory_analysis()
  gib = functools.partial('{:,.2f} GiB'.format)
  arguments, temporary = memory.argument_size_in_bytes, memory.temp_size_in_bytes
  total = max(arguments + temporary, getattr(memory, 'peak_memory_in_bytes', 0))
  limit = memory_limit(plan.mesh.local_devices[0])
  return '\n'.join([
      plan.describe(),
      f'memory   {total:,} bytes a device = {gib(total / 2**30)} (state and batch '
      f'{gib(arguments / 2**30)}, temporaries {gib(temporary / 2**30)}; '
      f'{gib(limit / 2**30)} to plan with)'])

"""What follows from a config before any data is read: sizes, mesh, micro-batches, memory."""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gpt2_jax.checkpoints.formats import peft
from gpt2_jax.checkpoints.tensors import Source, load_params
from gpt2_jax.core import determinism
from gpt2_jax.core.errors import UserError
from gpt2_jax.model import attention_kernels
from gpt2_jax.model.config import Config, GPTConfig
from gpt2_jax.model.cross_entropy import LOSS_TERMS
from gpt2_jax.model.gpt2 import Params
from gpt2_jax.model.sizes import flops_per_token, num_params, num_trained
from gpt2_jax.parallel import sharding
from gpt2_jax.tokenizer import bpe
from gpt2_jax.training import (
  batch_sizes,
  compile_cache,
  longer_context,
  memory_estimate,
  optimizer,
  out_of_memory,
)
from gpt2_jax.training.layer_values import make_measure
from gpt2_jax.training.optimizer import make_optimizer, make_schedule
from gpt2_jax.training.run_model import make_model
from gpt2_jax.training.step import TrainState, init_state, make_eval_step, make_train_step


@dataclasses.dataclass(frozen=True)
class Plan:
  """A run, as it follows from its config and its devices."""

  config: Config
  source: Source | None  # of the parameters that it begins with
  tokenizer: str  # its spec
  model: GPTConfig
  mesh: Mesh
  T: int  # tokens a row
  G: int  # rows of a global batch
  A: int  # micro-batches that a global batch is split into
  eval_rows: int  # rows of an evaluation batch
  tx: optax.GradientTransformation
  schedule: optax.Schedule
  steps: int  # of the run
  goal: int | None = None  # tokens that the run is to see, where its steps follow from them
  offset: int = 0  # tokens seen at a step beyond `step * G * T`: an earlier start had other batches

  def tokens(self, step: int) -> int:
    """Returns the tokens seen when `step` updates are done, over all starts of the run."""
    return self.offset + step * self.G * self.T

  def going_on(self, step: int, tokens: int) -> 'Plan':
    """Returns the plan of a run that goes on after `step`, where it had seen so many tokens."""
    return self._lasting(self.goal, tokens - step * self.G * self.T)

  def of_epochs(self, steps: float) -> 'Plan':
    """Returns the plan where an epoch is known to have so many steps."""
    if (epochs := self.config.train.epochs) is None:
      return self
    return self._lasting(max(1, round(epochs * steps * self.G * self.T)), self.offset)

  def _lasting(self, goal: int | None, offset: int) -> 'Plan':
    if (goal, offset) == (self.goal, self.offset):
      return self
    optim, a_step, steps = self.config.optim, self.G * self.T, self.steps
    if goal is not None:
      steps = -((offset - goal) // a_step)
    schedule = make_schedule(_until(optim, goal), steps, a_step, offset)
    tx = make_optimizer(optim, schedule, self.model.width_ratio)
    return dataclasses.replace(self, steps=steps, goal=goal, offset=offset, schedule=schedule, tx=tx)

  @property
  def batch_sharding(self) -> NamedSharding:
    return NamedSharding(self.mesh, P(None, sharding.BATCH))

  def init_state(self, given: Params | None = None) -> TrainState:
    """Returns the state before the first step; `given`, donated, replaces initial parameters."""
    ema = optimizer.averages(self.config.optim)
    return init_state(self.model, self.tx, self.config.train.seed, ema, given)

  def load_source(self) -> Params:
    """Returns the parameters that the run begins with, those that the model has."""
    assert self.source is not None
    source = peft.merged(self.source)
    kept = self.model.head == source.config.head
    config = dataclasses.replace(source.config, vocab_multiple=self.model.vocab_multiple)
    params = load_params(dataclasses.replace(source, config=config))
    how, seed = self.config.init_positions, self.config.train.seed
    params = longer_context.stretched(self.model, params, how, seed)
    return params if kept else {k: v for k, v in params.items() if k in ('wte', 'wpe', 'h', 'ln_f')}

  def abstract_state(self) -> TrainState:
    """Returns shapes and layouts of the state; nothing is allocated."""
    return sharding.on_devices(jax.eval_shape(self.init_state))

  def abstract_batch(self):
    """Returns shapes and layouts of a global batch."""

    def array(*row: int) -> jax.ShapeDtypeStruct:
      shape = self.A, self.G // self.A, *row
      return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=self.batch_sharding)

    if self.model.head == 'lm':
      return array(self.T + 1)
    return {'tokens': array(self.T), 'lengths': array(), 'labels': array()}

  def document_start(self, eot: int) -> int | None:
    """Returns the id that begins a document if documents are masked from each other, else None."""
    return eot if self.config.data.document_mask else None

  def compile_train_step(self, eot: int = 0, compiler_options: dict | None = None):
    """Compiles the step, `(state, batch) -> state, metrics`. `eot`: the id that begins documents."""
    step = make_train_step(
      self.model, self.tx, self.schedule, ema_decay=self.config.optim.ema_decay, **self._of_loss(eot)
    )
    return self._compiled(jax.jit(step, donate_argnums=0), compiler_options)

  def compile_measure(self, eot: int = 0):
    """Compiles what `log.layers_every` measures, `(state, batch) -> metrics`."""
    return self._compiled(jax.jit(make_measure(self.model, self.tx, **self._of_loss(eot))), None)

  def _of_loss(self, eot: int) -> dict[str, Any]:
    c = self.config
    factors = tuple((name, c.optim[name]) for name in LOSS_TERMS if c.optim[name])
    start = self.document_start(eot)
    return dict(seed=c.train.seed, document_start=start, factors=factors)

  def _compiled(self, jitted: Any, compiler_options: dict | None):
    """A function of a state and a batch, compiled."""
    options: Any = compile_cache.options(self.config.train.compiler_options)
    options |= compiler_options or {}
    with out_of_memory_advice(self), compile_cache.known_options(options):
      return jitted.lower(self.abstract_state(), self.abstract_batch()).compile(options)

  def eval_step(self, eot: int = 0):
    """Returns the step of an evaluation; it is compiled when it is first called."""
    model = dataclasses.replace(self.model, scan_layers=True)  # nothing of the layers is kept
    return jax.jit(make_eval_step(model, self.document_start(eot)))

  def attention(self) -> str:
    """Names the attention that the step will have, and says why it is not another."""
    with jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh):
      name, reason = attention_kernels.choose(self.model, self.T, drops=True)
    return f'{name} ({reason})' if reason else name

  def _other_tokenizer(self) -> bool:
    """Whether the config names another tokenizer than the source's own."""
    own = self.source and self.source.tokenizer
    if own is None or self.config.data.tokenizer is None:
      return False
    return (
      bpe.trained_size(self.tokenizer) is not None or bpe.load(self.tokenizer).sha256 != own.sha256
    )

  def _duration(self) -> str:
    if self.config.train.epochs is not None and self.goal is None:
      return f'{self.config.train.epochs:g} epochs'
    return f'{self.steps:,} steps, {self.G * self.T * self.steps:,} tokens'

  def describe(self) -> str:
    """Describes the run, in some lines for its user."""
    c, shape = self.model, 'x'.join(f'{name}={size}' for name, size in self.mesh.shape.items())
    device = self.mesh.devices.flat[0]
    rows = self.G // self.A
    tuned = []
    if self.source is not None:
      whole, part = num_params(c), num_trained(c)
      tuned = [f'from     {self.source.where}: {part:,} parameters are trained ({part / whole:.2%})']
      if self._other_tokenizer():
        tuned.append(
          f'         its ids stand for other texts: data.tokenizer = {self.tokenizer} is '
          'not the tokenizer that it was trained with'
        )
    first, *rest = optimizer.describe(self.config.optim, c)
    asked, given = self.config.model.n_positions, self.source and self.source.config.n_positions
    if context := longer_context.note(asked, self.T, given, c.n_positions):
      tuned.append(f'context  {context}')
    return '\n'.join(
      [
        f'model    {num_params(c):,} parameters: {c.n_layer} layers, width {c.n_embd}, '
        f'{c.n_head} heads, vocabulary {c.vocab_size:,} (inside {c.padded_vocab_size:,})',
        f'         {flops_per_token(c, self.T):,} FLOPs a token (6·P + 12·L·D·T), {c.dtype}, '
        f'remat {c.remat}, attention {self.attention()}',
        *tuned,
        f'optim    {first}',
        *(f'         {line}' for line in rest),
        f'mesh     {shape} of {self.mesh.size} x {device.device_kind}',
        f'batch    {self.G * self.T:,} tokens a step = {self.A} micro-batches x {rows} rows x '
        f'{self.T} tokens, {self._duration()}',
      ]
    )


@contextlib.contextmanager
def out_of_memory_advice(plan: Plan, workdir: str | Path | None = None) -> Iterator[None]:
  """Turns the compiler's or device's 'out of memory' into advice.

  Args:
    plan: of the run.
    workdir: where a profile of the memory is left; None: none is, while the step is compiled.
  """
  try:
    yield
  except jax.errors.JaxRuntimeError as e:
    if 'RESOURCE_EXHAUSTED' not in str(e):
      raise
    kept = out_of_memory.save_profile(workdir)  # first: the estimate is only said
    raise UserError(
      f'the device ran out of memory with micro-batches of {plan.G // plan.A} rows x '
      f'{plan.T} tokens ({str(e).splitlines()[0][:200]}). Three knobs, cheapest first: '
      '--config.train.micro_batch_rows smaller, --config.model.remat=dots or full, '
      '--config.mesh.fsdp larger (on more devices, once mesh.data is 1).\n'
      f'{memory_table(plan)}{kept}'
    ) from e


def memory_table(plan: Plan) -> str:
  """Returns the estimate of a step's memory as a table, with one row for each knob that lowers it."""
  c, mesh, rows = plan.model, plan.mesh, plan.G // plan.A
  estimate = functools.partial(
    memory_estimate.estimate_parts, mesh=mesh, T=plan.T, optim=plan.config.optim
  )
  parts, knobs = estimate(c, rows=rows), {}
  split = mesh.shape['data'] * mesh.shape['fsdp']
  for half in [r for r in range(1, rows // split // 2 + 1) if plan.G // split % r == 0][-1:]:
    knobs[f'--config.train.micro_batch_rows={half}'] = estimate(c, rows=half * split)
  order = ('none', 'dots', 'full')
  for remat in order[order.index(c.remat) + 1 :]:
    knobs[f'--config.model.remat={remat}'] = estimate(dataclasses.replace(c, remat=remat), rows=rows)
  # as many rows a device, on twice the devices or half of mesh.data
  knobs[f'--config.mesh.fsdp={2 * mesh.shape["fsdp"]}'] = parts | {'state': parts['state'] / 2}
  return out_of_memory.table(parts, knobs, memory_estimate.memory_limit(mesh.local_devices[0]))


def make_plan(config: Config, devices=None, held: int | None = None) -> Plan:
  """Checks a config against the devices and derives the rest.

  Args:
    config: of the run.
    devices: default: all. They needn't be there: those of a topology are only described.
    held: positions of the run that goes on, see `longer_context.context`; None: it begins.

  Raises:
    UserError: the config contradicts itself or doesn't fit the devices.
  """
  source, spec, model, mesh = make_model(config, devices, held)
  if config.deterministic:
    determinism.check()
  T, G = batch_sizes.batch_rows(config, model, mesh)
  batch_sizes.check_checkpoints(config)
  model, A = memory_estimate.fitted(config, model, mesh, T, G)
  eval_rows = batch_sizes.eval_rows(config, mesh, G // A)
  optimizer.check(config.optim, model)
  goal, steps = config.train.tokens, config.train.steps
  if goal is not None:
    if config.train.epochs is not None:
      raise UserError('train.tokens and train.epochs both say how long: leave one of them unset.')
    steps = -(-goal // (G * T))
  schedule = make_schedule(_until(config.optim, goal), steps, G * T)
  tx = make_optimizer(config.optim, schedule, model.width_ratio)
  return Plan(config, source, spec, model, mesh, T, G, A, eval_rows, tx, schedule, steps, goal)


def _until(optim: Config, goal: int | None) -> Config:
  """The section `optim`, with the end of the run as that of the decay, where it counts tokens."""
  if goal is None or optim.decay_steps is not None or optim.decay_tokens is not None:
    return optim
  optim = optim.copy_and_resolve_references()
  optim.decay_tokens = goal
  return optim


def dry_run(plan: Plan) -> str:
  """Compiles the training step without allocating anything, and says how much memory it needs."""
  with jax.set_mesh(plan.mesh):
    memory: Any = plan.compile_train_step().memory_analysis()
  gib = functools.partial('{:,.2f} GiB'.format)
  arguments, temporary = memory.argument_size_in_bytes, memory.temp_size_in_bytes
  total = max(arguments + temporary, getattr(memory, 'peak_memory_in_bytes', 0))
  limit = memory_estimate.memory_limit(sharding.own_device(plan.mesh))
  return '\n'.join(
    [
      plan.describe(),
      f'memory   {total:,} bytes a device = {gib(total / 2**30)} (state and batch '
      f'{gib(arguments / 2**30)}, temporaries {gib(temporary / 2**30)}; '
      f'{gib(limit / 2**30)} to plan with)',
    ]
  )

"""What follows from a config before any data is read: sizes, mesh, micro-batches, memory."""

import contextlib
import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gpt2_jax import determinism, kernels, sharding, tokenizer
from gpt2_jax.config import Config, GPTConfig, LoRA
from gpt2_jax.counts import flops_per_token, num_params, num_trained
from gpt2_jax.data import labelled
from gpt2_jax.errors import UserError
from gpt2_jax.files import whole
from gpt2_jax.interop import peft
from gpt2_jax.interop.opening import Opening
from gpt2_jax.interop.tensors import Source, load_params
from gpt2_jax.loss import LOSS_TERMS
from gpt2_jax.model import Params
from gpt2_jax.pretrained import open_source
from gpt2_jax.training import compiling, fit, knobs, memory, positions
from gpt2_jax.training.optimizer import make_optimizer, make_schedule
from gpt2_jax.training.step import TrainState, init_state, make_eval_step, make_train_step

# Fields of the model that may change between two starts of a run: they don't change what it is.
FREE = ('dtype', 'remat', 'attention', 'reduce_dtype', 'embd_pdrop', 'attn_pdrop', 'resid_pdrop')


@dataclasses.dataclass(frozen=True)
class Plan:
  """A run as its config and its devices determine it."""

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
  offset: int = 0  # tokens seen at a step, less those of so many steps of this batch

  def tokens(self, step: int) -> int:
    """Tokens seen when so many updates are done, over all starts of the run."""
    return self.offset + step * self.G * self.T

  def going_on(self, step: int, tokens: int) -> 'Plan':
    """The plan of a run that goes on behind a step at which it had seen so many tokens."""
    offset = tokens - step * self.G * self.T
    if offset == self.offset:
      return self
    optim, a_step = self.config.optim, self.G * self.T
    schedule = make_schedule(optim, self.config.train.steps, a_step, offset)
    tx = make_optimizer(optim, schedule, self.model.width_ratio)
    return dataclasses.replace(self, offset=offset, schedule=schedule, tx=tx)

  @property
  def batch_sharding(self) -> NamedSharding:
    return NamedSharding(self.mesh, P(None, sharding.BATCH))

  def init_state(self, given: Params | None = None) -> TrainState:
    """The state before the first step; `given` replaces initial parameters, and is used up."""
    optim = self.config.optim
    return init_state(self.model, self.tx, self.config.train.seed, optim.ema_decay > 0, given)

  def load_source(self) -> Params:
    """The parameters that the run begins with, as far as the model has them."""
    assert self.source is not None
    source = peft.merged(self.source)
    kept = self.model.head == source.config.head
    config = dataclasses.replace(source.config, vocab_multiple=self.model.vocab_multiple)
    params = load_params(dataclasses.replace(source, config=config))
    how, seed = self.config.init_positions, self.config.train.seed
    params = positions.stretched(self.model, params, how, seed)
    return params if kept else {k: v for k, v in params.items() if k in ('wte', 'wpe', 'h', 'ln_f')}

  def abstract_state(self) -> TrainState:
    """Shapes and layouts of the state; nothing is allocated."""
    return sharding.on_devices(jax.eval_shape(self.init_state))

  def abstract_batch(self):
    """Shapes and layouts of a global batch."""
    rows = self.A, self.G // self.A
    array = lambda *shape: jax.ShapeDtypeStruct(
      (*rows, *shape), jnp.int32, sharding=self.batch_sharding
    )
    if self.model.head == 'lm':
      return array(self.T + 1)
    return {'tokens': array(self.T), 'lengths': array(), 'labels': array()}

  def document_start(self, eot: int) -> int | None:
    """The id that begins a document, where documents are masked from each other; else None."""
    return eot if self.config.data.document_mask else None

  def compile_train_step(self, eot: int = 0, compiler_options: dict | None = None):
    """The compiled step: `(state, batch) -> state, metrics`. `eot`: the id that begins documents."""
    c = self.config
    step = make_train_step(
      self.model,
      self.tx,
      self.schedule,
      seed=c.train.seed,
      ema_decay=c.optim.ema_decay,
      document_start=self.document_start(eot),
      factors=tuple((name, c.optim[name]) for name in LOSS_TERMS if c.optim[name]),
    )
    options: Any = compiling.options(c.train.compiler_options) | (compiler_options or {})
    with out_of_memory_advice(self), compiling.known_options(options):
      return (
        jax.jit(step, donate_argnums=0)
        .lower(self.abstract_state(), self.abstract_batch())
        .compile(options)
      )

  def eval_step(self, eot: int = 0):
    return jax.jit(make_eval_step(self.model, self.document_start(eot)))

  def attention(self) -> str:
    """Which attention the step will have, and why not another."""
    with jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh):
      name, reason = kernels.choose(self.model, self.T, drops=True)
    return f'{name} ({reason})' if reason else name

  def _other_tokenizer(self) -> bool:
    """Whether the config names another tokenizer than that of the source."""
    own = self.source and self.source.tokenizer
    if own is None or self.config.data.tokenizer is None:
      return False
    return (
      tokenizer.trained_size(self.tokenizer) is not None
      or tokenizer.load(self.tokenizer).sha256 != own.sha256
    )

  def describe(self) -> str:
    """Some lines for a reader."""
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
    asked, given = self.config.model.n_positions, self.source and self.source.config.n_positions
    if context := positions.note(asked, self.T, given, c.n_positions):
      tuned.append(f'context  {context}')
    return '\n'.join(
      [
        f'model    {num_params(c):,} parameters: {c.n_layer} layers, width {c.n_embd}, '
        f'{c.n_head} heads, vocabulary {c.vocab_size:,} (inside {c.padded_vocab_size:,})',
        f'         {flops_per_token(c, self.T):,} FLOPs a token (6·P + 12·L·D·T), {c.dtype}, '
        f'remat {c.remat}, attention {self.attention()}',
        *tuned,
        f'mesh     {shape} of {self.mesh.size} x {device.device_kind}',
        f'batch    {self.G * self.T:,} tokens a step = {self.A} micro-batches x {rows} rows x '
        f'{self.T} tokens, {self.config.train.steps:,} steps, '
        f'{self.G * self.T * self.config.train.steps:,} tokens',
      ]
    )


class out_of_memory_advice:
  """A context that turns the compiler's or device's 'out of memory' into advice."""

  def __init__(self, plan: Plan, workdir: str | Path | None = None):
    """`workdir`: where a profile of the memory is left; None: there is none while compiling."""
    self.plan, self.workdir = plan, workdir

  def __enter__(self):
    return self

  def __exit__(self, kind, error, _):
    if isinstance(error, jax.errors.JaxRuntimeError) and 'RESOURCE_EXHAUSTED' in str(error):
      kept = memory.save_profile(self.workdir)  # first: the estimate is only said
      raise UserError(
        f'the device ran out of memory with micro-batches of {self.plan.G // self.plan.A} rows x '
        f'{self.plan.T} tokens ({str(error).splitlines()[0][:200]}). Three knobs, cheapest first: '
        '--config.train.micro_batch_rows smaller, --config.model.remat=dots or full, '
        '--config.mesh.fsdp larger (on more devices, once mesh.data is 1).\n'
        f'{memory_table(self.plan)}{kept}'
      ) from error


def memory_table(plan: Plan) -> str:
  """The estimate of a step's memory, and what the knobs would make of it."""
  c, mesh, rows = plan.model, plan.mesh, plan.G // plan.A
  estimate = functools.partial(fit.estimate_parts, mesh=mesh, T=plan.T, optim=plan.config.optim)
  parts, knobs = estimate(c, rows=rows), {}
  split = mesh.shape['data'] * mesh.shape['fsdp']
  for half in [r for r in range(1, rows // split // 2 + 1) if plan.G // split % r == 0][-1:]:
    knobs[f'--config.train.micro_batch_rows={half}'] = estimate(c, rows=half * split)
  order = ('none', 'dots', 'full')
  for remat in order[order.index(c.remat) + 1 :]:
    knobs[f'--config.model.remat={remat}'] = estimate(dataclasses.replace(c, remat=remat), rows=rows)
  # as many rows a device, on twice the devices or half of mesh.data
  knobs[f'--config.mesh.fsdp={2 * mesh.shape["fsdp"]}'] = parts | {'state': parts['state'] / 2}
  return memory.table(parts, knobs, fit.memory_limit(mesh.local_devices[0]))


def _tokenizer(config: Config, source: Source | None) -> str:
  """The spec of the tokenizer: as the config says, or the source's own, kept in a folder."""
  if config.data.tokenizer is not None or source is None:
    return config.data.tokenizer or 'gpt2'
  if source.tokenizer is None:
    raise UserError(f'{source.where} has no tokenizer that can be used: set config.data.tokenizer.')
  with contextlib.suppress(UserError):  # GPT-2's own may not be at hand
    if source.tokenizer.sha256 == tokenizer.load('gpt2').sha256:
      return 'gpt2'  # so that its stores are found
  folder = Path(config.data.directory) / 'tokenizers' / source.tokenizer.sha256[:16]
  try:
    with whole(folder) as path:
      source.tokenizer.save(path)
  except (OSError, UserError):
    if not folder.exists():  # else it is there already, by an earlier run or another process
      raise
  return str(folder)


def _model(
  config: Config, source: Source | None, spec: str, platform: str, held: int | None
) -> GPTConfig:
  fields, rows = dict(config.model), config.data.sequence_length
  if fields['dtype'] == 'auto':
    fields['dtype'] = 'float32' if platform == 'cpu' else 'bfloat16'
  lora = dict(config.lora)
  fields['lora'] = LoRA(**lora) if lora['r'] else None
  if fields['head'] == 'token_classification':
    raise UserError('model.head = token_classification can be loaded and converted, not trained.')
  if fields['head'] == 'sequence_classification':
    fields['num_labels'] = len(labelled.label_names(config.data))
  if source is None:
    if fields['lora']:
      raise UserError('lora.r trains adapters of a model that is there: say which, in init_from.')
    if fields['vocab_size'] is None:
      fields['vocab_size'] = tokenizer.vocab_size(spec)
    fields['n_positions'] = positions.context(fields['n_positions'], rows, None, held)
    return GPTConfig(**fields)
  free = [*FREE, 'vocab_multiple', 'head', 'lora', 'num_labels']  # what a run may choose anew
  other = {
    k: v
    for k, v in fields.items()
    if k not in free and v is not None and v != getattr(source.config, k)
  }
  if other.keys() == {'n_positions'} and other['n_positions'] > source.config.n_positions:
    free.append('n_positions')  # a longer context: see `positions.stretched`
    fields['n_positions'] = positions.context(
      other['n_positions'], rows, source.config.n_positions, held
    )
  elif other:
    raise UserError(
      f'the config says model = {other}, but init_from = {config.init_from} is of '
      'another shape: use configs/finetune.py, which takes its sizes from there.'
    )
  fields = {k: v for k, v in fields.items() if k in free}
  return dataclasses.replace(source.config, **fields)


def make_model(
  config: Config, devices=None, held: int | None = None
) -> tuple[Source | None, str, GPTConfig, Mesh]:
  """What a config begins with, its tokenizer's spec, its model and its mesh.

  Arguments are those of `make_plan`.

  Raises:
    UserError: they don't go together.
  """
  knobs.check(config)
  opening = Opening(config.init_base, config.init_ignore_extra)
  source = open_source(config.init_from, opening) if config.init_from else None
  spec = _tokenizer(config, source)
  devices = list(jax.devices() if devices is None else devices)
  model = _model(config, source, spec, devices[0].platform, held)
  mesh = fit.choose_mesh(config, model, devices)
  sharding.check_divisible(mesh, model.divisible())
  return source, spec, model, mesh


def make_plan(config: Config, devices=None, held: int | None = None) -> Plan:
  """Checks a config against the devices and derives the rest.

  Args:
    config: of the run.
    devices: default: all. They needn't be there: those of a topology are only described.
    held: positions of the run that goes on, see `positions.context`; None: it begins.

  Raises:
    UserError: the config contradicts itself or doesn't fit the devices.
  """
  source, spec, model, mesh = make_model(config, devices, held)
  if config.deterministic:
    determinism.check()
  T = model.n_positions if config.data.sequence_length is None else config.data.sequence_length
  if not 1 <= T <= model.n_positions:
    raise UserError(
      f"data.sequence_length = {T} is longer than the model's context "
      f'(model.n_positions = {model.n_positions}): shorten it or enlarge the model.'
    )
  G, remainder = divmod(config.train.global_batch_tokens, T)
  if remainder or not G:
    raise UserError(
      f'train.global_batch_tokens = {config.train.global_batch_tokens} is no multiple '
      f'of the row length {T}; the nearest is {max(1, G) * T}.'
    )
  sharding.check_divisible(mesh, {'data.sequence_length': (T, 'seq')})
  keep = config.checkpoint
  if keep.keep_every % keep.every:
    raise UserError(
      f'checkpoint.keep_every = {keep.keep_every} must be 0 or a multiple of '
      f'checkpoint.every = {keep.every}: only what is saved can be kept.'
    )
  A = fit.micro_batches(config, model, mesh, T, G)
  split = mesh.shape['data'] * mesh.shape['fsdp']
  eval_rows = config.evaluate.batch_rows
  if eval_rows is None:
    eval_rows = max(split, G // A)
  elif eval_rows % split:
    raise UserError(
      f'evaluate.batch_rows = {eval_rows} must be a multiple of mesh.data·mesh.fsdp = {split}.'
    )
  schedule = make_schedule(config.optim, config.train.steps, G * T)
  every, patience = config.evaluate.every, config.evaluate.patience
  if (patience or keep.keep_best) and every % keep.every:
    cause = (
      f'evaluate.patience = {patience} offers'
      if patience
      else f'checkpoint.keep_best = {keep.keep_best} keeps'
    )
    raise UserError(
      f'{cause} the best evaluated step, so each must be saved: make evaluate.every = '
      f'{every} a multiple of checkpoint.every = {keep.every}.'
    )
  return Plan(
    config,
    source,
    spec,
    model,
    mesh,
    T,
    G,
    A,
    eval_rows,
    make_optimizer(config.optim, schedule, model.width_ratio),
    schedule,
  )


def dry_run(plan: Plan) -> str:
  """Compiles the training step without allocating anything; says what it would need."""
  with jax.set_mesh(plan.mesh):
    memory: Any = plan.compile_train_step().memory_analysis()
  gib = functools.partial('{:,.2f} GiB'.format)
  arguments, temporary = memory.argument_size_in_bytes, memory.temp_size_in_bytes
  total = max(arguments + temporary, getattr(memory, 'peak_memory_in_bytes', 0))
  limit = fit.memory_limit(sharding.own_device(plan.mesh))
  return '\n'.join(
    [
      plan.describe(),
      f'memory   {total:,} bytes a device = {gib(total / 2**30)} (state and batch '
      f'{gib(arguments / 2**30)}, temporaries {gib(temporary / 2**30)}; '
      f'{gib(limit / 2**30)} to plan with)',
    ]
  )

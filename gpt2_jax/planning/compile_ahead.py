"""A run's real programs, compiled for devices that are not there."""

import contextlib
import dataclasses
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.compilation_cache import compilation_cache

from gpt2_jax.core.bounds import shortened
from gpt2_jax.core.chips import GIB
from gpt2_jax.core.errors import UserError
from gpt2_jax.core.files import save_text
from gpt2_jax.model.config import Config, GPTConfig
from gpt2_jax.model.sizes import flops_per_token, num_params
from gpt2_jax.planning.bill import ideal
from gpt2_jax.planning.program_cost import Cost, UnknownProgram, count
from gpt2_jax.planning.report import Memory, Report, refused_bytes, times
from gpt2_jax.planning.topology import Topology
from gpt2_jax.training.run_plan import make_plan

KNOBS = (
  'it does not fit. Knobs, cheapest first: --config.train.micro_batch_rows smaller, '
  '--config.model.remat=dots or full, --config.mesh.fsdp larger.'
)
GPU_SHARE = 0.75  # of its memory that JAX takes unless told otherwise


def versions() -> dict[str, str]:
  """Returns the versions of the packages that make a program."""
  found = {}
  for name in ('jax', 'jaxlib', 'libtpu', 'jax-cuda12-plugin', 'jax-cuda13-plugin'):
    with contextlib.suppress(metadata.PackageNotFoundError):
      found[name] = metadata.version(name)
  return found


def bytes_of(tree: Any) -> int:
  """Returns the bytes of one device's parts of abstract arrays."""
  shard = lambda x: np.prod(x.sharding.shard_shape(x.shape), dtype=int) * x.dtype.itemsize
  return int(
    sum(shard(x) for x in jax.tree.leaves(tree) if not jnp.issubdtype(x.dtype, jax.dtypes.prng_key))
  )


@dataclasses.dataclass(frozen=True)
class Compiled:
  """A program that was compiled, or refused."""

  memory: Memory
  cost: Cost | None  # None: it was refused, or its text can't be read
  refused: str | None  # what the compiler said
  seconds: float  # to compile
  note: str = ''  # why the cost of a program that was compiled is not known


@contextlib.contextmanager
def _without_cache():
  """A context without JAX's persistent cache, which can't read back what was compiled for devices
  that are not there ("PjRtCompiler must be constructed with a Client").
  """
  before = jax.config.values['jax_enable_compilation_cache']
  jax.config.update('jax_enable_compilation_cache', False)
  compilation_cache.reset_cache()  # it looks at the switch once
  try:
    yield
  finally:
    jax.config.update('jax_enable_compilation_cache', before)
    compilation_cache.reset_cache()


def compile_for(
  topology: Topology,
  mesh,
  build: Callable[[], Any],
  arguments: Any,
  dump: Path | None = None,
  *,
  one_turn: bool = False,
) -> Compiled:
  """Compiles a program, and counts what it needs.

  Args:
    topology: what to compile for.
    mesh: over its devices.
    build: returns the compiled program.
    arguments: the program's, abstract.
    dump: a file for the program's text.
    one_turn: whether to count one turn of its endless loop alone.
  """
  began, hbm = time.monotonic(), topology.chip.hbm
  try:
    with _without_cache():
      compiled = build()
  except (UserError, RuntimeError) as e:
    if 'cuDNN not found' in str(e):
      raise UserError(
        'cuDNN, whose attention is compiled in, is not installed: pip install '
        '"gpt2_jax[cuda12]", or plan with --config.model.attention=xla.'
      ) from e
    error = e.__cause__ if isinstance(e, UserError) else e
    if not isinstance(error, jax.errors.JaxRuntimeError) or 'RESOURCE_EXHAUSTED' not in str(error):
      raise
    message, known = str(error).splitlines()[0], bytes_of(arguments)
    temporaries = refused_bytes(message)
    memory = Memory(known, temporaries, 0, max(known + temporaries, hbm + 1), hbm)
    return Compiled(memory, None, message, time.monotonic() - began)
  seconds = time.monotonic() - began
  m = compiled.memory_analysis()
  made = m.output_size_in_bytes - m.alias_size_in_bytes
  needed = m.argument_size_in_bytes + m.temp_size_in_bytes + m.generated_code_size_in_bytes + made
  memory = Memory(
    m.argument_size_in_bytes,
    m.temp_size_in_bytes,
    m.generated_code_size_in_bytes,
    max(needed, getattr(m, 'peak_memory_in_bytes', 0)),
    hbm,
  )
  try:
    text = compiled.as_text()
  except jax.errors.JaxRuntimeError as e:
    why = f"this compiler can't print its program ({shortened(str(e).splitlines()[0], 200)})"
    note = f'memory alone is known: {why}; libtpu 0.0.42.1 could.'
    return Compiled(memory, None, None, seconds, note)
  if dump is not None:
    save_text(dump, text, 'the program')
  try:
    cost = count(text, topology.slices_of(mesh.devices.flat), one_turn=one_turn)
  except UnknownProgram as e:
    return Compiled(memory, None, None, seconds, f'memory alone is known: {e}')
  return Compiled(memory, cost, None, seconds)


def describe(c: GPTConfig) -> str:
  return f'{num_params(c):,} parameters, {c.n_layer} layers, width {c.n_embd}, {c.dtype}'


def report(topology: Topology, mesh, compiled: Compiled, *, flops: float, **fields) -> Report:
  """Returns the report of a program; `flops` are those of the formula, of one device."""
  notes, memory = [compiled.note] if compiled.note else [], compiled.memory
  if not memory.fits:
    notes.append(KNOBS)
  elif mesh.devices.flat[0].platform == 'gpu' and memory.total > GPU_SHARE * memory.hbm:
    notes.append(
      f"JAX takes {GPU_SHARE:.0%} of a GPU's memory, unless "
      'XLA_PYTHON_CLIENT_MEM_FRACTION says more: '
      f'{(memory.total + GIB) / memory.hbm:.2f} is needed.'
    )
  cost, known = compiled.cost, {}
  if cost is not None:
    known = dict(
      collectives={kind: dataclasses.asdict(t) for kind, t in sorted(cost.collectives.items())},
      kernels=cost.kernels,
      flops_compiled=cost.flops,
      hbm_bytes=cost.hbm_bytes,
      cycles=cost.cycles,
      places={name: dataclasses.asdict(use) for name, use in cost.places.items()},
      times=times(topology.chip, flops, cost),
    )
  return Report(
    topology=topology.name,
    device_kind=mesh.devices.flat[0].device_kind,
    devices=len(topology.devices),
    chips=topology.chips,
    mesh=dict(mesh.shape),
    memory=memory,
    fits=memory.fits,
    refused=compiled.refused,
    flops=flops,
    notes=tuple(notes),
    versions=versions(),
    compile_seconds=compiled.seconds,
    **known,
    **fields,
  )


def plan_train(
  config: Config,
  topology: Topology,
  name: str,
  *,
  tokens: int | None = None,
  dump: Path | None = None,
) -> Report:
  """Compiles the training step of a config for a topology.

  Args:
    config: as launch.py takes it.
    topology: the devices to compile for.
    name: of the config, for the report.
    tokens: to train on; default: as many as the config trains on.
    dump: a file for the compiled program.

  Raises:
    UserError: the config can't run there, whatever its memory.
  """
  plan = make_plan(config, topology.devices)
  with jax.set_mesh(plan.mesh):
    arguments = plan.abstract_state(), plan.abstract_batch()
    compiled = compile_for(topology, plan.mesh, plan.compile_train_step, arguments, dump)
  step, c = plan.G * plan.T, plan.model
  goal: int = step * plan.steps if tokens is None else tokens
  rows = plan.G // plan.A // (plan.mesh.shape['data'] * plan.mesh.shape['fsdp'])
  all_flops = flops_per_token(c, plan.T) * step
  made = report(
    topology,
    plan.mesh,
    compiled,
    mode='train',
    config=name,
    flops=all_flops / plan.mesh.size,
    ideal=ideal(c, plan.mesh, step * plan.mesh.shape['tensor'] // plan.mesh.size, plan.A),
    model=f'{describe(c)}, remat {c.remat}',
    batch=f'{step:,} tokens a step = {plan.A} micro-batches x {rows} rows a device x {plan.T}',
    numbers=dict(
      parameters=num_params(c),
      remat=c.remat,
      micro_batch_rows=rows,
      micro_batches=plan.A,
      tokens_a_step=step,
    ),
  )
  if (estimate := made.times) is None:
    return made
  per_second = step / estimate.total
  days = goal / per_second / 86400
  return dataclasses.replace(
    made,
    results={
      'tokens_per_second': per_second,
      'mfu': all_flops / estimate.total / (topology.chip.flops * plan.mesh.size),
      'tokens': goal,
      'days': days,
      'chip_hours': days * 24 * topology.chips,
    },
  )

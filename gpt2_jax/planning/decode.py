"""Generation for devices that are not there: the compiled reading of prompts, and one more token."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gpt2_jax import batching
from gpt2_jax.config import Config, GPTConfig
from gpt2_jax.counts import flops_per_token, num_params
from gpt2_jax.decoding.assemble import make_processors
from gpt2_jax.decoding.history import Endings, History
from gpt2_jax.decoding.loop import Request, Rules, Sample, advance, start
from gpt2_jax.decoding.options import Options
from gpt2_jax.errors import UserError, brief
from gpt2_jax.forms import for_decoding
from gpt2_jax.model import make_params
from gpt2_jax.planning.plan import Compiled, bytes_of, compile_for, describe, report
from gpt2_jax.planning.report import HBM, Report
from gpt2_jax.planning.topology import Topology
from gpt2_jax.sharding import BATCH, P, on_devices, reshard
from gpt2_jax.training.run_model import make_model

FILL = 0.97  # of the memory, what the largest batch aims at
TOKENS = 128  # of a prompt, and new ones, where nothing is said of them
TRIES = 3  # compilations to find it


def cache_bytes(config: GPTConfig, rows: int, slots: int) -> int:
  """Bytes of the keys and values of some rows, each with so many positions, on all devices."""
  return 2 * config.n_layer * config.n_embd * slots * rows * jnp.dtype(config.dtype).itemsize


def abstract_params(config: GPTConfig) -> tuple[GPTConfig, Any]:
  """Config and parameters in the form 'decode', abstract, on the mesh that is set."""
  made = {}

  def make():
    made['config'], params = for_decoding(config, make_params(config, 0))
    return params

  params = on_devices(jax.eval_shape(make))
  return made['config'], params


def abstract_request(config: GPTConfig, rows: int, prompt: int, new: int) -> Request:
  """A request for `rows` prompts of one length with a row each, as `decoding.driver` makes it."""
  options, eos = Options(), np.zeros(1, np.int32)

  def make():
    zeros = lambda *shape: reshard(
      jnp.zeros((rows, *shape), jnp.int32), P(BATCH, *(None for _ in shape))
    )
    processors = make_processors(
      options,
      V=config.vocab_size,
      eos=eos,
      ends=eos,
      guide=None,
      extra=(),
      prefix_allowed_tokens_fn=None,
    )
    size = batching.bucket(prompt, 1 << 30) + new
    history = History(zeros(size), *(zeros() for _ in range(8)))
    return Request(
      zeros(prompt),
      zeros(),
      history,
      zeros(),
      jax.random.key(0),
      Rules(processors, Endings(jnp.asarray(eos))),
    )

  return on_devices(jax.eval_shape(make))


def compile_decode(
  topology: Topology,
  mesh,
  config: GPTConfig,
  mode: str,
  rows: int,
  prompt: int,
  new: int,
  dump: Path | None = None,
) -> tuple[Compiled, dict[str, int]]:
  """Compiles the reading of prompts ('prefill') or the loop of new tokens ('decode').

  Returns:
    The program, and a device's bytes of the weights and of the cache.
  """
  search = Sample()
  with jax.set_mesh(mesh):
    config, params = abstract_params(config)
    request = abstract_request(config, rows, prompt, new)
    begin = functools.partial(start, N=new, K=0)
    state = on_devices(
      jax.eval_shape(
        lambda *args: begin(config, params=args[0], search=search, request=args[1])[0],
        params,
        request,
      )
    )
    parts = {'weights': bytes_of(params), 'cache': bytes_of(state.cache)}
    if mode == 'prefill':
      build = lambda: start.lower(config, params, search, request, N=new, K=0).compile()
      arguments = params, request
    else:
      until = on_devices(jax.eval_shape(lambda: jnp.zeros((), jnp.int32)))
      build = lambda: advance.lower(config, params, search, request, state, until).compile()
      arguments = params, request, state
    return compile_for(topology, mesh, build, arguments, dump, one_turn=mode == 'decode'), parts


def lengths(S: int, prompt: int | None, new: int | None) -> tuple[int, int]:
  """Tokens that are read and written of a text, as they are compiled, where a model has S positions.

  Raises:
    UserError: it has not so many.
  """
  if S < 2:
    raise UserError(f'a model of n_positions = {S} does not write.')
  if prompt is None:
    prompt = max(1, min(TOKENS, S // 2, S - (new or 1)))
  if new is None:
    new = max(1, min(TOKENS, S - prompt))
  if min(prompt, new) < 1 or prompt + new > S:
    raise UserError(
      f'--prompt {brief(prompt)} and --new {brief(new)} must be at least 1 and no more '
      f'than model.n_positions = {S} together.'
    )
  return batching.bucket(prompt, S), batching.bucket(new, S)


def plan_decode(
  config: Config,
  topology: Topology,
  name: str,
  mode: str,
  *,
  batch: int | None = None,
  prompt: int | None = None,
  new: int | None = None,
  dump: Path | None = None,
  largest: bool = True,
) -> Report:
  """Generation with a config's model, compiled for a topology.

  Args:
    config: its model and mesh are used.
    topology: where to.
    name: of the config, for the report.
    mode: 'decode', a token more in each row, or 'prefill', the prompts and the first token.
    batch: texts at a time on all devices; default: one for each of the parts that it is split in.
    prompt, new: tokens of each text that are read, and for which there is room; default: 128 of both,
      or what a smaller context has.
    dump: a file for the compiled program.
    largest: whether to look for the largest batch that fits as well: one compilation more, or two.

  Raises:
    UserError: the model does not fit the mesh, or the texts the model.
  """
  _, _, model, mesh = make_model(config, topology.devices)
  if model.head != 'lm':
    raise UserError(f'a model with model.head = {model.head} does not write.')
  split = mesh.shape['data'] * mesh.shape['fsdp']
  rows = split if batch is None else batch
  if rows < 1 or rows % split:
    raise UserError(f'--batch {rows} must be a multiple of mesh.data·mesh.fsdp = {split}.')
  prompt, new = lengths(model.n_positions, prompt, new)
  compile_rows = functools.partial(compile_decode, topology, mesh, model, mode)
  compiled, parts = compile_rows(rows, prompt, new, dump)
  tensor, chip = mesh.shape['tensor'], topology.chip
  tokens = rows if mode == 'decode' else rows * prompt
  forward = flops_per_token(model, prompt) // 3
  weights = parts['weights'] * mesh.shape['fsdp']  # what a device reads: its own and the gathered
  made = report(
    topology,
    mesh,
    compiled,
    mode=mode,
    config=name,
    flops=forward * tokens / mesh.size,
    model=describe(model),
    batch=f'{rows} texts of {prompt} tokens, with room for {new} more',
    numbers=dict(parameters=num_params(model), rows=rows, prompt=prompt, new=new),
  )
  results: dict[str, float] = {
    'kv_cache_bytes': cache_bytes(model, rows, prompt + new),
    'kv_cache_bytes_per_device': parts['cache'],
    'weight_bytes_per_device': parts['weights'],
  }
  if made.times is not None:
    results |= {'tokens_per_second': tokens / made.times.total}
    if mode == 'decode':
      floor = (weights + parts['cache']) / (HBM * chip.hbm_bandwidth)
      results |= {'ms_per_token': made.times.total * 1e3, 'ms_to_read_weights_and_cache': floor * 1e3}
  if largest:
    results |= _largest(compile_rows, compiled, parts, rows, split, prompt, new, tensor, model)
  return dataclasses.replace(made, results=results)


def _largest(
  compile_rows, compiled: Compiled, parts, rows, split, prompt, new, tensor, model: GPTConfig
) -> dict[str, float]:
  """The largest batch that fits, of those compiled: the first by bytes that are known, the others on
  the line through the last two.
  """
  hbm, n = compiled.memory.hbm, rows // split
  # a row's cache; in float32 its logits, their copy and the processed scores
  each = parts['cache'] / n + 3 * 4 * model.padded_vocab_size / tensor
  best = (n, compiled.memory.total) if compiled.memory.fits else (0, 0)
  line = n, compiled.memory.total
  n = max(1, int((FILL * hbm - parts['weights'] - compiled.memory.code) / each))
  for _ in range(TRIES):
    if n <= best[0]:
      break
    memory = compile_rows(n * split, prompt, new)[0].memory
    if memory.fits:
      best = n, memory.total
    if memory.fits and memory.total > 0.9 * hbm:
      break
    slope = (memory.total - line[1]) / (n - line[0]) if n != line[0] else memory.total / n
    n, line = int((FILL * hbm - memory.total) / max(slope, 1) + n), (n, memory.total)
  return {'largest_batch': best[0] * split, 'largest_batch_bytes_per_device': best[1]}

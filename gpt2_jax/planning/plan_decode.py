"""Generation for devices that are not there: the compiled reading of prompts, and one more token."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from gpt2_jax.core.chips import HBM
from gpt2_jax.core.errors import UserError, brief
from gpt2_jax.decoding.device_loop import Request, Rules, Sample, advance, start
from gpt2_jax.decoding.from_options import make_processors
from gpt2_jax.decoding.generation_mesh import generation_mesh
from gpt2_jax.decoding.options import Options
from gpt2_jax.decoding.row_state import Endings, History
from gpt2_jax.model import text_batches
from gpt2_jax.model.config import Config, GPTConfig
from gpt2_jax.model.decode_layout import for_decoding
from gpt2_jax.model.gpt2 import make_params
from gpt2_jax.model.sizes import flops_per_token, num_params
from gpt2_jax.parallel.sharding import BATCH, P, on_devices, reshard
from gpt2_jax.planning.compile_ahead import Compiled, bytes_of, compile_for, describe, report
from gpt2_jax.planning.report import Report
from gpt2_jax.planning.topology import Topology
from gpt2_jax.training.run_model import make_model

# of a config that sets none
OPEN_MESH = dict(data=None, fsdp=-1, seq=1, tensor=1, slices_over='data')
FILL = 0.97  # share of the memory that the largest batch should take
TOKENS = 128  # of a prompt, and new ones, where the user says nothing
TRIES = 3  # the most compilations to find the largest batch


@dataclasses.dataclass(frozen=True)
class Texts:
  """What is written at a time: so many texts on all devices, each with a prompt of so many tokens and
  room for so many `new` ones.
  """

  rows: int
  prompt: int
  new: int

  def cache_bytes(self, config: GPTConfig) -> int:
    """Returns the bytes of their keys and values, on all devices."""
    values = 2 * config.n_layer * config.n_embd * self.rows * (self.prompt + self.new)
    return values * jnp.dtype(config.dtype).itemsize


@dataclasses.dataclass(frozen=True)
class AskedTexts:
  """The numbers of `Texts` that a user gives; None: the default."""

  batch: int | None = None  # default: a text for each part that the mesh splits the batch in
  prompt: int | None = None  # default: 128, or what a smaller context has
  new: int | None = None  # default: likewise

  def texts(self, model: GPTConfig, split: int) -> Texts:
    """Returns all numbers, for a model on a mesh that splits the batch in so many parts.

    Raises:
      UserError: the batch can't be split so, or the model has too few positions.
    """
    rows = split if self.batch is None else self.batch
    if rows < 1 or rows % split:
      raise UserError(f'--batch {rows} must be a multiple of mesh.data·mesh.fsdp = {split}.')
    return Texts(rows, *lengths(model.n_positions, self.prompt, self.new))


def abstract_params(config: GPTConfig) -> tuple[GPTConfig, Any]:
  """Returns config and parameters in the form 'decode', abstract, on the mesh that is set."""
  made = {}

  def make():
    made['config'], params = for_decoding(config, make_params(config, 0))
    return params

  params = on_devices(jax.eval_shape(make))
  return made['config'], params


def abstract_request(config: GPTConfig, texts: Texts) -> Request:
  """Returns an abstract request for texts, a row each, as `decoding.driver` makes it."""
  options, eos = Options(), np.zeros(1, np.int32)

  def zeros(*shape: int):
    spec = P(BATCH, *(None for _ in shape))
    return reshard(jnp.zeros((texts.rows, *shape), jnp.int32), spec)

  def make():
    processors = make_processors(options, V=config.vocab_size, eos=eos, ends=eos)
    size = text_batches.bucket(texts.prompt, 1 << 30) + texts.new
    history = History(zeros(size), *(zeros() for _ in range(8)))
    return Request(
      zeros(texts.prompt),
      zeros(),
      history,
      zeros(),
      jax.random.key(0),
      Rules(processors, Endings(jnp.asarray(eos))),
    )

  return on_devices(jax.eval_shape(make))


def compile_decode(
  topology: Topology, mesh, config: GPTConfig, mode: str, texts: Texts, dump: Path | None = None
) -> tuple[Compiled, dict[str, int]]:
  """Compiles the reading of prompts ('prefill') or the loop of new tokens ('decode').

  Returns:
    The program, and the bytes of the weights and of the cache on one device.
  """
  search = Sample()
  with jax.set_mesh(mesh):
    config, params = abstract_params(config)
    request = abstract_request(config, texts)
    sizes = dict(N=texts.new, K=0)

    def begin(params, request):
      return start(config, params, search, request, **sizes)[0]

    state = on_devices(jax.eval_shape(begin, params, request))
    parts = {'weights': bytes_of(params), 'cache': bytes_of(state.cache)}
    if mode == 'prefill':
      build = lambda: start.lower(config, params, search, request, **sizes).compile()
      arguments = params, request
    else:
      until = on_devices(jax.eval_shape(lambda: jnp.zeros((), jnp.int32)))
      build = lambda: advance.lower(config, params, search, request, state, until).compile()
      arguments = params, request, state
    return compile_for(topology, mesh, build, arguments, dump, one_turn=mode == 'decode'), parts


def lengths(S: int, prompt: int | None, new: int | None) -> tuple[int, int]:
  """Returns how many tokens of a text are read and written, as they are compiled, by a model of S
  positions.

  Raises:
    UserError: the model has too few positions.
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
  return text_batches.bucket(prompt, S), text_batches.bucket(new, S)


def plan_decode(
  config: Config,
  topology: Topology,
  name: str,
  mode: str,
  asked: AskedTexts = AskedTexts(),
  *,
  dump: Path | None = None,
  largest: bool = True,
) -> Report:
  """Compiles generation with a config's model for a topology.

  Args:
    config: its model is used, and its mesh where it sets one; else `generation_mesh`.
    topology: the devices to compile for.
    name: of the config, for the report.
    mode: 'decode', one token more in each row, or 'prefill', the prompts and the first token.
    asked: how many texts, and of how many tokens.
    dump: a file for the compiled program.
    largest: whether to look for the largest batch that fits as well: one compilation more, or two.

  Raises:
    UserError: the model does not fit the mesh, or the texts the model.
  """
  _, _, model, mesh = make_model(config, topology.devices)
  if dict(config.mesh) == OPEN_MESH:
    mesh = generation_mesh(model, topology.devices)
  if model.head != 'lm':
    raise UserError(f'a model with model.head = {model.head} does not write.')
  texts = asked.texts(model, mesh.shape['data'] * mesh.shape['fsdp'])
  compile_texts = functools.partial(compile_decode, topology, mesh, model, mode)
  compiled, parts = compile_texts(texts, dump)
  tokens = texts.rows if mode == 'decode' else texts.rows * texts.prompt
  forward = flops_per_token(model, texts.prompt) // 3
  made = report(
    topology,
    mesh,
    compiled,
    mode=mode,
    config=name,
    flops=forward * tokens / mesh.size,
    model=describe(model),
    batch=f'{texts.rows} texts of {texts.prompt} tokens, with room for {texts.new} more',
    numbers=dict(parameters=num_params(model)) | dataclasses.asdict(texts),
  )
  results: dict[str, float] = {
    'kv_cache_bytes': texts.cache_bytes(model),
    'kv_cache_bytes_per_device': parts['cache'],
    'weight_bytes_per_device': parts['weights'],
  }
  if made.times is not None:
    results |= {'tokens_per_second': tokens / made.times.total}
    if mode == 'decode':
      # a device reads all weights of its part of the tensor axis: its own and those it gathers
      read = parts['weights'] * mesh.shape['fsdp'] + parts['cache']
      results |= {
        'ms_per_token': made.times.total * 1e3,
        'ms_to_read_weights_and_cache': read / (HBM * topology.chip.hbm_bandwidth) * 1e3,
      }
  if largest:
    results |= _largest(compile_texts, compiled, parts, texts, mesh, model)
  return dataclasses.replace(made, results=results)


def _largest(
  compile_texts: Callable[[Texts], tuple[Compiled, dict[str, int]]],
  compiled: Compiled,
  parts: dict[str, int],
  texts: Texts,
  mesh: Mesh,
  model: GPTConfig,
) -> dict[str, float]:
  """Returns the largest batch that fits among those it compiles: the first one's size follows from
  known bytes, that of each later one from the line through the last two.

  Args:
    compile_texts: compiles texts as `compile_decode` does.
    compiled, parts: what it made of `texts`.
  """
  hbm, split = compiled.memory.hbm, mesh.shape['data'] * mesh.shape['fsdp']
  n = texts.rows // split  # rows of a device
  # a row's cache; in float32 its logits, their copy and the processed scores
  row_bytes = parts['cache'] / n + 3 * 4 * model.padded_vocab_size / mesh.shape['tensor']
  best = (n, compiled.memory.total) if compiled.memory.fits else (0, 0)
  last = n, compiled.memory.total
  n = max(1, int((FILL * hbm - parts['weights'] - compiled.memory.code) / row_bytes))
  for _ in range(TRIES):
    if n <= best[0]:
      break
    memory = compile_texts(dataclasses.replace(texts, rows=n * split))[0].memory
    if memory.fits:
      best = n, memory.total
    if memory.fits and memory.total > 0.9 * hbm:
      break
    slope = (memory.total - last[1]) / (n - last[0]) if n != last[0] else memory.total / n
    n, last = int((FILL * hbm - memory.total) / max(slope, 1) + n), (n, memory.total)
  return {'largest_batch': best[0] * split, 'largest_batch_bytes_per_device': best[1]}

"""The model of a run, by its config: what it begins with, its tokenizer, its sizes and its mesh."""

import contextlib
import dataclasses
from pathlib import Path

import jax
from jax.sharding import Mesh

from gpt2_jax.checkpoints.opening import Opening
from gpt2_jax.checkpoints.pretrained import open_source
from gpt2_jax.checkpoints.tensors import Source
from gpt2_jax.core.errors import UserError
from gpt2_jax.core.files import whole
from gpt2_jax.data import labelled_texts
from gpt2_jax.model.config import Config, GPTConfig, LoRA
from gpt2_jax.parallel import sharding
from gpt2_jax.tokenizer import bpe
from gpt2_jax.training import knobs, longer_context, memory_estimate

# Fields of the model that may change between two starts of a run: they don't change what it is.
FREE = (
  'dtype',
  'remat',
  'scan_layers',
  'attention',
  'reduce_dtype',
  'embd_pdrop',
  'attn_pdrop',
  'resid_pdrop',
)


def _tokenizer(config: Config, source: Source | None) -> str:
  """Returns the spec of the tokenizer: as the config says, or the source's own, kept in a folder."""
  if config.data.tokenizer is not None or source is None:
    return config.data.tokenizer or 'gpt2'
  if source.tokenizer is None:
    raise UserError(f'{source.where} has no tokenizer that can be used: set config.data.tokenizer.')
  if (spec := spec_of(config, source.tokenizer)) == 'gpt2':
    return spec
  folder = Path(spec)
  try:
    with whole(folder) as path:
      source.tokenizer.save(path)
  except (OSError, UserError):
    if not folder.exists():  # else it is there already, by an earlier run or another process
      raise
  return str(folder)


def spec_of(config: Config, own: bpe.Tokenizer) -> str:
  """Returns the spec of a loaded model's own tokenizer: 'gpt2', or a folder of the run's data."""
  with contextlib.suppress(UserError):  # GPT-2's own may not be at hand
    if own.sha256 == bpe.load('gpt2').sha256:
      return 'gpt2'  # so that its stores are found
  return str(Path(config.data.directory) / 'tokenizers' / own.sha256[:16])


def _model(
  config: Config, source: Source | None, spec: str, platform: str, held: int | None
) -> GPTConfig:
  """Returns the model as the config says: new, or the source's with what a run may choose anew."""
  fields, rows = dict(config.model), config.data.sequence_length
  if fields['dtype'] == 'auto':
    fields['dtype'] = 'float32' if platform == 'cpu' else 'bfloat16'
  if fields['remat'] == 'auto':  # until the batch is known: see `memory_estimate.fitted`
    fields['remat'] = 'none'
  if fields['scan_layers'] is None:
    fields['scan_layers'] = platform != 'gpu'
  lora = dict(config.lora)
  fields['lora'] = LoRA(**lora) if lora['r'] else None
  if fields['head'] == 'token_classification':
    raise UserError('model.head = token_classification can be loaded and converted, not trained.')
  if fields['head'] == 'sequence_classification':
    fields['num_labels'] = len(labelled_texts.label_names(config.data))
  if source is None:
    if fields['lora']:
      raise UserError('lora.r trains adapters of a model that is there: say which, in init_from.')
    if fields['vocab_size'] is None:
      fields['vocab_size'] = bpe.vocab_size(spec)
    fields['n_positions'] = longer_context.context(fields['n_positions'], rows, None, held)
    return GPTConfig(**fields)
  free = [*FREE, 'vocab_multiple', 'head', 'lora', 'num_labels']  # what a run may choose anew
  other = {
    k: v
    for k, v in fields.items()
    if k not in free and v is not None and v != getattr(source.config, k)
  }
  if other.keys() == {'n_positions'} and other['n_positions'] > source.config.n_positions:
    free.append('n_positions')  # a longer context: see `longer_context.stretched`
    given = source.config.n_positions
    fields['n_positions'] = longer_context.context(other['n_positions'], rows, given, held)
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
  """Returns what a config begins with, the spec of its tokenizer, its model and its mesh.

  Arguments are those of `plan.make_plan`.

  Raises:
    UserError: they don't go together.
  """
  knobs.check(config)
  opening = Opening(config.init_base, config.init_ignore_extra)
  source = open_source(config.init_from, opening) if config.init_from else None
  spec = _tokenizer(config, source)
  devices = list(jax.devices() if devices is None else devices)
  model = _model(config, source, spec, devices[0].platform, held)
  mesh = memory_estimate.choose_mesh(config, model, devices)
  sharding.check_divisible(mesh, model.divisible())
  return source, spec, model, mesh

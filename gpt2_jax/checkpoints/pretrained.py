"""Models from wherever they are kept, and back.

model = gpt2_jax.from_pretrained('gpt2')
gpt2_jax.save_pretrained(model, 'out/')
"""

import contextlib
import dataclasses
import os
import sys
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from gpt2_jax.checkpoints import hub, workdir
from gpt2_jax.checkpoints.format_table import FORMATS, recognise, written
from gpt2_jax.checkpoints.formats import mup, peft
from gpt2_jax.checkpoints.opening import PLAIN, Opening
from gpt2_jax.checkpoints.tensors import Source, load_params, source_of
from gpt2_jax.core import buckets
from gpt2_jax.core.bounds import DType, Place
from gpt2_jax.core.buckets import AnyPath
from gpt2_jax.core.errors import UserError, brief
from gpt2_jax.core.files import whole
from gpt2_jax.model.config import DTYPES
from gpt2_jax.model.gpt2 import bind
from gpt2_jax.model.pretrained_model import Model, Pretrained, params_of
from gpt2_jax.parallel import sharding
from gpt2_jax.tokenizer import bpe


def open_source(source: str | os.PathLike, opening: Opening = PLAIN) -> Source:
  """Opens a checkpoint of any kind, recognised by its content. Tensors are read later, one at a time.

  Args:
    source: on a disk or in a bucket (gs://…, s3://…): the workdir of a run, `DIR`, or one of its kept
      steps, `DIR@1200`, `DIR@best` or `DIR@latest`; a folder of Hugging Face's (safetensors or .bin,
      the removed Flax one, or PEFT's adapters), of OpenAI's release or of nanoGPT; a file of nanoGPT
      or llm.c; or a name on the Hugging Face hub, `NAME` or `NAME@REVISION`.
    opening: how it is opened.

  Raises:
    UserError: it is none of these, or names what about it can't be read or honoured.
  """
  path, step = workdir.split_step(Place().check('source', source))
  if step is not None:
    if opening.step not in (None, step):
      raise UserError(
        f'{source} names a step, and step = {brief(opening.step)} another: say it once.'
      )
    opening = dataclasses.replace(opening, step=step)
  return _open(str(source) if step is None else path, opening, ())


def _open(source: str | os.PathLike, opening: Opening, above: tuple[Path, ...]) -> Source:
  """`above`: the adapters whose base this is."""
  path = buckets.place(Place().check('source', source))  # of a base, perhaps
  if not isinstance(path, Path) and not workdir.recognises(path):
    opened = _open(buckets.fetched(path), opening, above)
    return dataclasses.replace(opened, where=str(path))
  if not path.exists():
    if not hub.is_name(str(source)):
      raise UserError(f'{str(source)[:300]} is neither a file or folder here nor a name of the hub.')
    opened = _open(hub.fetch(str(source)), opening, above)
    return dataclasses.replace(opened, where=str(source))
  name = recognise(path)
  if opening.step is not None and name != 'workdir':
    raise UserError(
      f'{source} is no workdir of a run, so that it has no steps to choose from: leave '
      f'step = {brief(opening.step)} out.'
    )
  if opening.base is not None and name != 'peft' and not _same_place(opening.base, path):
    raise UserError(
      f"{source} is no folder of PEFT's adapters (adapter_config.json), so that it "
      f'has no base: leave base = {brief(opening.base)} out.'
    )
  if name is None:
    there = sorted(p.name for p in path.iterdir())[:8] if path.is_dir() else 'a file'
    wanted = '; '.join(each.known_by for each in FORMATS.values() if each.known_by)
    raise UserError(
      f'{path} holds no checkpoint that can be read (there is: {there or "nothing"}). '
      f'Wanted: {wanted}.'
    )
  if name == 'peft' and isinstance(path, Path):
    return _adapters(path, opening, above)
  return FORMATS[name].module.open_source(path, opening)


def _adapters(path: Path, opening: Opening, above: tuple[Path, ...]) -> Source:
  """Opens PEFT's adapters and the model that they belong to, which may be of any format."""
  if path.resolve() in above:
    raise UserError(f'{path}: these adapters name themselves as the model that they belong to.')

  def open_base(name: str) -> Source:
    base, step = workdir.split_step(name)
    inner = Opening(ignore_extra=opening.ignore_extra, step=step)
    return _open(name if step is None else base, inner, (*above, path.resolve()))

  return peft.open_source(path, open_base, opening.base)


def _same_place(name: str, path: AnyPath) -> bool:
  """Whether a base is the model itself, of several that are opened alike."""
  other = buckets.place(name)
  return other.exists() and other.resolve() == path.resolve()


def from_pretrained(
  source: str | os.PathLike,
  *,
  mesh: Mesh | None = None,
  dtype: Any = None,
  step: int | str | None = None,
  base: str | None = None,
  ignore_extra: bool = False,
) -> Pretrained:
  """Returns a model from anything that `open_source` reads.

  Args:
    source: where from.
    mesh: to lay the parameters out on, each device getting its shard only. Default: the mesh that
      is set (`jax.set_mesh`), or one device.
    dtype: of parameters and activations, float32 or bfloat16, as `jnp.dtype` takes it. Default:
      float32; for a run's workdir, that of the run.
    step: which checkpoint of a run: a kept step, 'latest', or 'best', that of the lowest held-out
      loss. Default: what the run offers.
    base: the model that adapters belong to, in place of the one that they name.
    ignore_extra: whether to take the language model alone from a file with more in it, other heads
      for instance. What is left out is listed.

  Returns:
    The model, with its tokenizer as `model.tokenizer` (None where there is none that we can use).
    Adapters stay apart from the weights that they belong to: see `merge_adapters`. Of a run with
    `optim.ema_decay` it has the moving average of the parameters; of one that stops early, those of
    its best step.

  Raises:
    UserError: names what about it can't be read or honoured.
  """
  dtype = None if dtype is None else DType(DTYPES).check('dtype', dtype)
  opened = open_source(source, Opening(base, ignore_extra, step))
  with jax.set_mesh(mesh) if mesh is not None else contextlib.nullcontext():
    return _model(opened, dtype)


def open_model(
  checkpoint: str, spec: str | None, opening: Opening, *, needs_tokenizer: bool = True, **options
) -> Pretrained:
  """Returns a model as the command line names it: --checkpoint, --tokenizer, --base, --ignore-extra.

  Args:
    checkpoint: what `from_pretrained` reads, as are `options`.
    spec: of a tokenizer in the place of the checkpoint's own: gpt2, byte, or a folder. That it is
      another one is said on standard error.
    opening: how it is opened.
    needs_tokenizer: whether to have none is an error.
  """
  model = from_pretrained(checkpoint, **vars(opening), **options)
  if spec is not None:
    own, model.tokenizer = model.tokenizer, bpe.load(spec)
    if own is not None and own.sha256 != model.tokenizer.sha256:
      print(
        f'--tokenizer {spec} (sha256 {model.tokenizer.sha256[:16]}) is taken in place of the one '
        f'that {checkpoint} was trained with (sha256 {own.sha256[:16]})',
        file=sys.stderr,
      )
  if needs_tokenizer and model.tokenizer is None:
    raise UserError(f'{checkpoint} brings no tokenizer: name one with --tokenizer.')
  return model


def _model(source: Source, dtype: str | None = None) -> Pretrained:
  config = source.config if dtype is None else dataclasses.replace(source.config, dtype=dtype)
  if sharding.in_mesh():
    sharding.check_divisible(jax.sharding.get_mesh(), config.divisible())
  return Pretrained(bind(config, load_params(source, dtype or 'float32')), source.tokenizer, source)


def _source(model: Pretrained) -> Source:
  """Returns a model's parameters as they are now, with what is known of where it is from."""
  params = params_of(model)
  made = source_of(model.config, params, 'this model', tokenizer=model.tokenizer)
  if model.source is None:
    return made
  return dataclasses.replace(
    model.source, config=model.config, read=made.read, load=None, tokenizer=model.tokenizer
  )


def merge_adapters(model: Model) -> Pretrained:
  """Returns the same model with its LoRA adapters added into its weights. `model` stays as it is."""
  source = _source(Pretrained.of(model))
  with sharding.mesh_of(params_of(model)):
    return _model(peft.merged(source.astype('float32')), model.config.dtype)


def save_pretrained(
  model: Model, folder: str | os.PathLike, *, to: str = 'hf', dtype: Any = None, **options
) -> None:
  """Writes a model, in Hugging Face's format unless `to` says otherwise.

  Args:
    model: the model.
    folder: a new folder, or a new file where the format is one (`format_table.FORMATS`).
    to: a format that is written. Adapters are merged into the weights, but for 'peft', which has them
      only.
    dtype: of the tensors: float32, bfloat16 or float16, as `jnp.dtype` takes it. Default:
      as in the file that the model is from, so that nothing is lost.
    **options: of the format: `max_shard_size` of 'hf', in bytes, default 5 GB.

  Raises:
    UserError: the place is taken, or the format can't express this model; nothing is written.
  """
  with sharding.mesh_of(params_of(model)):
    write(_source(Pretrained.of(model)), folder, to, dtype=dtype, **options)


def write(
  source: Source, target: str | os.PathLike, to: str, *, dtype: Any = None, **options
) -> None:
  """Writes an opened checkpoint, as `save_pretrained` does; `options` are those of the format."""
  format = FORMATS.get(to)
  if format is None or format.writes is None:
    raise UserError(f'format {to!r} is none of {", ".join(written())}.')
  if other := sorted(options.keys() - format.options.keys()):
    raise UserError(f'{", ".join(other)}: no option of the format {to!r}.')
  if dtype is not None:
    source = source.astype(dtype)
  if not format.keeps_adapters:
    source = mup.folded(peft.merged(source))
  with whole(target) as path:
    format.module.write(source, path, **options)

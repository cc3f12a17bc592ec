"""Hugging Face's folders, both ways: config.json, weights, tokenizer files, model card.

Tensor names and shapes are those of `tensors.py`; a `GPT2Model` has them as they stand there, the
models with a head have them behind `transformer.`.
"""

import dataclasses
import functools
import json
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gpt2_jax.checkpoints import foreign
from gpt2_jax.checkpoints.formats import safetensors_files, torch_files
from gpt2_jax.checkpoints.formats.huggingface_config import (
  KEPT_KEYS,
  NEUTRAL_KEYS,
  config_from_dict,
  config_to_dict,
  generation_keys,
)
from gpt2_jax.checkpoints.model_card import model_card
from gpt2_jax.checkpoints.opening import PLAIN, Opening
from gpt2_jax.checkpoints.tensors import (
  Source,
  Tensor,
  check_tensors,
  common_dtype,
  full_name,
  shapes,
)
from gpt2_jax.core.errors import UserError
from gpt2_jax.core.files import check_place, read_json, unreadable
from gpt2_jax.tokenizer import bpe

WEIGHTS = (
  'model.safetensors',
  'model.safetensors.index.json',
  'pytorch_model.bin',
  'pytorch_model.bin.index.json',
)
TOKENIZER = (
  'tokenizer.json',
  'vocab.json',
  'merges.txt',
  'tokenizer_config.json',
  'special_tokens_map.json',
  'added_tokens.json',
)
MAX_SHARD_SIZE = 5_000_000_000  # bytes


def recognises(path: Path) -> bool:
  return (path / 'config.json').is_file() and any((path / name).is_file() for name in WEIGHTS)


def open_source(path: Path, opening: Opening = PLAIN) -> Source:
  """Opens a folder as `save_pretrained` of any version of transformers leaves it.

  Names of tensors may have any prefix.

  Raises:
    UserError: names the file, and what about it can't be read or honoured.
  """
  keys = read_json(path / 'config.json')
  found = {name: path / name for name in WEIGHTS if (path / name).is_file()}
  name, file = next(iter(found.items()))
  tensors = _indexed(path, file) if name.endswith('.index.json') else _tensors(file)
  return assemble(path, keys, tensors, opening)


def assemble(
  path: Path, keys: Mapping[str, Any], tensors: dict[str, Tensor], opening: Opening
) -> Source:
  """Returns a `Source` of a folder from its config.json and its tensors."""
  config = config_from_dict(keys, f'{path / "config.json"}')
  tensors = {name: tensors[full] for full, name in foreign.plain_names(tensors, path).items()}
  if head := foreign.head_of(tensors):
    config = dataclasses.replace(config, head=head[0], num_labels=head[1])
  if config.head != 'lm' or config.tie_word_embeddings:
    _drop_tied_head(path, tensors)
  tensors = foreign.narrowed(foreign.without_extra(config, tensors, path, opening), path)
  check_tensors(config, {name: tensor.shape for name, tensor in tensors.items()}, path)
  generation = path / 'generation_config.json'
  kept = {k: v for k, v in keys.items() if k in NEUTRAL_KEYS or k in KEPT_KEYS}
  if config.vocab_size > 50256:  # what transformers takes where the file is silent
    kept = {'bos_token_id': 50256, 'eos_token_id': 50256} | kept
  return Source(
    config,
    lambda name: tensors[name].read(),
    common_dtype(tensors.values(), path),
    str(path),
    tokenizer=load_tokenizer(path),
    keys=kept,
    generation=generation_keys(generation),
  )


def _drop_tied_head(path: Path, tensors: dict[str, Tensor]) -> None:
  """Drops `lm_head.weight` where it only repeats `wte.weight`, as old .bin files do."""
  head, wte = tensors.pop('lm_head.weight', None), tensors.get('wte.weight')
  if head and wte and not np.array_equal(head.read(), wte.read()):
    raise UserError(
      f'{path}: lm_head.weight differs from wte.weight, but config.json ties them '
      '(tie_word_embeddings, true by default). Write false there to use both.'
    )


def load_tokenizer(path: Path) -> bpe.Tokenizer | None:
  """Returns the tokenizer of a folder; None, with a warning, where it has one that we can't use."""
  if not any((path / name).is_file() for name in TOKENIZER[:3]):
    return None
  try:
    return bpe.load(path)
  except UserError as e:
    warnings.warn(
      f'the model is used without its tokenizer, with ids instead of texts: {e}', stacklevel=2
    )
    return None


def _indexed(folder: Path, index: Path) -> dict[str, Tensor]:
  """Reads the tensors of a sharded checkpoint."""
  weight_map = read_json(index).get('weight_map')
  if not isinstance(weight_map, dict) or not weight_map:
    raise unreadable(index, 'it has no weight_map')
  shards = {}
  for name in sorted(set(map(str, weight_map.values()))):
    if not re.fullmatch(r'[\w\-.]+', name) or name.startswith('.'):
      raise UserError(f"{index} names a file outside of its folder: {name!r}. It can't be trusted.")
    shards[name] = _tensors(folder / name)
  tensors = {}
  for name, shard in weight_map.items():
    if name not in shards[shard]:
      raise unreadable(folder / shard, f'it lacks {name}, which {index.name} promises')
    tensors[name] = shards[shard][name]
  if extra := sorted(set().union(*shards.values()) - weight_map.keys()):
    raise unreadable(index, f'it does not list {extra[0]}, which a shard has')
  return tensors


def _tensors(path: Path) -> dict[str, Tensor]:
  """Returns the tensors of a file, which are read later."""
  check_place(path)
  if path.suffix == '.safetensors':
    return safetensors_files.read(path)
  state = torch_files.read(path)
  if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
    raise unreadable(path, 'it holds no state dict')
  return state


def write(source: Source, target: Path, *, max_shard_size: int = MAX_SHARD_SIZE) -> None:
  """Writes a folder that `transformers` loads: config, weights, tokenizer, model card.

  Args:
    source: the model.
    target: the folder, not there yet.
    max_shard_size: bytes of a weights file; a single tensor may be larger.
  """
  target.mkdir()
  config = config_to_dict(source)
  generation = dict(source.generation) or {
    '_from_model_config': True,
    'bos_token_id': config['bos_token_id'],
    'eos_token_id': config['eos_token_id'],
    'pad_token_id': config['pad_token_id'],
  }
  for name, value in (('config.json', config), ('generation_config.json', generation)):
    (target / name).write_text(json.dumps(value, indent=2, ensure_ascii=False) + '\n', 'utf-8')
  if source.tokenizer is not None:
    source.tokenizer.save(target, model_max_length=source.config.n_positions)
  (target / 'README.md').write_text(model_card(source), encoding='utf-8')

  tensors = {}
  for name, shape in shapes(source.config).items():
    read = functools.partial(source.tensor, name)
    tensors[full_name(name)] = Tensor(shape, source.dtype, read)
  shards: list[dict[str, Tensor]] = [{}]
  for name, tensor in tensors.items():
    if shards[-1] and sum(t.nbytes for t in shards[-1].values()) + tensor.nbytes > max_shard_size:
      shards.append({})
    shards[-1][name] = tensor
  if len(shards) == 1:
    safetensors_files.write(target / 'model.safetensors', tensors)
    return
  weight_map, size = {}, 0
  for i, shard in enumerate(shards):
    file = f'model-{i + 1:05d}-of-{len(shards):05d}.safetensors'
    size += safetensors_files.write(target / file, shard)
    weight_map |= dict.fromkeys(shard, file)
  parameters = sum(int(np.prod(tensor.shape)) for tensor in tensors.values())
  (target / 'model.safetensors.index.json').write_text(
    json.dumps(
      {'metadata': {'total_parameters': parameters, 'total_size': size}, 'weight_map': weight_map},
      indent=2,
    )
    + '\n'
  )

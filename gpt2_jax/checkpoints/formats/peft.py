"""LoRA adapters as PEFT keeps them: adapter_config.json and adapter_model.safetensors, both ways, or
the older adapter_model.bin.

PEFT's A is [r, in] and its B [out, r]; modules that were trained as a whole, such as a classification
head, stand beside them.
"""

import dataclasses
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gpt2_jax.checkpoints import foreign
from gpt2_jax.checkpoints.formats import huggingface, peft_config, safetensors_files, torch_files
from gpt2_jax.checkpoints.tensors import (
  Source,
  Tensor,
  adapter_shapes,
  check_shapes,
  common_dtype,
  full_name,
  shapes,
)
from gpt2_jax.core.errors import UserError, brief
from gpt2_jax.core.files import check_place, read_json, unreadable
from gpt2_jax.model.config import GPTConfig

CONFIG, FILE, BIN = 'adapter_config.json', 'adapter_model.safetensors', 'adapter_model.bin'
PREFIX = 'base_model.model.'
HEADS = {'score.weight': 'sequence_classification', 'classifier.weight': 'token_classification'}
TASKS = {'lm': 'CAUSAL_LM', 'sequence_classification': 'SEQ_CLS', 'token_classification': 'TOKEN_CLS'}
EMBEDDINGS = ('wte.weight', 'lm_head.weight')


def recognises(path: Path) -> bool:
  return (path / CONFIG).is_file() and any((path / name).is_file() for name in (FILE, BIN))


def open_source(path: Path, open_base: Callable[[str], Source], base: str | None = None) -> Source:
  """Opens adapters and the model that they belong to, and keeps them apart.

  Modules without adapters, where others of their kind have some, have B = 0; those of a lower rank
  are filled up with zeros; those of another scale have it in B. Modules that were saved beside the
  adapters stand in place of the model's.

  Args:
    path: the adapters' folder.
    open_base: opens the model that they belong to.
    base: its name, in place of the one in adapter_config.json.

  Raises:
    UserError: names what can't be read or honoured.
  """
  keys = read_json(path / CONFIG)
  peft_config.check(path / CONFIG, keys)
  name = base or _base_name(path / CONFIG, keys)
  model = merged(_open_base(path / CONFIG, name, open_base, given=base is not None))
  file, tensors = _tensors(path)
  root = 'transformer.' if any(key.startswith('transformer.') for key in tensors) else ''
  adapted = peft_config.adapted(path / CONFIG, keys, model.config.n_layer, root)
  tensors = {key.removeprefix(root): tensor for key, tensor in tensors.items()}
  adapters = {
    key.removesuffix('.weight'): tensor for key, tensor in tensors.items() if '.lora_' in key
  }
  saved = {
    key: tensor
    for key, tensor in tensors.items()
    if '.lora_' not in key and not foreign.MASK.fullmatch(key)
  }
  config = dataclasses.replace(model.config, lora=adapted.lora)
  config, saved = _with_saved(file, keys, root, config, saved)
  check_shapes(
    _want(config, adapted, saved),
    {key: tensor.shape for key, tensor in (adapters | saved).items()},
    file,
  )
  dtype = common_dtype((adapters | saved).values(), file)
  return dataclasses.replace(
    model,
    config=config,
    where=str(path),
    base=name,
    read=_reader(config, model, adapted, adapters, saved),
    load=None,
    replaced=tuple(saved),
    dtype=dtype if dtype == model.dtype and adapted.uniform else 'float32',
    tokenizer=huggingface.load_tokenizer(path) or model.tokenizer,
  )


def _reader(
  config: GPTConfig,
  model: Source,
  adapted: peft_config.Adapted,
  adapters: Mapping[str, Tensor],
  saved: Mapping[str, Tensor],
) -> Callable[[str], np.ndarray]:
  """Returns a function that reads a tensor: of the adapters, beside them, or the model's own."""
  wanted = adapter_shapes(config)
  r, first = adapted.lora.r, adapted.lora.alpha / adapted.lora.r

  def read(key: str) -> np.ndarray:
    if key in saved:
      return saved[key].read()
    if '.lora_' not in key:
      tied = key == 'lm_head.weight' and model.config.tie_word_embeddings
      return model.read('wte.weight' if tied else key)
    module = key.rpartition('.')[0]
    if module not in adapted.ranks:
      return np.zeros(wanted[key], np.float32)
    tensor = adapters[key].read()
    if adapted.uniform:
      return tensor
    more = r - adapted.ranks[module]
    if key.endswith('A'):
      return np.pad(tensor, ((0, more), (0, 0)))
    factor = np.float32(adapted.scales[module] / first if first else 0)
    return np.pad(tensor.astype(np.float32) * factor, ((0, 0), (0, more)))

  return read


def _base_name(where: Path, keys: Mapping[str, Any]) -> str:
  """Returns the model that adapter_config.json names, with its revision."""
  name, revision = keys.get('base_model_name_or_path'), keys.get('revision')
  if not name or not isinstance(name, str):
    raise UserError(
      f'{where} does not name the model that the adapters belong to: name it with '
      '--base (in Python base=, in a config init_base), or write its name or path '
      'there as base_model_name_or_path.'
    )
  return f'{name}@{revision}' if revision and '@' not in name and not os.path.exists(name) else name


def _open_base(where: Path, name: str, open_base: Callable[[str], Source], given: bool) -> Source:
  try:
    return open_base(name)
  except UserError as e:
    if given:
      raise
    raise UserError(
      f'{where} names {brief(name)} as the model that the adapters belong to: {e} If '
      'it is elsewhere now, name it with --base (in Python base=, in a config '
      'init_base).'
    ) from e


def _tensors(path: Path) -> tuple[Path, dict[str, Tensor]]:
  """Returns the file of the tensors, and these by PEFT's names without their common prefix."""
  file = path / (FILE if (path / FILE).is_file() else BIN)
  check_place(file)
  state = safetensors_files.read(file) if file.name == FILE else torch_files.read(file)
  if not isinstance(state, dict) or not all(
    isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()
  ):
    raise unreadable(file, 'it holds no state dict')
  return file, foreign.narrowed(
    {
      name.removeprefix(PREFIX).replace('.modules_to_save.', '.'): tensor
      for name, tensor in state.items()
    },
    file,
  )


def _with_saved(
  file: Path, keys: Mapping[str, Any], root: str, config: GPTConfig, saved: dict[str, Tensor]
) -> tuple[GPTConfig, dict[str, Tensor]]:
  """Returns the model's config with the modules that stand beside the adapters, and their tensors.

  One of two tied embeddings that was trained is no longer tied to the other: PEFT copies it, unless
  it is lm_head and ensure_weight_tying is set. Embeddings that were saved since they grew stay tied.
  """
  for name, head in HEADS.items():
    if name in saved and len(saved[name].shape) == 2:
      config = dataclasses.replace(config, head=head, num_labels=saved[name].shape[0])
  saved, there = dict(saved), [name for name in EMBEDDINGS if name in saved]
  if not there:
    return config, saved
  if config.head == 'lm' and config.tie_word_embeddings:
    modules = keys.get('modules_to_save') or ()
    trained = any(full.endswith(module) for module in modules for full in (f'{root}wte', 'lm_head'))
    tying = keys.get('ensure_weight_tying') and any(
      module.split('.')[-1] == 'lm_head' for module in modules
    )
    if trained and not tying:
      config = dataclasses.replace(config, tie_word_embeddings=False)
    elif len(there) == 2:
      if not np.array_equal(saved['wte.weight'].read(), saved.pop('lm_head.weight').read()):
        raise UserError(f'{file}: lm_head.weight differs from wte.weight, but the model ties them.')
    else:
      saved = {'wte.weight' if name in there else name: tensor for name, tensor in saved.items()}
  rows = {saved[name].shape[0] for name in EMBEDDINGS if name in saved and saved[name].shape}
  if rows != {config.vocab_size}:
    if len(rows) != 1 or (not config.tie_word_embeddings and len(there) < 2):
      raise UserError(
        f'{file}: {", ".join(there)} have {sorted(rows)} rows, but the model has a '
        f'vocabulary of {config.vocab_size:,}: it is not the one that they belong to.'
      )
    config = dataclasses.replace(config, vocab_size=rows.pop())
  return config, saved


def _want(
  config: GPTConfig, adapted: peft_config.Adapted, saved: Mapping[str, Tensor]
) -> dict[str, tuple[int, ...]]:
  """Returns {name: shape} of the tensors that a file must have.

  Those beside the adapters are optional, but for a head.
  """
  want = {}
  for name, shape in adapter_shapes(config).items():
    module, _, which = name.rpartition('.')
    if r := adapted.ranks.get(module):
      want[name] = (r, shape[1]) if which == 'lora_A' else (shape[0], r)
  return want | {
    name: shape
    for name, shape in shapes(config).items()
    if name in saved or name.startswith(('score.', 'classifier.'))
  }


def write(source: Source, target: Path) -> None:
  """Writes the adapters of a model, and what is not its base's, without the model."""
  lora, head = source.config.lora, source.config.head
  if lora is None:
    raise UserError(
      f'{source.where} has no adapters to write: train it with lora.r, or write the '
      'whole model with --to hf.'
    )
  target.mkdir()
  all_shapes, heads = shapes(source.config), ('score.', 'classifier.')
  beside = [name for name in all_shapes if name in source.replaced or name.startswith(heads)]
  modules = {full_name(name).rpartition('.')[0] for name in beside}
  if source.config.tie_word_embeddings:  # PEFT would take them apart
    modules -= {'transformer.wte', 'lm_head'}
  config: dict[str, Any] = {
    'peft_type': 'LORA',
    'task_type': TASKS[head],
    'r': lora.r,
    'lora_alpha': lora.alpha,
    'lora_dropout': lora.dropout,
    'target_modules': list(lora.target_modules),
    'bias': 'none',
    'fan_in_fan_out': True,
    'inference_mode': True,
    'base_model_name_or_path': source.base,
    'modules_to_save': sorted(modules) or None,
  }
  (target / CONFIG).write_text(json.dumps(config, indent=2) + '\n')
  adapters = {
    name: shape
    for name, shape in adapter_shapes(source.config).items()
    if full_name(name).rpartition('.')[0] not in modules
  }  # whose B is 0
  tensors = adapters | {name: all_shapes[name] for name in beside}
  safetensors_files.write(
    target / FILE,
    {
      PREFIX + full_name(name) + ('.weight' if 'lora_' in name else ''): Tensor(
        shape, source.dtype, lambda name=name: source.tensor(name)
      )
      for name, shape in tensors.items()
    },
  )


def merged(source: Source) -> Source:
  """Returns the same model without adapters: W + alpha/r · A·B in place of each W that has them."""
  lora = source.config.lora
  if lora is None:
    return source
  adapted = {name.removesuffix('.lora_A') for name in adapter_shapes(source.config)}

  def read(name: str) -> np.ndarray:
    tensor, module = source.read(name), name.removesuffix('.weight')
    if module not in adapted or not name.endswith('.weight'):
      return tensor
    A_RI, B_OR = (source.read(f'{module}.lora_{x}').astype(np.float32) for x in 'AB')
    return tensor.astype(np.float32) + np.float32(lora.alpha / lora.r) * (B_OR @ A_RI).T

  return dataclasses.replace(source, config=dataclasses.replace(source.config, lora=None), read=read)

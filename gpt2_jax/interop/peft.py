"""LoRA adapters as PEFT keeps them: adapter_config.json and adapter_model.safetensors, both ways.

PEFT's A is [r, in] and its B [out, r]; a classification head that was trained stands beside them.
"""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from gpt2_jax.config import LoRA
from gpt2_jax.errors import UserError, brief
from gpt2_jax.files import check_place, read_json
from gpt2_jax.interop import safetensors_files
from gpt2_jax.interop.tensors import Source, Tensor, adapter_shapes, check_shapes, common_dtype

CONFIG, FILE = 'adapter_config.json', 'adapter_model.safetensors'
PREFIX = 'base_model.model.'
HEADS = {'score.weight': 'sequence_classification', 'classifier.weight': 'token_classification'}
TASKS = {'lm': 'CAUSAL_LM', 'sequence_classification': 'SEQ_CLS', 'token_classification': 'TOKEN_CLS'}
USED = ('peft_type', 'r', 'lora_alpha', 'target_modules', 'lora_dropout', 'use_rslora',
        'base_model_name_or_path')
NEUTRAL = (  # for what is there: how it was begun, by which program, on which base
    'auto_mapping', 'inference_mode', 'init_lora_weights', 'peft_version', 'revision', 'task_type',
    'fan_in_fan_out', 'modules_to_save', 'ensure_weight_tying', 'corda_config', 'eva_config',
    'loftq_config', 'megatron_core', 'qalora_group_size')


def recognises(path: Path) -> bool:
  return (path / CONFIG).is_file() and (path / FILE).is_file()


def open_source(path: Path, open_base: Callable[[str], Source]) -> Source:
  """Adapters and the model that they belong to, kept apart.

  Args:
    path: the adapters' folder.
    open_base: opens the model that adapter_config.json names.

  Raises:
    UserError: names what can't be read or honoured.
  """
  keys = read_json(path / CONFIG)
  if keys.get('peft_type') != 'LORA':
    raise UserError(f'{path / CONFIG}: peft_type is {brief(keys.get("peft_type"))}; '
                    'LORA can be read.')
  unknown = {k: v for k, v in keys.items()
             if k not in USED and k not in NEUTRAL and v and (k, v) != ('bias', 'none')}
  targets = keys.get('target_modules')
  if isinstance(targets, str):
    unknown['target_modules'] = targets
  if unknown:
    raise UserError(f'{path / CONFIG} has keys that can\'t be honoured: {brief(unknown, 400)}.')
  base_name = keys.get('base_model_name_or_path')
  if not isinstance(base_name, str) or not base_name:
    raise UserError(f'{path / CONFIG} does not name the model that the adapters belong to: write '
                    'its name or path as base_model_name_or_path.')
  try:
    r, alpha = keys['r'], keys['lora_alpha']
    lora = LoRA(r, alpha * r**0.5 if keys.get('use_rslora') else alpha, tuple(sorted(targets or ())),
                keys.get('lora_dropout', 0.0))
  except (KeyError, TypeError, OverflowError) as e:
    raise UserError(f'{path / CONFIG} can\'t be read: {brief(e)}.') from e
  base = merged(open_base(base_name))
  check_place(path / FILE)
  tensors = safetensors_files.read(path / FILE)
  tensors = {name.removeprefix(PREFIX).removeprefix('transformer.').removesuffix('.weight')
             if 'lora_' in name else name.removeprefix(PREFIX): tensor
             for name, tensor in tensors.items()}
  config = dataclasses.replace(base.config, lora=lora)
  for name, head in HEADS.items():
    if name in tensors:
      config = dataclasses.replace(config, head=head, num_labels=tensors[name].shape[0])
  check_shapes(_shapes(config), {name: t.shape for name, t in tensors.items()}, path / FILE)
  dtype = common_dtype(tensors.values(), path / FILE)
  return dataclasses.replace(
      base, config=config, where=str(path), base=base_name,
      dtype=base.dtype if dtype == base.dtype else 'float32',
      read=lambda name: tensors[name].read() if name in tensors else base.read(name))


def _shapes(config) -> dict[str, tuple[int, ...]]:
  """Name -> shape of the tensors of an adapter file."""
  head = {'sequence_classification': {'score.weight': (config.num_labels, config.n_embd)},
          'token_classification': {'classifier.weight': (config.num_labels, config.n_embd),
                                   'classifier.bias': (config.num_labels,)}}
  return adapter_shapes(config) | head.get(config.head, {})


def write(source: Source, target: Path) -> None:
  """Writes the adapters of a model, without the model."""
  lora, head = source.config.lora, source.config.head
  if lora is None:
    raise UserError(f'{source.where} has no adapters to write: train it with lora.r, or write the '
                    'whole model with --to hf.')
  target.mkdir()
  config: dict[str, Any] = {
      'peft_type': 'LORA', 'task_type': TASKS[head], 'r': lora.r, 'lora_alpha': lora.alpha,
      'lora_dropout': lora.dropout, 'target_modules': list(lora.target_modules), 'bias': 'none',
      'fan_in_fan_out': True, 'inference_mode': True, 'base_model_name_or_path': source.base,
      'modules_to_save': {'sequence_classification': ['score'],
                          'token_classification': ['classifier']}.get(head)}
  (target / CONFIG).write_text(json.dumps(config, indent=2) + '\n')
  inner = lambda name: name if name.startswith(('score', 'classifier')) else f'transformer.{name}'
  safetensors_files.write(target / FILE, {
      PREFIX + inner(name) + ('.weight' if 'lora_' in name else ''):
          Tensor(shape, source.dtype, lambda name=name: source.tensor(name))
      for name, shape in _shapes(source.config).items()})


def merged(source: Source) -> Source:
  """The same model without adapters: W + alpha/r · A·B in place of each W that has them."""
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

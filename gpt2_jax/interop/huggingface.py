"""Hugging Face's GPT-2: its config keys and tensor names, both ways.

Tensor names are the parameters' paths, with `h.{i}` in place of the stacked `h`; shapes differ only
in that theirs merge axes (`c_attn.weight` is [D, 3·D], ours [D, C, N, H]). No tensor is transposed.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gpt2_jax.config import GPTConfig
from gpt2_jax.errors import UserError
from gpt2_jax.model import Params, make_params

OURS = ('init_scheme', 'vocab_multiple', 'dtype', 'remat')  # fields that their config has not
CONFIG_KEYS = tuple(f.name for f in dataclasses.fields(GPTConfig) if f.name not in OURS)
# Keys that don't change the numbers of a language model.
IGNORED_KEYS = frozenset((
    '_name_or_path', 'architectures', 'bos_token_id', 'chunk_size_feed_forward', 'dtype',
    'eos_token_id', 'gradient_checkpointing', 'id2label', 'is_encoder_decoder', 'label2id',
    'model_type', 'n_ctx', 'output_attentions', 'output_hidden_states', 'pad_token_id',
    'problem_type', 'return_dict', 'summary_activation', 'summary_first_dropout',
    'summary_proj_to_labels', 'summary_type', 'summary_use_proj', 'task_specific_params',
    'torch_dtype', 'transformers_version', 'use_cache'))


def config_from_dict(keys: Mapping[str, Any]) -> GPTConfig:
  """The configuration that a `config.json` describes.

  Raises:
    UserError: names the keys that can't be honoured.
  """
  unknown = {k: v for k, v in keys.items() if k not in CONFIG_KEYS and k not in IGNORED_KEYS
             and not (k == 'add_cross_attention' and not v)}
  if unknown:
    raise UserError(f'config.json has keys that this GPT-2 can\'t honour: {unknown}.')
  return GPTConfig(**{k: keys[k] for k in CONFIG_KEYS if k in keys})


def _paths(config: GPTConfig):
  """(path, our shape) of each parameter."""
  shapes = jax.eval_shape(lambda: make_params(config, 0))
  return [([key.key for key in path], leaf.shape)  # pyright: ignore[reportAttributeAccessIssue]
          for path, leaf in jax.tree.leaves_with_path(shapes)]


def params_from_tensors(config: GPTConfig, tensors: Mapping[str, np.ndarray]) -> Params:
  """Parameters from the tensors of a `GPT2LMHeadModel` (or `GPT2Model`: the same, unprefixed).

  Raises:
    UserError: a tensor is missing, left over, or of another shape.
  """
  left = {name.removeprefix('transformer.'): tensor for name, tensor in tensors.items()}
  if config.tie_word_embeddings:
    left.pop('lm_head.weight', None)

  def take(name: str, shape: tuple[int, ...]) -> np.ndarray:
    if name not in left:
      raise UserError(f'the checkpoint has no tensor {name}.')
    tensor = np.asarray(left.pop(name), np.float32)
    if name in ('wte.weight', 'lm_head.weight') and len(tensor) == config.vocab_size:
      tensor = np.pad(tensor, ((0, config.padded_vocab_size - len(tensor)), (0, 0)))
    if tensor.size != np.prod(shape):
      raise UserError(f'the tensor {name} has the shape {tensor.shape}, which does not fit {shape}.')
    return tensor.reshape(shape)

  params: Params = {}
  for path, shape in _paths(config):
    if path[0] == 'h':
      rest = '.'.join(path[1:])
      value = np.stack([take(f'h.{i}.{rest}', shape[1:]) for i in range(config.n_layer)])
    else:
      value = take('.'.join(path), shape)
    node = params
    for key in path[:-1]:
      node = node.setdefault(key, {})
    node[path[-1]] = jnp.asarray(value)
  buffers = ('.attn.bias', '.attn.masked_bias')  # in old files
  if unknown := sorted(name for name in left if not name.endswith(buffers)):
    raise UserError(f'the checkpoint has tensors that this GPT-2 does not: {unknown[:5]}.')
  return params


def tensors_from_params(config: GPTConfig, params: Params) -> dict[str, np.ndarray]:
  """The tensors of a `GPT2LMHeadModel`, without the padding of the vocabulary."""
  tensors = {}
  for path, _ in _paths(config):
    value: Any = params
    for key in path:
      value = value[key]
    name, value = '.'.join(path[1:]), np.asarray(value)
    if path[0] == 'h':
      for i, layer in enumerate(value):
        tensors[f'transformer.h.{i}.{name}'] = _merge_axes(name, layer)
    elif path[0] == 'lm_head':
      tensors['lm_head.weight'] = value[:config.vocab_size]
    else:
      tensors[f'transformer.{path[0]}.{name}'] = (
          value[:config.vocab_size] if path[0] == 'wte' else value)
  return tensors


def _merge_axes(name: str, value: np.ndarray) -> np.ndarray:
  if name == 'attn.c_attn.weight':
    return value.reshape(value.shape[0], -1)
  if name == 'attn.c_proj.weight':
    return value.reshape(-1, value.shape[-1])
  return value.reshape(-1) if name.endswith('bias') else value

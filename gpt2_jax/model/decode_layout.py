"""A model's parameters in the forms that are fast or small to decode with (`config.FORMS`)."""

import dataclasses
import functools
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from gpt2_jax.core.errors import UserError
from gpt2_jax.model.config import GPTConfig
from gpt2_jax.model.gpt2 import GPT2, Params, bind
from gpt2_jax.model.parameters import ROWS
from gpt2_jax.model.pretrained_model import Pretrained, params_of
from gpt2_jax.parallel.sharding import mesh_of

M = TypeVar('M', GPT2, Pretrained)


def _in_steps(weight: jax.Array, ins: int) -> tuple[jax.Array, jax.Array]:
  """A weight whose last `ins` axes come in: int8 steps, and their size for each of the others.

  Symmetric and per channel, so that zero stays zero (Dettmers et al. 2022, arXiv:2208.07339, section
  2.1; there also the activations are rounded, here they are not).
  """
  axes = tuple(range(weight.ndim - ins, weight.ndim))
  largest = jnp.abs(weight).max(axes, keepdims=True)
  scale = jnp.where(largest == 0, 1, largest / 127)
  return jnp.round(weight / scale).astype(jnp.int8), scale.reshape(weight.shape[:-ins])


@functools.partial(jax.jit, static_argnames=('config', 'form'))
def _to_form(config: GPTConfig, params: Params, form: str) -> Params:
  arrays: Any = flatten_dict(params)
  made = {}
  for row in config.parameters():
    for layer in range(config.n_layer) if row.stacked else [None]:
      array = arrays[row.path] if layer is None else arrays[row.path][layer]
      path = row.path if layer is None else ('h', layer, *row.path[1:])
      if f'{row.module}.scale' in ROWS and row.path[-1] == 'weight':
        ins = len(row.contracted)
        if row.stacked:  # [in, out]
          array = array.transpose((*range(ins, array.ndim), *range(ins)))
        if form == 'int8':
          array, made[*path[:-1], 'scale'] = _in_steps(array.astype(jnp.float32), ins)
        else:
          array = array.astype(config.dtype)
      made[path] = array
  return unflatten_dict(made)


def for_decoding(config: GPTConfig, params: Params) -> tuple[GPTConfig, Params]:
  """A config and parameters of the form 'train' in the form 'decode'; others as they are.

  Each array keeps its layout on the mesh. The logits differ by rounding alone.
  """
  if config.form != 'train':
    return config, params
  return dataclasses.replace(config, form='decode'), _to_form(config, params, 'decode')


def with_wide_steps(config: GPTConfig, params: Params) -> Params:
  """Parameters of the form 'int8' with their steps as numbers of the model's dtype, for programs that
  make one token each on a CPU; others as they are.

  A CPU makes its steps wide before it multiplies: a loop over tokens does it once, such a program
  each time. The steps are exact in every dtype, so nothing else changes.
  """
  if config.form != 'int8':
    return params
  return jax.tree.map(lambda x: x.astype(config.dtype) if x.dtype == jnp.int8 else x, params)


def quantize(model: M) -> M:
  """The model with weights in int8, a float32 scale for each output channel and token.

  A quarter of the bytes of float32: for decoding that waits for memory. It costs some likelihood
  (docs/decoding.md). Activations stay in the model's dtype; layer norms, biases, positions and
  adapters are as they were. Such a model generates, scores and gives features; it can't be trained
  or saved.

  Raises:
    UserError: it is in int8 already.
  """
  if model.config.form != 'train':
    raise UserError(f'the model is in the form {model.config.form!r}: quantize it as it was loaded.')
  params = params_of(model)
  with mesh_of(params):
    small = bind(
      dataclasses.replace(model.config, form='int8'), _to_form(model.config, params, 'int8')
    )
  if isinstance(model, Pretrained):
    return type(model)(small, model.tokenizer, model.source)
  return small

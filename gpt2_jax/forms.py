"""A model's parameters in the forms that are fast or small to decode with (`config.FORMS`)."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from gpt2_jax.config import GPTConfig
from gpt2_jax.errors import UserError
from gpt2_jax.model import GPT2, Params, bind
from gpt2_jax.sharding import mesh_of

# axes that a block's weights contract with what comes in; they come first in the form 'train'
CONTRACTED = {('attn', 'c_attn'): 1, ('attn', 'c_proj'): 2, ('mlp', 'c_fc'): 1, ('mlp', 'c_proj'): 1}
TABLES = ('wte', 'lm_head')


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
  def put(module: Params, weight: jax.Array, ins: int) -> Params:
    if form == 'int8':
      weight, scale = _in_steps(weight.astype(jnp.float32), ins)
      return module | {'weight': weight, 'scale': scale}
    return module | {'weight': weight.astype(config.dtype)}

  def block(stacked: Params) -> Params:
    layer = jax.tree.map(lambda x: x, stacked)  # a copy of the dicts
    for (part, name), ins in CONTRACTED.items():
      module = layer[part][name]
      outs = module['weight'].ndim - ins
      axes = (*range(ins, ins + outs), *range(ins))
      layer[part][name] = put(module, module['weight'].transpose(axes), ins)
    return layer

  take = lambda i: jax.tree.map(lambda x: x[i], params['h'])
  blocks = {i: block(take(i)) for i in range(config.n_layer)}
  tables = {name: put(params[name], params[name]['weight'], 1) for name in TABLES if name in params}
  return params | tables | {'h': blocks}


def for_decoding(config: GPTConfig, params: Params) -> tuple[GPTConfig, Params]:
  """A config and parameters of the form 'train' in the form 'decode'; others as they are.

  Each array keeps its layout on the mesh. The logits differ by rounding alone.
  """
  if config.form != 'train':
    return config, params
  return dataclasses.replace(config, form='decode'), _to_form(config, params, 'decode')


def quantize(model: GPT2) -> GPT2:
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
  params: Any = nnx.to_pure_dict(nnx.state(model, nnx.Param))
  with mesh_of(params):
    small = bind(
      dataclasses.replace(model.config, form='int8'), _to_form(model.config, params, 'int8')
    )
  small.tokenizer, small.source = model.tokenizer, model.source
  return small

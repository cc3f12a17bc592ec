"""The same model written otherwise: layer norms folded, writing weights and the unembedding centred.

Functions from parameters to parameters that change no log-probability. What is left is what the parts
of a model read and write: heads that are compared by their weights (`head_scores.py`) want all
three, and TransformerLens makes them by default (`fold_ln`, `center_writing_weights`,
`center_unembed` in its `weight_processing.py`; `compatibility_mode.md` there says why).

    config, params = processed(model.config, params_of(model))

A folded norm still takes off the mean and divides by the scale, with weight 1 and bias 0, so that the
result is a GPT-2 like any other. The unembedding is one's own matrix then: `lm_head`, no longer tied.
"""

import dataclasses

import jax
import jax.numpy as jnp

from gpt2_jax.core.errors import UserError
from gpt2_jax.model.config import GPTConfig
from gpt2_jax.model.gpt2 import Params

Processed = tuple[GPTConfig, Params]


def fold_layer_norms(config: GPTConfig, params: Params) -> Processed:
  """Puts the weights and biases of the layer norms into the matrices that read from them.

  What a norm gives has no mean over D, so that a matrix that reads it loses its own too. The last
  norm's bias adds the same to the logits everywhere; GPT-2's unembedding has no bias that
  could hold it, so that it stays in the norm, divided by its weight.

  Returns:
    A config with an `lm_head` of its own, and parameters in float32.

  Raises:
    UserError: the model has another form or head, adapters, or a weight 0 in its last norm.
  """
  config, params = _untied(config, params)
  h, ln_f = params['h'], params['ln_f']
  attn, mlp = h['attn'], h['mlp']
  for norm, of, reads in (('ln_1', attn, 'c_attn'), ('ln_2', mlp, 'c_fc')):
    weight, bias = of[reads]['weight'], of[reads]['bias']  # [L, D, …], [L, …]
    scale_LD, shift_LD = h[norm]['weight'], h[norm]['bias']
    along = (*scale_LD.shape, *(1,) * (weight.ndim - 2))
    with jax.default_matmul_precision('highest'):
      bias = bias + jnp.einsum('LD,LD...->L...', shift_LD, weight)
    weight = weight * scale_LD.reshape(along)
    of[reads] = of[reads] | {'weight': weight - weight.mean(1, keepdims=True), 'bias': bias}
    h[norm] = {'weight': jnp.ones_like(scale_LD), 'bias': jnp.zeros_like(shift_LD)}
  if not jnp.all(ln_f['weight']):
    raise UserError('ln_f.weight holds a 0: the bias of that norm can not be folded past it.')
  params['lm_head']['weight'] = params['lm_head']['weight'] * ln_f['weight']
  params['ln_f'] = {'weight': jnp.ones_like(ln_f['weight']), 'bias': ln_f['bias'] / ln_f['weight']}
  return config, params


def center_writing_weights(config: GPTConfig, params: Params) -> Processed:
  """Takes off the mean over D of all that writes into the residual stream: each norm that reads from
  it takes it off anyway.

  Raises:
    UserError: as of `fold_layer_norms`.
  """
  config, params = _untied(config, params)
  center = lambda x: x - x.mean(-1, keepdims=True)
  params['wte'], params['wpe'] = ({'weight': center(params[n]['weight'])} for n in ('wte', 'wpe'))
  for part in ('attn', 'mlp'):
    params['h'][part]['c_proj'] = jax.tree.map(center, params['h'][part]['c_proj'])
  return config, params


def center_unembedding(config: GPTConfig, params: Params) -> Processed:
  """Takes off the unembedding's mean over the vocabulary, which adds the same to each logit.

  Raises:
    UserError: as of `fold_layer_norms`.
  """
  config, params = _untied(config, params)
  table_VD = params['lm_head']['weight']
  real_VD = table_VD[: config.vocab_size]
  centred_VD = real_VD - real_VD.mean(0)
  params['lm_head']['weight'] = table_VD.at[: config.vocab_size].set(centred_VD)
  return config, params


def processed(config: GPTConfig, params: Params) -> Processed:
  """All three, as TransformerLens makes them: `bind(*processed(config, params_of(model)))`."""
  for step in (fold_layer_norms, center_writing_weights, center_unembedding):
    config, params = step(config, params)
  return config, params


def check_weights(config: GPTConfig) -> None:
  """Raises a `UserError` for a model whose weights are not plain matrices."""
  if config.form != 'train' or config.head != 'lm' or config.lora is not None:
    raise UserError(
      "weights are read of a language model in the form 'train', without adapters: see "
      'gpt2_jax.merge_adapters.'
    )


def _untied(config: GPTConfig, params: Params) -> Processed:
  """A copy of the nested dicts, in which the unembedding is its own."""
  check_weights(config)
  params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
  if config.tie_word_embeddings:
    config = dataclasses.replace(config, tie_word_embeddings=False)
    params['lm_head'] = {'weight': params['wte']['weight']}
  return config, params

"""A model of maximal-update parametrization as a plain GPT-2: its multipliers, in the weights.

No other format knows them. Which they are: `GPTConfig.width_ratio` and `score_scale`.
"""

import dataclasses

import numpy as np

from gpt2_jax.checkpoints.tensors import Source

FIELDS = ('parametrization', 'mup_base_width', 'mup_base_head_width')  # of GPTConfig


def folded(source: Source) -> Source:
  """Returns the same function of tokens as a model of standard parametrization.

  The last layer norm takes the factor of the logits, queries that of the scores: the features after
  the last layer norm are 1/m of what they were. Bitwise where the factors are powers of two.
  """
  config = source.config
  if config.parametrization == 'standard':
    return source
  plain = dataclasses.replace(config, **dict.fromkeys(FIELDS[1:]), parametrization='standard')
  queries = np.float32(config.score_scale / plain.score_scale)
  logits = np.float32(1 / config.width_ratio if config.head == 'lm' else 1)

  def read(name: str) -> np.ndarray:
    tensor = source.read(name)
    if name.startswith('ln_f.'):
      return tensor * logits
    if '.attn.c_attn.' in name:  # [..., 3·D]: queries, keys, values
      tensor = tensor.copy()
      tensor[..., : config.n_embd] *= queries
    return tensor

  return dataclasses.replace(source, config=plain, read=read, load=None)

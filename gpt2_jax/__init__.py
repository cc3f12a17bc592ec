"""GPT-2 in JAX and Flax.

    model = gpt2_jax.from_pretrained('runs/tiny')
    for result in gpt2_jax.generate(model, 'def ', max_new_tokens=60, seed=42):
      print(result.text)

Everything named here is loaded when it is first used.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
  from gpt2_jax.config import GPTConfig, LoRA
  from gpt2_jax.decoding.generate import Generated, generate, stream
  from gpt2_jax.decoding.processors import Processor
  from gpt2_jax.errors import UserError
  from gpt2_jax.forms import quantize
  from gpt2_jax.inference import Classified, Features, classify, features
  from gpt2_jax.model import GPT2, bind, init_params
  from gpt2_jax.pretrained import from_pretrained, merge_adapters, save_pretrained
  from gpt2_jax.pretrained_model import Pretrained

_PLACES = {
  'Classified': 'inference',
  'Features': 'inference',
  'GPT2': 'model',
  'GPTConfig': 'config',
  'Generated': 'decoding.generate',
  'LoRA': 'config',
  'Pretrained': 'pretrained_model',
  'Processor': 'decoding.processors',
  'UserError': 'errors',
  'bind': 'model',
  'classify': 'inference',
  'features': 'inference',
  'from_pretrained': 'pretrained',
  'generate': 'decoding.generate',
  'init_params': 'model',
  'merge_adapters': 'pretrained',
  'quantize': 'forms',
  'save_pretrained': 'pretrained',
  'stream': 'decoding.generate',
}

__all__ = [
  'GPT2',
  'Classified',
  'Features',
  'GPTConfig',
  'Generated',
  'LoRA',
  'Pretrained',
  'Processor',
  'UserError',
  'bind',
  'classify',
  'features',
  'from_pretrained',
  'generate',
  'init_params',
  'merge_adapters',
  'quantize',
  'save_pretrained',
  'stream',
]


def __getattr__(name: str):
  if name in _PLACES:
    return getattr(importlib.import_module(f'gpt2_jax.{_PLACES[name]}'), name)
  raise AttributeError(f'module gpt2_jax has no attribute {name!r}')


def __dir__():
  return sorted(__all__)

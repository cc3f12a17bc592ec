"""GPT-2 in JAX and Flax.

    run = gpt2_jax.train('tiny', 'runs/tiny')
    model = gpt2_jax.from_pretrained('runs/tiny')
    for result in gpt2_jax.generate(model, 'def ', max_new_tokens=60, seed=42):
      print(result.text)

Everything named here is loaded when it is first used.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
  from gpt2_jax.checkpoints.pretrained import from_pretrained, merge_adapters, save_pretrained
  from gpt2_jax.core.errors import UserError
  from gpt2_jax.decoding.generate import Generated, generate, stream
  from gpt2_jax.decoding.processors import Processor
  from gpt2_jax.model.config import GPTConfig, LoRA
  from gpt2_jax.model.decode_layout import quantize
  from gpt2_jax.model.features import Classified, Features, classify, features
  from gpt2_jax.model.gpt2 import GPT2, bind, init_params
  from gpt2_jax.model.pretrained_model import Pretrained
  from gpt2_jax.training.from_python import TrainedRun, train

_PLACES = {
  'Classified': 'model.features',
  'Features': 'model.features',
  'GPT2': 'model.gpt2',
  'GPTConfig': 'model.config',
  'Generated': 'decoding.generate',
  'LoRA': 'model.config',
  'Pretrained': 'model.pretrained_model',
  'Processor': 'decoding.processors',
  'TrainedRun': 'training.from_python',
  'UserError': 'core.errors',
  'bind': 'model.gpt2',
  'classify': 'model.features',
  'features': 'model.features',
  'from_pretrained': 'checkpoints.pretrained',
  'generate': 'decoding.generate',
  'init_params': 'model.gpt2',
  'merge_adapters': 'checkpoints.pretrained',
  'quantize': 'model.decode_layout',
  'save_pretrained': 'checkpoints.pretrained',
  'stream': 'decoding.generate',
  'train': 'training.from_python',
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
  'TrainedRun',
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
  'train',
]


def __getattr__(name: str):
  if name in _PLACES:
    return getattr(importlib.import_module(f'gpt2_jax.{_PLACES[name]}'), name)
  if name == '__version__':  # which stands in setup.cfg alone
    return importlib.import_module('importlib.metadata').version('gpt2_jax')
  if name == 'configs':
    return importlib.import_module('gpt2_jax.configs')
  raise AttributeError(f'module gpt2_jax has no attribute {name!r}')


def __dir__():
  return sorted(__all__)

"""Small models and their configs."""

from typing import Any

import jax

import gpt2_jax
from gpt2_jax.model.config import GPTConfig
from gpt2_jax.tokenizer import bpe


def tiny_gpt2(**fields: Any) -> GPTConfig:
  """Returns a config of odd sizes without dropout, with weights large enough that every part matters.
  `fields` are set in place of these.
  """
  sizes = dict(vocab_size=97, n_positions=32, n_embd=32, n_layer=3, n_head=4, n_inner=80)
  others = dict(vocab_multiple=8, initializer_range=0.3, embd_pdrop=0, attn_pdrop=0, resid_pdrop=0)
  return GPTConfig(**(sizes | others | fields))


def noisy_params(config: GPTConfig, scale: float = 0.1) -> Any:
  """Parameters of which every one matters: biases and gains of layer norms, too."""
  noise = lambda x: x + scale * jax.random.normal(jax.random.key(x.size), x.shape)
  return jax.tree.map(noise, gpt2_jax.init_params(config, 0))


def byte_model(seed: int = 0, **fields: Any) -> gpt2_jax.Pretrained:
  """Returns a random model of bytes, some of which are likelier than others."""
  sizes = dict(vocab_size=257, n_positions=64, n_layer=2, n_inner=None, vocab_multiple=128)
  config = tiny_gpt2(**(sizes | fields))
  model = gpt2_jax.bind(config, gpt2_jax.init_params(config, seed))
  return gpt2_jax.Pretrained(model, bpe.load('byte'))

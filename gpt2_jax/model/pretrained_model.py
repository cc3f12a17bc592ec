"""A model with what its checkpoint brings beside the parameters."""

import html
from typing import Any

import jax
from flax import nnx

from gpt2_jax.model.config import GPTConfig
from gpt2_jax.model.gpt2 import GPT2, Params
from gpt2_jax.model.sizes import num_params
from gpt2_jax.tokenizer.bpe import Tokenizer


class Pretrained:
  """A model as `gpt2_jax.from_pretrained` returns it. `model(tokens_BT)` gives logits.

  Attributes:
    model: the model itself, which knows nothing of files and texts.
    tokenizer: that of its texts; None where there is none that can be used.
    source: the opened checkpoint (`checkpoints.tensors.Source`); None: the model is from none.
  """

  def __init__(self, model: GPT2, tokenizer: Tokenizer | None = None, source: Any = None):
    self.model, self.source = model, source
    self.tokenizer: Any = tokenizer

  @classmethod
  def of(cls, model: 'Model') -> 'Pretrained':
    """The model as it is, or a bare one with nothing beside it."""
    return model if isinstance(model, Pretrained) else cls(model)

  @property
  def config(self) -> GPTConfig:
    """Sizes and options of the model."""
    return self.model.config

  def __call__(self, tokens_BT: jax.Array, **options: Any) -> jax.Array:
    """Logits, see `GPT2.__call__`."""
    return self.model(tokens_BT, **options)

  def __repr__(self) -> str:
    c, tokenizer = self.config, self.tokenizer
    where = '' if self.source is None else f' from {str(self.source.where)[:200]}'
    words = 'no tokenizer' if tokenizer is None else f'tokenizer {tokenizer.sha256[:16]}'
    return (
      f'<GPT-2{where}: {num_params(c):,} parameters, n_layer={c.n_layer}, n_embd={c.n_embd}, '
      f'n_head={c.n_head}, n_positions={c.n_positions}, vocab_size={c.vocab_size}, '
      f'head={c.head}, dtype={c.dtype}, form={c.form}, {words}>'
    )

  def _repr_html_(self) -> str:
    c, where = self.config, 'none' if self.source is None else str(self.source.where)[:200]
    named = {'parameters': f'{num_params(c):,}', 'from': where, 'dtype': c.dtype, 'head': c.head}
    sizes = ('n_layer', 'n_embd', 'n_head', 'n_positions', 'vocab_size')
    rows = named | {name: f'{getattr(c, name):,}' for name in sizes}
    cells = ''.join(f'<tr><th>{key}</th><td>{html.escape(v)}</td></tr>' for key, v in rows.items())
    return f'<table><caption>GPT-2</caption>{cells}</table>'


Model = GPT2 | Pretrained


def params_of(model: Model) -> Params:
  """A model's parameters, as a nested dict."""
  bare = model.model if isinstance(model, Pretrained) else model
  return nnx.to_pure_dict(nnx.state(bare, nnx.Param))

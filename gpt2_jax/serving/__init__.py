"""A model over HTTP, its pages, a notebook's view.

`attention_figure` is loaded when it is first used.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
  from gpt2_jax.serving.figure import attention_figure

__all__ = ['attention_figure']


def __getattr__(name: str):
  if name == 'attention_figure':
    from gpt2_jax.serving.figure import attention_figure

    return attention_figure
  raise AttributeError(f'module gpt2_jax.serving has no attribute {name!r}')

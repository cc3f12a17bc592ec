"""The configs that come with the package: `--config=small`, in a checkout `configs/small.py` too.

In Python `configs.small('fineweb')` is `configs.load('small:fineweb')`.
"""

import importlib
import sys
import types
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
NAMES = ('tiny', 'small', 'medium', 'large', 'xl', 'finetune')


class _Named(types.ModuleType):
  """A module of a config that can be called, with a recipe or none."""

  def __call__(self, recipe: str = '') -> Any:
    return self.get_config(*filter(None, [recipe]))


class _Package(types.ModuleType):
  """This package: a config is imported when it is first named, and can be called."""

  def __getattr__(self, name: str) -> Any:
    if name not in NAMES:
      known = ', '.join(NAMES)
      raise AttributeError(f'module {__name__} has no attribute {name!r}; configs: {known}')
    return importlib.import_module(f'{__name__}.{name}')

  def __setattr__(self, name: str, value: Any) -> None:
    if name in NAMES:
      value.__class__ = _Named
    super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def path_of(spec: str) -> str:
  """Where a config that is named, 'small' or 'small:RECIPE', lies; a path as it is."""
  name, colon, recipe = spec.partition(':')
  return f'{FOLDER / name}.py{colon}{recipe}' if name in NAMES else spec


def load(spec: str) -> Any:
  """A config by its name: 'small', or 'small:fineweb' with a recipe.

  Raises:
    ValueError: there is none of this name.
  """
  name, _, recipe = spec.partition(':')
  if name not in NAMES:
    raise ValueError(f'config {name!r} is none of: {", ".join(NAMES)}')
  return getattr(sys.modules[__name__], name)(recipe)

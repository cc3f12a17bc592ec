"""The configs that come with the package: `--config=small`, in a checkout `configs/small.py` too."""

import importlib
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
NAMES = ('tiny', 'small', 'medium', 'large', 'xl', 'finetune')


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
  return importlib.import_module(f'{__name__}.{name}').get_config(*filter(None, [recipe]))

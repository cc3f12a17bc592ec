"""Models from where they are kept."""

import os
from pathlib import Path

from gpt2_jax import tokenizer
from gpt2_jax.errors import UserError
from gpt2_jax.model import GPT2, bind
from gpt2_jax.training import checkpoint


def from_pretrained(source: str | os.PathLike) -> GPT2:
  """The model of a run's newest checkpoint, on the mesh that is set or on one device.

  Args:
    source: the workdir of a run.

  Returns:
    The model, with its tokenizer as `model.tokenizer`. Of a run with `optim.ema_decay`, it has the
    moving average of the parameters.

  Raises:
    UserError: there is no such run, or it has no checkpoint yet.
  """
  workdir = Path(source)
  if not checkpoint.is_workdir(workdir):
    raise UserError(f'{source} is not the workdir of a run: it has no folder '
                    f'{checkpoint.FOLDER!r}. Train one with launch.py.')
  config, params, _ = checkpoint.load_model(workdir)
  model = bind(config, params)
  model.tokenizer = tokenizer.load(workdir / 'tokenizer')
  return model

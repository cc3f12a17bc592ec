"""What a run has saved, for who reads it: which steps, what is said of them, the parameters."""

import contextlib
import os

import jax

from gpt2_jax.checkpoints.orbax_store import FOLDER, Checkpoints
from gpt2_jax.core import buckets
from gpt2_jax.core.errors import UserError
from gpt2_jax.core.files import read_json, whole_number
from gpt2_jax.model.config import GPTConfig
from gpt2_jax.model.gpt2 import Params, make_params
from gpt2_jax.parallel.sharding import on_devices


def is_workdir(path: str | os.PathLike) -> bool:
  """Whether a path is the folder of a run that has saved anything."""
  return (buckets.place(path) / FOLDER).is_dir()


def kept_steps(workdir: str | os.PathLike) -> list[int]:
  """Returns the steps that a run has checkpoints of, in order."""
  with contextlib.closing(Checkpoints(workdir)) as checkpoints:
    return sorted(checkpoints.all_steps())


def held_positions(workdir: str | os.PathLike) -> int | None:
  """Returns n_positions of the run in a workdir, by any of its checkpoints; None if it has none."""
  for path in sorted((buckets.place(workdir) / FOLDER).glob('*/meta/metadata')):
    with contextlib.suppress(UserError):  # a damaged one: another tells
      return read_json(path, {'model': {'n_positions': whole_number}})['model']['n_positions']
  return None


def read_meta(workdir: str | os.PathLike, step: int | None = None) -> dict:
  """Returns the meta of a checkpoint, its `step` among it.

  Args:
    workdir: of the run.
    step: of the checkpoint; default: the one that the run offers.

  Raises:
    UserError: the workdir has no finished checkpoint, or that of `step` is damaged.
  """
  workdir = buckets.place(workdir)
  if not is_workdir(workdir):
    raise UserError(f'{workdir} holds no checkpoints: is it the --workdir of a run?')
  with contextlib.closing(Checkpoints(workdir)) as checkpoints:
    step = checkpoints.step_to_use() if step is None else checkpoints.checked(step)
    if step is None:
      raise UserError(
        f'{workdir} has no finished checkpoint yet: let the run go on until its first '
        '(config.checkpoint.every).'
      )
    return checkpoints.meta(step)


def load_params(workdir: str | os.PathLike, meta: dict) -> Params:
  """Returns the parameters of the checkpoint that `read_meta` described, on the mesh that is set."""
  config = GPTConfig(**meta['model'])
  abstract = on_devices(jax.eval_shape(lambda: make_params(config, 0)))
  with contextlib.closing(Checkpoints(workdir)) as checkpoints:
    return checkpoints.params(meta['step'], abstract)

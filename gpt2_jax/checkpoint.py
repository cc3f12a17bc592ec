"""Checkpoints of a run, by Orbax: written in the background, whole or not at all.

A checkpoint has items: `params`, `opt_state`, `ema` (where the run has one) and `meta`: a dict with
the step, the model's config, the data's sha256 and the tree of shapes, which is compared before
anything is restored. This is the only module that knows Orbax.
"""

import errno
import logging
import shutil
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from gpt2_jax.config import GPTConfig
from gpt2_jax.errors import UserError, saving
from gpt2_jax.model import Params, make_params
from gpt2_jax.sharding import on_devices

FOLDER = 'checkpoints'
VERSION = 1

# Orbax logs a background thread's exception with its traceback, and then raises it in ours as well.
logging.getLogger('absl').addFilter(
    lambda record: not (record.exc_info and 'orbax' in record.pathname))


def _shapes(tree: Any) -> dict[str, str]:
  return {jax.tree_util.keystr(path, simple=True, separator='.'): f'{leaf.dtype}{[*leaf.shape]}'
          for path, leaf in jax.tree.leaves_with_path(tree)}


def difference(have: dict, want: dict) -> str:
  """What two flat dicts differ in, a line each: the first 12 lines."""
  lines = [f'  {key}: {have.get(key, "absent")} there, {want.get(key, "absent")} here'
           for key in sorted(have.keys() | want.keys()) if have.get(key) != want.get(key)]
  return '\n'.join(lines[:12] + [f'  … and {len(lines) - 12} more'] * (len(lines) > 12))


class _Best(ocp.checkpoint_managers.PreservationPolicy):
  """Keeps the checkpoint that `meta` calls the best so far."""

  step: int | None = None

  def should_preserve(self, checkpoints, *, context):
    return [checkpoint.step == self.step for checkpoint in checkpoints]


class Checkpoints:
  """The checkpoints of a workdir."""

  def __init__(self, workdir: str | Path, keep: int | None = None):
    """
    Args:
      workdir: of the run.
      keep: how many of the newest to keep, and the best one; None: to read only.
    """
    self.path, self._best = epath.Path(workdir).resolve() / FOLDER, _Best()
    managers = ocp.checkpoint_managers
    policy = managers.AnyPreservationPolicy([managers.LatestN(keep), self._best]) if keep else None
    self._manager = ocp.CheckpointManager(
        self.path, options=ocp.CheckpointManagerOptions(
            preservation_policy=policy, create=keep is not None, enable_async_checkpointing=True))

  def latest_step(self) -> int | None:
    """The newest step there is, None where there is none."""
    return self._manager.latest_step()

  def meta(self, step: int) -> dict:
    return self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))['meta']

  def step_to_use(self) -> int | None:
    """The step whose parameters a run offers: its best one where it stops early, else the newest."""
    step = self.latest_step()
    return None if step is None else self.meta(step).get('best') or step

  def save(self, step: int, items: dict[str, Any], meta: dict) -> None:
    """Begins to save; waits only for an earlier save and for the copy to the host's memory."""
    meta = meta | {'version': VERSION, 'step': step, 'tree': _shapes(items)}
    self._best.step = meta.get('best')
    with saving('a checkpoint', str(self.path)):
      need = sum(leaf.nbytes for leaf in jax.tree.leaves(items)) // jax.process_count()
      if (free := shutil.disk_usage(self.path).free) < need:
        raise OSError(errno.ENOSPC, f'{need:,} bytes needed, {free:,} free')
      self._manager.save(step, args=ocp.args.Composite(
          meta=ocp.args.JsonSave(meta),
          **{name: ocp.args.StandardSave(tree) for name, tree in items.items()}))

  def params(self, step: int, abstract: Params) -> Params:
    """The parameters to use, without the rest: the moving average where the run has one."""
    name = 'ema' if (self.path / str(step) / 'ema').exists() else 'params'
    return self.restore(step, {name: abstract})[name]

  def restore(self, step: int, items: dict[str, Any]) -> dict[str, Any]:
    """Items of a step, laid out as the abstract arrays in `items` say.

    Raises:
      UserError: the checkpoint is of another shape.
    """
    have, want = self.meta(step)['tree'], _shapes(items)
    have = {key: value for key, value in have.items() if key.split('.')[0] in items}
    if have != want:
      raise UserError(f'the checkpoint of step {step} in {self.path} does not fit:\n'
                      f'{difference(have, want)}\nUse the config it was made with, or another '
                      'workdir.')
    restored = self._manager.restore(step, args=ocp.args.Composite(
        **{name: ocp.args.StandardRestore(tree) for name, tree in items.items()}))
    return {name: restored[name] for name in items}

  def wait(self) -> None:
    """Returns when everything begun is on disk."""
    with saving('a checkpoint', str(self.path)):
      self._manager.wait_until_finished()

  def close(self) -> None:
    self._manager.close()


def is_workdir(path: str | Path) -> bool:
  return (Path(path) / FOLDER).is_dir()


def read_meta(workdir: str | Path) -> dict:
  """Meta of the checkpoint that a run offers, its `step` among it.

  Raises:
    UserError: the workdir has no finished checkpoint.
  """
  workdir = Path(workdir)
  if not is_workdir(workdir):
    raise UserError(f'{workdir} holds no checkpoints: is it the --workdir of a run?')
  checkpoints = Checkpoints(workdir)
  try:
    step = checkpoints.step_to_use()
    if step is None:
      raise UserError(f'{workdir} has no finished checkpoint yet: let the run go on until its first '
                      '(config.checkpoint.every).')
    return checkpoints.meta(step)
  finally:
    checkpoints.close()


def load_params(workdir: str | Path, meta: dict) -> Params:
  """The parameters of the checkpoint that `read_meta` described, on the mesh that is set."""
  checkpoints = Checkpoints(workdir)
  try:
    config = GPTConfig(**meta['model'])
    abstract = on_devices(jax.eval_shape(lambda: make_params(config, 0)))
    return checkpoints.params(meta['step'], abstract)
  finally:
    checkpoints.close()

"""Checkpoints of a run, by Orbax: written in the background, whole or not at all.

A checkpoint has items: `params`, `opt_state`, `ema` (where the run has one) and `meta`: a dict with
the step, the model's config, the data's sha256, the tree of shapes, which is compared before anything
is restored, and the arrays' checksums, made on the devices and compared after that. Its manifest is
written before Orbax renames the folder to its final name, so that what is committed has one; a
checkpoint is checked against it before it is used. Only this module and `orbax_manager` know Orbax.
"""

import errno
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from gpt2_jax.checkpoints import manifest
from gpt2_jax.checkpoints.orbax_manager import BestPolicy, Manager, unreadable
from gpt2_jax.core import buckets
from gpt2_jax.core.buckets import AnyPath
from gpt2_jax.core.errors import UserError, saving
from gpt2_jax.core.files import read_json
from gpt2_jax.model.gpt2 import Params
from gpt2_jax.parallel.checksums import checksums
from gpt2_jax.parallel.sharding import without_mesh

FOLDER = 'checkpoints'
VERSION = 2  # from 2 on none is without a manifest


def _of_step(step: int) -> str:
  return f'checkpoint of step {step:,}'


def shapes(tree: Any) -> dict[str, str]:
  """Returns dtype and shape of each array of a tree, by its path: 'float32[2, 3]'."""
  return {
    jax.tree_util.keystr(path, simple=True, separator='.'): f'{leaf.dtype}{[*leaf.shape]}'
    for path, leaf in jax.tree.leaves_with_path(tree)
  }


def difference(have: dict, want: dict) -> str:
  """Returns what two flat dicts differ in: a line for each key, the first 12 of them."""
  lines = [
    f'  {key}: {have.get(key, "absent")} there, {want.get(key, "absent")} here'
    for key in sorted(have.keys() | want.keys())
    if have.get(key) != want.get(key)
  ]
  more = [f'  … and {len(lines) - 12} more'] if len(lines) > 12 else []
  return '\n'.join(lines[:12] + more)


class Checkpoints:
  """The checkpoints of a workdir."""

  def __init__(
    self,
    workdir: str | os.PathLike,
    keep: int | None = None,
    keep_every: int = 0,
    keep_best: int = 0,
    before_commit: Callable[[], None] = lambda: None,
  ):
    """
    Args:
      workdir: of the run.
      keep: how many of the newest to keep, beside the one that is offered; None: to read only.
      keep_every: the steps that are multiples of it are kept too; 0: none.
      keep_best: so many with the lowest held-out loss are kept too.
      before_commit: is called on process 0, in a thread, once all of a checkpoint is written but what
        makes it count; where it raises, the checkpoint does not.
    """
    self.path, self._best = _absolute(workdir) / FOLDER, BestPolicy(keep_best)
    self._before_commit = before_commit
    self._writes, self._saving = keep is not None, 0
    managers = ocp.checkpoint_managers
    policies = [managers.LatestN(keep), self._best]
    if keep_every:
      policies.append(managers.EveryNSteps(keep_every))
    self._manager = Manager(
      self.path,
      options=ocp.CheckpointManagerOptions(
        preservation_policy=managers.AnyPreservationPolicy(policies) if self._writes else None,
        create=self._writes,
        cleanup_tmp_directories=self._writes,
        enable_async_checkpointing=True,
        async_options=ocp.AsyncOptions(post_finalization_callback=self._complete),
      ),
    )

  def latest_step(self) -> int | None:
    """Returns the newest step; None if there is none."""
    return self._manager.latest_step()

  def all_steps(self) -> list[int]:
    """Returns the steps that have a checkpoint, whole or not."""
    return list(self._manager.all_steps())

  def _complete(self) -> None:
    """Writes the manifest. Orbax calls it on process 0, in a thread, before it commits."""
    self._before_commit()
    folder = self._folder(self._saving)
    unfinished = folder.with_name(folder.name + '.orbax-checkpoint-tmp')
    manifest.write(unfinished if unfinished.exists() else folder)

  def _folder(self, step: int) -> AnyPath:
    return buckets.place(self.path) / str(step)

  def _damage(self, step: int, items: tuple[str, ...] | None = None) -> str | None:
    """Says what is wrong with the files of a step; None if nothing is."""
    folder = self._folder(step)
    if (folder / manifest.FILE).exists():
      return manifest.damage(folder, items)
    try:
      meta = read_json(folder / 'meta' / 'metadata', {'tree': {str: str}})
    except UserError as e:
      return f"it has no {manifest.FILE} and can't be read ({e})"
    if meta.get('version') not in (None, 1):
      return f'it has no {manifest.FILE}, though it was written with one'
    return unreadable(folder, meta['tree'], items)

  def whole_step(self, items: tuple[str, ...] | None = None) -> int | None:
    """Returns the newest step whose files are whole, the same on all processes; None without one.

    Prints what is wrong with newer ones. A run moves these aside, so that it can save them again.

    Args:
      items: the items whose files must be whole; default: all.

    Raises:
      UserError: there are checkpoints, and all of them are damaged.
    """
    shared = self._writes and jax.process_count() > 1
    step, damaged = None, {}
    if not shared or jax.process_index() == 0:
      for step in sorted(self._manager.all_steps(), reverse=True):
        damage = self._damage(step, items)
        if damage is None:
          break
        damaged[step], step = damage, None
    lost = bool(damaged) and step is None
    if shared:  # process 0 decides
      with without_mesh():
        agreed = multihost_utils.broadcast_one_to_all(np.array([step or 0, lost], np.int32))
      step, lost = map(int, agreed)
    where = {} if lost or not self._writes else {bad: self._move_aside(bad) for bad in damaged}
    for bad, why in damaged.items():
      moved = f' and moved to {where[bad]}' if bad in where else ''
      print(f'{_of_step(bad)}: {why}: skipped{moved}', file=sys.stderr, flush=True)
    if lost:
      raise UserError(
        f'all checkpoints in {self.path} are damaged. Restore their files from a copy, '
        'or begin anew in another --workdir.'
      )
    if self._writes:
      if shared:
        multihost_utils.sync_global_devices('damaged checkpoints are moved')
      self._manager.reload()
    return step or None

  def _move_aside(self, step: int) -> AnyPath:
    """Gives a damaged checkpoint a name that is no step's."""
    folder = buckets.place(self.path)
    names = (f'damaged-{step}-{n}' if n > 1 else f'damaged-{step}' for n in range(1, 1000))
    target = next(folder / name for name in names if not (folder / name).exists())
    return (folder / str(step)).rename(target)

  def meta(self, step: int) -> dict:
    """Returns the meta of a step."""
    return self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))['meta']

  def step_to_use(self) -> int | None:
    """Returns the step whose parameters a run offers: the best if it stops early, else the newest.

    Names damaged ones and passes over them.
    """
    used = ('meta', 'params', 'ema')
    step = self.whole_step(used)
    best = step and self.meta(step).get('best')
    if not best or best == step:
      return step
    gone = best not in self._manager.all_steps()
    if damage := 'it is gone' if gone else self._damage(best, used):
      print(f'{_of_step(best)}, the best one: {damage}: skipped', file=sys.stderr, flush=True)
      return step
    return best

  def checked(self, step: int) -> int:
    """Returns a step that the user named; a UserError if it is damaged: no other is taken for it."""
    if damage := self._damage(step, ('meta', 'params', 'ema')):
      raise UserError(
        f'{_of_step(step)} in {self.path}: {damage}. Name another step, or none: the '
        'run then offers one that is whole.'
      )
    return step

  def save(
    self, step: int, items: dict[str, Any], meta: dict, losses: dict[int, float] | None = None
  ) -> None:
    """Begins to save; waits only for an earlier save and for the copy to the host's memory.

    Args:
      step: number of updates done.
      items: trees by name.
      meta: JSON that is kept with them; its `best` is a step whose checkpoint is kept.
      losses: held-out losses so far, by step.
    """
    meta = meta | {'version': VERSION, 'step': step, 'tree': shapes(items)}
    meta['checksums'] = checksums(items).of_arrays()
    self._best.step, self._best.losses = meta.get('best'), losses or {}
    self.wait()
    self._saving = step
    with saving('a checkpoint', str(self.path)):
      need = sum(leaf.nbytes for leaf in jax.tree.leaves(items)) // jax.process_count()
      on_disk = not buckets.is_bucket(self.path)
      if on_disk and (free := shutil.disk_usage(self.path).free) < need:
        raise OSError(errno.ENOSPC, f'{need:,} bytes needed, {free:,} free')
      self._manager.save(
        step,
        args=ocp.args.Composite(
          meta=ocp.args.JsonSave(meta),
          **{name: ocp.args.StandardSave(tree) for name, tree in items.items()},
        ),
      )

  def params(self, step: int, abstract: Params) -> Params:
    """Returns the parameters to use: the moving average if the run has one. The rest is not read."""
    name = 'ema' if (self.path / str(step) / 'ema').exists() else 'params'
    return self.restore(step, {name: abstract})[name]

  def restore(self, step: int, items: dict[str, Any]) -> dict[str, Any]:
    """Returns items of a step, laid out as the abstract arrays in `items` say.

    Raises:
      UserError: the checkpoint is of another shape, or isn't what the devices had.
    """
    meta = self.meta(step)
    have, want = meta['tree'], shapes(items)
    have = {key: value for key, value in have.items() if key.split('.')[0] in items}
    if have != want:
      raise UserError(
        f'the checkpoint of step {step} in {self.path} does not fit:\n'
        f'{difference(have, want)}\nUse the config it was made with, or another '
        'workdir.'
      )
    restored = self._manager.restore(
      step,
      args=ocp.args.Composite(
        **{name: ocp.args.StandardRestore(tree) for name, tree in items.items()}
      ),
    )
    found = {name: restored[name] for name in items}
    sums = meta.get('checksums', {})
    lost = [
      name for name, sum_ in checksums(found).of_arrays().items() if sums.get(name, sum_) != sum_
    ]
    if lost:
      raise UserError(
        f'the {_of_step(step)} in {self.path} is not what the devices had when it was saved, of '
        f'{len(lost)} arrays: {", ".join(lost[:6])}. Bits were lost on the way to its files, or from '
        f'them: if it says so again, remove the folder {step} there, and the run goes on from the '
        'checkpoint before.'
      )
    return found

  def wait(self) -> None:
    """Returns when everything begun is on disk."""
    with saving('a checkpoint', str(self.path)):
      self._manager.wait_until_finished()

  def close(self) -> None:
    """Ends the threads of Orbax."""
    self._manager.close()


def _absolute(path: str | os.PathLike) -> epath.Path:
  """Returns a place as Orbax wants it."""
  found = buckets.place(path)
  return epath.Path(found.resolve() if isinstance(found, Path) else found)

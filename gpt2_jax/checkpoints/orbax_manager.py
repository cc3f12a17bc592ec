"""The manager of checkpoints that Orbax has, with our policies and without some of its messages."""

import logging
import sys
from collections.abc import Collection

import jax
import numpy as np
import orbax.checkpoint as ocp

from gpt2_jax.core.buckets import AnyPath

# Orbax logs a background thread's exception with its traceback, and then raises it in ours as well;
# asyncio prints about its other tasks that nobody asked how they ended, or that they ended too late.
logging.getLogger('absl').addFilter(
  lambda record: not (record.exc_info and 'orbax' in record.pathname)
)
logging.getLogger('asyncio').addFilter(
  lambda record: 'exception was never retrieved' not in record.getMessage()
)


def _unraisable(unraisable, *, hook=sys.unraisablehook) -> None:
  if str(unraisable.exc_value) != 'Event loop is closed':
    hook(unraisable)


sys.unraisablehook = _unraisable


class BestPolicy(ocp.checkpoint_managers.PreservationPolicy):
  """Keeps the best checkpoint so far, as the run says, and those with the lowest held-out losses."""

  def __init__(self, count: int):
    self.count, self.step = count, None
    self.losses: dict[int, float] = {}  # held-out losses by step

  def should_preserve(self, checkpoints, *, context):
    steps = [checkpoint.step for checkpoint in checkpoints]
    ranked = sorted((step for step in steps if step in self.losses), key=lambda s: self.losses[s])
    return [step == self.step or step in ranked[: self.count] for step in steps]


class Manager(ocp.CheckpointManager):
  def reached_preemption(self, step: int) -> bool:
    """False: `StopSignal` asks JAX and counts its questions; a question from here would not count."""
    return False

  def _load_checkpoint_infos(self, skip_metadata_read: bool = False) -> list:
    """Returns the steps by the names of their folders. The file of Orbax in each has nothing that is
    needed here; if one is damaged, the others can be read all the same.
    """
    return super()._load_checkpoint_infos(skip_metadata_read=True)


def unreadable(folder: AnyPath, tree: Collection[str], items: Collection[str] | None) -> str | None:
  """Reads all of a checkpoint of an early version, which has no manifest, and says what is damaged.

  Args:
    folder: of the checkpoint.
    tree: names of its arrays, as its meta has them.
    items: that are read; default: all.
  """
  alone = ocp.options.MultiprocessingOptions(
    primary_host=None, active_processes={jax.process_index()}, barrier_sync_key_prefix='check'
  )
  try:
    names = {key.split('.')[0] for key in tree}
    for name in names if items is None else names & set(items):
      handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=alone)
      with ocp.Checkpointer(handler, multiprocessing_options=alone) as reader:
        args = jax.tree.map(
          lambda _: ocp.RestoreArgs(restore_type=np.ndarray),
          reader.metadata(folder / name).item_metadata.tree,
        )
        reader.restore(folder / name, args=ocp.args.PyTreeRestore(restore_args=args))
  except Exception as e:  # of whatever kind: the files may hold anything
    return f"it has no manifest.json and can't be read ({str(e).splitlines()[0][:200]})"
  return None

"""Files for TensorBoard, written by tensorboardX."""

import sys
from pathlib import Path
from typing import Any


def open_writer(folder: Path, done: int) -> Any:
  """Opens a tensorboardX.SummaryWriter; lines beyond `done` updates that are there are not shown.

  Importing tensorboardX takes a second, and would import torch, if there is one, for the name of a
  type: seconds. So torch is hidden meanwhile; it can be imported later.
  """
  hidden = 'torch' not in sys.modules
  if hidden:
    sys.modules['torch'] = None  # type: ignore[assignment]
  try:
    import tensorboardX
  finally:
    if hidden:
      del sys.modules['torch']
  return tensorboardX.SummaryWriter(str(folder), purge_step=done + 1 if done else None)

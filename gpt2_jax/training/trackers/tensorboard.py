"""TensorBoard's files, in `tensorboard` of the workdir, written by tensorboardX."""

import sys
from pathlib import Path
from typing import Any

from gpt2_jax.training.trackers.protocol import Start, numbers


class TensorBoard:
  """What a killed start wrote beyond its checkpoint is hidden, and written anew."""

  needs, run, where = 'tensorboardX', '', ''

  def __init__(self, start: Start):
    folder = start.workdir / 'tensorboard'
    earlier = folder.exists()
    # an early version kept no account of what it had sent: it wrote each line at once
    self.sent = start.step if earlier and start.run is None else min(start.sent, start.step)
    self._last = start.step
    self._writer = _import().SummaryWriter(str(folder), purge_step=self.sent + 1 if earlier else None)

  def log(self, lines: list[dict[str, Any]]) -> None:
    for line in lines:
      self._last = line['step']
      for key, value in numbers(line).items():
        self._writer.add_scalar(key, value, line['step'])
    self._writer.flush()

  def close(self, outcome: str, summary: dict[str, Any], picture: Path | None) -> None:
    if picture:
      from matplotlib.image import imread

      self._writer.add_image('loss', imread(picture)[..., :3], self._last, dataformats='HWC')
    if summary:
      rows = [f'| {key} | {value} |' for key, value in summary.items() if key != 'sample']
      sample = ''.join(f'    {line}\n' for line in str(summary.get('sample', '')).splitlines())
      text = '\n'.join(['| | |', '|---|---|', *rows, '', sample])
      self._writer.add_text('summary', text, self._last)
    self._writer.close()


def _import() -> Any:
  """Returns tensorboardX.

  Importing it takes a second, and would import torch, if there is one, for the name of a type:
  seconds. So torch is hidden meanwhile; it can be imported later.
  """
  hidden = 'torch' not in sys.modules
  if hidden:
    sys.modules['torch'] = None  # type: ignore[assignment]
  try:
    import tensorboardX
  finally:
    if hidden:
      del sys.modules['torch']
  return tensorboardX

"""Weights & Biases. Project, entity, mode and address are its own: WANDB_PROJECT, WANDB_MODE, …"""

import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gpt2_jax.core.errors import UserError
from gpt2_jax.training.trackers.protocol import Start, numbers


def records(path: Path) -> Iterator[bytes]:
  """Yields the records of a .wandb file: LevelDB's log behind 7 bytes, in blocks of 32 KiB."""
  data, at, whole = path.read_bytes(), 7, b''
  while at + 7 <= len(data):
    if 2**15 - at % 2**15 < 7:  # no room for a header: zeros to the end of the block
      at += 2**15 - at % 2**15
      continue
    size, kind = int.from_bytes(data[at + 4 : at + 6], 'little'), data[at + 6]
    whole += data[at + 7 : at + 7 + size]
    at += 7 + size
    if at > len(data):  # cut short by a kill
      return
    if kind in (1, 4):  # all of it, or its last part
      yield whole
      whole = b''


def _written(folder: Path, run: str, sent: int) -> int:
  """Returns the last step in a run's files; `sent` if they are gone, to a server perhaps."""
  from wandb.proto import wandb_internal_pb2 as proto  # pyright: ignore[reportMissingImports]

  parse = getattr(proto, 'Record').FromString  # noqa: B009  made when the module is loaded
  paths = folder.glob(f'*run-*-{run}/*.wandb')
  read = [parse(record) for path in paths for record in records(path)]
  steps = [r.history.step.num for r in read if r.WhichOneof('record_type') == 'history']
  return max(steps, default=sent)


class Wandb:
  """A row a step. Rows can't be written twice: those beyond a checkpoint stay as they were sent."""

  needs = 'wandb'

  def __init__(self, start: Start):
    """
    Raises:
      UserError: there is no API key, which wandb would ask for at the keyboard.
    """
    import wandb  # pyright: ignore[reportMissingImports]

    self._wandb = wandb
    if wandb.setup().settings.mode in ('online', 'run', 'shared') and not wandb.login(prompt=False):
      raise UserError('there is no API key: `wandb login` or WANDB_API_KEY, or WANDB_MODE=offline')
    self.run = start.run or secrets.token_hex(4)
    self._run = wandb.init(
      id=self.run,
      resume='allow',
      reinit='create_new',  # a run of the user's own goes on beside it
      project=os.environ.get('WANDB_PROJECT', 'gpt2_jax'),
      name=start.workdir.resolve().name,
      dir=str(start.workdir),
      config=start.config,
      settings=wandb.Settings(console='off', silent=True),
    )
    offline, files = self._run.offline, Path(self._run.dir).parent
    self.where = f'wandb sync {files}' if offline else str(self._run.url)
    # a kill takes what wandb has not written yet: it knows itself what it has
    self.sent = 0
    if start.run:
      self.sent = _written(files.parent, self.run, start.sent) if offline else self._run.step - 1
    self._last = self.sent

  def log(self, lines: list[dict[str, Any]]) -> None:
    for line in lines:
      self._last = line['step']
      self._run.log(numbers(line), step=self._last)

  def close(self, outcome: str, summary: dict[str, Any], picture: Path | None) -> None:
    if picture:
      self._run.log({'loss': self._wandb.Image(str(picture))}, step=self._last)
    self._run.summary.update(summary)
    self._run.finish(exit_code=int(outcome == 'failed'))

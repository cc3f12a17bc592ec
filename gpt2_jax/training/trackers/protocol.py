"""What a tracker is: a service, or a program with files of its own, that shows runs side by side."""

import dataclasses
from pathlib import Path
from typing import Any, Protocol


@dataclasses.dataclass(frozen=True)
class Start:
  """What a tracker is opened with.

  Attributes:
    workdir: of the run; its name is the run's.
    config: of the run, as JSON gives it back.
    step: updates done by earlier starts.
    run: the tracker's own name of the run, if an earlier start has begun one.
    sent: the last step that the tracker has, by the same.
  """

  workdir: Path
  config: dict[str, Any]
  step: int
  run: str | None = None
  sent: int = 0


class Tracker(Protocol):
  """One run in a tracker; `TRACKER(start)` begins it, or goes on with it.

  All of it happens in one thread, which is no other's. Whatever is raised is said in a line, and
  tried again: the run itself goes on.

  Attributes:
    needs: the module that has to be there; the extra of the package has the tracker's name.
    run: its own name of the run, kept in the workdir for the next start.
    sent: the last step that it has: `log` begins behind it.
    where: what a user opens to see the run; '' where that needs no word.
  """

  needs: str
  run: str
  sent: int
  where: str

  def log(self, lines: list[dict[str, Any]]) -> None:
    """Takes lines of the record in order: `step`, and numbers; a value may be None or not finite."""
    ...

  def close(self, outcome: str, summary: dict[str, Any], picture: Path | None) -> None:
    """Ends the run, for this start.

    Args:
      outcome: 'finished', 'stopped' (it is to go on) or 'failed'.
      summary: figures and texts of the whole run; empty unless it is finished.
      picture: of the losses, a PNG.
    """
    ...


def numbers(line: dict[str, Any]) -> dict[str, float]:
  """Returns the values of a line by key, without its step, and those that the record has as null."""
  return {key: value for key, value in line.items() if key != 'step' and value is not None}


def flat(config: dict[str, Any], prefix: str = '') -> dict[str, Any]:
  """Returns the knobs of a config as {'section.key': value}."""
  found: dict[str, Any] = {}
  for key, value in config.items():
    found |= flat(value, f'{prefix}{key}.') if isinstance(value, dict) else {prefix + key: value}
  return found

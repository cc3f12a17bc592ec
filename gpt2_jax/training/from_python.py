"""Training from Python: `gpt2_jax.train('tiny', 'runs/tiny')`, in a notebook too."""

import dataclasses
import html
import multiprocessing
import sys
from pathlib import Path
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

from gpt2_jax import configs
from gpt2_jax.checkpoints.pretrained import from_pretrained
from gpt2_jax.checkpoints.workdir import record_of
from gpt2_jax.core.buckets import AnyPath, place
from gpt2_jax.model.config import Config
from gpt2_jax.model.pretrained_model import Pretrained
from gpt2_jax.training import train as training
from gpt2_jax.training.watch import metrics_file, run_summary

SHOWN = ('step', 'train/loss', 'eval/loss', 'train/tokens')


@dataclasses.dataclass(frozen=True)
class TrainedRun:
  """A run in its workdir."""

  workdir: AnyPath
  finished: bool  # False: a signal, or a notebook's stop button, ended it; `train` goes on from there

  @property
  def metrics(self) -> list[dict[str, Any]]:
    """The record, a dict a step."""
    return metrics_file.read(record_of(self.workdir))

  @property
  def table(self) -> dict[str, list]:
    """The record by column, None where a step has no such figure: what `pandas.DataFrame` and
    `polars.DataFrame` take.
    """
    lines = self.metrics
    return {key: [line.get(key) for line in lines] for key in {k: 0 for line in lines for k in line}}

  @property
  def model(self) -> Pretrained:
    """The model that the run offers, by `gpt2_jax.from_pretrained`."""
    return from_pretrained(self.workdir)

  def plot(self) -> Any:
    """Training and held-out loss against tokens seen: a matplotlib Figure, drawn by a notebook."""
    return run_summary.loss_figure(record_of(self.workdir), self.workdir.name, {})

  def _last(self) -> dict[str, Any]:
    lines = self.metrics
    return {
      key: next((line[key] for line in reversed(lines) if line.get(key) is not None), None)
      for key in SHOWN
    }

  def __repr__(self) -> str:
    said = ', '.join(f'{key}={value}' for key, value in self._last().items() if value is not None)
    return f'TrainedRun({str(self.workdir)!r}, finished={self.finished}, {said})'

  def _repr_html_(self) -> str:
    cells = ''.join(f'<tr><th>{key}</th><td>{value}</td></tr>' for key, value in self._last().items())
    return f'<table><caption>{html.escape(str(self.workdir))}</caption>{cells}</table>'


def train(
  config: Config | str, workdir: str | Path | None = None, **knobs: dict[str, Any]
) -> TrainedRun:
  """Trains, or goes on with a run that was stopped, as `gpt2-jax train` does.

  Ctrl-C, or a notebook's stop button, saves and returns the unfinished run: the same call goes on.
  A script calls it under `if __name__ == '__main__':`, since workers that prepare text import it.

  Args:
    config: by its name, 'tiny' or 'small:fineweb'; or a ConfigDict, of `gpt2_jax.configs.load` say.
    workdir: of the run; default: runs/NAME, of a config by its name.
    **knobs: of sections, in place of the config's: `train={'steps': 20}, model={'n_layer': 2}`.

  Raises:
    UserError: for everything that the user can mend.
  """
  if getattr(multiprocessing.current_process(), '_inheriting', False):  # which imports the script
    sys.exit(
      "gpt2_jax.train, in a script, belongs under `if __name__ == '__main__':`, as this is not"
    )
  if workdir is None:
    if not isinstance(config, str):
      raise TypeError('train: workdir is needed beside a config that has no name.')
    workdir = Path('runs') / config.replace(':', '-')
  made: Config = configs.load(config) if isinstance(config, str) else config
  made = made.copy_and_resolve_references()
  for section, values in knobs.items():
    made[section].update(values)
  cache = jax.config.jax_compilation_cache_dir  # pyright: ignore[reportAttributeAccessIssue]
  try:
    status = training.train(made, workdir)
  finally:
    if jax.config.jax_compilation_cache_dir != cache:  # pyright: ignore[reportAttributeAccessIssue]
      jax.config.update('jax_compilation_cache_dir', cache)
      compilation_cache.reset_cache()  # else the next run would keep its programs beside this one
  return TrainedRun(place(workdir), finished=status == 0)

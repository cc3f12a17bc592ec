"""A run made again from its own record, and where the two differ.

Compared are the lines of `metrics.jsonl`, without what is measured. A run repeats itself to the
last bit on the same devices with the same versions; on GPUs it does so with `config.deterministic`.
"""

import dataclasses
import json
import math
import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from gpt2_jax.checkpoints.orbax_store import difference
from gpt2_jax.checkpoints.saved_steps import held_positions
from gpt2_jax.checkpoints.workdir import record_of
from gpt2_jax.configs import base
from gpt2_jax.core import determinism
from gpt2_jax.core.buckets import AnyPath, place
from gpt2_jax.core.errors import UserError
from gpt2_jax.core.files import local, read_json
from gpt2_jax.model.config import Config
from gpt2_jax.parallel.multihost import say
from gpt2_jax.training import knobs
from gpt2_jax.training.train import train
from gpt2_jax.training.watch import metrics_file, run_record

NOTE = 'reproduces.json'  # in the folder of the second run: of which run it is the repetition


@dataclasses.dataclass(frozen=True)
class Difference:
  """A value of a step that is not the same in both records; one that is absent is None."""

  step: int
  key: str
  there: float | None  # in the run
  here: float | None  # in its repetition

  @property
  def relative(self) -> float:
    """|there - here| by the larger of the two; infinite where one is absent or not finite."""
    a, b = self.there, self.here
    if a is None or b is None or not math.isfinite(a - b):
      return math.inf
    return abs(a - b) / (max(abs(a), abs(b)) or 1.0)

  def __str__(self) -> str:
    show = lambda value: 'absent' if value is None else repr(value)
    far = f' (relative {self.relative:.1e})' if math.isfinite(self.relative) else ''
    return f'{self.key}: {show(self.there)} there, {show(self.here)} here{far}'


def differences(there: list[dict], here: list[dict]) -> Iterator[Difference]:
  """Yields the differences between two records, in the order of the steps.

  Args:
    there, here: lines of `metrics.jsonl`, measured keys among them or not.
  """
  left, right = (
    {line['step']: metrics_file.plain(line) for line in lines} for lines in (there, here)
  )
  for step in sorted(left.keys() | right.keys()):
    a, b = left.get(step, {}), right.get(step, {})
    for key in sorted((a.keys() | b.keys()) - {'step'}):
      x, y = a.get(key), b.get(key)
      if json.dumps(x) != json.dumps(y):  # bits: NaN is NaN, and 0.0 is not -0.0
        yield Difference(step, key, x, y)


def _restrict(config: Config, last: int, start: dict, positions: int | None) -> None:
  """Sets in a config what the run derived from its devices, and its last recorded step."""
  for axis, size in start['mesh'].items():
    config.mesh[axis] = size
  T = start.get('row_tokens') or config.data.sequence_length or positions or config.model.n_positions
  rows = config.train.global_batch_tokens // T
  split = config.mesh.data * config.mesh.fsdp
  config.train.micro_batch_rows = rows // start['micro_batches'] // split
  if goal := start.get('goal'):  # its steps followed from it, and so did the schedule's end
    if config.optim.decay_tokens is None and config.optim.decay_steps is None:
      config.optim.decay_tokens = goal
    config.train.update(steps=last, tokens=None, epochs=None)
  if last < config.train.steps:  # it was stopped: its schedule is that of all steps
    if config.optim.decay_tokens is None:
      config.optim.decay_steps = config.optim.decay_steps or config.train.steps
    config.train.steps = last


def _recorded(workdir: Path) -> tuple[dict, list[dict], list[dict]]:
  """Returns a run's config, starts and lines."""
  try:
    config = read_json(workdir / 'config.json')
    starts, lines = run_record.starts(workdir), metrics_file.read(workdir)
  except UserError as e:
    raise UserError(
      f'{workdir} holds no run that can be made again ({e}): name the --workdir of a '
      'run of launch.py.'
    ) from e
  if not starts or not lines:
    raise UserError(
      f'{workdir} has no {run_record.ENV} or no step in {metrics_file.FILE} yet: there is '
      'nothing to compare with.'
    )
  return config, starts, lines


def as_config(read: dict) -> Config:
  """Returns the config of a run by its `config.json`. Knobs that there were not yet have their
  defaults, which do what was done without them.
  """

  def filled(usual: Any, own: Any) -> Any:
    if not (isinstance(usual, dict) and isinstance(own, dict)):
      return own
    return usual | {key: filled(usual.get(key), value) for key, value in own.items()}

  config = filled(base.get_config().to_dict(), read)
  if isinstance(config['log'], dict):
    config['log'].pop('tensorboard', None)  # log.to now
  return ConfigDict(config)  # pyright: ignore[reportReturnType]


def _environment(start: dict) -> dict[str, Any]:
  """Returns what the figures of a start may depend on, without its data."""
  return {
    'python': start['python'],
    'platform': start['platform'],
    'commit': start['git_commit'],
    **start['versions'],
    **{name: start['env'].get(name) for name in run_record.ENVIRONMENT},
  }


def _here() -> dict[str, Any]:
  return _environment(
    {
      'python': platform.python_version(),
      'platform': platform.platform(),
      'env': os.environ,
      'git_commit': run_record.commit(),
      'versions': run_record.versions(),
    }
  )


def _take_environment(start: dict) -> None:
  """Sets the variables that the run had, as long as no device was used."""
  for name in run_record.ENVIRONMENT:
    if name in start['env']:
      os.environ[name] = start['env'][name]
  if platforms := start['env'].get('JAX_PLATFORMS'):  # which JAX has read already
    jax.config.update('jax_platforms', platforms)


def _claim(output: Path, workdir: AnyPath) -> None:
  """Notes in a new folder which run it repeats, so that a killed repetition goes on."""
  note = output / NOTE
  if (
    output.exists()
    and any(output.iterdir())
    and not (note.exists() and read_json(note).get('run') == str(workdir))
  ):
    raise UserError(
      f'{output} is there already and holds no repetition of {workdir}: name another '
      'folder with --output.'
    )
  output.mkdir(parents=True, exist_ok=True)
  run_record.write_json(note, {'run': str(workdir)})


def reproduce(workdir: str | os.PathLike, output: str | os.PathLike | None = None) -> int:
  """Runs a run's config once more, and says where the two differ.

  The config, the mesh, the micro-batches and the variables of the environment are those of the run's
  last start; what differs of versions, machine and commit is said first. Relative paths in the config
  are looked for from where this is called.

  Args:
    workdir: of the run, finished or not: it is repeated up to its last recorded step.
    output: folder of the repetition, on a disk. Default: beside the run (of one in a bucket: in
      `runs`), its name and '-again'. A repetition that was stopped there goes on.

  Returns:
    0 where each step is bitwise the same, 1 where one is not, 128 + the signal that stopped it.

  Raises:
    UserError: there is no such run, or it can't be run here.
  """
  lies, workdir = place(workdir), record_of(workdir)
  if output is None:
    beside = lies.parent if isinstance(lies, Path) else Path('runs')
    output = beside / f'{lies.name}-again'
  output = local(output, '--output')
  config, starts, lines = _recorded(workdir)
  start = starts[-1]
  _claim(output, lies)
  changed = difference(_environment(start), _here())
  _take_environment(start)  # before `say`, which asks the devices who is to speak
  if changed:
    say(f'what is not as it was:\n{changed}')
  for name in ('mesh', 'micro_batches', 'rows', 'row_tokens', 'git_commit', 'versions'):
    if any(other.get(name) != start.get(name) for other in starts):
      say(f"its {len(starts)} starts differ in {name}: only the last one's is repeated")
  again = as_config(config)
  again.log.to = ''  # what repeats a run is nothing to follow
  knobs.check(again)
  positions = held_positions(lies)
  _restrict(again, lines[-1]['step'], start, positions)
  if again.deterministic:
    determinism.require()
  if status := train(again, output, held=positions):
    return status
  used = lambda start: f'{start["devices"]}, data {start["data"]["sha256"]}'
  if (there := used(start)) != (here := used(run_record.starts(output)[-1])):
    say(f'it ran on {there}; this on {here}')
  return report(lines, metrics_file.read(output))


def report(there: list[dict], here: list[dict]) -> int:
  """Says where two records differ. Returns 0 if they don't, else 1."""
  found = list(differences(there, here))
  if not found:
    say(f'the same to the last bit: {len(there):,} steps')
    return 0
  first = [d for d in found if d.step == found[0].step]
  say(f'the first step that differs is {found[0].step:,} of {there[-1]["step"]:,}:')
  for each in first:
    say(f'  {each}')
  worst: dict[str, Difference] = {}
  for each in found:
    worst[each.key] = max(worst.get(each.key, each), each, key=lambda d: d.relative)
  say('the largest differences of all steps:')
  for each in worst.values():
    say(f'  step {each.step:,}: {each}')
  return 1

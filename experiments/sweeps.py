"""Points of a sweep, as plain data: a point is a dict of overrides of the config.

    seeds(grid({'optim.peak_lr': [1e-3, 2e-3], 'model.n_embd': [64, 128]}), 3)    12 points

Keys are those of the config (`optim.peak_lr` is `--config.optim.peak_lr`), or say how a run is made:

    run.devices   so many simulated devices, on CPU
    run.kill_at   steps at which the run is killed (SIGKILL) and started again
"""

import builtins
import hashlib
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from gpt2_jax.core.errors import UserError

Point = dict[str, Any]
Axes = Mapping[str, Sequence[Any]]  # key -> its values
SEED = 'train.seed'
HOW = ('run.devices', 'run.kill_at')


def grid(axes: Axes) -> list[Point]:
  """Each value with each value of the others, the last key's changing fastest."""
  return [dict(builtins.zip(axes, values)) for values in itertools.product(*axes.values())]


def zip(axes: Axes) -> list[Point]:
  """The first values together, then the second ones, …; all keys have as many."""
  if len({len(values) for values in axes.values()}) > 1:
    raise UserError(
      'zip: each key needs as many values as the others, not '
      + ', '.join(f'{len(values)} of {key}' for key, values in axes.items())
      + '.'
    )
  return [dict(builtins.zip(axes, values)) for values in builtins.zip(*axes.values())]


def seeds(points: Iterable[Point], count: int) -> list[Point]:
  """Each point with the seeds 0 to `count` - 1, the same ones for all: what is compared is paired."""
  return [point | {SEED: seed} for point in points for seed in range(count)]


def canonical(point: Point) -> str:
  """JSON that is the same for the same overrides, whatever their order."""
  return json.dumps(point, sort_keys=True, separators=(',', ':'), allow_nan=False)


def key(config: str, point: Point) -> str:
  """Names a run: 12 hexadecimal digits of the SHA-256 of its config file and overrides."""
  return hashlib.sha256(canonical(point | {'config': config}).encode()).hexdigest()[:12]


def varied(points: Sequence[Point]) -> list[str]:
  """The keys that are not the same in all points, the seed aside, in order of appearance."""
  keys = dict.fromkeys(k for point in points for k in point if k != SEED)
  return [k for k in keys if len({canonical({k: p.get(k)}) for p in points}) > 1]

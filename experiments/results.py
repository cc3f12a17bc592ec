"""From finished runs to what an experiment's README shows."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from experiments import stats, sweeps
from gpt2_jax.core.errors import UserError
from gpt2_jax.core.files import write_whole
from gpt2_jax.training.watch import metrics_file, run_record

BEGIN = '<!-- results: what follows is written by experiments/run.py -->'
END = '<!-- end of results -->'


@dataclasses.dataclass(frozen=True)
class Run:
  """A finished run."""

  point: sweeps.Point
  folder: Path
  lines: list[dict]
  starts: list[dict]

  @classmethod
  def read(cls, point: sweeps.Point, folder: Path) -> 'Run':
    return cls(point, folder, metrics_file.read(folder), run_record.starts(folder))

  @property
  def seconds(self) -> float:
    return sum(self.starts[-1]['seconds'].values())

  def last(self, metric: str) -> float:
    """The last value of a key of `metrics.jsonl`."""
    return next(line[metric] for line in reversed(self.lines) if metric in line)


@dataclasses.dataclass(frozen=True)
class Group:
  """Runs that differ in their seed alone."""

  settings: sweeps.Point  # what is varied, with its value here
  values: dict[int, float]  # of the metric, by seed

  @property
  def summary(self) -> stats.Summary:
    return stats.Summary.of([*self.values.values()])

  def against(self, other: 'Group') -> stats.Paired:
    if self.values.keys() != other.values.keys():
      raise UserError(
        f'{self.settings} and {other.settings} have other seeds: '
        f'{[*self.values]}, {[*other.values]}. Pairs need the same ones.'
      )
    return stats.paired([*self.values.values()], [other.values[seed] for seed in self.values])


def groups(runs: Iterable[Run], metric: str = 'eval/loss') -> list[Group]:
  """The runs by what is varied between them."""
  runs = list(runs)
  keys, found = sweeps.varied([run.point for run in runs]), {}
  for run in runs:
    settings = {k: run.point.get(k) for k in keys}
    group = found.setdefault(sweeps.canonical(settings), Group(settings, {}))
    group.values[run.point.get(sweeps.SEED, 0)] = run.last(metric)
  return list(found.values())


def markdown(rows: Sequence[Sequence[Any]]) -> str:
  """A table; the first row is its head. Columns after the first are set right."""
  head, *body = [f'| {" | ".join(str(cell) for cell in row)} |' for row in rows]
  return '\n'.join([head, '|---|' + '---:|' * (len(rows[0]) - 1), *body])


def show(value: Any) -> str:
  return f'{value:g}' if isinstance(value, float) else f'{value}'


def number(value: float, digits: int = 4) -> str:
  return f'{value:.{digits}f}' if math.isfinite(value) else '–'


def p_value(p: float) -> str:
  return '–' if math.isnan(p) else '< 0.001' if p < 0.001 else f'{p:.3f}'


def table(
  found: Sequence[Group], baseline: sweeps.Point | None = None, name: str = 'held-out loss'
) -> str:
  """Mean, standard deviation and 95 % interval of each group; with a baseline (settings of one of
  them) each one's difference from it, with its interval and its p-value (paired t, Holm).
  """
  keys = [*found[0].settings] or ['']
  head = [*keys, 'seeds', f'{name}, mean', 'standard deviation', '95 % interval']
  columns = [
    [
      *(show(g.settings[k]) if k else 'all' for k in keys),
      g.summary.n,
      number(g.summary.mean),
      number(g.summary.deviation),
      f'± {number(g.summary.half_width)}',
    ]
    for g in found
  ]
  if baseline is not None:
    base = next(g for g in found if g.settings == baseline)
    others = [g for g in found if g is not base]
    compared = [g.against(base) for g in others]
    adjusted = iter(stats.holm([c.p for c in compared]))
    by_group = {id(g): c for g, c in zip(others, compared)}
    head += ['difference from the baseline', 'p']
    for group, column in zip(found, columns):
      if group is base:
        column += ['baseline', '']
      else:
        d = by_group[id(group)].difference
        column += [f'{d.mean:+.4f} ± {number(d.half_width)}', p_value(next(adjusted))]
  return markdown([head, *columns])


def provenance(name: str, runs: Sequence[Run]) -> str:
  """How the results can be had again, and what they were had with."""
  starts = [start for run in runs for start in run.starts]
  distinct = lambda key: ', '.join(dict.fromkeys(str(key(start)) for start in starts))
  versions = distinct(lambda s: f'Python {s["python"]}, jax {s["versions"]["jax"]}')
  minutes = sum(run.seconds for run in runs) / 60
  return (
    f'`python experiments/run.py {name}`: {len(runs)} runs, {minutes:.1f} minutes of them in '
    f'all, {min(s["time"] for s in starts)[:10]}, on {distinct(lambda s: s["processor"])} '
    f'(shared with other work); {versions}; '
    f'commit {distinct(lambda s: (s["git_commit"] or "unknown")[:12])}'
    + ' (with changes)' * any('dirty' in (s['git_commit'] or '') for s in starts)
    + '.'
  )


def write(folder: Path, name: str, runs: Sequence[Run], report: Callable) -> None:
  """Puts the results between the markers of an experiment's README, and its plot beside it.

  Args:
    folder: of the experiment.
    name: of the experiment.
    runs: all of its runs, finished.
    report: `(runs, axes) -> blocks of Markdown`; draws onto the axes.
  """
  from experiments import plots

  readme = folder / 'README.md'
  text = readme.read_text()
  if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
    raise UserError(f'{readme} needs the two lines\n{BEGIN}\n{END}\nbetween which results go.')
  figure, axes = plots.figure()
  blocks = report(list(runs), axes)
  plots.save(figure, folder / f'{name}.png')
  before, after = text[: text.index(BEGIN)], text[text.index(END) :]
  body = '\n\n'.join([BEGIN, *blocks, f'![{name}]({name}.png)', provenance(name, runs), ''])
  write_whole(readme, before + body + after)

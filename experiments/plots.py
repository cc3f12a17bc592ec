"""The look of the experiments' plots: labels at the lines, nothing that says nothing."""

import os
from collections.abc import Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

COLOURS = ('#0b6fa4', '#d1495b', '#3a7d44', '#8d5a97', '#c77d0a', '#4d4d4d')


def figure():
  """A figure with one pair of axes."""
  made = Figure(figsize=(6.4, 4), layout='constrained')
  FigureCanvasAgg(made)
  axes = made.subplots()
  axes.spines[['top', 'right']].set_visible(False)
  axes.set_prop_cycle(color=COLOURS)
  return made, axes


def save(made: Figure, path: Path) -> None:
  """Names the lines at their ends and writes the file."""
  for axes in made.axes:
    label_ends(axes)
  temporary = path.with_suffix('.tmp')
  made.savefig(temporary, format='png', dpi=130)
  os.replace(temporary, path)


def label_ends(axes) -> None:
  """Writes each line's label to the right of its end, moved up or down where two would collide."""
  axes.figure.canvas.draw()
  lines = [line for line in axes.get_lines() if not line.get_label().startswith('_')]
  at = axes.transAxes.inverted().transform
  ends = {line: at(axes.transData.transform(line.get_xydata()[-1]))[1] for line in lines}
  lines.sort(key=ends.__getitem__)
  height = 14 / axes.get_window_extent().height * axes.figure.dpi / 100
  places = [ends[line] for line in lines]
  for _ in range(50):  # pushes neighbours apart
    for i in range(len(places) - 1):
      overlap = height - (places[i + 1] - places[i])
      if overlap > 0:
        places[i], places[i + 1] = places[i] - overlap / 2, places[i + 1] + overlap / 2
  for line, place in zip(lines, places):
    axes.text(
      1.02,
      place,
      line.get_label(),
      transform=axes.transAxes,
      color=line.get_color(),
      va='center',
      fontsize=9,
    )


def line(
  axes,
  x: Sequence[float],
  y: Sequence[float],
  label: str | None = None,
  *,
  error: Sequence[float] | None = None,
  **style,
) -> None:
  """A line of points with error bars; its label will stand at its end."""
  drawn = axes.errorbar(x, y, yerr=error, marker='o', markersize=4, linewidth=1.4, capsize=2, **style)
  drawn[0].set_label(label or '_')


def ticks(axes, values: Sequence[float], labels: Sequence[str] | None = None) -> None:
  """Marks the x axis at these values alone."""
  axes.set_xticks(values, labels or [f'{value:g}' for value in values])
  axes.minorticks_off()


def dots(axes, found, names: Sequence[str]) -> None:
  """A column of dots for each group, a seed each, with its mean and the mean's 95 % interval."""
  for i, group in enumerate(found):
    colour = COLOURS[i % len(COLOURS)]
    axes.plot(
      [i] * len(group.values), [*group.values.values()], 'o', color=colour, alpha=0.45, markersize=5
    )
    axes.errorbar(
      i + 0.12,
      group.summary.mean,
      group.summary.half_width,
      fmt='D',
      color=colour,
      markersize=5,
      capsize=3,
    )
    axes.annotate(
      f'{group.summary.mean:.4f}',
      (i + 0.12, group.summary.mean),
      xytext=(8, 0),
      textcoords='offset points',
      va='center',
      color=colour,
      fontsize=9,
    )
  ticks(axes, range(len(found)), names)
  axes.set_xlim(-0.5, len(found) - 0.2)
  axes.set_ylabel('held-out loss (nats a byte)')

"""Heat maps of what a sweep finds, by matplotlib: for notebooks and scripts."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gpt2_jax.core.errors import UserError

MOST_NAMED = 64  # rows or columns with a label each


def shown(token: str) -> str:
  """A token on one line, its blanks made visible."""
  return repr(token)[1:-1].replace(' ', '·')


def heat_map(
  values: Any,
  axes: Sequence[str] = ('layer', 'position'),
  *,
  labels: Mapping[str, Sequence[str]] | None = None,
  title: str = '',
  says: str = '',
) -> Any:
  """A picture of a table: white is 0, red above, blue below, to the same depth.

  Args:
    values: [rows, columns]; with one axis more, in front, a panel for each of its indices.
    axes: what each axis is called.
    labels: name of an axis -> its indices' labels; default: numbers.
    title: of the figure.
    says: what a colour means.

  Returns:
    A matplotlib Figure, which a notebook shows and `savefig` writes.

  Raises:
    UserError: the table has not two or three axes, or not as many as are named.
  """
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  values = np.asarray(values, np.float64)
  if values.ndim == 1:
    values, axes = values[:, None], (*axes[:1], '')
  if values.ndim not in (2, 3) or len(axes) != values.ndim:
    raise UserError(
      f'a heat map is of two axes, or three; not of {values.shape} named {", ".join(axes)}.'
    )
  panels, labels = values if values.ndim == 3 else values[None], labels or {}
  columns = min(len(panels), 4)
  rows = -(-len(panels) // columns)
  wide, high = (0.32 * min(n, 40) + 1.2 for n in panels.shape[:0:-1])
  figure = Figure((max(columns * wide + 1, 4), max(rows * (high + 0.6), 2.5)), layout='constrained')
  FigureCanvasAgg(figure)
  most = np.abs(values[np.isfinite(values)]).max(initial=0) or 1.0
  drawn: Any = None
  grid = figure.subplots(rows, columns, squeeze=False).ravel()
  for panel, (ax, table) in enumerate(zip(grid, panels)):
    drawn = ax.imshow(table, cmap='RdBu_r', vmin=-most, vmax=most, aspect='auto')
    for axis, name, n in zip((ax.yaxis, ax.xaxis), axes[-2:], table.shape):
      named = labels.get(name, [str(i) for i in range(n)])
      axis.set_label_text(name)
      axis.set_ticks(range(n) if n <= MOST_NAMED else range(0, n, -(-n // MOST_NAMED)))
      texts = axis.set_ticklabels([named[int(i)] for i in axis.get_ticklocs()], fontsize=8)
      for text in texts:
        text.set_parse_math(False)
    if any(len(text) > 3 for text in labels.get(axes[-1], ())):
      ax.tick_params('x', rotation=90)
    if len(panels) > 1:
      ax.set_title(f'{axes[0]} {panel}', fontsize=9)
  for ax in grid[len(panels) :]:
    ax.remove()
  figure.suptitle(title, fontsize=10, parse_math=False)
  figure.colorbar(drawn, ax=list(grid[: len(panels)]), label=says)
  return figure

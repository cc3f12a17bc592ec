"""The picture of what `log.layers_every` measured, `layers.png`."""

import collections
import os
from pathlib import Path

import numpy as np

from gpt2_jax.core.errors import saving
from gpt2_jax.training.watch import metrics_file

PLOT = 'layers.png'
MEANS = 10  # of so many points is a noise scale


def curves(lines: list[dict], what: str) -> dict[str, np.ndarray]:
  """Name -> its values [steps, layers], of the keys `layers/{what}/NAME` and those with a layer."""
  found = collections.defaultdict(list)
  begin = f'layers/{what}'
  for key in [key for key in lines[0] if key == begin or key.startswith(f'{begin}/')]:
    name, _, last = key.removeprefix(begin).strip('/').rpartition('/')
    name = name if last.isdecimal() else key.removeprefix(begin).strip('/')
    found[name].append([np.nan if (x := line.get(key)) is None else x for line in lines])
  return {name: np.array(values, float).T for name, values in found.items()}


def noise_scale(lines: list[dict]) -> np.ndarray:
  """Tokens: at each point the ratio of means over the last `MEANS`; NaN where one is negative."""
  get = lambda key: np.array([line.get(f'layers/gradient_{key}') or 0.0 for line in lines])
  total = lambda x: np.array([x[max(0, i + 1 - MEANS) : i + 1].sum() for i in range(len(x))])
  square, variance = total(get('square')), total(get('variance'))
  return np.where((square > 0) & (variance > 0), variance / np.where(square > 0, square, 1), np.nan)


def draw(workdir: Path) -> Path | None:
  """Draws four panels: updates by weights and gradients, of each kind of matrix over its layers; the
  largest attention logit of each layer; the noise scale. None where nothing was measured.
  """
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure
  from matplotlib.ticker import EngFormatter

  lines = [line for line in metrics_file.read(workdir) if 'layers/largest_logit/0' in line]
  if not lines:
    return None
  tokens = np.array([line['train/tokens'] for line in lines])
  figure = Figure(figsize=(11, 7), layout='constrained')
  FigureCanvasAgg(figure)
  (ratio, grads), (logits, noise) = figure.subplots(2, 2, sharex=True)
  for axes, what in ((ratio, 'update_ratio'), (grads, 'grad_norm')):
    for i, (name, values) in enumerate(curves(lines, what).items()):
      axes.plot(tokens, np.median(values, 1), color=f'C{i}', label=name, marker='.')
      axes.fill_between(tokens, values.min(1), values.max(1), color=f'C{i}', alpha=0.15)
    axes.set(yscale='log')
  ratio.set(title='norm of updates by that of weights: median and range over the layers')
  ratio.legend(fontsize=8)
  grads.set(title='norm of gradients')
  (largest,) = curves(lines, 'largest_logit').values()
  for layer, values in enumerate(largest.T):
    shade = layer / max(1, largest.shape[1] - 1)
    logits.plot(tokens, values, color=(shade, 0.2, 1 - shade), marker='.')
  logits.set(title='largest attention logit, by layer: first blue, last red')
  if np.isfinite(scale := noise_scale(lines)).any():
    noise.plot(tokens, scale, color='C0', marker='.')
    noise.set(yscale='log')
  noise.set(title='noise scale of the gradient (tokens)')
  for axes in (logits, noise):
    axes.set(xlabel='tokens seen')
    axes.xaxis.set_major_formatter(EngFormatter())
  for axes in (ratio, grads, logits, noise):
    axes.grid(alpha=0.3)
  path = workdir / PLOT
  with saving('the plot', path):
    figure.savefig(path.with_suffix('.tmp'), format='png', dpi=110)
    os.replace(path.with_suffix('.tmp'), path)
  return path

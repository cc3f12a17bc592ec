"""The best learning rate over widths, under both parametrizations."""

from experiments import plots, results
from experiments.sweeps import grid, seeds

BASE, WIDTHS = 32, (32, 64, 128)
RATES = [1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2]
# A deviation of 0.02 is small for matrices with 32 rows, and gradients are clipped at a norm that
# depends on the width: both would hide what this is about.
SETTINGS = {
  'model.initializer_range': 0.1,
  'optim.clip_norm': 0.0,
  'train.steps': 300,
  'optim.warmup_steps': 30,
  'checkpoint.every': 300,
  'evaluate.every': 300,
}


def sweep():
  points = []
  for width in WIDTHS:
    for name in ('standard', 'mup'):
      if name == 'mup' and width == BASE:
        continue  # there the two are the same, to the last bit (tests/model/test_mup.py)
      mup = {'model.parametrization': 'mup', 'model.mup_base_width': BASE} if name == 'mup' else {}
      points += [
        {'model.n_embd': width, 'model.n_head': width // 16} | SETTINGS | mup | rate
        for rate in grid({'optim.peak_lr': RATES})
      ]
  return seeds(points, 1)


def report(runs, axes):
  curves = {}
  for group in results.groups(runs):
    width, name = group.settings['model.n_embd'], group.settings['model.parametrization']
    curves.setdefault((name or 'standard', width), []).append(group.summary.mean)
  curves['mup', BASE] = curves['standard', BASE]
  at_base = min(range(len(RATES)), key=curves['mup', BASE].__getitem__)
  rows = [
    [
      'parametrization',
      'width',
      *(f'{rate:g}' for rate in RATES),
      'best rate',
      f'loss at {RATES[at_base]:g} above the best',
    ]
  ]
  for name, style in (('standard', '--'), ('mup', '-')):
    for i, width in enumerate(WIDTHS):
      curve = curves[name, width]
      best = min(range(len(RATES)), key=curve.__getitem__)
      shown = [f'**{v:.4f}**' if j == best else f'{v:.4f}' for j, v in enumerate(curve)]
      rows.append(
        [name, str(width), *shown, f'{RATES[best]:g}', f'{curve[at_base] - curve[best]:.4f}']
      )
      if name == 'mup' and width == BASE:
        continue
      plots.line(
        axes,
        RATES,
        curve,
        f'{"both" if width == BASE else name}, width {width}',
        color=plots.COLOURS[i],
        linestyle=style,
      )
      axes.plot(
        RATES[best], curve[best], 'o', color=plots.COLOURS[i], markersize=10, fillstyle='none'
      )
  axes.set(
    xscale='log',
    xlabel='peak learning rate (of the embeddings)',
    ylabel='held-out loss (nats a byte)',
  )
  plots.ticks(axes, RATES)
  return [results.markdown(rows)]

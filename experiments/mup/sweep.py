"""The best learning rate over widths, under both parametrizations."""

from experiments import plots, results
from experiments.sweeps import grid

BASE, WIDTHS = 32, (32, 64, 128)
RATES = [5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2]


def sweep():
  points = []
  for width in WIDTHS:
    for name in ('standard', 'mup'):
      if name == 'mup' and width == BASE:
        continue  # there the two are the same, to the last bit (tests/test_mup.py)
      mup = {'model.parametrization': 'mup', 'model.mup_base_width': BASE} if name == 'mup' else {}
      points += [{'model.n_embd': width, 'model.n_head': width // 16} | mup | rate
                 for rate in grid({'optim.peak_lr': RATES})]
  return points


def report(runs, axes):
  loss = {(run.point.get('model.parametrization', 'standard'), run.point['model.n_embd'],
           run.point['optim.peak_lr']): run.last('eval/loss') for run in runs}
  loss |= {('mup', BASE, rate): loss['standard', BASE, rate] for rate in RATES}
  rows = [['parametrization', 'width', *(f'{rate:g}' for rate in RATES), 'best']]
  for name, style in (('standard', '--'), ('mup', '-')):
    for i, width in enumerate(WIDTHS):
      curve = [loss[name, width, rate] for rate in RATES]
      best = min(range(len(RATES)), key=lambda i: curve[i])
      shown = [f'**{v:.4f}**' if j == best else f'{v:.4f}' for j, v in enumerate(curve)]
      rows.append([name, width, *shown, f'{RATES[best]:g}'])
      if name == 'mup' and width == BASE:
        continue
      plots.line(axes, RATES, curve, f'{"both" if width == BASE else name}, width {width}',
                 color=plots.COLOURS[i], linestyle=style)
      axes.plot(RATES[best], curve[best], 'o', color=plots.COLOURS[i], markersize=10,
                fillstyle='none')
  axes.set(xscale='log', xlabel='peak learning rate (of the embeddings)',
           ylabel='held-out loss (nats a byte)')
  plots.ticks(axes, RATES)
  return [results.markdown(rows)]

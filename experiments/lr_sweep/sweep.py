"""Held-out loss against the peak learning rate."""

from experiments import plots, results
from experiments.sweeps import grid, seeds

RATES = [5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2]
BASELINE = 2e-3


def sweep():
  # the baseline has no override: it is experiments/config.py, whose runs other experiments share
  points = [
    point if point['optim.peak_lr'] != BASELINE else {} for point in grid({'optim.peak_lr': RATES})
  ]
  return seeds(points, 3)


def report(runs, axes):
  found = [
    results.Group({'optim.peak_lr': group.settings['optim.peak_lr'] or BASELINE}, group.values)
    for group in results.groups(runs)
  ]
  summaries = [group.summary for group in found]
  plots.line(axes, RATES, [s.mean for s in summaries], error=[s.half_width for s in summaries])
  axes.set(xscale='log', xlabel='peak learning rate', ylabel='held-out loss (nats a byte)')
  axes.margins(y=0.15)
  plots.ticks(axes, RATES)
  return [results.table(found, {'optim.peak_lr': BASELINE})]

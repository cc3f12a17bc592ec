"""Activations in float32 against bfloat16, seed by seed."""

from experiments import plots, results
from experiments.sweeps import grid, seeds


def sweep():
  # float32 is what `auto` means on a CPU: without an override, so that runs are shared
  return seeds([{}, *grid({'model.dtype': ['bfloat16']})], 5)


def report(runs, axes):
  found = [
    results.Group({'model.dtype': group.settings['model.dtype'] or 'float32'}, group.values)
    for group in results.groups(runs)
  ]
  plots.dots(axes, found, ['float32', 'bfloat16'])
  axes.set_xlabel('dtype of activations')
  return [results.table(found, {'model.dtype': 'float32'})]

"""How much the loss depends on the seed alone: of the weights, the order of the data."""

from experiments import plots, results, stats
from experiments.sweeps import seeds


def sweep():
  return seeds([{}], 10)


def report(runs, axes):
  (group,) = results.groups(runs)
  s = group.summary
  counts = range(2, 11)
  halves = [
    s.half_width * (stats.t_quantile(n) / n**0.5) / (stats.t_quantile(s.n) / s.n**0.5) for n in counts
  ]
  plots.line(axes, counts, halves, 'half width of the\n95 % interval')
  axes.axhline(s.deviation, color='#4d4d4d', linewidth=0.8, linestyle=':')
  axes.annotate(
    'standard deviation of a run',
    (10, s.deviation),
    xytext=(0, 4),
    ha='right',
    textcoords='offset points',
    fontsize=9,
    color='#4d4d4d',
  )
  axes.set(xlabel='seeds that the mean is over', ylabel='held-out loss (nats a byte)')
  axes.set_ylim(bottom=0)
  values = [*group.values.values()]
  return [results.table([group]), f'Lowest and highest: {min(values):.4f} and {max(values):.4f}.']

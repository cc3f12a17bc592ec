"""Optimizers on the same model and data, each at its own learning rate: tokens to AdamW's loss."""

import numpy as np

from experiments import plots, results, stats
from experiments.sweeps import SEED, grid, seeds
from gpt2_jax.core.errors import UserError

FRESH = range(1, 6)  # seeds of the comparison; seed 0 chose the rates
SETTINGS = {'evaluate.every': 10}
NORMUON = {'optim.name': 'muon', 'optim.muon_normalize_rows': True, 'optim.cautious_decay': True}
# Each one's knobs, its rates, and the best of them by the run with seed 0.
OPTIMIZERS = {
  'AdamW': ({}, [1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2], 2e-3),
  'Muon': ({'optim.name': 'muon'}, [2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2, 6.4e-2], 1.6e-2),
  'NorMuon, cautious': (NORMUON, [2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2, 6.4e-2], 1.6e-2),
  'SOAP': ({'optim.name': 'soap'}, [2e-3, 4e-3, 8e-3, 1.6e-2], 8e-3),
  'Lion': ({'optim.name': 'lion', 'optim.weight_decay': 0.3}, [2.5e-4, 5e-4, 1e-3, 2e-3], 1e-3),
}


def sweep():
  points = []
  for knobs, rates, best in OPTIMIZERS.values():
    points += seeds([SETTINGS | knobs | rate for rate in grid({'optim.peak_lr': rates})], 1)
    points += [SETTINGS | knobs | {'optim.peak_lr': best, SEED: seed} for seed in FRESH]
  return points


def curve(run) -> tuple[np.ndarray, np.ndarray]:
  """Tokens, and the held-out losses there."""
  lines = [line for line in run.lines if 'eval/loss' in line]
  tokens, losses = (np.array([line[k] for line in lines]) for k in ('train/tokens', 'eval/loss'))
  return tokens, losses


def tokens_to(loss: float, run) -> float:
  """Tokens to a held-out loss, straight between evaluations; NaN: it was not reached."""
  tokens, losses = curve(run)
  below = np.flatnonzero(losses <= loss)
  if not below.size:
    return np.nan
  i = max(1, int(below[0]))
  return float(np.interp(-loss, -losses[i - 1 : i + 1], tokens[i - 1 : i + 1]))


def chosen(runs, name: str) -> tuple[list, list]:
  """The runs of an optimizer: those that chose its rate, and those of the comparison.

  Raises:
    UserError: another rate than the one that stands in `OPTIMIZERS` was the best.
  """
  knobs, _, best = OPTIMIZERS[name]
  rest = {'optim.peak_lr', SEED}
  own = [
    run for run in runs if {k: v for k, v in run.point.items() if k not in rest} == SETTINGS | knobs
  ]
  tried = [run for run in own if run.point[SEED] == 0]
  found = min(tried, key=lambda run: run.last('eval/loss')).point['optim.peak_lr']
  if found != best:
    raise UserError(f'{name}: the best rate is {found:g}, and OPTIMIZERS says {best}.')
  return tried, [run for run in own if run.point[SEED] != 0]


def rates_table(tried: dict[str, list]) -> str:
  """The held-out loss at each rate."""
  rates = sorted({run.point['optim.peak_lr'] for runs in tried.values() for run in runs})
  rows = [['seed 0, held-out loss', *(f'{rate:g}' for rate in rates)]]
  for name, runs in tried.items():
    losses = {run.point['optim.peak_lr']: run.last('eval/loss') for run in runs}
    least = min(losses.values())
    show = lambda x, least=least: '' if x is None else f'**{x:.3f}**' if x == least else f'{x:.3f}'
    rows.append([name, *(show(losses.get(rate)) for rate in rates)])
  return results.markdown(rows)


def report(runs, axes):
  tried, compared = {}, {}
  for name in OPTIMIZERS:
    tried[name], compared[name] = chosen(runs, name)
  target = [run.last('eval/loss') for run in compared['AdamW']]
  total = runs[0].last('train/tokens')
  others = [name for name in OPTIMIZERS if name != 'AdamW']
  losses = {name: [run.last('eval/loss') for run in compared[name]] for name in OPTIMIZERS}
  shares = {
    name: [tokens_to(loss, run) / total for loss, run in zip(target, compared[name], strict=True)]
    for name in others
  }
  against = {name: stats.paired(losses[name], target) for name in others}
  ps = dict(zip(others, stats.holm([against[name].p for name in others])))
  rows = [
    [
      'optimizer',
      'rate',
      'held-out loss',
      'difference from AdamW',
      'p (paired t, Holm)',
      'seeds that reached its loss',
      'tokens to it, share of the run',
    ]
  ]
  for i, name in enumerate(OPTIMIZERS):
    own = stats.Summary.of(losses[name])
    row = [name, f'{OPTIMIZERS[name][2]:g}', f'{own.mean:.4f} ± {own.half_width:.4f}']
    if name in against:
      d, reached = against[name].difference, [x for x in shares[name] if np.isfinite(x)]
      share = stats.Summary.of(reached) if len(reached) == len(target) else None
      row += [f'{d.mean:+.4f} ± {d.half_width:.4f}', results.p_value(ps[name])]
      row += [f'{len(reached)} of {len(target)}']
      row += [f'{share.mean:.1%} ± {share.half_width:.1%}' if share else '–']
    rows.append(row + [''] * (7 - len(row)))
    tokens = curve(compared[name][0])[0]
    mean = np.mean([curve(run)[1] for run in compared[name]], 0)
    plots.line(axes, tokens.tolist(), mean.tolist(), name, color=plots.COLOURS[i], linestyle='-')
  axes.axhline(np.mean(target), color='0.5', linewidth=0.8, linestyle='--')
  axes.set(
    xlabel='bytes seen', ylabel='held-out loss (nats a byte), mean of 5 seeds', ylim=(2.4, 3.6)
  )
  return [results.markdown(rows), rates_table(tried)]

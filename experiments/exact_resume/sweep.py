"""A run that is killed and started again, against one that is left alone: bit by bit."""

from experiments import results
from gpt2_jax.training.reproduce import differences

KILLS = [[], [23], [7, 31, 52]]


def sweep():
  base = {
    'deterministic': True,
    'model.resid_pdrop': 0.1,
    'train.steps': 60,
    'checkpoint.every': 10,
    'evaluate.every': 20,
  }
  return [base | ({'run.kill_at': kills} if kills else {}) for kills in KILLS]


def report(runs, axes):
  whole = runs[0]
  rows = [
    [
      'killed (SIGKILL) after step',
      'starts',
      'from the steps',
      'lines in its record',
      'values that differ',
    ]
  ]
  for i, run in enumerate(runs):
    kills = ', '.join(map(str, run.point.get('run.kill_at', []))) or 'never'
    begins = [start['began_at'] for start in run.starts]
    found = 'compared with' if run is whole else len(list(differences(whole.lines, run.lines)))
    row = (kills, len(run.starts), ', '.join(map(str, begins)), len(run.lines), found)
    rows.append([*map(str, row)])
    losses = [line['train/loss'] + 0.5 * i for line in run.lines]
    axes.plot([line['step'] for line in run.lines], losses, label=f'killed: {kills}', linewidth=1.3)
    axes.plot(begins[1:], [losses[max(step - 1, 0)] for step in begins[1:]], 'k|', markersize=14)
  axes.set(
    xlabel='step (bars: where a start went on)',
    ylabel='training loss (nats a byte),\neach curve 0.5 above the one below',
  )
  return [results.markdown(rows)]

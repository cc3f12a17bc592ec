"""One run on several meshes and in several micro-batches: the losses' largest difference."""

import numpy as np

from experiments import results

MESHES = [{}, {'data': 4}, {'fsdp': 4}, {'data': 2, 'tensor': 2}, {'fsdp': 2, 'seq': 2}]


def sweep():
  dropped = dict.fromkeys(('model.embd_pdrop', 'model.attn_pdrop', 'model.resid_pdrop'), 0.1)
  base = dropped | {'train.steps': 60, 'checkpoint.every': 60, 'evaluate.every': 60}
  points = [base | {'train.micro_batch_rows': rows} for rows in (8, 2)]
  for mesh in MESHES[1:]:
    sizes = {f'mesh.{axis}': mesh.get(axis, 1) for axis in ('data', 'fsdp', 'seq', 'tensor')}
    points.append(base | sizes | {'run.devices': 4})
  return points


def name(point) -> str:
  if 'run.devices' not in point:
    return f'1 device, {8 // point["train.micro_batch_rows"]} micro-batches'
  return '4 devices, ' + ', '.join(
    f'{axis}={point[f"mesh.{axis}"]}'
    for axis in ('data', 'fsdp', 'seq', 'tensor')
    if point[f'mesh.{axis}'] > 1
  )


def report(runs, axes):
  first, *others = runs
  rows = [['run', 'final training loss', 'held-out loss', 'largest relative difference of a loss']]
  rows.append(
    [
      name(first.point),
      f'{first.last("train/loss"):.6f}',
      f'{first.last("eval/loss"):.6f}',
      'compared with',
    ]
  )
  for run in others:
    differences = [abs(a['train/loss'] / b['train/loss'] - 1) for a, b in zip(run.lines, first.lines)]
    so_far = np.maximum.accumulate(differences)
    rows.append(
      [
        name(run.point),
        f'{run.last("train/loss"):.6f}',
        f'{run.last("eval/loss"):.6f}',
        f'{max(differences):.1e}',
      ]
    )
    axes.plot([line['step'] for line in run.lines], so_far, linewidth=1.4, label=name(run.point))
  axes.set(
    yscale='log',
    xlabel='step',
    ylim=(1e-8, 1e-6),
    ylabel='largest relative difference so far\nof the training loss',
  )
  axes.axhline(2**-24, color='#4d4d4d', linewidth=0.8, linestyle=':')
  axes.annotate(
    'half a unit in the last place of float32',
    (60, 2**-24),
    xytext=(0, -11),
    ha='right',
    textcoords='offset points',
    fontsize=8,
    color='#4d4d4d',
  )
  return [results.markdown(rows)]

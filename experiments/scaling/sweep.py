"""Held-out loss against the model's size and the tokens it has seen."""

from experiments import plots, results, stats, sweeps

WIDTHS = (16, 32, 64, 128)
STEPS = (75, 150, 300, 600)


def sweep():
  sizes = sweeps.zip({'model.n_embd': WIDTHS, 'model.n_head': [width // 16 for width in WIDTHS]})
  # each length is a run with a schedule of its own, and the warm-up a tenth of it
  lengths = sweeps.grid({'train.steps': STEPS})
  return [
    size
    | length
    | {
      'optim.warmup_steps': length['train.steps'] // 10,
      'checkpoint.every': 600,
      'evaluate.every': 600,
    }
    for size in sizes
    for length in lengths
  ]


def parameters(width: int) -> int:
  """Of the two blocks' matrices: 12·L·D²."""
  return 12 * 2 * width**2


def report(runs, axes):
  loss = {
    (run.point['model.n_embd'], run.point['train.steps']): run.last('eval/loss') for run in runs
  }
  tokens = [steps * 8 * 64 for steps in STEPS]
  for width in WIDTHS:
    plots.line(
      axes, tokens, [loss[width, steps] for steps in STEPS], f'{parameters(width):,} parameters'
    )
  axes.set(
    xscale='log', yscale='log', xlabel='bytes of training text', ylabel='held-out loss (nats a byte)'
  )
  plots.ticks(axes, tokens, [f'{n:,}' for n in tokens])
  values = [
    v
    for v in (1.75, 2, 2.25, 2.5, 2.75, 3, 3.25, 3.5, 3.75)
    if min(loss.values()) * 0.97 < v < max(loss.values()) * 1.03
  ]
  axes.set_yticks(values, [f'{v:g}' for v in values])
  head = ['width', 'parameters of the blocks', *(f'{n:,} bytes' for n in tokens)]
  rows = [
    [width, f'{parameters(width):,}', *(f'{loss[width, steps]:.4f}' for steps in STEPS)]
    for width in WIDTHS
  ]
  fit = lambda x, y: '{0.exponent:.4f} ± {0.half_width:.4f}'.format(stats.power_law(x, y))
  fits = [['held fixed', 'loss falls as', 'exponent, 95 % interval']]
  fits += [
    [f'width {width}', 'bytes^-exponent', fit(tokens, [loss[width, steps] for steps in STEPS])]
    for width in WIDTHS
  ]
  fits += [
    [
      f'{n:,} bytes',
      'parameters^-exponent',
      fit([parameters(w) for w in WIDTHS], [loss[w, steps] for w in WIDTHS]),
    ]
    for steps, n in zip(STEPS, tokens)
  ]
  return [
    results.markdown([head, *rows]),
    'Power laws through four points each (least squares of logarithms, without an offset):',
    results.markdown(fits),
  ]

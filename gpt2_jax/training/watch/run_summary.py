"""The end of a run, for its user: a picture of the losses, the prompt of the sample, a summary."""

import io
import os
import shlex
from pathlib import Path

import numpy as np

from gpt2_jax.core.buckets import AnyPath
from gpt2_jax.core.errors import saving
from gpt2_jax.model.config import GPTConfig
from gpt2_jax.tokenizer.bpe import Tokenizer
from gpt2_jax.training.watch import goodput, metrics_file

PLOT = 'loss.png'


def _smooth(values: np.ndarray) -> np.ndarray:
  """Returns a moving average over about a fiftieth of the run."""
  width = max(1, len(values) // 50)
  padded = np.pad(values, (width // 2, width - 1 - width // 2), mode='edge')
  return np.convolve(padded, np.ones(width) / width, mode='valid')


def _draw_time(axes, totals: dict[str, float]) -> None:
  """Draws a bar of the time by kind; kinds of more than a thousandth are named below it."""
  whole, left = sum(totals.values()), 0.0
  for i, (kind, seconds) in enumerate(totals.items()):
    share = seconds / whole
    axes.barh(
      0, share, left=left, color=f'C{i}', label=f'{kind} {share:.1%}' if share > 0.001 else None
    )
    left += share
  axes.set(xlim=(0, 1), yticks=[], xticks=[])
  axes.set_title(f'time: {_duration(whole)}', fontsize=9, loc='left')
  axes.legend(
    loc='upper center',
    bbox_to_anchor=(0.5, 0),
    ncols=4,
    fontsize=7,
    frameon=False,
    handlelength=1,
    columnspacing=1,
  )


def _duration(seconds: float) -> str:
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f'{hours} h {minutes} min' if hours else f'{minutes} min {seconds} s'


def plot_losses(workdir: Path, title: str, totals: dict[str, float]) -> Path:
  """Draws `loss_figure` to `loss.png`."""
  figure, path = loss_figure(workdir, title, totals), workdir / PLOT
  with saving('the plot', path):
    figure.savefig(path.with_suffix('.tmp'), format='png', dpi=120)
    os.replace(path.with_suffix('.tmp'), path)
  return path


def _png(figure) -> bytes:
  content = io.BytesIO()
  figure.savefig(content, format='png', dpi=100)
  return content.getvalue()


def loss_figure(workdir: Path, title: str, totals: dict[str, float]):
  """Returns a figure of training and held-out loss against the tokens seen; and beneath, of the
  seconds by kind, where there are any.
  """
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure
  from matplotlib.ticker import EngFormatter

  lines = [line for line in metrics_file.read(workdir) if line.get('train/tokens') is not None]
  tokens = np.array([line['train/tokens'] for line in lines])
  losses = np.array([line.get('train/loss') for line in lines], float)  # null is NaN
  held_out = [
    (line['train/tokens'], line['eval/loss']) for line in lines if line.get('eval/loss') is not None
  ]
  figure = Figure(figsize=(7, 4.8), layout='constrained')
  FigureCanvasAgg(figure)
  setattr(figure, '_repr_png_', lambda: _png(figure))  # noqa: B010  which a notebook shows
  if totals:
    axes, below = figure.subplots(2, height_ratios=(16, 1))
    _draw_time(below, totals)
  else:
    axes = figure.subplots()
  axes.plot(tokens, losses, color='tab:blue', alpha=0.25, linewidth=0.8)
  axes.plot(tokens, _smooth(losses), color='tab:blue', label='training')
  if held_out:
    axes.plot(*zip(*held_out), color='tab:orange', marker='o', markersize=4, label='held out')
    axes.annotate(
      f'{held_out[-1][1]:.3f}',
      held_out[-1],
      textcoords='offset points',
      xytext=(0, 8),
      ha='right',
      color='tab:orange',
    )
  axes.set(title=title, xlabel='tokens seen', ylabel='loss (nats a token)')
  axes.xaxis.set_major_formatter(EngFormatter())
  axes.grid(alpha=0.3)
  axes.legend()
  return figure


def fit_prompt(prompt: str, tokenizer: Tokenizer | None, config: GPTConfig) -> str:
  """Returns a prompt, or the end of one that is too long for the context."""
  ids = [] if tokenizer is None else tokenizer.encode(prompt)
  if tokenizer is None or len(ids) < config.n_positions:
    return prompt
  # a character that was cut is left out
  prompt = tokenizer.decode_bytes(ids[len(ids) - config.n_positions // 2 :]).decode(errors='ignore')
  while len(tokenizer.encode(prompt)) >= config.n_positions > 1:  # a text's end may have other ids
    prompt = prompt[1:]
  return prompt


def figures(workdir: Path, totals: dict[str, float]) -> dict[str, float]:
  """Returns the figures of a finished run: its last ones, its lowest held-out loss, its seconds."""
  lines = metrics_file.read(workdir)
  held_out = [line['eval/loss'] for line in lines if line.get('eval/loss') is not None]
  found = {'steps': lines[-1]['step'], 'tokens': lines[-1]['train/tokens']}
  found |= {'train_loss': lines[-1].get('train/loss'), 'seconds': round(sum(totals.values()), 1)}
  found |= {'eval_loss': held_out[-1], 'eval_loss_lowest': min(held_out)} if held_out else {}
  return found | {'goodput': round(goodput.goodput(totals), 4)}


def summary(
  workdir: Path,
  prompt: str,
  sample: str | None,
  totals: dict[str, float],
  place: AnyPath | None = None,
) -> str:
  """Returns a screen of text: the figures, where the files are, what to try next.

  Args:
    workdir: the folder that the record is read from.
    prompt, sample: a text, and what the model makes of it; None: it can't continue one.
    totals: seconds by kind.
    place: where its user finds the run; default: in that folder.
  """
  place = workdir if place is None else place
  lines = metrics_file.read(workdir)
  last, final = lines[-1], next((m for m in reversed(lines) if m.get('eval/loss') is not None), {})
  speed = np.median([m.get('perf/tokens_per_second') or 0.0 for m in lines])
  loss = last.get('train/loss')
  held_out = f', held-out loss {final["eval/loss"]:.4f}' if final else ''
  if 'eval/accuracy' in final:
    held_out += f', {final["eval/accuracy"]:.2%} right'
  rule = '-' * 78
  return '\n'.join(
    [
      rule,
      f'done: step {last["step"]:,}, {last["train/tokens"]:,} tokens, training loss '
      f'{"not finite" if loss is None else f"{loss:.4f}"}{held_out}',
      f'      {speed:,.0f} tokens/s, peak memory {last["perf/memory_gib"]:.1f} GiB',
      *goodput.table(totals),
      rule,
      *([] if sample is None else [prompt + sample, rule]),
      f'record     {place / metrics_file.FILE}',
      f'picture    {place / PLOT}',
      'next',
      f"  gpt2_jax.classify(gpt2_jax.from_pretrained({str(place)!r}), 'a text')"
      if sample is None
      else '  '
      + shlex.join(
        [
          'gpt2-jax',
          'sample',
          '--checkpoint',
          str(place),
          '--prompt',
          *(prompt.splitlines() or [''])[:1],
        ]
      ),
      f'  {shlex.join(["tensorboard", "--logdir", str(place)])}          (pip install tensorboard)',
      '  the same command with a larger --config.train.steps goes on from here',
    ]
  )

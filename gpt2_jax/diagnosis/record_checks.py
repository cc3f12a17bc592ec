"""Checks of the record: what the steps that were done show."""

import math
from collections.abc import Iterator

import numpy as np
from scipy.signal import savgol_filter

from gpt2_jax.diagnosis import reference
from gpt2_jax.diagnosis.facts import Facts

SMOOTH = 31  # steps around each that its loss is compared with
FIRST = 20  # steps that are not, of a curve that falls steeply
WAIT = 0.2  # of a step, that the host may wait for its batch
GAP = 0.5  # nats, that a training loss may lie below the held-out one before the data repeats
SLOW = 0.1  # of a device's peak; plans count on six times that
RISE = 5  # times, that a gradient's norm may grow


def first_loss(facts: Facts) -> Iterator[str]:
  """A model that knows nothing has the loss ln V, and a little more for the spread of its logits."""
  losses, V = facts.column('train/loss'), facts.vocabulary
  if not (facts.begins and losses and losses[0][0] == 1 and V):
    return
  loss, want = losses[0][1], math.log(V)
  # logits of a layer norm's output and a table of this deviation: half their variance, twice over
  spread = facts.model.n_embd * facts.model.initializer_range**2
  if not want - 0.15 <= loss <= want + 0.15 + spread:
    yield (
      f'the first loss is {loss:.3f}; a model that knows nothing has ln {V:,} = {want:.3f}, up to '
      f'{0.15 + spread:.2f} more: the vocabulary, the targets or the initial weights are others.'
    )


def curve(facts: Facts) -> Iterator[str]:
  """The losses lie in the band of the config's reference runs."""
  if not facts.begins:
    return
  band = reference.of(facts.config)
  losses, evaluated = facts.column('train/loss'), facts.column('eval/loss')
  if band and (found := band.outside(losses, evaluated, facts.update)):
    yield found


def order(facts: Facts) -> Iterator[str]:
  """Batches are drawn from all of the text: a step's loss tells nothing of the next one's."""
  values = np.array([loss for _, loss in facts.column('train/loss')])[FIRST:]
  if len(values) < 3 * SMOOTH:
    return
  # a cubic around each step, which the bend of a young curve does not leave (Savitzky & Golay 1964)
  rest = (values - savgol_filter(values, SMOOTH, 3))[SMOOTH // 2 : -(SMOOTH // 2)]
  together = float((rest[:-1] * rest[1:]).mean() / max(rest.var(), 1e-12))
  if together > 0.15 + 2.5 / math.sqrt(len(rest)):
    yield (
      f'the losses of neighbouring steps go together (correlation {together:.2f} around their mean): '
      'batches follow the order of the text, or come from one part of it.'
    )


def gradient(facts: Facts) -> Iterator[str]:
  """The norm of the gradient stays finite, and does not grow."""
  if lost := sum(line.get('train/grad_norm', 0.0) is None for line in facts.lines):
    yield f'{lost:,} steps have a gradient that is not finite.'
  norms = np.array([norm for _, norm in facts.column('train/grad_norm')])
  if len(norms) < 40:
    return
  quarters = np.array_split(norms, 4)
  low, last = np.median(quarters[1]), np.median(quarters[3])
  if last > RISE * low and last > 1:
    yield (
      f'the norm of the gradient grew from {low:.2g} to {last:.2g}: the run is about to diverge. A '
      'lower optim.peak_lr, a longer warm-up, or optim.z_loss.'
    )


def loader(facts: Facts) -> Iterator[str]:
  """Batches come in time, and are others each time."""
  waits = [
    line['perf/data_wait_seconds'] / line['perf/step_seconds']
    for line in facts.lines[2:]
    if line.get('perf/step_seconds') and line.get('perf/data_wait_seconds') is not None
  ]
  if len(waits) >= 8 and (share := float(np.median(waits))) > WAIT:
    yield (
      f'{share:.0%} of a step goes to waiting for its batch: a slower disk, a bucket without copies, '
      'or no processor left to read.'
    )
  losses = dict(facts.column('train/loss'))
  for step, held in facts.column('eval/loss'):
    recent = [losses[s] for s in range(step - 9, step + 1) if s in losses]
    seen = step * facts.update / len(facts.store.splits['train']) if facts.store else 0.0
    if len(recent) == 10 and seen <= 1 and np.mean(recent) < held - GAP:
      yield (
        f'at step {step:,} the training loss is {np.mean(recent):.2f} and the held-out one '
        f'{held:.2f}, after {seen:.2g} passes over the text: the same batches come again, or the '
        'held-out text is of another kind.'
      )
      return


def overfitting(facts: Facts) -> Iterator[str]:
  """The held-out loss does not rise."""
  held = facts.column('eval/loss')
  if len(held) < 3:
    return
  step, best = min(held, key=lambda at: at[1])
  if held[-1][1] > best + 0.1:
    yield (
      f'the held-out loss was {best:.3f} at step {step:,} and is {held[-1][1]:.3f} now: what follows '
      'that step was learned by heart. evaluate.patience stops there.'
    )


def speed(facts: Facts) -> Iterator[str]:
  """A step takes about as long as planned."""
  rates = [rate for _, rate in facts.column('perf/tokens_per_second')][2:]
  if facts.plan and rates and (rate := float(np.median(rates))) < facts.plan / 2:
    yield f'{rate:,.0f} tokens a second, where the plan said {facts.plan:,.0f}.'
  mfu = [share for _, share in facts.column('perf/mfu')][2:]
  if mfu and (share := float(np.median(mfu))) < SLOW:
    yield (
      f'model FLOPs utilization is {share:.1%} of {facts.device}: plans count on 60 %. A trace '
      '(profile.steps) shows what it waits for.'
    )

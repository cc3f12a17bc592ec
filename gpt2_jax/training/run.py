"""A run between its opening and its end: what its parts share, and what it does more than once."""

import dataclasses
import json
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from gpt2_jax.checkpoints.orbax_store import Checkpoints, difference
from gpt2_jax.core.errors import UserError
from gpt2_jax.core.progress import track
from gpt2_jax.data import verify
from gpt2_jax.data.training_data import Batches, TrainingData
from gpt2_jax.parallel import multihost
from gpt2_jax.parallel.multihost import say
from gpt2_jax.training import compile_cache, skip_spikes
from gpt2_jax.training.run_data import BATCHES
from gpt2_jax.training.run_folder import RunFolder
from gpt2_jax.training.run_plan import Plan
from gpt2_jax.training.step import TrainState
from gpt2_jax.training.stopping import Patience, StopSignal
from gpt2_jax.training.trackers.feeds import Trackers
from gpt2_jax.training.trackers.protocol import Start
from gpt2_jax.training.watch import corruption, goodput, metrics_file
from gpt2_jax.training.watch import run_record as record_lib
from gpt2_jax.training.watch.step_record import Recorder, note


class Run:
  """A run in its workdir.

  Attributes:
    folder: where it lies; `workdir`: the folder of this machine that its record is written in.
    start: updates that earlier starts have done; `step`: those done by now.
    identity: what must not change between two starts.
    cut: whether the last start was stopped within the evaluation after its last step.
    held_out: whether there is anything to evaluate on.
    state, writer, trackers, recorder, advance: are there from when `train` makes them.
  """

  state: TrainState
  writer: metrics_file.MetricsWriter
  trackers: Trackers
  recorder: Recorder
  advance: Callable[[int, str], None]

  def __init__(
    self,
    plan: Plan,
    folder: RunFolder,
    clock: goodput.Clock,
    data: TrainingData,
    batches: Batches,
    stop: StopSignal,
  ):
    """Opens the workdir, and finds where the run that it holds goes on.

    Raises:
      UserError: it holds the run of another model or other data.
    """
    multihost.check_shared(folder.place)
    keep, every = plan.config.checkpoint, plan.config.evaluate.every
    self.folder, workdir = folder, folder.record
    self.workdir, self.clock, self.data, self.batches, self.stop = workdir, clock, data, batches, stop
    self.checkpoints = Checkpoints(
      folder.place, keep.keep, keep.keep_every, keep.keep_best, folder.keep
    )
    self.start, self.identity = self.checkpoints.whole_step() or 0, record_lib.identity(plan, data)
    self.step = self.saved = start = self.start
    meta = self.checkpoints.meta(start) if start else {}
    if start and (other := difference(meta['identity'], self.identity)):
      raise UserError(
        f'{folder.place} holds the run of another model, optimizer or other data:\n{other}\n'
        'Choose another --workdir, or the config of that run.'
      )
    if jax.process_index() == 0:
      for line in record_lib.set_aside(workdir):
        say(line)
      if start and (line := metrics_file.flaws(workdir, start)):
        say(line)
    self.lines = metrics_file.read(workdir)
    if start:
      seen = meta.get('tokens')
      if seen is None:
        seen = metrics_file.tokens_seen(self.lines, start, plan.G * plan.T)
      plan = plan.going_on(start, seen)
      batches.go_on(start, plan.tokens(start) // plan.T)
    self.plan, self.steps = plan, plan.steps
    self.held_out = len(data.splits['val']) > 1
    cut = any(line['step'] == start and 'eval/loss' not in line for line in self.lines)
    self.cut = self.held_out and self.is_due(every) and cut
    self.patience = Patience(plan.config.evaluate.patience, self.lines if start else [], start)

  def is_due(self, every: int) -> bool:
    """Whether it is time for something that is done each `every` steps and after the last one."""
    return self.step % every == 0 or self.step == self.steps

  def over(self) -> str:
    """Says why there is nothing left to do; '' if there is."""
    if self.start > self.steps or (self.start == self.steps and not self.cut):
      return f'{self.folder.place}: step {self.start} of {self.steps} is done already.'
    if not self.patience.over:
      return ''
    stopped = f'{self.folder.place}: stopped early at step {self.start} of {self.steps}'
    return f'{stopped}; its best is step {self.patience.best}.'

  def begin_record(self) -> None:
    """Leaves the record of this start, on process 0, and says what changed since the last one."""
    if jax.process_index() == 0:
      self.clock.before = goodput.seconds_before(
        self.lines, record_lib.starts(self.workdir), self.start
      )
      totals = self.clock.totals()
      if changed := record_lib.begin(self.workdir, self.plan, self.data, self.start, totals):
        say(f'config changed since the last start:\n{changed}')

  def open_trackers(self) -> Trackers:
    """Opens the trackers that the config names, on process 0."""
    config = json.loads(self.plan.config.to_json_best_effort())
    to = self.plan.config.log.to if jax.process_index() == 0 else ''
    read = lambda: metrics_file.read(self.workdir)
    return Trackers(to, Start(self.workdir, config, self.start), read, say)

  def compile(self) -> None:
    """Compiles the training step, and prepares the evaluation's."""
    since = time.monotonic()
    with self.clock('compile'), compile_cache.from_cache() as kept:
      self.train_step = self._verified(self.plan.compile_train_step(self.data.eot))
      self.eval_step = self.plan.eval_step(self.data.eot)
      if self.plan.config.log.layers_every:
        self.measure = self.plan.compile_measure(self.data.eot)
    cached = ', from the cache' if kept and all(kept) else ''
    say(f'compiled in {time.monotonic() - since:.1f} s{cached}')

  def _verified(self, step: Callable) -> Callable:
    """The step, some of which are made twice if the config says so."""
    train = self.plan.config.train
    if not (train.verify_every or train.verify_replicas_every):
      return step
    return corruption.VerifiedStep(
      step,
      start=self.start,
      every=train.verify_every,
      replicas_every=train.verify_replicas_every,
      workdir=self.workdir,
      last_good=self.last_good,
    )

  def last_good(self) -> int | None:
    """Returns the step of the newest checkpoint, once it is whole."""
    self.checkpoints.wait()
    return self.checkpoints.latest_step()

  def first_state(self) -> TrainState:
    """Returns the state before the first step."""
    return self.plan.init_state(self.plan.load_source() if self.plan.source else None)

  def restored_state(self) -> TrainState:
    """Returns the state of the checkpoint that the run goes on from."""
    plan, start, abstract = self.plan, self.start, self.plan.abstract_state()
    with self.clock('checkpoint'):
      items = skip_spikes.restored(
        lambda items: self.checkpoints.restore(start, items),
        self.checkpoints.meta(start)['tree'],
        abstract.items(),
      )
      state = abstract.restored(start, items)
    of_all = f' of {plan.tokens(self.steps):,}' if plan.offset else ''
    say(f'resumed from step {start:,} of {self.steps:,}, {plan.tokens(start):,} tokens seen{of_all}')
    return state

  def params_in_use(self) -> Any:
    """Returns the parameters, or their moving average if the run has one."""
    return self.state.params if self.state.ema is None else self.state.ema

  def measured(self, batch: Any) -> dict[str, Any]:
    """What is measured of the next step's layers, where that is due."""
    every = self.plan.config.log.layers_every
    return self.measure(self.state, batch) if every and (self.step + 1) % every == 0 else {}

  def evaluate(self, step: int) -> dict[str, float]:
    """Evaluates the held-out split. Returns keys for the step's line, none if a signal came."""
    with self.clock('evaluate'):
      val = self.data.splits['val']
      means = evaluate(self.eval_step, self.params_in_use(), val, self.plan, self.stop)
    if means:
      right = f', {means["eval/accuracy"]:.2%} right' if 'eval/accuracy' in means else ''
      say(f'step {step:,}: held-out loss {means["eval/loss"]:.4f}{right}')
      if step:
        self.patience.add(step, means['eval/loss'])
    return means

  def record(self, step: int, values: dict, evaluated: bool = False) -> None:
    """Fetches the metrics of a step, checks them, evaluates if that is due, and writes its line."""
    line = self.recorder.line(step, values)
    if step == self.start + 1:
      say(f'step {step:,}: {note(line)}')
    self.advance(1, note(line))
    if evaluated and self.held_out:
      line |= self.evaluate(step)
    line |= self.clock.line()
    self.writer.write(line)
    self.trackers.put(line)

  def amend(self, values: dict[str, float]) -> None:
    """Adds keys to the line of the step that the run goes on from."""
    self.writer.amend_last(values)
    self.trackers.amend({'step': self.start, **values})

  def save(self, content: verify.Background) -> None:
    """Begins to save the state, once the data are known to be whole."""
    self.saved, plan = self.step, self.plan
    with self.clock('checkpoint'):
      content.wait()
      self.writer.sync()
      self.trackers.hurry()
      meta = {
        'identity': self.identity,
        'best': self.patience.best,
        'model': dataclasses.asdict(plan.model),
        'tokens': plan.tokens(self.step),
        'rows': {'tokens': plan.T, 'document_mask': plan.config.data.document_mask},
        'data': {'sha256': self.data.sha256, 'tokenizer': self.data.manifest['tokenizer']},
      }
      self.checkpoints.save(self.step, self.state.items(), meta, self.patience.losses)


def evaluate(eval_step, params, split: Any, plan: Plan, stop: StopSignal) -> dict[str, float]:
  """Evaluates a whole split, each target counted once.

  Returns: the mean loss in nats, and of a classifier the share of labels that are right; nothing if a
    signal cut it short.
  """
  sums, batches = [], BATCHES[plan.model.head]
  parts = plan.mesh.shape['data'] * plan.mesh.shape['fsdp']
  there = -(-batches.eval_size(split, plan.T, 1) // parts) * parts
  rows = min(plan.eval_rows, there)  # no batch is larger than the split
  with track('evaluating', batches.eval_size(split, plan.T, rows), 'batches') as done:
    for batch in batches.eval_batches(split, plan.T, rows, plan.batch_sharding):
      sums.append(eval_step(params, *batch))
      done(1)
      if len(sums) > 4:  # keeps the host from running ahead of the device
        jax.block_until_ready(sums[-4])
      if stop.due():
        return {}
  total, count, *right = np.sum(np.asarray(jax.device_get(sums), np.float64), axis=0)
  means = {'eval/loss': float(total / count)}
  return means | ({'eval/accuracy': float(right[0] / count)} if right else {})

"""Training, from a config to a trained model: read `train` from top to bottom."""

import contextlib
import dataclasses
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gpt2_jax import tokenizer
from gpt2_jax.checkpoint import Checkpoints, difference, held_positions
from gpt2_jax.config import Config
from gpt2_jax.data import labelled, prepare, store, verify
from gpt2_jax.data import loader as loader_lib
from gpt2_jax.decoding.generate import generate_tokens
from gpt2_jax.errors import UserError
from gpt2_jax.files import local
from gpt2_jax.progress import track
from gpt2_jax.sharding import mesh_of, whole_rows
from gpt2_jax.training import compiling, distributed, goodput, holding, metrics, report, spikes
from gpt2_jax.training import record as record_lib
from gpt2_jax.training.plan import Plan, make_plan, out_of_memory_advice
from gpt2_jax.training.profiling import Profile
from gpt2_jax.training.recorder import Recorder, note
from gpt2_jax.training.stopping import Patience, StopSignal

LOADERS = {'lm': loader_lib, 'sequence_classification': labelled}  # two modules with the same names


def say(text: str) -> None:
  if jax.process_index() == 0:
    print(text, flush=True)


def open_data(plan: Plan) -> Any:
  """The data of a run: a token store, prepared first where it isn't there, or labelled texts."""
  data = plan.config.data
  if plan.model.head != 'lm':
    return labelled.open_labelled(data, tokenizer.load(plan.tokenizer), plan.T)
  if data.corpus.startswith('bin:'):
    opened = store.open_store(data.corpus.removeprefix('bin:'))
    named = data.tokenizer is not None or plan.source is not None
    if named and tokenizer.trained_size(plan.tokenizer) is None:
      whose = 'data.tokenizer' if data.tokenizer is not None else str(plan.config.init_from)
      opened.check_tokenizer(tokenizer.load(plan.tokenizer), whose, '--config.data.tokenizer')
    return opened
  settings = prepare.Settings(
    data.corpus,
    plan.tokenizer,
    data.val_fraction,
    data.split_seed,
    data.split,
    data.text_field,
    data.special,
  )
  folder = data.store or local(data.directory) / prepare.store_name(settings)
  return prepare.ensure_store(settings, folder)


def check_prompt(plan: Plan, tokenizer: tokenizer.Tokenizer) -> None:
  """Raises a UserError where the model has no such ids as the sample at the end will begin with."""
  V, ids = plan.model.vocab_size, tokenizer.encode(plan.config.log.sample_prompt) or [tokenizer.eot]
  if plan.model.head == 'lm' and max(ids) >= V:
    raise store.bad_token(max(ids), 'log.sample_prompt', V)


def evaluate(eval_step, params, split: Any, plan: Plan, stop: StopSignal) -> dict[str, float]:
  """Means over a whole split, each target counted once: of the loss, and of a classifier how many
  labels are right. Empty where a signal cut it short.
  """
  sums, loader = [], LOADERS[plan.model.head]
  parts = plan.mesh.shape['data'] * plan.mesh.shape['fsdp']
  there = -(-loader.eval_size(split, plan.T, 1) // parts) * parts
  rows = min(plan.eval_rows, there)  # no batch is larger than the split
  with track('evaluating', loader.eval_size(split, plan.T, rows), 'batches') as done:
    for batch in loader.eval_batches(split, plan.T, rows, plan.batch_sharding):
      sums.append(eval_step(params, *batch))
      done(1)
      if len(sums) > 4:  # keeps the host from running ahead of the device
        jax.block_until_ready(sums[-4])
      if stop.due():
        return {}
  total, count, *right = np.sum(np.asarray(jax.device_get(sums), np.float64), axis=0)
  means = {'eval/loss': float(total / count)}
  return means | ({'eval/accuracy': float(right[0] / count)} if right else {})


def train(
  config: Config, workdir: str | Path, began: float | None = None, held: int | None = None
) -> int:
  """Runs, or continues, the training that a config describes. Returns an exit status.

  Args:
    config: with every knob of configs/base.py.
    workdir: of the run.
    began: when the program was started, by `time.monotonic`; default: now.
    held: positions that the model is to have, as `make_plan` takes them; default: the workdir's.

  Raises:
    UserError: for everything that the user can mend.
  """
  clock = goodput.Clock(began)
  plan = make_plan(config, held=held_positions(workdir) if held is None else held)
  with holding.held(workdir):
    return _train(plan, Path(workdir), clock)


def _train(plan: Plan, workdir: Path, clock: goodput.Clock) -> int:
  """`train` in a workdir that is held."""
  # --- Plan: sizes, mesh, micro-batches --------------------------------------------------------
  config = plan.config
  distributed.hello(plan.mesh)
  say(plan.describe())
  steps, tokens_a_step = config.train.steps, plan.G * plan.T
  profile = Profile(config.profile.steps, workdir, clock, say)
  if why := compiling.keep_compiled(workdir):
    say(why)

  # --- Data: a token store, and batch = f(seed, rows seen) --------------------------------------
  data = open_data(plan)
  data.check_vocabulary(plan.model.vocab_size)
  content = verify.Background(data, jax.process_index(), jax.process_count())
  check_prompt(plan, data.tokenizer)
  train_split, val_split = data.splits['train'], data.splits['val']
  loader = LOADERS[plan.model.head].TrainLoader(
    train_split, plan.T, plan.G, config.train.seed, plan.model.vocab_size
  )
  unit = 'tokens' if plan.model.head == 'lm' else 'texts'
  say(
    f'data     {data.path}: {len(train_split):,} {unit} to train on '
    f'({loader.steps_per_epoch:,.1f} steps an epoch), {len(val_split):,} held out'
  )
  if plan.model.head != 'lm':
    say(
      f'         labels {", ".join(data.labels[:12])}'
      + ', …' * (len(data.labels) > 12)
      + f'; {data.cut:,} texts are cut to {plan.T} tokens' * bool(data.cut)
    )
    for line in data.notes:
      say(f'         {line}')

  with StopSignal() as stop, jax.set_mesh(plan.mesh), contextlib.ExitStack() as at_end:
    # --- Workdir: new, or that of the same run --------------------------------------------------
    distributed.check_shared(workdir)
    keep = config.checkpoint
    checkpoints = Checkpoints(workdir, keep.keep, keep.keep_every, keep.keep_best)
    start, identity = checkpoints.whole_step() or 0, record_lib.identity(plan, data)
    if start and (other := difference(checkpoints.meta(start)['identity'], identity)):
      raise UserError(
        f'{workdir} holds the run of another model or other data:\n{other}\n'
        'Choose another --workdir, or the config of that run.'
      )
    if jax.process_index() == 0:
      for line in record_lib.set_aside(workdir) + [metrics.flaws(workdir, start)] * bool(start):
        say(line) if line else None
    lines, held_out = metrics.read(workdir), len(val_split) > 1
    if start:
      seen = checkpoints.meta(start).get('tokens')
      plan = plan.going_on(
        start, metrics.tokens_seen(lines, start, tokens_a_step) if seen is None else seen
      )
      loader.go_on(start, plan.tokens(start) // plan.T)
    due = lambda step, section: step % section.every == 0 or step == steps
    # whether the last start was stopped within an evaluation
    cut = (
      held_out
      and due(start, config.evaluate)
      and any(line['step'] == start and 'eval/loss' not in line for line in lines)
    )
    if start > steps or (start == steps and not cut):
      say(f'{workdir}: step {start} of {steps} is done already.')
      record_lib.mark_finished(workdir)
      checkpoints.close()
      return 0
    patience = Patience(config.evaluate.patience, lines if start else [], start)
    if patience.over:
      say(f'{workdir}: stopped early at step {start} of {steps}; its best is step {patience.best}.')
      record_lib.mark_finished(workdir)
      checkpoints.close()
      return 0
    if jax.process_index() == 0:
      clock.before = goodput.before(lines, record_lib.starts(workdir), start)
      if changed := record_lib.begin(workdir, plan, data, start, clock.totals()):
        say(f'config changed since the last start:\n{changed}')

    # --- State: initial or restored ------------------------------------------------------------
    compiling_since = time.monotonic()
    with clock('compile'), compiling.from_cache() as kept:
      train_step, eval_step = plan.compile_train_step(data.eot), plan.eval_step(data.eot)
    say(
      f'compiled in {time.monotonic() - compiling_since:.1f} s'
      + ', from the cache' * bool(kept and all(kept))
    )
    with out_of_memory_advice(plan, workdir):
      if start:
        abstract = plan.abstract_state()
        with clock('checkpoint'):
          state = abstract.restored(
            start,
            spikes.restored(
              lambda items: checkpoints.restore(start, items),
              checkpoints.meta(start)['tree'],
              abstract.items(),
            ),
          )
        say(
          f'resumed from step {start:,} of {steps:,}, {plan.tokens(start):,} tokens seen'
          + f' of {plan.tokens(steps):,}' * (plan.offset != 0)
        )
      else:
        state = plan.init_state(plan.load_source() if plan.source else None)
    writer = metrics.MetricsWriter(workdir, start, config.log.tensorboard, config.deterministic)
    at_end.callback(writer.close)
    in_use = lambda: state.params if state.ema is None else state.ema

    def evaluation(step: int) -> dict:
      with clock('evaluate'):
        means = evaluate(eval_step, in_use(), val_split, plan, stop)
      if means:
        right = f', {means["eval/accuracy"]:.2%} right' if 'eval/accuracy' in means else ''
        say(f'step {step:,}: held-out loss {means["eval/loss"]:.4f}{right}')
        if step:
          patience.add(step, means['eval/loss'])
      return means

    saved = start

    def save(step: int) -> None:
      nonlocal saved
      saved = step
      with clock('checkpoint'):
        content.wait()
        writer.sync()
        checkpoints.save(
          step,
          state.items(),
          {
            'identity': identity,
            'best': patience.best,
            'model': dataclasses.asdict(plan.model),
            'tokens': plan.tokens(step),
            'rows': {'tokens': plan.T, 'document_mask': config.data.document_mask},
            'data': {'sha256': data.sha256, 'tokenizer': data.manifest['tokenizer']},
          },
          patience.losses,
        )

    if cut:
      writer.amend_last(evaluation(start))

    if plan.source and not start and held_out:
      evaluation(0)  # what it is to be better than

    # --- Loop ----------------------------------------------------------------------------------
    recorder = Recorder(plan, clock, workdir, loader, checkpoints, say)

    def record(step: int, values: dict, evaluated: bool = False) -> None:
      """Fetches a step's metrics, checks and writes them."""
      line = recorder.line(step, values)
      if step == start + 1:
        say(f'step {step:,}: {note(line)}')
      advance(1, note(line))
      if evaluated and held_out:
        line |= evaluation(step)
      writer.write(line | clock.line())

    with (
      track('training', steps, 'steps', done=start) as advance,
      profile,
      clock('step'),
      out_of_memory_advice(plan, workdir),
    ):
      batches = loader.batches(start, steps, plan.A, plan.batch_sharding)
      pending, step, values = None, start, None
      while step < steps and not stop.due() and not patience.over:
        with clock('data'):
          tokens = next(batches)
        content.check()
        profile.before(step + 1, values)
        with clock('device'), jax.profiler.StepTraceAnnotation('train', step_num=step + 1):
          state, values = train_step(state, tokens)
        step += 1
        if pending:  # one step late, so that the device never waits for the host
          record(*pending)
        pending = step, values
        evaluated, due_to_save = due(step, config.evaluate), due(step, config.checkpoint)
        if evaluated or due_to_save:  # its metrics are on disk before its checkpoint is
          record(step, values, evaluated)
          pending = None
        if due_to_save:
          save(step)
      if pending:  # a signal ended the loop
        record(*pending)
      if step > saved:
        save(step)
    with clock('checkpoint'):
      checkpoints.wait()
    writer.close()

    # --- End -----------------------------------------------------------------------------------
    if stop.received:
      if jax.process_index() == 0:
        record_lib.end(workdir, step, clock.totals(), finished=False)
      say(f'stopped at step {step:,} of {steps:,}, which is saved; the same command goes on from it')
      checkpoints.close()
      return 128 + stop.received
    if patience.over:
      say(f'stopped early: no lower held-out loss since step {patience.best:,}, which is offered')
    text, prompt = None, report.fitting(config.log.sample_prompt, data.tokenizer, plan.model)
    if plan.model.head == 'lm' and plan.model.n_positions > 1:
      params = in_use()
      if patience.best not in (None, step):
        params = checkpoints.params(patience.best, plan.abstract_state().params)
      params = whole_rows(params)
      with clock('evaluate'), mesh_of(params):
        (sample,) = generate_tokens(
          plan.model,
          params,
          prompt,
          tokenizer=data.tokenizer,
          allow_special=config.data.special,
          seed=config.train.seed,
          max_new_tokens=config.log.sample_tokens,
          temperature=config.log.sample_temperature,
          top_k=config.log.sample_top_k,
        )
      text = sample.text
    if jax.process_index() == 0:
      totals = clock.totals()
      report.plot_losses(
        workdir,
        f'{workdir.name}: {tokens_a_step:,} tokens a step' + ', at the end' * (plan.offset != 0),
        totals,
      )
      say(report.summary(workdir, prompt, text, totals))
    checkpoints.close()
    if jax.process_index() == 0:
      record_lib.end(workdir, step, clock.totals(), finished=True)
    return 0

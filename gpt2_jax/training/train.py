"""Training, from a config to a trained model: read `train` from top to bottom."""

import contextlib
import os

import jax

from gpt2_jax.checkpoints.saved_steps import held_positions
from gpt2_jax.core.progress import track
from gpt2_jax.data import verify
from gpt2_jax.decoding.generate import generate_tokens
from gpt2_jax.model.config import Config
from gpt2_jax.parallel import multihost
from gpt2_jax.parallel.multihost import say
from gpt2_jax.parallel.sharding import mesh_of, whole_rows
from gpt2_jax.training import compile_cache, run_folder
from gpt2_jax.training.run import Run
from gpt2_jax.training.run_data import check_prompt, make_batches, open_data
from gpt2_jax.training.run_plan import make_plan, out_of_memory_advice
from gpt2_jax.training.stopping import StopSignal
from gpt2_jax.training.trackers import feeds
from gpt2_jax.training.watch import goodput, layer_picture, metrics_file, run_record, run_summary
from gpt2_jax.training.watch.profiling import Profile
from gpt2_jax.training.watch.step_record import Recorder


def train(
  config: Config, workdir: str | os.PathLike, began: float | None = None, held: int | None = None
) -> int:
  """Runs, or continues, the training that a config describes.

  Args:
    config: with every knob of configs/base.py.
    workdir: of the run.
    began: when the program was started, by `time.monotonic`; default: now.
    held: positions that the model is to have, as `make_plan` takes them; default: the workdir's.

  Returns:
    The exit status: 0 when the run is finished, 128 + the signal that stopped it.

  Raises:
    UserError: for everything that the user can mend.
  """
  # --- Plan: sizes, mesh, micro-batches ----------------------------------------------------------
  clock = goodput.Clock(began)
  plan = make_plan(config, held=held_positions(workdir) if held is None else held)
  feeds.require(config.log.to)
  with run_folder.opened(workdir) as folder:
    multihost.hello(plan.mesh)
    say(plan.describe())
    profile = Profile(config.profile.steps, folder.record, clock, say)
    if why := compile_cache.keep_compiled(workdir):
      say(why)

    # --- Data: a token store, and batch = f(seed, rows seen) --------------------------------------
    data = open_data(plan)
    data.check_vocabulary(plan.model.vocab_size)
    content = verify.Background(data, jax.process_index(), jax.process_count())
    check_prompt(plan, data.tokenizer)
    batches = make_batches(plan, data)
    plan = plan.of_epochs(batches.steps_per_epoch)

    with StopSignal() as stop, jax.set_mesh(plan.mesh), contextlib.ExitStack() as at_end:
      # --- Workdir: new, or that of the same run ---------------------------------------------------
      run, status = Run(plan, folder, clock, data, batches, stop), 0
      at_end.callback(run.checkpoints.close)
      if why := run.over():
        say(why)
        run_record.mark_finished(run.workdir)
      else:
        run.begin_record()

        # --- State: initial or restored ------------------------------------------------------------
        run.compile()
        with out_of_memory_advice(run.plan, run.workdir):
          run.state = run.restored_state() if run.start else run.first_state()

        # --- Loop ----------------------------------------------------------------------------------
        run.writer = metrics_file.MetricsWriter(run.workdir, run.start, config.deterministic)
        with run.writer, run.open_trackers() as run.trackers:
          run_steps(run, profile, content)

          # --- End ---------------------------------------------------------------------------------
          status = finish(run)
      return status


def run_steps(run: Run, profile: Profile, content: verify.Background) -> None:
  """Trains until the last step, a signal or the end of the patience, and saves what it did."""
  plan, config, clock = run.plan, run.plan.config, run.clock
  if run.cut:
    run.amend(run.evaluate(run.start))
  elif plan.source and not run.start and run.held_out:
    run.evaluate(0)  # what it is to be better than
  run.recorder = Recorder(plan, clock, run.workdir, run.batches, run.checkpoints, say)
  with (
    track('training', run.steps, 'steps', done=run.start) as run.advance,
    profile,
    clock('step'),
    out_of_memory_advice(plan, run.workdir),
  ):
    batches = run.batches.batches(run.start, run.steps, plan.A, plan.batch_sharding)
    pending = values = None
    while run.step < run.steps and not run.stop.due() and not run.patience.over:
      with clock('data'):
        batch = next(batches)
      content.check()
      run.folder.check()
      profile.before(run.step + 1, values)
      with clock('device'), jax.profiler.StepTraceAnnotation('train', step_num=run.step + 1):
        measured = run.measured(batch)  # first: the step takes the state
        run.state, values = run.train_step(run.state, batch)
        values |= measured
      run.step += 1
      if pending:  # one step late, so that the device never waits for the host
        run.record(*pending)
      pending = run.step, values
      evaluated, due_to_save = run.is_due(config.evaluate.every), run.is_due(config.checkpoint.every)
      if evaluated or due_to_save:  # its metrics are on disk before its checkpoint is
        run.record(run.step, values, evaluated)
        pending = None
      if due_to_save:
        run.save(content)
    if pending:  # a signal ended the loop
      run.record(*pending)
    if run.step > run.saved:
      run.save(content)
  with clock('checkpoint'):
    run.checkpoints.wait()


def finish(run: Run) -> int:
  """Says how the run ended; leaves its picture, a sample and a summary if it is finished.

  Returns: the exit status.
  """
  first, finished = jax.process_index() == 0, not run.stop.received
  summary, picture = {}, None
  if finished:
    if run.patience.over:
      say(f'stopped early: no lower held-out loss since step {run.patience.best:,}, which is offered')
    prompt = run_summary.fit_prompt(
      run.plan.config.log.sample_prompt, run.data.tokenizer, run.plan.model
    )
    text = sample(run, prompt)
    if first:
      totals, title = (
        run.clock.totals(),
        f'{run.folder.place.name}: {run.plan.G * run.plan.T:,} tokens a step',
      )
      picture = run_summary.plot_losses(
        run.workdir, f'{title}, at the end' if run.plan.offset else title, totals
      )
      if layers := layer_picture.draw(run.workdir):
        say(f'layers     {run.folder.place / layers.name}')
      say(run_summary.summary(run.workdir, prompt, text, totals, run.folder.place))
      summary = run_summary.figures(run.workdir, totals)
      summary |= {} if text is None else {'sample': prompt + text}
  else:
    of = f'step {run.step:,} of {run.steps:,}'
    say(f'stopped at {of}, which is saved; the same command goes on from it')
  if first:
    run_record.end(run.workdir, run.step, run.clock.totals(), finished)
  run.trackers.end('finished' if finished else 'stopped', summary, picture)
  return 128 + run.stop.received if run.stop.received else 0


def sample(run: Run, prompt: str) -> str | None:
  """Returns what the best parameters make of a prompt; None of a model that can't continue one."""
  config, model, best = run.plan.config, run.plan.model, run.patience.best
  if model.head != 'lm' or model.n_positions == 1:
    return None
  params = run.params_in_use()
  if best not in (None, run.step):
    params = run.checkpoints.params(best, run.plan.abstract_state().params)
  params = whole_rows(params)
  with run.clock('evaluate'), mesh_of(params):
    (made,) = generate_tokens(
      model,
      params,
      prompt,
      tokenizer=run.data.tokenizer,
      allow_special=config.data.special,
      seed=config.train.seed,
      max_new_tokens=config.log.sample_tokens,
      temperature=config.log.sample_temperature,
      top_k=config.log.sample_top_k,
    )
  return made.text

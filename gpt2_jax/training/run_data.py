"""The data of a run, by its config: opened, checked, and cut into batches."""

from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from gpt2_jax.core.buckets import AnyPath, is_bucket, place
from gpt2_jax.core.errors import UserError, saving
from gpt2_jax.data import labelled_texts, prepare, token_store
from gpt2_jax.data.shards import bad_token
from gpt2_jax.data.token_batches import TokenBatches
from gpt2_jax.data.training_data import Batches, TrainingData
from gpt2_jax.model.config import Config
from gpt2_jax.parallel import multihost
from gpt2_jax.parallel.multihost import say
from gpt2_jax.tokenizer import bpe
from gpt2_jax.training.run_plan import Plan

BATCHES: dict[str, type[Batches]] = {  # by the model's head
  'lm': TokenBatches,
  'sequence_classification': labelled_texts.LabelledBatches,
}


def open_data(plan: Plan) -> TrainingData:
  """Opens the data of a run: a token store, prepared first if it isn't there, or labelled texts."""
  data = plan.config.data
  if plan.model.head != 'lm':
    return labelled_texts.open_labelled(data, bpe.load(plan.tokenizer), plan.T)
  if data.corpus.startswith('bin:'):
    opened = token_store.open_store(data.corpus.removeprefix('bin:'))
    named = data.tokenizer is not None or plan.source is not None
    if named and bpe.trained_size(plan.tokenizer) is None:
      whose = 'data.tokenizer' if data.tokenizer is not None else str(plan.config.init_from)
      opened.check_tokenizer(bpe.load(plan.tokenizer), whose, '--config.data.tokenizer')
    return opened
  settings, folder = store_of(data, plan.tokenizer)
  return prepare.ensure_store(settings, folder, process=_share(folder))


def store_of(data: Config, tokenizer: str) -> tuple[prepare.Settings, AnyPath]:
  """Returns how the token store of a config is made, and its folder, which may not be there yet.

  Args:
    data: that section of the config; its corpus is none of `bin:`.
    tokenizer: its spec.
  """
  settings = prepare.Settings(
    data.corpus,
    tokenizer,
    data.val_fraction,
    data.split_seed,
    data.split,
    data.text_field,
    data.special,
  )
  return settings, place(data.store or place(data.directory) / prepare.store_name(settings))


def _share(folder: AnyPath) -> tuple[int, int]:
  """Returns which share of a store this process is to prepare, of how many.

  Processes that see one folder prepare it together. Those with disks of their own each need all.
  """
  processes = jax.process_index(), jax.process_count()
  if processes[1] == 1 or is_bucket(folder):
    return processes
  if multihost_utils.process_allgather(np.array(token_store.is_store(folder))).all():
    return 0, 1  # nothing is written where it is there: it may be on a disk that can only be read
  parent = Path(folder.parent)
  with saving('the token store', folder):
    parent.mkdir(parents=True, exist_ok=True)
  try:
    multihost.check_shared(parent)
  except UserError:
    return 0, 1
  return processes


def check_prompt(plan: Plan, tokenizer: bpe.Tokenizer) -> None:
  """Raises a UserError if the model lacks an id that the prompt of the sample at the end has."""
  V, ids = plan.model.vocab_size, tokenizer.encode(plan.config.log.sample_prompt) or [tokenizer.eot]
  if plan.model.head == 'lm' and max(ids) >= V:
    raise bad_token(max(ids), 'log.sample_prompt', V)


def make_batches(plan: Plan, data: TrainingData) -> Batches:
  """Returns the batches of the training split, and says how much data there is."""
  splits = data.splits
  batches = BATCHES[plan.model.head](
    splits['train'], plan.T, plan.G, plan.config.train.seed, plan.model.vocab_size
  )
  say(
    f'data     {data.path}: {len(splits["train"]):,} {data.unit} to train on '
    f'({batches.steps_per_epoch:,.1f} steps an epoch), {len(splits["val"]):,} held out'
  )
  for line in data.remarks():
    say(f'         {line}')
  return batches

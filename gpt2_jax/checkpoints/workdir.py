"""The workdir of a run of `launch.py`, read like any other format."""

import functools
import math
import os
import re
import sys
from pathlib import Path
from typing import Any

from gpt2_jax.checkpoints import orbax_store, saved_steps
from gpt2_jax.checkpoints.opening import PLAIN, Opening
from gpt2_jax.checkpoints.tensors import Source, source_of
from gpt2_jax.core import buckets
from gpt2_jax.core.buckets import AnyPath
from gpt2_jax.core.errors import UserError, brief
from gpt2_jax.core.files import misfit, read_json, read_lines, whole_number
from gpt2_jax.model.config import GPTConfig
from gpt2_jax.model.gpt2 import Params
from gpt2_jax.parallel.sharding import without_mesh
from gpt2_jax.tokenizer import bpe

APART = orbax_store.FOLDER + '/', 'tensorboard/', 'profile/'  # folders that are no part of the record
LABELS = 'labels.json'  # names of a classifier's labels, in order
NUMBER = int, float
# what a model card shows of the record, see `files.misfit`
LINE = {'step': whole_number, 'train/tokens': whole_number, 'train/loss': NUMBER}
ENV = {
  'devices': str,
  'mesh': dict,
  'python': str,
  'versions': {'jax': str, 'flax': str},
  'git_commit': (str, type(None)),
  'command': list,
  'data': {'corpus': str, 'tokens': whole_number, 'sha256': str, 'licence': (str, type(None))},
}


def _shown(line: Any) -> bool:
  """Whether a line of the record has what is shown of it; a held-out loss may be missing or null."""
  return misfit(line, LINE) is None and isinstance(line.get('eval/loss'), (*NUMBER, type(None)))


def recognises(path: AnyPath) -> bool:
  return saved_steps.is_workdir(path)


def in_record(name: str) -> bool:
  """Whether a file of a workdir, by its name in there, is of the record that others read."""
  return not name.startswith((*APART, '.lock'))


def record_of(path: str | os.PathLike) -> Path:
  """Returns a folder of this machine with the record of a run: on a disk, the workdir itself."""
  return buckets.fetched(buckets.place(path), in_record)


def split_step(source: str | os.PathLike) -> tuple[AnyPath, int | str | None]:
  """Splits `runs/x@1200` into the workdir and the step, where there is such a workdir.

  A path that exists as it stands has no step, nor has what may be a name of the hub, `NAME@REVISION`.

  Raises:
    UserError: the workdir is there, and what stands behind the @ is neither a number nor a name.
  """
  head, at, which = str(source).rpartition('@')
  whole, before = buckets.place(source), buckets.place(head or '.')
  if not at or whole.exists() or not before.exists():
    return whole, None
  said = re.fullmatch(r'[0-9]{1,18}|best|latest', which)
  if recognises(before):
    if not said:
      raise UserError(
        f'{source}: behind the @ stands a step of the run {head}, best or latest, not '
        f'{brief(which)}; kept are {_listed(saved_steps.kept_steps(head))}.'
      )
  elif not said:  # perhaps a revision
    return whole, None
  return before, int(which) if which.isdecimal() else which


def find_step(path: AnyPath, which: int | str) -> int:
  """Returns the number of a kept step of a run, named by its number, 'latest' or 'best'.

  The best has the lowest held-out loss that metrics.jsonl has of a kept step.

  Raises:
    UserError: it is not there; lists those that are.
  """
  kept = saved_steps.kept_steps(path)
  if not kept:
    raise UserError(
      f'{path} has no finished checkpoint yet: let the run go on until its first '
      '(config.checkpoint.every).'
    )
  if which == 'latest':
    return kept[-1]
  if which == 'best':
    file = record_of(path) / 'metrics.jsonl'
    lines, _ = read_lines(file, {'step': whole_number, 'eval/loss': NUMBER})
    losses = {line['step']: line['eval/loss'] for line in lines}
    found = [step for step in kept if math.isfinite(losses.get(step, math.nan))]
    if not found:
      raise UserError(
        f'{path}: no kept step has a held-out loss in metrics.jsonl (evaluate.every), '
        f'so that none is the best: name one, @{kept[-1]}. Kept are {_listed(kept)}.'
      )
    return min(found, key=lambda step: (losses[step], step))
  if isinstance(which, bool) or not isinstance(which, int):
    raise UserError(f"{path}: step = {brief(which)} is neither a number, 'best' nor 'latest'.")
  if which not in kept:
    raise UserError(
      f'{path} has no checkpoint of step {which}; kept are {_listed(kept)} (how many: '
      'config.checkpoint).'
    )
  return which


def _listed(steps: list[int]) -> str:
  """Lists steps in a line, without those in the middle where there are many."""
  if len(steps) <= 20:
    return ', '.join(map(str, steps)) or 'none'
  return f'{_listed(steps[:10])}, … ({len(steps) - 20} more), {_listed(steps[-10:])}'


def open_source(path: AnyPath, opening: Opening = PLAIN) -> Source:
  """Opens a run's checkpoint.

  It is the step that is asked for, else the best one where the run stops early, else the newest.

  Orbax puts the parameters straight onto the mesh (`load`). To be converted, they are read at once,
  when the first tensor is asked for.
  """
  asked = None if opening.step is None else find_step(path, opening.step)
  meta = saved_steps.read_meta(path, asked)
  where = str(path) if asked is None else f'{path}@{asked}'
  at = record_of(path)
  config, known = GPTConfig(**meta['model']), record(at, meta['step'])
  asked_of = known.get('config', {})  # empty where the run's record is damaged
  known['rows'] = rows = meta.get('rows') or _rows(asked_of, config)
  if asked_of.get('init_from') is None and rows['tokens'] < config.n_positions:
    print(
      f'{path}: its rows of {rows["tokens"]:,} tokens train as many of its '
      f'{config.n_positions:,} positions: what it makes of longer texts is not to be trusted',
      file=sys.stderr,
    )

  def load(wanted: GPTConfig) -> Params | None:
    same = (wanted.padded_vocab_size, wanted.lora) == (config.padded_vocab_size, config.lora)
    return saved_steps.load_params(path, meta) if same else None

  @functools.cache
  def held() -> Source:
    with without_mesh():
      return source_of(config, saved_steps.load_params(path, meta), where)

  return Source(
    config,
    lambda name: held().read(name),
    'float32',
    where,
    load=load,
    tokenizer=_tokenizer(at, meta),
    keys=keys(at),
    record=known,
    base=asked_of.get('init_from'),
  )


def _rows(config: dict[str, Any], model: GPTConfig) -> dict[str, Any]:
  """Returns the rows of a run whose checkpoints don't say, by its config."""
  said = config['data'] if 'data' in config else {}
  return {
    'tokens': said.get('sequence_length') or model.n_positions,
    'document_mask': said.get('document_mask', False),
  }


def _tokenizer(path: Path, meta: dict) -> bpe.Tokenizer:
  """Returns the run's tokenizer, with the hash that its checkpoint says, where it says one."""
  found = bpe.load(path / 'tokenizer')
  if found.sha256 != meta.get('data', {}).get('tokenizer', {}).get('sha256', found.sha256):
    raise UserError(
      f'{path / "tokenizer"} is not the tokenizer that the run was trained with: its '
      'files were changed or damaged. Start the run again: it writes them anew.'
    )
  return found


def keys(path: Path) -> dict[str, Any]:
  """Returns the keys of a config.json about a run's model, beside its sizes."""
  if not (path / LABELS).exists():
    return {}
  labels = read_json(path / LABELS, [str])
  return {
    'id2label': {str(i): label for i, label in enumerate(labels)},
    'label2id': {label: i for i, label in enumerate(labels)},
  }


def record(path: Path, step: int) -> dict[str, Any]:
  """Reads the facts about a run that its folder holds, for a model card.

  Keys: step, config, env (of the last start), data (corpus, tokens, sha256, licence) and losses: the
  lines of metrics.jsonl with a held-out loss, at most 20 of them, and the last line. `open_source`
  adds rows: tokens of each, and document_mask.
  """
  try:
    config = read_json(path / 'config.json', {'optim': dict, 'train': dict})
    env = read_json(path / 'env.json', {'starts': [ENV]})['starts'][-1:]
  except UserError as e:
    print(f'{e} Of this run no more is known than its checkpoints say.', file=sys.stderr, flush=True)
    return {'step': step}
  lines = read_lines(record_of(path) / 'metrics.jsonl', _shown)[0]
  lines = [line for line in lines if line['step'] <= step]
  losses = [line for line in lines if 'eval/loss' in line]
  losses = losses[:: -(-len(losses) // 20) or 1]
  if lines and lines[-1] not in losses:
    losses.append(lines[-1])
  return {'step': step, 'config': config, 'losses': losses} | (
    {'env': env[0], 'data': env[0]['data']} if env else {}
  )

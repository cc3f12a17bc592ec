"""The workdir of a run of `launch.py`, read like any other format."""

import functools
import sys
from pathlib import Path
from typing import Any

from gpt2_jax import checkpoint, tokenizer
from gpt2_jax.config import GPTConfig
from gpt2_jax.errors import UserError
from gpt2_jax.files import read_json, read_lines, whole_number
from gpt2_jax.interop.tensors import Source, source_of
from gpt2_jax.model import Params
from gpt2_jax.sharding import without_mesh

LABELS = 'labels.json'  # names of a classifier's labels, in order
NUMBER = int, float
# what a model card shows of the record, see `files.misfit`
LINE = {'step': whole_number, 'train/tokens': whole_number, 'train/loss': NUMBER}
ENV = {'devices': str, 'mesh': dict, 'python': str, 'versions': {'jax': str, 'flax': str},
       'git_commit': (str, type(None)), 'command': list,
       'data': {'corpus': str, 'tokens': whole_number, 'sha256': str, 'licence': (str, type(None))}}


def recognises(path: Path) -> bool:
  return checkpoint.is_workdir(path)


def open_source(path: Path) -> Source:
  """A run's checkpoint, its best one where the run stops early.

  Orbax puts the parameters straight onto the mesh (`load`). To be converted, they are read at once,
  when the first tensor is asked for.
  """
  meta = checkpoint.read_meta(path)
  config, known = GPTConfig(**meta['model']), record(path, meta['step'])

  def load(wanted: GPTConfig) -> Params | None:
    same = (wanted.padded_vocab_size, wanted.lora) == (config.padded_vocab_size, config.lora)
    return checkpoint.load_params(path, meta) if same else None

  @functools.cache
  def held() -> Source:
    with without_mesh():
      return source_of(config, checkpoint.load_params(path, meta), str(path))

  return Source(config, lambda name: held().read(name), 'float32', str(path), load=load,
                tokenizer=_tokenizer(path, meta), keys=keys(path), record=known,
                base=known.get('config', {}).get('init_from'))


def _tokenizer(path: Path, meta: dict) -> tokenizer.Tokenizer:
  """The run's tokenizer, with the hash that its checkpoint says, where it says one."""
  found = tokenizer.load(path / 'tokenizer')
  if found.sha256 != meta.get('data', {}).get('tokenizer', {}).get('sha256', found.sha256):
    raise UserError(f'{path / "tokenizer"} is not the tokenizer that the run was trained with: its '
                    'files were changed or damaged. Start the run again: it writes them anew.')
  return found


def keys(path: Path) -> dict[str, Any]:
  """What a config.json says of a run's model beside its sizes."""
  if not (path / LABELS).exists():
    return {}
  labels = read_json(path / LABELS, [str])
  return {'id2label': {str(i): label for i, label in enumerate(labels)},
          'label2id': {label: i for i, label in enumerate(labels)}}


def record(path: Path, step: int) -> dict[str, Any]:
  """What a run has left about itself, for a model card.

  Keys: step, config, env (of the last start), data (corpus, tokens, sha256, licence) and losses: the
  lines of metrics.jsonl with a held-out loss, at most 20 of them, and the last line.
  """
  try:
    config = read_json(path / 'config.json', {'optim': dict, 'train': dict})
    env = read_json(path / 'env.json', {'starts': [ENV]})['starts'][-1:]
  except UserError as e:
    print(f'{e} Of this run no more is known than its checkpoints say.', file=sys.stderr, flush=True)
    return {'step': step}
  lines = read_lines(path / 'metrics.jsonl', LINE)[0]
  lines = [line for line in lines if line['step'] <= step]
  losses = [line for line in lines if 'eval/loss' in line]
  losses = losses[::-(-len(losses) // 20) or 1]
  if lines and lines[-1] not in losses:
    losses.append(lines[-1])
  return {'step': step, 'config': config, 'losses': losses} | (
      {'env': env[0], 'data': env[0]['data']} if env else {})

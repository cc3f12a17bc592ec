"""The workdir of a run of `launch.py`, read like any other format."""

import functools
import json
import sys
from pathlib import Path
from typing import Any

from gpt2_jax import checkpoint, tokenizer
from gpt2_jax.config import GPTConfig
from gpt2_jax.interop.tensors import Source, source_of
from gpt2_jax.model import Params
from gpt2_jax.sharding import without_mesh

LABELS = 'labels.json'  # names of a classifier's labels, in order


def recognises(path: Path) -> bool:
  return checkpoint.is_workdir(path)


def open_source(path: Path) -> Source:
  """A run's checkpoint, its best one where the run stops early.

  Orbax puts the parameters straight onto the mesh (`load`). To be converted, they are read at once,
  when the first tensor is asked for.
  """
  meta = checkpoint.read_meta(path)
  config, known = GPTConfig(**meta['model']), record(path, meta['step'])
  known['rows'] = rows = meta.get('rows') or _rows(known['config'], config)
  if known['config'].get('init_from') is None and rows['tokens'] < config.n_positions:
    print(f'{path}: its rows of {rows["tokens"]:,} tokens train as many of its '
          f'{config.n_positions:,} positions: what it makes of longer texts is not to be trusted',
          file=sys.stderr)

  def load(wanted: GPTConfig) -> Params | None:
    same = (wanted.padded_vocab_size, wanted.lora) == (config.padded_vocab_size, config.lora)
    return checkpoint.load_params(path, meta) if same else None

  @functools.cache
  def held() -> Source:
    with without_mesh():
      return source_of(config, checkpoint.load_params(path, meta), str(path))

  return Source(config, lambda name: held().read(name), 'float32', str(path), load=load,
                tokenizer=tokenizer.load(path / 'tokenizer'), keys=keys(path), record=known,
                base=known['config'].get('init_from'))


def _rows(config: dict[str, Any], model: GPTConfig) -> dict[str, Any]:
  """The rows of a run whose checkpoints don't say, by its config."""
  data = config['data']
  return {'tokens': data['sequence_length'] or model.n_positions,
          'document_mask': 'document_mask' in data and data['document_mask']}


def keys(path: Path) -> dict[str, Any]:
  """What a config.json says of a run's model beside its sizes."""
  if not (path / LABELS).exists():
    return {}
  labels = json.loads((path / LABELS).read_text())
  return {'id2label': {str(i): label for i, label in enumerate(labels)},
          'label2id': {label: i for i, label in enumerate(labels)}}


def record(path: Path, step: int) -> dict[str, Any]:
  """What a run has left about itself, for a model card.

  Keys: step, config, env (of the last start), data (corpus, tokens, sha256, licence) and losses: the
  lines of metrics.jsonl with a held-out loss, at most 20 of them, and the last line. `open_source`
  adds rows: tokens of each, and document_mask.
  """
  read = lambda name: json.loads((path / name).read_text())
  lines = [json.loads(line) for line in (path / 'metrics.jsonl').read_text().splitlines()]
  lines = [line for line in lines if line['step'] <= step]
  losses = [line for line in lines if 'eval/loss' in line]
  losses = losses[::-(-len(losses) // 20) or 1]
  if lines and lines[-1] not in losses:
    losses.append(lines[-1])
  env = read('env.json')['starts'][-1]
  return {'step': step, 'config': read('config.json'), 'env': env, 'data': env['data'],
          'losses': losses}

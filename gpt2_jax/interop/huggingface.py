"""Hugging Face's folders, both ways: config.json, weights, tokenizer files, model card.

Tensor names and shapes are those of `tensors.py`; a `GPT2Model` has them as they stand there, the
models with a head have them behind `transformer.`.
"""

import dataclasses
import functools
import json
import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gpt2_jax import bounds, tokenizer
from gpt2_jax.config import MODEL, GPTConfig
from gpt2_jax.errors import UserError, brief
from gpt2_jax.files import check_place, read_json, unreadable
from gpt2_jax.interop import foreign, safetensors_files, torch_files
from gpt2_jax.interop.card import model_card
from gpt2_jax.interop.opening import PLAIN, Opening
from gpt2_jax.interop.tensors import Source, Tensor, check_tensors, common_dtype, full_name, shapes

WEIGHTS = (
  'model.safetensors',
  'model.safetensors.index.json',
  'pytorch_model.bin',
  'pytorch_model.bin.index.json',
)
TOKENIZER = (
  'tokenizer.json',
  'vocab.json',
  'merges.txt',
  'tokenizer_config.json',
  'special_tokens_map.json',
  'added_tokens.json',
)
MAX_SHARD_SIZE = 5_000_000_000  # bytes
ARCHITECTURES = {
  'lm': 'GPT2LMHeadModel',
  'sequence_classification': 'GPT2ForSequenceClassification',
  'token_classification': 'GPT2ForTokenClassification',
}

# Fields of GPTConfig that their config.json has, which stand first there.
FIELDS = [field.name for field in dataclasses.fields(GPTConfig)]
CONFIG_KEYS = (*FIELDS[: FIELDS.index('init_scheme')], 'classifier_dropout')
# Keys that we write anew.
MADE_KEYS = (
  'model_type',
  'architectures',
  'dtype',
  'torch_dtype',
  'transformers_version',
  'add_cross_attention',
  '_name_or_path',
  '_commit_hash',
)
# Keys that change nothing in the numbers of a model, with the defaults of transformers' GPT2Config.
# They are kept and written again.
NEUTRAL_KEYS: dict[str, Any] = dict(
  bos_token_id=50256,
  eos_token_id=50256,
  pad_token_id=None,
  use_cache=True,
  summary_type='cls_index',
  summary_use_proj=True,
  summary_activation=None,
  summary_proj_to_labels=True,
  summary_first_dropout=0.1,
)
# The same, without defaults: what older versions and other tools wrote.
KEPT_KEYS = frozenset(
  """
  id2label label2id num_labels _num_labels author created_date language license problem_type
  finetuning_task task_specific_params n_ctx n_special predict_special_tokens
  gradient_checkpointing is_decoder is_encoder_decoder chunk_size_feed_forward output_attentions
  output_hidden_states output_past return_dict use_return_dict torchscript use_bfloat16
  tf_legacy_loss xla_device eos_token_ids tokenizer_class prefix sep_token_id cls_token_id
  mask_token_id unk_token_id decoder_start_token_id attn_implementation _attn_implementation
  _attn_implementation_autoset hidden_dropout vocab_size_or_config_json_file
  """.split()
)
# Defaults of `generate`, which older files have there.
KEPT_KEYS |= frozenset(
  """
  max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty
  temperature top_k top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size
  encoder_no_repeat_ngram_size bad_words_ids num_return_sequences output_scores
  return_dict_in_generate forced_bos_token_id forced_eos_token_id remove_invalid_values
  exponential_decay_length_penalty suppress_tokens begin_suppress_tokens
  """.split()
)
# What of the two is used, and what it may be.
TOKEN_ID = bounds.Int(-(2**31), 2**31 - 1)  # one that is not in the vocabulary, as -1, is passed over
USED_KEYS: bounds.Table = dict(
  bos_token_id=bounds.Optional(TOKEN_ID),
  pad_token_id=bounds.Optional(TOKEN_ID),
  eos_token_id=bounds.Optional(bounds.OneOrMore(TOKEN_ID)),
  id2label=bounds.Optional(bounds.Names()),
)
# Keys that mean another function unless they, or the items of their lists, have these values. Any
# other key may only say that something is off: null, false or empty.
SAME_KEYS: dict[str, tuple] = {
  'is_causal': (True,),
  'add_cross_attention': (False, None),
  'layer_types': (None, 'full_attention'),
}


def _is_honoured(key: str, value: Any) -> bool:
  """Whether a key of a config.json is known, or says that something unknown is off."""
  if key in SAME_KEYS:
    return (
      value in SAME_KEYS[key]
      if not isinstance(value, list)
      else (all(item in SAME_KEYS[key] for item in value))
    )
  if key in CONFIG_KEYS or key in NEUTRAL_KEYS or key in KEPT_KEYS or key in MADE_KEYS:
    return True
  return foreign.is_off(value)


def config_from_dict(keys: Mapping[str, Any], where: str = 'config.json') -> GPTConfig:
  """The configuration that a `config.json` describes; of the language model, without another head.

  Raises:
    UserError: it is another model's, or names keys that can't be honoured.
  """
  if keys.get('model_type', 'gpt2') != 'gpt2':
    raise UserError(f'{where}: model_type is {brief(keys["model_type"])}, but only gpt2 can be read.')
  if unknown := {brief(k): brief(v) for k, v in keys.items() if not _is_honoured(k, v)}:
    said = ', '.join(f'{key}: {value}' for key, value in list(unknown.items())[:8])
    raise UserError(
      f"{where} has keys that this GPT-2 can't honour: {{{said}}}. If they don't "
      'matter, remove them in a copy of the folder and name that.'
    )
  fields = {k: keys[k] for k in CONFIG_KEYS if k in keys}
  if fields.get('classifier_dropout', 0) is None:
    del fields['classifier_dropout']
  fields.setdefault('classifier_dropout', keys.get('hidden_dropout', 0.1))
  bounds.check_all(MODEL, fields, f'{where}: ')
  check_keys(keys, where)
  with bounds.errors_of(where):
    return GPTConfig(**fields)


def check_keys(keys: Mapping[str, Any], where: str | os.PathLike) -> None:
  """Checks those values beside the sizes that something is done with: see USED_KEYS."""
  bounds.check_all(USED_KEYS, {k: v for k, v in keys.items() if k in USED_KEYS}, f'{where}: ')


def config_to_dict(source: Source) -> dict[str, Any]:
  """The `config.json` of a model, with every key that transformers' GPT2Config has."""
  c = source.config
  if source.tokenizer is not None:
    ends = {'bos_token_id': source.tokenizer.eot, 'eos_token_id': source.tokenizer.eot}
  else:
    ends = {} if c.vocab_size > 50256 else {'bos_token_id': None, 'eos_token_id': None}
  keys = NEUTRAL_KEYS | ends | dict(source.keys)
  keys |= {key: getattr(c, key) for key in CONFIG_KEYS}
  if c.head != 'token_classification':
    del keys['classifier_dropout']
  if c.head != 'lm' and 'id2label' not in keys:
    keys['id2label'] = {str(i): f'LABEL_{i}' for i in range(c.num_labels)}
    keys['label2id'] = {label: int(i) for i, label in keys['id2label'].items()}
  made = {
    'model_type': 'gpt2',
    'architectures': [ARCHITECTURES[c.head]],
    'dtype': source.dtype,
    'add_cross_attention': False,
  }
  return dict(sorted((keys | made).items()))


def recognises(path: Path) -> bool:
  return (path / 'config.json').is_file() and any((path / name).is_file() for name in WEIGHTS)


def open_source(path: Path, opening: Opening = PLAIN) -> Source:
  """A folder as transformers' `save_pretrained` leaves it, in any version; names of tensors may have
  any prefix.

  Raises:
    UserError: names the file, and what about it can't be read or honoured.
  """
  keys = read_json(path / 'config.json')
  found = {name: path / name for name in WEIGHTS if (path / name).is_file()}
  name, file = next(iter(found.items()))
  tensors = _indexed(path, file) if name.endswith('.index.json') else _tensors(file)
  return assemble(path, keys, tensors, opening)


def assemble(
  path: Path, keys: Mapping[str, Any], tensors: dict[str, Tensor], opening: Opening
) -> Source:
  """A `Source` of a folder from its config.json and its tensors."""
  config = config_from_dict(keys, f'{path / "config.json"}')
  tensors = {name: tensors[full] for full, name in foreign.plain_names(tensors, path).items()}
  if head := foreign.head_of(tensors):
    config = dataclasses.replace(config, head=head[0], num_labels=head[1])
  if config.head != 'lm' or config.tie_word_embeddings:
    _drop_tied_head(path, tensors)
  tensors = foreign.narrowed(foreign.without_extra(config, tensors, path, opening), path)
  check_tensors(config, {name: tensor.shape for name, tensor in tensors.items()}, path)
  generation = path / 'generation_config.json'
  kept = {k: v for k, v in keys.items() if k in NEUTRAL_KEYS or k in KEPT_KEYS}
  if config.vocab_size > 50256:  # what transformers takes where the file is silent
    kept = {'bos_token_id': 50256, 'eos_token_id': 50256} | kept
  return Source(
    config,
    lambda name: tensors[name].read(),
    common_dtype(tensors.values(), path),
    str(path),
    tokenizer=load_tokenizer(path),
    keys=kept,
    generation=generation_keys(generation),
  )


def generation_keys(path: Path) -> dict[str, Any]:
  """What a generation_config.json says; nothing where there is none."""
  keys = read_json(path) if path.is_file() else {}
  check_keys(keys, path)
  return keys


def _drop_tied_head(path: Path, tensors: dict[str, Tensor]) -> None:
  """Drops `lm_head.weight` where it only repeats `wte.weight`, as old .bin files do."""
  head, wte = tensors.pop('lm_head.weight', None), tensors.get('wte.weight')
  if head and wte and not np.array_equal(head.read(), wte.read()):
    raise UserError(
      f'{path}: lm_head.weight differs from wte.weight, but config.json ties them '
      '(tie_word_embeddings, true by default). Write false there to use both.'
    )


def load_tokenizer(path: Path) -> tokenizer.Tokenizer | None:
  """The tokenizer of a folder; None, with a warning, where it has one that we can't use."""
  if not any((path / name).is_file() for name in TOKENIZER[:3]):
    return None
  try:
    return tokenizer.load(path)
  except UserError as e:
    warnings.warn(
      f'the model is used without its tokenizer, with ids instead of texts: {e}', stacklevel=2
    )
    return None


def _indexed(folder: Path, index: Path) -> dict[str, Tensor]:
  """Tensors of a sharded checkpoint."""
  weight_map = read_json(index).get('weight_map')
  if not isinstance(weight_map, dict) or not weight_map:
    raise unreadable(index, 'it has no weight_map')
  shards = {}
  for name in sorted(set(map(str, weight_map.values()))):
    if not re.fullmatch(r'[\w\-.]+', name) or name.startswith('.'):
      raise UserError(f"{index} names a file outside of its folder: {name!r}. It can't be trusted.")
    shards[name] = _tensors(folder / name)
  tensors = {}
  for name, shard in weight_map.items():
    if name not in shards[shard]:
      raise unreadable(folder / shard, f'it lacks {name}, which {index.name} promises')
    tensors[name] = shards[shard][name]
  if extra := sorted(set().union(*shards.values()) - weight_map.keys()):
    raise unreadable(index, f'it does not list {extra[0]}, which a shard has')
  return tensors


def _tensors(path: Path) -> dict[str, Tensor]:
  """Tensors of a file, unread."""
  check_place(path)
  if path.suffix == '.safetensors':
    return safetensors_files.read(path)
  state = torch_files.read(path)
  if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
    raise unreadable(path, 'it holds no state dict')
  return state


def write(source: Source, target: Path, *, max_shard_size: int = MAX_SHARD_SIZE) -> None:
  """Writes a folder that `transformers` loads: config, weights, tokenizer, model card.

  Args:
    source: the model.
    target: the folder, not there yet.
    max_shard_size: bytes of a weights file; a single tensor may be larger.
  """
  target.mkdir()
  config = config_to_dict(source)
  generation = dict(source.generation) or {
    '_from_model_config': True,
    'bos_token_id': config['bos_token_id'],
    'eos_token_id': config['eos_token_id'],
    'pad_token_id': config['pad_token_id'],
  }
  for name, value in (('config.json', config), ('generation_config.json', generation)):
    (target / name).write_text(json.dumps(value, indent=2, ensure_ascii=False) + '\n', 'utf-8')
  if source.tokenizer is not None:
    source.tokenizer.save(target, model_max_length=source.config.n_positions)
  (target / 'README.md').write_text(model_card(source), encoding='utf-8')

  tensors = {}
  for name, shape in shapes(source.config).items():
    read = functools.partial(source.tensor, name)
    tensors[full_name(name)] = Tensor(shape, source.dtype, read)
  shards: list[dict[str, Tensor]] = [{}]
  for name, tensor in tensors.items():
    if shards[-1] and sum(t.nbytes for t in shards[-1].values()) + tensor.nbytes > max_shard_size:
      shards.append({})
    shards[-1][name] = tensor
  if len(shards) == 1:
    safetensors_files.write(target / 'model.safetensors', tensors)
    return
  weight_map, size = {}, 0
  for i, shard in enumerate(shards):
    file = f'model-{i + 1:05d}-of-{len(shards):05d}.safetensors'
    size += safetensors_files.write(target / file, shard)
    weight_map |= dict.fromkeys(shard, file)
  parameters = sum(int(np.prod(tensor.shape)) for tensor in tensors.values())
  (target / 'model.safetensors.index.json').write_text(
    json.dumps(
      {'metadata': {'total_parameters': parameters, 'total_size': size}, 'weight_map': weight_map},
      indent=2,
    )
    + '\n'
  )

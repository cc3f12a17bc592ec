"""Hugging Face's `config.json` of a GPT-2, both ways: which keys are honoured, kept or refused."""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gpt2_jax.checkpoints import foreign
from gpt2_jax.checkpoints.tensors import Source
from gpt2_jax.core import bounds
from gpt2_jax.core.errors import UserError, brief
from gpt2_jax.core.files import read_json
from gpt2_jax.model.config import MODEL, GPTConfig

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
  finetuning_task task_specific_params n_ctx n_special predict_special_tokens gradient_checkpointing
  is_decoder is_encoder_decoder chunk_size_feed_forward output_attentions output_hidden_states
  output_past return_dict use_return_dict torchscript use_bfloat16 tf_legacy_loss xla_device
  eos_token_ids tokenizer_class prefix sep_token_id cls_token_id mask_token_id unk_token_id
  decoder_start_token_id attn_implementation _attn_implementation _attn_implementation_autoset
  hidden_dropout vocab_size_or_config_json_file max_length min_length do_sample early_stopping
  num_beams num_beam_groups diversity_penalty temperature top_k top_p typical_p repetition_penalty
  length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids
  num_return_sequences output_scores return_dict_in_generate forced_bos_token_id forced_eos_token_id
  remove_invalid_values exponential_decay_length_penalty suppress_tokens begin_suppress_tokens
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
  """Returns the configuration that a `config.json` describes: of the language model, without a head.

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
  """Returns the `config.json` of a model, with every key that transformers' GPT2Config has."""
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


def generation_keys(path: Path) -> dict[str, Any]:
  """Reads a generation_config.json; an empty dict where there is none."""
  keys = read_json(path) if path.is_file() else {}
  check_keys(keys, path)
  return keys

"""What people's folders have around a GPT-2: keys, heads, prefixes, wide numbers, adapters elsewhere.

Without torch; what torch's libraries compute of the same files: test_foreign_parity.py.
"""

import json
import shutil

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st
from support.processes import ROOT

import gpt2_jax
from configs import finetune
from gpt2_jax.checkpoints import foreign, pretrained, tensors
from gpt2_jax.checkpoints.formats import (
  huggingface_config,
  nanogpt,
  peft_config,
  torch_files,
  torch_writing,
)
from gpt2_jax.checkpoints.opening import Opening
from gpt2_jax.checkpoints.tensors import Tensor
from gpt2_jax.cli import main
from gpt2_jax.core.errors import UserError
from gpt2_jax.training import run_plan

GOLDEN = ROOT / 'tests' / 'golden'
few = settings(deadline=None, max_examples=150)

# What transformers' GPT2Config has written, by version; sizes aside.
SIZES = {'n_embd': 24, 'n_layer': 2, 'n_head': 2, 'n_positions': 16, 'vocab_size': 50257}
OLD_GENERATION = {
  'do_sample': False,
  'length_penalty': 1.0,
  'max_length': 20,
  'num_beams': 1,
  'num_return_sequences': 1,
  'repetition_penalty': 1.0,
  'temperature': 1.0,
  'top_k': 50,
  'top_p': 1.0,
}
SUMMARY = {
  'summary_activation': None,
  'summary_first_dropout': 0.1,
  'summary_proj_to_labels': True,
  'summary_type': 'cls_index',
  'summary_use_proj': True,
}
RATES = {
  'attn_pdrop': 0.1,
  'embd_pdrop': 0.1,
  'resid_pdrop': 0.1,
  'initializer_range': 0.02,
  'layer_norm_epsilon': 1e-05,
}
COMMON = SIZES | RATES | SUMMARY
LABELS = {'id2label': {'0': 'LABEL_0', '1': 'LABEL_1'}, 'label2id': {'LABEL_0': 0, 'LABEL_1': 1}}
CONFIGS = {
  'pytorch_transformers 1.2': COMMON
  | {
    'finetuning_task': None,
    'n_ctx': 1024,
    'n_special': 0,
    'num_labels': 1,
    'output_attentions': False,
    'output_hidden_states': False,
    'predict_special_tokens': True,
    'pruned_heads': {},
    'torchscript': False,
  },
  'transformers 2.3': COMMON
  | OLD_GENERATION
  | LABELS
  | {
    'eos_token_ids': 0,
    'finetuning_task': None,
    'is_decoder': False,
    'n_ctx': 1024,
    'num_labels': 2,
    'output_attentions': False,
    'output_hidden_states': False,
    'output_past': True,
    'pad_token_id': 0,
    'bos_token_id': 0,
    'pruned_heads': {},
    'torchscript': False,
    'use_bfloat16': False,
  },
  'transformers 2.11': COMMON
  | OLD_GENERATION
  | LABELS
  | {
    'activation_function': 'gelu_new',
    'architectures': ['GPT2LMHeadModel'],
    'bad_words_ids': None,
    'bos_token_id': 50256,
    'decoder_start_token_id': None,
    'early_stopping': False,
    'eos_token_id': 50256,
    'finetuning_task': None,
    'is_decoder': False,
    'is_encoder_decoder': False,
    'min_length': 0,
    'model_type': 'gpt2',
    'n_ctx': 1024,
    'no_repeat_ngram_size': 0,
    'num_labels': 2,
    'output_attentions': False,
    'output_hidden_states': False,
    'pad_token_id': None,
    'prefix': None,
    'pruned_heads': {},
    'task_specific_params': {'text-generation': {'do_sample': True, 'max_length': 50}},
    'torchscript': False,
    'use_bfloat16': False,
    'use_cache': True,
    'xla_device': None,
  },
  'transformers 3.5': COMMON
  | {
    '_num_labels': 2,
    'activation_function': 'gelu_new',
    'architectures': ['GPT2LMHeadModel'],
    'bos_token_id': 50256,
    'chunk_size_feed_forward': 0,
    'diversity_penalty': 0.0,
    'eos_token_id': 50256,
    'gradient_checkpointing': False,
    'model_type': 'gpt2',
    'n_ctx': 1024,
    'n_inner': None,
    'num_beam_groups': 1,
    'return_dict': False,
    'tie_encoder_decoder': False,
    'tie_word_embeddings': True,
    'tokenizer_class': None,
    'use_cache': True,
    'xla_device': None,
    'add_cross_attention': False,
    'sep_token_id': None,
    'cross_attention_hidden_size': None,
  },
  'transformers 4.11': COMMON
  | {
    'activation_function': 'gelu_new',
    'architectures': ['GPT2LMHeadModel'],
    'bos_token_id': 50256,
    'eos_token_id': 50256,
    'model_type': 'gpt2',
    'n_ctx': 1024,
    'n_inner': None,
    'problem_type': None,
    'scale_attn_weights': True,
    'torch_dtype': 'float32',
    'transformers_version': '4.11.3',
    'use_cache': True,
  },
  'transformers 4.40, all keys': COMMON
  | OLD_GENERATION
  | LABELS
  | {
    'activation_function': 'gelu_new',
    'architectures': ['GPT2LMHeadModel'],
    'bos_token_id': 50256,
    'eos_token_id': 50256,
    'model_type': 'gpt2',
    'n_inner': None,
    '_name_or_path': 'gpt2',
    '_attn_implementation_autoset': False,
    'add_cross_attention': False,
    'begin_suppress_tokens': None,
    'cross_attention_hidden_size': None,
    'encoder_no_repeat_ngram_size': 0,
    'exponential_decay_length_penalty': None,
    'forced_bos_token_id': None,
    'forced_eos_token_id': None,
    'output_scores': False,
    'remove_invalid_values': False,
    'reorder_and_upcast_attn': False,
    'return_dict_in_generate': False,
    'scale_attn_by_inverse_layer_idx': False,
    'scale_attn_weights': True,
    'suppress_tokens': None,
    'tf_legacy_loss': False,
    'tie_encoder_decoder': False,
    'tie_word_embeddings': True,
    'torch_dtype': 'bfloat16',
    'torchscript': False,
    'typical_p': 1.0,
    'use_bfloat16': False,
    'pruned_heads': {},
    'quantization_config': None,
    'auto_map': {},
    'use_cache': True,
  },
  'transformers 5': COMMON
  | {
    'activation_function': 'gelu_new',
    'add_cross_attention': False,
    'architectures': ['GPT2LMHeadModel'],
    'bos_token_id': 50256,
    'dtype': 'float32',
    'eos_token_id': 50256,
    'model_type': 'gpt2',
    'n_inner': None,
    'pad_token_id': None,
    'reorder_and_upcast_attn': False,
    'scale_attn_by_inverse_layer_idx': False,
    'scale_attn_weights': True,
    'tie_word_embeddings': True,
    'transformers_version': '5.24.0',
    'use_cache': True,
    'is_causal': True,
    'layer_types': ['full_attention', 'full_attention'],
    'rope_parameters': None,
    'attn_implementation': 'sdpa',
  },
}


@pytest.fixture(autouse=True)
def at_root(monkeypatch):
  monkeypatch.chdir(ROOT)  # the golden adapters name their base by a path from there


def copied(folder, name='plain'):
  """A golden folder, to be changed."""
  shutil.copytree(GOLDEN / 'huggingface' / name, folder)
  return folder


def edit(file, **keys):
  file.write_text(json.dumps(json.loads(file.read_text()) | keys))


def rewrite(folder, change):
  """Gives a folder the tensors that `change` makes of its own."""
  file = folder / 'model.safetensors'
  safetensors.numpy.save_file(change(safetensors.numpy.load_file(file)), file)


def same(have, want, **options):
  """Whether two checkpoints hold one model, to the last bit."""
  have, want = pretrained.open_source(have, Opening(**options)), pretrained.open_source(want)
  assert have.config == want.config
  for name in tensors.shapes(want.config):
    np.testing.assert_array_equal(have.tensor(name), want.tensor(name))


# --- config.json ------------------------------------------------------------------------------------


@pytest.mark.parametrize('version', CONFIGS)
def test_configs_of_every_time(version):
  config = huggingface_config.config_from_dict(CONFIGS[version])
  want = huggingface_config.config_from_dict(SIZES)
  assert config == want


@given(
  st.text(min_size=1),
  st.recursive(
    st.none() | st.just(False), lambda x: st.lists(x) | st.dictionaries(st.text(), x), max_leaves=5
  ),
)
@few
def test_unknown_keys_that_are_off(key, value):
  known = (
    *huggingface_config.CONFIG_KEYS,
    *huggingface_config.SAME_KEYS,
    *huggingface_config.NEUTRAL_KEYS,
    'model_type',
  )
  if key not in known:
    assert huggingface_config.config_from_dict({key: value}) == huggingface_config.config_from_dict(
      {}
    )


@given(
  st.text(min_size=1).map('x_'.__add__),
  st.just(True) | st.integers() | st.floats() | st.text() | st.lists(st.integers(), min_size=1),
)
@few
def test_unknown_keys_that_say_something(key, value):
  with pytest.raises(UserError, match="keys that this GPT-2 can't honour"):
    huggingface_config.config_from_dict({key: value})


@pytest.mark.parametrize(
  'key,value',
  [
    ('is_causal', False),
    ('is_causal', None),
    ('add_cross_attention', True),
    ('layer_types', ['full_attention', 'sliding_attention']),
    ('rope_theta', 1e4),
    ('quantization_config', {'bits': 4}),
    ('auto_map', {'AutoModel': 'x.Y'}),
    ('pruned_heads', {'0': [1]}),
    ('tie_encoder_decoder', True),
  ],
)
def test_keys_that_would_change_the_numbers(key, value):
  with pytest.raises(UserError, match=f"'{key}': "):
    huggingface_config.config_from_dict({key: value})


def test_what_is_off_and_known_is_honoured():
  for key in ('scale_attn_weights', 'tie_word_embeddings'):
    assert getattr(huggingface_config.config_from_dict({key: False}), key) is False
  assert huggingface_config.config_from_dict({'n_inner': None}).n_inner is None


def test_keys_that_are_off_are_not_written_again(tmp_path):
  folder = copied(tmp_path / 'x')
  edit(folder / 'config.json', xla_device=None, auto_map={}, rope_scaling=None)
  edit(folder / 'generation_config.json', cache_implementation=None, watermarking_config=None)
  same(folder, GOLDEN / 'huggingface' / 'plain')
  main.main(['convert', str(folder), str(tmp_path / 'out'), '--to', 'hf'])
  written = json.loads((tmp_path / 'out' / 'config.json').read_text())
  assert not {'auto_map', 'rope_scaling'} & written.keys()


# --- prefixes and other heads -----------------------------------------------------------------------


@pytest.mark.parametrize(
  'prefix',
  [
    'module.',
    'model.',
    '_orig_mod.',
    'module._orig_mod.',
    'model.module.transformer.',
    'net.gpt2.',
    '_orig_mod.model.transformer.',
    '',
  ],
)
def test_prefixes(tmp_path, prefix):
  folder = copied(tmp_path / 'x')
  rewrite(
    folder,
    lambda state: {
      prefix + name.removeprefix('transformer.'): tensor for name, tensor in state.items()
    },
  )
  same(folder, GOLDEN / 'huggingface' / 'plain')


def test_wrapped_blocks_and_masks(tmp_path):
  folder = copied(tmp_path / 'x')
  rewrite(
    folder,
    lambda state: (
      {
        'module.' + name.replace('.h.1.', '.h.1._checkpoint_wrapped_module.'): tensor
        for name, tensor in state.items()
      }
      | {
        'module.transformer.h.0.attn.bias': np.ones((1, 1, 4, 4), np.float32),
        'module.transformer.h.1._checkpoint_wrapped_module.attn.masked_bias': np.float32([-1e4]),
      }
    ),
  )
  same(folder, GOLDEN / 'huggingface' / 'plain')


def test_an_untied_head_of_an_old_name(tmp_path):
  folder = copied(tmp_path / 'x', 'untied')
  rewrite(
    folder,
    lambda state: {
      name.replace('lm_head.', 'lm_head.decoder.'): tensor for name, tensor in state.items()
    },
  )
  same(folder, GOLDEN / 'huggingface' / 'untied')


def test_two_models_in_a_file(tmp_path):
  folder = copied(tmp_path / 'x')
  rewrite(folder, lambda state: state | {f'ref_model.{k}': v for k, v in state.items()})
  with pytest.raises(UserError, match=r'than one model \(ref_model\.transformer\.wte\.weight and'):
    pretrained.open_source(folder, Opening(ignore_extra=True))


EXTRA = {
  'v_head.summary.weight': np.ones((1, 15), np.float32),
  'v_head.summary.bias': np.ones(1, np.float32),
}


@pytest.mark.parametrize(
  'extra',
  [
    EXTRA,
    {'qa_outputs.weight': np.ones((2, 15), np.float32)},
    {'step': np.ones(1, np.int64)},
    {'optimizer.transformer.ln_f.weight': np.ones(15, np.float32)},
    {'score.weight': np.ones((2, 15), np.float32), 'score.bias': np.ones(2, np.float32)},
    {'transformer.h.0.attn.adapter.down.weight': np.ones((15, 2), np.float32)},
  ],
)
def test_other_heads(tmp_path, capfd, extra):
  folder = copied(tmp_path / 'x')
  rewrite(folder, lambda state: state | extra)
  with pytest.raises(UserError) as error:
    pretrained.open_source(folder)
  assert '--ignore-extra (in Python ignore_extra=True, in a config' in str(error.value)
  same(folder, GOLDEN / 'huggingface' / 'plain', ignore_extra=True)
  said = capfd.readouterr().err
  assert said.count('left out') == 1
  for name in extra:
    assert name.removeprefix('transformer.') in said and name.split('.')[-1] in str(error.value)


@pytest.mark.parametrize(
  'name',
  [
    'transformer.h.0.attn.q_norm.weight',
    'transformer.h.2.ln_1.weight',
    'transformer.ln_f.scale',
    'transformer.wte.scales',
    'lm_head.bias',
  ],
)
def test_what_belongs_to_the_language_model_is_never_left_out(tmp_path, name):
  folder = copied(tmp_path / 'x')
  rewrite(folder, lambda state: state | {name: np.ones(15, np.float32)})
  for ignore in (False, True):
    with pytest.raises(UserError, match=f'{name.removeprefix("transformer.")}.* model itself'):
      pretrained.open_source(folder, Opening(ignore_extra=ignore))


def test_what_is_left_out_is_said_in_groups():
  names = [f'h.{i}.adapter.{kind}' for i in range(12) for kind in ('up', 'down')]
  assert foreign._grouped([*names, '[v_head.bias]']) == (
    'h.0.adapter.up (and 11 more like it), h.0.adapter.down (and 11 more like it), v_head.bias'
  )


def test_a_nanogpt_with_more_in_it(tmp_path):
  value = torch_files.read(GOLDEN / 'foreign_nanogpt.pt')
  extra = Tensor((3,), 'float32', lambda: np.ones(3, np.float32))
  value['model'] = {f'module._orig_mod.{k}': v for k, v in value['model'].items()}
  value['model_args'] |= {'flash': None, 'rotary': False}
  torch_writing.write(tmp_path / 'a.pt', value)
  same(tmp_path / 'a.pt', GOLDEN / 'foreign_nanogpt.pt')
  value['model']['module._orig_mod.value.weight'] = extra
  torch_writing.write(tmp_path / 'b.pt', value)
  with pytest.raises(UserError, match=r'value\.weight.*--ignore-extra'):
    nanogpt.open_source(tmp_path / 'b.pt')
  same(tmp_path / 'b.pt', GOLDEN / 'foreign_nanogpt.pt', ignore_extra=True)


def test_float64(tmp_path, capfd):
  folder = copied(tmp_path / 'x')
  rewrite(folder, lambda state: {name: x.astype(np.float64) for name, x in state.items()})
  same(folder, GOLDEN / 'huggingface' / 'plain')
  assert capfd.readouterr().err == ''  # nothing was lost
  rewrite(folder, lambda state: {name: x + 1e-12 for name, x in state.items()})
  source = pretrained.open_source(folder)
  assert source.dtype == 'float32' and source.tensor('wte.weight').dtype == np.float32
  source.tensor('wpe.weight')
  assert capfd.readouterr().err.count('they are rounded to float32') == 1
  rewrite(folder, lambda state: {name: x * 1e40 for name, x in state.items()})
  with pytest.raises(UserError, match='NaN or infinite in float32'):
    pretrained.open_source(folder).tensor('wte.weight')


# --- adapters ---------------------------------------------------------------------------------------


def test_a_base_that_is_gone(tmp_path):
  folder = copied(tmp_path / 'a', 'lora')
  edit(folder / 'adapter_config.json', base_model_name_or_path='/nowhere/it/was')
  with pytest.raises(UserError, match=r'adapter_config\.json names .*/nowhere/it/was.* --base '):
    pretrained.open_source(folder)
  same(folder, GOLDEN / 'huggingface' / 'lora', base='tests/golden/huggingface/plain')
  edit(folder / 'adapter_config.json', base_model_name_or_path=None)
  with pytest.raises(UserError, match='name it with --base'):
    pretrained.open_source(folder)
  same(folder, GOLDEN / 'huggingface' / 'lora', base='tests/golden/huggingface/plain')
  with pytest.raises(UserError, match='^/still/nowhere is neither a file'):
    pretrained.open_source(folder, Opening(base='/still/nowhere'))
  main.main(
    [
      'convert',
      str(folder),
      str(tmp_path / 'out'),
      '--to',
      'hf',
      '--base',
      'tests/golden/huggingface/plain',
    ]
  )
  model = gpt2_jax.from_pretrained(folder, base='tests/golden/huggingface/plain')
  gpt2_jax.save_pretrained(model, tmp_path / 'again')
  same(tmp_path / 'out', tmp_path / 'again')


BAD = [
  None,
  True,
  -1,
  0,
  2**70,
  1e30,
  float('nan'),
  '',
  '(',
  'x' * 3000,
  [],
  [1],
  ['('],
  {},
  {'x': 1},
  {'(': 2},
  {'c_attn': 0},
  {'c_attn': 10**400},
  [[]],
  'all-linear',
]


@pytest.mark.parametrize(
  'key',
  [
    *peft_config.USED,
    'use_dora',
    'bias',
    'trainable_token_indices',
    'lora_bias',
    'layer_replication',
    'something_new',
  ],
)
def test_adapter_configs_that_are_broken(tmp_path, key):
  """Whatever stands there: a model, or a message."""
  folder = copied(tmp_path / 'a', 'lora')
  content = json.loads((folder / 'adapter_config.json').read_text())
  for value in BAD:
    (folder / 'adapter_config.json').write_text(json.dumps(content | {key: value}))
    try:
      source = pretrained.open_source(folder)
      for name in tensors.adapter_shapes(source.config):
        source.read(name)
    except UserError as e:
      assert len(str(e)) < 1000


@pytest.mark.parametrize('init', ['pissa', 'pissa_niter_4', 'olora', 'loftq', 'corda', 'lora_ga'])
def test_adapters_that_were_taken_from_the_base(tmp_path, init):
  folder = copied(tmp_path / 'a', 'lora')
  edit(folder / 'adapter_config.json', init_lora_weights=init)
  with pytest.raises(UserError, match=f"'init_lora_weights': '{init}'"):
    pretrained.open_source(folder)


def test_the_revision_of_a_base(tmp_path, monkeypatch):
  folder, asked = copied(tmp_path / 'a', 'lora'), []
  edit(folder / 'adapter_config.json', base_model_name_or_path='someone/name', revision='v2')
  monkeypatch.setattr(
    pretrained.hub, 'fetch', lambda name: (asked.append(name), GOLDEN / 'huggingface' / 'plain')[1]
  )
  pretrained.open_source(folder)
  assert asked == ['someone/name@v2']


# --- every door -------------------------------------------------------------------------------------


def test_the_doors_of_training(tmp_path):
  """init_from with init_base and init_ignore_extra."""
  text = tmp_path / 'text.txt'
  text.write_text('a text\n' * 200)
  config = finetune.get_config()
  config.data.update(corpus=f'text:{text}', tokenizer='byte', directory=str(tmp_path / 'data'))
  config.init_from = str(copied(tmp_path / 'a', 'lora'))
  edit(tmp_path / 'a' / 'adapter_config.json', base_model_name_or_path='gone')
  with pytest.raises(UserError, match='--base'):
    run_plan.make_model(config)
  config.init_base = str(GOLDEN / 'huggingface' / 'plain')
  assert run_plan.make_model(config)[2].n_embd == 15
  config.init_from, config.init_base = str(copied(tmp_path / 'x')), None
  rewrite(tmp_path / 'x', lambda state: state | EXTRA)
  with pytest.raises(UserError, match='v_head'):
    run_plan.make_model(config)
  config.init_ignore_extra = True
  assert run_plan.make_model(config)[2].n_embd == 15


@pytest.mark.parametrize('verb', ['sample', 'serve', 'evaluate', 'bias', 'convert'])
def test_the_doors_of_the_command_line(monkeypatch, verb):
  """Each verb hands --base and --ignore-extra on to what opens checkpoints."""

  class Opened(Exception):
    pass

  def opens(source, opening):
    raise Opened(source, opening)

  monkeypatch.setattr(pretrained, 'open_source', opens)
  arguments = {
    'convert': ['X', 'Y', '--to', 'hf'],
    'evaluate': ['--checkpoint', 'X', '--tasks', 'lambada', '--data', str(ROOT / 'README.md')],
    'sample': ['--checkpoint', 'X', '--prompt', 'a'],
  }.get(verb, ['--checkpoint', 'X'])
  monkeypatch.setattr('gpt2_jax.cli.evaluate.Evaluate.open', lambda self, wanted: [])
  with pytest.raises(Opened) as found:
    main.main([verb, *arguments, '--base', 'B', '--ignore-extra'])
  source, opening = found.value.args
  assert (source, opening.base, opening.ignore_extra, opening.step) == ('X', 'B', True, None)

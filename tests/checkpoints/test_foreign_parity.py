"""Files of transformers, PEFT and torch in the forms that people have: the numbers are theirs."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.arrays import assert_close

import gpt2_jax
from gpt2_jax.checkpoints import pretrained
from gpt2_jax.core.errors import UserError

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')
peft = pytest.importorskip('peft')

pytestmark = pytest.mark.filterwarnings(
  'ignore:`is_gradient_checkpointing`:FutureWarning',
  'ignore:.*tie_word_embeddings=True.*',
  'ignore:`rope_scaling` is deprecated',
  'ignore:Setting `save_embedding_layers` to `True`',
  'ignore:fan_in_fan_out is set to False',
  'ignore:.*ensure_weight_tying.*',
)
IDS = np.random.default_rng(0).integers(0, 61, (2, 9))


def base_model(folder, kind='GPT2LMHeadModel', **fields):
  """A random model of transformers, saved in a folder unless it is there."""
  sizes = dict(
    vocab_size=61,
    n_positions=16,
    n_embd=24,
    n_layer=3,
    n_head=2,
    resid_pdrop=0.0,
    embd_pdrop=0.0,
    attn_pdrop=0.0,
    initializer_range=0.3,
    bos_token_id=0,
    eos_token_id=0,
  )
  torch.manual_seed(0)
  model = getattr(transformers, kind)(transformers.GPT2Config(**sizes | fields)).eval()
  if not folder.exists():
    model.save_pretrained(folder)
  return model


def logits(model) -> np.ndarray:
  with jax.default_matmul_precision('highest'):
    return np.asarray(model(jnp.asarray(IDS)))


def theirs(model) -> np.ndarray:
  with torch.no_grad():
    return model(torch.tensor(IDS)).logits.float().numpy()


# --- PEFT -------------------------------------------------------------------------------------------


FORMS = {
  'suffixes': dict(target_modules=['c_attn', 'mlp.c_proj']),
  'full names': dict(target_modules=['transformer.h.0.attn.c_attn', 'transformer.h.2.mlp.c_fc']),
  'ends of names': dict(target_modules=['h.1.attn.c_proj', 'c_fc', 'nothing_of_gpt2']),
  'regex': dict(target_modules=r'transformer\.h\.[02]\.(attn|mlp)\.c_proj'),
  'all-linear': dict(target_modules='all-linear'),
  'layers': dict(target_modules=['c_attn'], layers_to_transform=[0, 2]),
  'one layer': dict(target_modules=['c_attn'], layers_to_transform=1, layers_pattern='h'),
  'excluded': dict(target_modules=['c_attn', 'c_proj'], exclude_modules=r'.*\.h\.1\.attn\.c_proj'),
  'ranks': dict(target_modules=['c_attn', 'c_fc'], rank_pattern={'h.1.attn.c_attn': 5, 'c_fc': 1}),
  'alphas': dict(target_modules=['c_attn'], alpha_pattern={r'h\.[12].*': 3.7}),
  'rslora': dict(target_modules=['c_attn', 'c_fc'], use_rslora=True, rank_pattern={'c_fc': 4}),
  'head': dict(target_modules=['c_attn'], modules_to_save=['lm_head']),
  'embedding': dict(target_modules=['c_attn'], modules_to_save=['wte']),
  'both': dict(target_modules=['c_attn'], modules_to_save=['wte', 'lm_head']),
  'tied': dict(target_modules=['c_attn'], modules_to_save=['wte'], ensure_weight_tying=True),
  'tied head': dict(target_modules=['c_attn'], modules_to_save=['lm_head'], ensure_weight_tying=True),
  'norms': dict(target_modules=['c_fc'], modules_to_save=['ln_f', 'ln_1', 'wpe']),
  'a block': dict(target_modules=['c_fc', 'c_attn'], modules_to_save=['h.1']),
}


def adapters(folder, base, seed=1, **config):
  """Random adapters on a model, saved by PEFT; returns its model."""
  base.name_or_path = str(folder.parent / 'base')
  config = dict(r=2, lora_alpha=3, task_type='CAUSAL_LM', fan_in_fan_out=True) | config
  made = peft.get_peft_model(base, peft.LoraConfig(**config)).eval()
  torch.manual_seed(seed)
  with torch.no_grad():
    for parameter in made.parameters():
      if parameter.requires_grad:
        parameter.add_(torch.randn_like(parameter) * 0.2)
  made.save_pretrained(folder)
  keys = json.loads((folder / 'adapter_config.json').read_text())
  if isinstance(config.get('target_modules'), str):  # PEFT writes what it found instead
    keys['target_modules'] = config['target_modules']
  (folder / 'adapter_config.json').write_text(json.dumps(keys))
  return made


@pytest.mark.parametrize('form', FORMS)
def test_adapters_of_every_form(tmp_path, form):
  made = adapters(tmp_path / 'a', base_model(tmp_path / 'base'), **FORMS[form])
  again = peft.PeftModel.from_pretrained(base_model(tmp_path / 'base'), tmp_path / 'a').eval()
  want = theirs(again)
  assert_close(theirs(made), want, 1e-6)
  model = gpt2_jax.from_pretrained(tmp_path / 'a')
  assert_close(logits(model), want)
  assert_close(logits(gpt2_jax.merge_adapters(model)), want)
  gpt2_jax.save_pretrained(model, tmp_path / 'b', to='peft')
  assert_close(logits(gpt2_jax.from_pretrained(tmp_path / 'b')), want)
  again = peft.PeftModel.from_pretrained(base_model(tmp_path / 'base'), tmp_path / 'b').eval()
  assert_close(theirs(again), want)


def test_adapters_of_a_classifier_and_of_a_bare_model(tmp_path):
  labelled = dict(kind='GPT2ForSequenceClassification', num_labels=3, pad_token_id=0)
  base = base_model(tmp_path / 'base', **labelled)
  made = adapters(
    tmp_path / 'a', base, task_type='SEQ_CLS', target_modules='all-linear', layers_to_transform=None
  )
  with torch.no_grad():
    want = made(torch.tensor(IDS)[:1]).logits.numpy()
  model = gpt2_jax.from_pretrained(tmp_path / 'a')
  assert model.config.head == 'sequence_classification' and model.config.num_labels == 3
  assert_close(model(jnp.asarray(IDS[:1]), lengths_B=jnp.array([IDS.shape[1]])), want)

  (tmp_path / 'bare').mkdir()
  bare = base_model(tmp_path / 'bare' / 'base', kind='GPT2Model')
  made = adapters(
    tmp_path / 'bare' / 'a', bare, task_type='FEATURE_EXTRACTION', target_modules=r'h\.1\..*c_fc'
  )
  with torch.no_grad():
    want = made(torch.tensor(IDS)).last_hidden_state.numpy()
  model = gpt2_jax.from_pretrained(tmp_path / 'bare' / 'a')
  assert_close(model.model.transformer(jnp.asarray(IDS)).x_BTD, want)


def test_adapters_with_more_tokens(tmp_path):
  """A vocabulary that grew: PEFT saves both embeddings, still tied."""
  base = base_model(tmp_path / 'base')
  base.resize_token_embeddings(64)
  made = adapters(tmp_path / 'a', base, target_modules=['c_attn'], layers_to_transform=[1])
  model = gpt2_jax.from_pretrained(tmp_path / 'a')
  assert model.config.vocab_size == 64 and model.config.tie_word_embeddings
  assert_close(logits(model), theirs(made))
  gpt2_jax.save_pretrained(model, tmp_path / 'b', to='peft')
  assert_close(logits(gpt2_jax.from_pretrained(tmp_path / 'b')), theirs(made))


def test_adapters_in_a_bin(tmp_path):
  made = adapters(tmp_path / 'a', base_model(tmp_path / 'base'), target_modules=['c_attn'])
  tensors = peft.get_peft_model_state_dict(made)
  (tmp_path / 'a' / 'adapter_model.safetensors').unlink()
  torch.save(tensors, tmp_path / 'a' / 'adapter_model.bin')
  assert_close(logits(gpt2_jax.from_pretrained(tmp_path / 'a')), theirs(made))


@pytest.mark.parametrize(
  'config,name',
  [
    (dict(use_dora=True), 'use_dora'),
    (dict(target_modules=['wte']), "'wte' is none of"),
    (dict(init_lora_weights='pissa'), "'init_lora_weights': 'pissa'"),
    (dict(trainable_token_indices=[1, 2]), 'trainable_token_indices'),
    (dict(bias='lora_only'), "'bias': 'lora_only'"),
  ],
)
def test_adapters_whose_numbers_would_be_others(tmp_path, config, name):
  """What PEFT makes of these keys we don't: each is named."""
  adapters(tmp_path / 'a', base_model(tmp_path / 'base'), **dict(target_modules=['c_attn']) | config)
  with pytest.raises(UserError, match=name):
    pretrained.open_source(tmp_path / 'a')


# --- other heads and prefixes -----------------------------------------------------------------------


def value_head(state):
  """As TRL's AutoModelForCausalLMWithValueHead saves it."""
  return state | {'v_head.summary.weight': torch.ones(1, 24), 'v_head.summary.bias': torch.ones(1)}


@pytest.mark.parametrize('kind', ['GPT2DoubleHeadsModel', 'GPT2ForQuestionAnswering', 'trl'])
def test_the_language_model_of_a_file_with_other_heads(tmp_path, capfd, kind):
  fields = dict(num_labels=1) if kind == 'GPT2DoubleHeadsModel' else {}
  whole = base_model(tmp_path / 'x', 'GPT2LMHeadModel' if kind == 'trl' else kind, **fields)
  if kind == 'trl':
    (tmp_path / 'x' / 'model.safetensors').unlink()
    torch.save(value_head(whole.state_dict()), tmp_path / 'x' / 'pytorch_model.bin')
  head = {
    'trl': 'v_head.summary',
    'GPT2DoubleHeadsModel': 'multiple_choice_head.summary',
    'GPT2ForQuestionAnswering': 'qa_outputs',
  }[kind]
  with pytest.raises(UserError, match=rf'{head}\.(weight|bias).* --ignore-extra'):
    gpt2_jax.from_pretrained(tmp_path / 'x')
  capfd.readouterr()
  model = gpt2_jax.from_pretrained(tmp_path / 'x', ignore_extra=True)
  gpt2_jax.from_pretrained(tmp_path / 'x', ignore_extra=True)
  said = capfd.readouterr().err
  assert said.count('left out') == 1
  assert f'{head}.weight' in said and f'{head}.bias' in said
  plain = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / 'x').eval()
  assert_close(logits(model), theirs(plain))


@pytest.mark.parametrize(
  'wrap',
  [
    lambda m: torch.nn.DataParallel(m),
    lambda m: torch.compile(m, backend='eager'),
    lambda m: torch.compile(torch.nn.DataParallel(m), backend='eager'),
    lambda m: torch.nn.ModuleDict({'model': m}),
    lambda m: torch.nn.ModuleDict({'net': torch.nn.ModuleDict({'gpt2': m})}),
    'block',
    'bare',
  ],
)
def test_prefixes_of_wrapped_models(tmp_path, wrap):
  model = base_model(tmp_path / 'x')
  want = theirs(model)
  (tmp_path / 'x' / 'model.safetensors').unlink()
  if wrap == 'block':
    model.transformer.h[1] = torch.compile(model.transformer.h[1], backend='eager')
  wrapped = model.transformer if wrap == 'bare' else model if wrap == 'block' else wrap(model)
  torch.save(wrapped.state_dict(), tmp_path / 'x' / 'pytorch_model.bin')
  assert_close(logits(gpt2_jax.from_pretrained(tmp_path / 'x')), want)


def test_adapters_within_a_whole_model(tmp_path):
  """A state dict of a model that PEFT has wrapped: without the adapters it is the model before."""
  base = base_model(tmp_path / 'x')
  want = theirs(base)
  made = peft.get_peft_model(
    base, peft.LoraConfig(r=2, target_modules=['c_attn'], fan_in_fan_out=True)
  )
  (tmp_path / 'x' / 'model.safetensors').unlink()
  torch.save(made.state_dict(), tmp_path / 'x' / 'pytorch_model.bin')
  with pytest.raises(UserError, match='lora_A'):
    gpt2_jax.from_pretrained(tmp_path / 'x')
  assert_close(logits(gpt2_jax.from_pretrained(tmp_path / 'x', ignore_extra=True)), want)


# --- config.json ------------------------------------------------------------------------------------


def test_a_config_of_this_transformers(tmp_path):
  """What it writes is read, and keys that say that something is off mean the same to both."""
  theirs_ = base_model(tmp_path / 'x')
  want = logits(gpt2_jax.from_pretrained(tmp_path / 'x'))
  keys = json.loads((tmp_path / 'x' / 'config.json').read_text())
  off = {
    'xla_device': None,
    'tie_encoder_decoder': False,
    'quantization_config': None,
    'rope_scaling': None,
    'rope_parameters': None,
    'auto_map': {},
    'layer_types': None,
    'sliding_window': None,
    'attn_implementation': 'sdpa',
  }
  (tmp_path / 'x' / 'config.json').write_text(json.dumps(keys | off))
  again = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / 'x').eval()
  assert_close(theirs(again), theirs(theirs_))
  np.testing.assert_array_equal(logits(gpt2_jax.from_pretrained(tmp_path / 'x')), want)
  # and one whose false is not off
  (tmp_path / 'x' / 'config.json').write_text(json.dumps(keys | {'is_causal': False}))
  again = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / 'x').eval()
  assert np.abs(theirs(again) - theirs(theirs_)).max() > 0.01
  with pytest.raises(UserError, match="'is_causal': False"):
    gpt2_jax.from_pretrained(tmp_path / 'x')

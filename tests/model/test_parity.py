"""The same numbers as transformers' GPT-2, on random models of odd shapes (`parity` extra)."""

import dataclasses
import json
import logging

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support.arrays import assert_close
from support.processes import ROOT

torch = pytest.importorskip('torch', reason='parity tests need the extra: pip install -e .[parity]')
transformers = pytest.importorskip('transformers', reason='parity tests need the extra parity')

import gpt2_jax  # noqa: E402
from gpt2_jax.checkpoints.formats import huggingface_config  # noqa: E402
from gpt2_jax.checkpoints.tensors import Source, check_tensors, load_params, shapes, source_of  # noqa: E402
from gpt2_jax.core.errors import UserError  # noqa: E402
from gpt2_jax.decoding.generate import generate_tokens  # noqa: E402
from gpt2_jax.model.activations import ACTIVATIONS  # noqa: E402
from gpt2_jax.model.edits import Listening  # noqa: E402
from gpt2_jax.model.gpt2 import bind  # noqa: E402
from gpt2_jax.tokenizer import bpe  # noqa: E402
from gpt2_jax.training.optimizers.parts import decay_mask  # noqa: E402
from gpt2_jax.training.step import nll  # noqa: E402

GOLDEN = ROOT / 'tests' / 'golden' / 'huggingface'
KNOBS = {
  'plain': {},
  'n_inner': dict(n_inner=52),
  'unscaled': dict(scale_attn_weights=False, initializer_range=0.1),  # 0.2 saturates the softmax
  'inverse layer': dict(scale_attn_by_inverse_layer_idx=True),
  'upcast': dict(reorder_and_upcast_attn=True),
  'mistral': dict(reorder_and_upcast_attn=True, scale_attn_by_inverse_layer_idx=True),
  'untied': dict(tie_word_embeddings=False),
  'epsilon': dict(layer_norm_epsilon=1e-2),
  'one head': dict(n_head=1),
  'five heads': dict(n_head=5, n_embd=45, n_inner=53),
  'vocabulary 97': dict(vocab_size=97, n_inner=1),
  'vocabulary 50257': dict(vocab_size=50257, n_embd=24, bos_token_id=50256, eos_token_id=50256),
}


def pair(seed=0, **fields):
  """(their model, our config, our parameters): a random model with weights that matter.

  Theirs computes in float64 where it can: what differs is our rounding, not the sum of both.
  """
  fields = (
    dict(
      vocab_size=101,
      n_positions=40,
      n_embd=48,
      n_layer=3,
      n_head=3,
      initializer_range=0.2,
      bos_token_id=0,
      eos_token_id=0,
    )
    | fields
  )
  config = transformers.GPT2Config(**fields, attn_implementation='eager')
  torch.manual_seed(seed)
  theirs = transformers.GPT2LMHeadModel(config).eval()
  with torch.no_grad():
    for name, parameter in theirs.named_parameters():  # biases and layer norms matter too
      if name.endswith('bias') or 'ln_' in name:
        parameter.add_(0.1 * torch.randn_like(parameter))
  ours = huggingface_config.config_from_dict(config.to_dict())
  params = params_of(ours, tensors(theirs))
  return theirs if config.reorder_and_upcast_attn else theirs.double(), ours, params


def tensors(model):
  """Their state dict, under the names that all formats share."""
  return {
    name.removeprefix('transformer.'): tensor.detach().numpy()
    for name, tensor in model.state_dict().items()
  }


def params_of(config, state):
  """Our parameters from their state dict."""
  check_tensors(
    config,
    {n: t.shape for n, t in state.items() if n != 'lm_head.weight' or not config.tie_word_embeddings},
    'theirs',
  )
  return load_params(Source(config, state.__getitem__, 'float32', 'theirs'))


def tensors_of(config, params):
  """The other way."""
  source = source_of(config, params, 'ours')
  return {name: source.tensor(name) for name in shapes(config)}


def ids(B=2, T=17, seed=0):
  return np.random.default_rng(seed).integers(0, 97, (B, T))


@pytest.mark.parametrize('knobs', KNOBS)
def test_logits_and_gradients(knobs):
  theirs, config, params = pair(**KNOBS[knobs])
  x = ids()
  out = theirs(torch.tensor(x), labels=torch.tensor(x))
  assert_close(jax.jit(lambda p: bind(config, p)(jnp.asarray(x)))(params), out.logits.detach())

  out.loss.backward()
  loss, gradients = jax.jit(jax.value_and_grad(lambda p: nll(bind(config, p), jnp.asarray(x)).total))(
    params
  )
  assert_close(loss, out.loss.item())
  gradients = tensors_of(config, gradients)
  checked = 0
  for name, parameter in theirs.named_parameters():
    assert_close(gradients[name.removeprefix('transformer.')], parameter.grad)
    checked += 1
  assert checked == len(gradients)


@pytest.mark.parametrize('name', sorted(ACTIVATIONS))
def test_activations(name):
  from transformers.activations import ACT2FN

  x = np.linspace(-8, 8, 1001, dtype=np.float32)
  want = ACT2FN[name](torch.tensor(x)).numpy()
  np.testing.assert_allclose(ACTIVATIONS[name](jnp.asarray(x)), want, rtol=2e-5, atol=2e-6)


def test_hidden_states_and_attentions():
  theirs, config, params = pair()
  x = ids()
  want = theirs(torch.tensor(x), output_hidden_states=True, output_attentions=True)
  listen = Listening(record=('resid_pre', 'pattern'))
  out = jax.jit(lambda p: bind(config, p).transformer(jnp.asarray(x), listen=listen))(params)
  states = jnp.concatenate([out.found['resid_pre'], out.x_BTD[None]])
  assert_close(states, torch.stack(want.hidden_states).detach())
  assert_close(out.found['pattern'], torch.stack(want.attentions).detach())


def both_adamw(theirs, lr, eps):
  """torch's AdamW on a model, and ours."""
  named = dict(theirs.named_parameters())
  decays = lambda n: n.endswith('weight') and 'ln_' not in n
  return torch.optim.AdamW(
    [
      {'params': [p for n, p in named.items() if decays(n)], 'weight_decay': 0.1},
      {'params': [p for n, p in named.items() if not decays(n)], 'weight_decay': 0.0},
    ],
    lr=lr,
    betas=(0.9, 0.95),
    eps=eps,
  ), optax.chain(
    optax.clip_by_global_norm(1.0),
    optax.adamw(lr, b1=0.9, b2=0.95, eps=eps, weight_decay=0.1, mask=decay_mask),
  )


@pytest.mark.parametrize('knobs', ['plain', 'untied', 'five heads'])
def test_one_adamw_step(knobs):
  theirs, config, params = pair(**KNOBS[knobs])
  x = ids()
  # A first step is lr·g / (|g| + eps): it magnifies the rounding of g by 1/eps, and with 1e-8 it is
  # lr·sign(g), of which rounding decides where g is 0. That formula itself: the next test.
  optimizer, tx = both_adamw(theirs, 1e-3, 1e-3)
  theirs(torch.tensor(x), labels=torch.tensor(x)).loss.backward()
  torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
  optimizer.step()

  gradients = jax.jit(jax.grad(lambda p: nll(bind(config, p), jnp.asarray(x)).total))(params)
  updates, _ = tx.update(gradients, tx.init(params), params)
  ours = tensors_of(config, optax.apply_updates(params, updates))
  for name, parameter in theirs.named_parameters():
    assert_close(ours[name.removeprefix('transformer.')], parameter.detach(), 1e-6)


def test_three_adamw_steps_on_equal_gradients():
  theirs, config, params = pair()
  optimizer, tx = both_adamw(theirs, 1e-2, 1e-8)
  state, update = tx.init(params), jax.jit(tx.update)
  rng = np.random.default_rng(0)
  for _ in range(3):
    given = {n: rng.standard_normal(p.shape).astype(np.float32) for n, p in theirs.named_parameters()}
    for n, p in theirs.named_parameters():
      p.grad = torch.tensor(given[n], dtype=p.dtype)
    torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
    optimizer.step()
    gradients = params_of(config, {n.removeprefix('transformer.'): g for n, g in given.items()})
    updates, state = update(gradients, state, params)
    params = optax.apply_updates(params, updates)
  ours = tensors_of(config, params)
  for name, parameter in theirs.named_parameters():
    assert_close(ours[name.removeprefix('transformer.')], parameter.detach(), 1e-6)


def test_greedy_ids_of_ragged_prompts():
  theirs, config, params = pair(seed=1, initializer_range=0.4)
  prompts = [[5, 6, 7], list(range(20, 31)), [9]]
  ours = generate_tokens(config, params, prompts, do_sample=False, max_new_tokens=20)
  for prompt, result in zip(prompts, ours):
    want = theirs.generate(
      torch.tensor([prompt]), do_sample=False, max_new_tokens=20, eos_token_id=None, pad_token_id=0
    )
    assert result.tokens == want[0, len(prompt) :].tolist()


def test_tensors_round_trip_with_a_padded_vocabulary():
  theirs, config, params = pair(tie_word_embeddings=False)
  config = dataclasses.replace(config, vocab_multiple=64)
  want = tensors(theirs)
  params = params_of(config, want)
  assert params['wte']['weight'].shape == (128, 48)
  back = tensors_of(config, params)
  assert back.keys() == want.keys()
  for name, tensor in want.items():
    np.testing.assert_array_equal(back[name], tensor)


def test_what_cannot_be_honoured_is_refused():
  theirs, config, _ = pair()
  with pytest.raises(UserError, match='add_cross_attention'):
    huggingface_config.config_from_dict({'n_embd': 48, 'add_cross_attention': True})
  with pytest.raises(UserError, match='rope_theta'):
    huggingface_config.config_from_dict({'rope_theta': 1e4})
  state = tensors(theirs)
  with pytest.raises(UserError, match='extra.weight'):
    params_of(config, state | {'extra.weight': np.zeros(3)})
  del state['h.1.mlp.c_fc.bias']
  with pytest.raises(UserError, match=r'h\.1\.mlp\.c_fc\.bias'):
    params_of(config, state)


# --- what we write, transformers and PEFT read ------------------------------------------------------


@pytest.fixture
def silent(monkeypatch):
  """Whatever transformers logs as a warning, or worse, is an error."""

  def refuse(record):
    raise AssertionError(f'{record.name}: {record.getMessage()}')

  handler = logging.Handler(logging.WARNING)
  handler.emit = refuse
  logger = logging.getLogger('transformers')
  logger.addHandler(handler)
  yield
  logger.removeHandler(handler)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'float16'])
@pytest.mark.parametrize('knobs', ['plain', 'mistral', 'untied'])
def test_transformers_loads_our_export(tmp_path, silent, knobs, dtype):
  theirs, config, params = pair(vocab_size=257, bos_token_id=256, eos_token_id=256, **KNOBS[knobs])
  model = bind(config, params)
  model = gpt2_jax.Pretrained(model, bpe.load('byte'))
  gpt2_jax.save_pretrained(model, tmp_path / 'out', dtype=dtype, max_shard_size=30_000)
  assert len(list((tmp_path / 'out').glob('model-*.safetensors'))) > 2
  again, info = transformers.AutoModelForCausalLM.from_pretrained(
    tmp_path / 'out', output_loading_info=True, attn_implementation='eager'
  )
  assert not any(info.values()), info
  assert str(again.dtype) == f'torch.{dtype}'
  x = ids()
  with torch.no_grad():
    if dtype == 'float32' and knobs != 'mistral':
      again = again.double()
    have = again(torch.tensor(x)).logits.float()
  assert_close(
    have,
    theirs(torch.tensor(x)).logits.detach(),
    {'float32': 1e-5, 'float16': 2e-2, 'bfloat16': 0.1}[dtype],
  )
  words = transformers.AutoTokenizer.from_pretrained(tmp_path / 'out')
  assert words('Hello <x>').input_ids == model.tokenizer.encode('Hello <x>')
  assert words.model_max_length == config.n_positions
  want = transformers.GPT2Config().to_dict().keys()
  have = json.loads((tmp_path / 'out' / 'config.json').read_text()).keys()
  junk = {
    'transformers_version',
    '_name_or_path',
    'output_hidden_states',
    'return_dict',
    'output_attentions',
    'chunk_size_feed_forward',
    'is_encoder_decoder',
    'problem_type',
    'id2label',
    'label2id',
    'num_labels',
  }  # of every model, with defaults
  assert want - junk <= have, want - junk - have
  assert have <= want, have - want  # none of ours


@pytest.mark.parametrize('fields', [{}, dict(tie_word_embeddings=False)])
def test_what_transformers_saves_comes_back_bit_for_bit(tmp_path, fields):
  theirs = pair(**fields)[0]
  theirs.float().save_pretrained(tmp_path / 'in', max_shard_size='20KB')
  assert (tmp_path / 'in' / 'model.safetensors.index.json').exists()
  gpt2_jax.save_pretrained(gpt2_jax.from_pretrained(tmp_path / 'in'), tmp_path / 'out')
  again = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / 'out').state_dict()
  for name, tensor in theirs.state_dict().items():
    assert torch.equal(again[name], tensor), name


@pytest.mark.parametrize('name', ['sequence', 'token'])
def test_transformers_loads_our_classifiers(tmp_path, silent, name):
  model = gpt2_jax.from_pretrained(GOLDEN / name)
  gpt2_jax.save_pretrained(model, tmp_path / 'out')
  kind = (
    transformers.AutoModelForSequenceClassification
    if name == 'sequence'
    else transformers.AutoModelForTokenClassification
  )
  theirs = kind.from_pretrained(tmp_path / 'out').double().eval()
  assert theirs.config.id2label == {0: 'no', 1: 'perhaps', 2: 'yes'}
  want = np.load(GOLDEN / name / 'expected.npz')
  x = torch.tensor(want['tokens']).long()
  assert_close(theirs(x, attention_mask=torch.ones_like(x)).logits.detach(), want['logits'])


@pytest.mark.filterwarnings('ignore:`is_gradient_checkpointing`:FutureWarning')  # by peft
@pytest.mark.parametrize('name', ['lora', 'lora_sequence'])
def test_peft_loads_our_adapters(tmp_path, monkeypatch, name):
  import peft

  monkeypatch.chdir(ROOT)  # the adapters name their base by a path from there
  gpt2_jax.save_pretrained(gpt2_jax.from_pretrained(GOLDEN / name), tmp_path / 'out', to='peft')
  base = (
    transformers.GPT2LMHeadModel if name == 'lora' else transformers.GPT2ForSequenceClassification
  )
  theirs = base.from_pretrained(GOLDEN / 'plain', pad_token_id=96)
  theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / 'out').double().eval()
  want = np.load(GOLDEN / name / 'expected.npz')
  assert_close(theirs(torch.tensor(want['tokens']).long()).logits.detach(), want['logits'])

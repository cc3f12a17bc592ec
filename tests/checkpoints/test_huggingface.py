"""Hugging Face's folders: golden ones of transformers and PEFT, our own, and hostile ones.

tests/golden/make_huggingface.py made the golden files, so that nothing here needs torch.
"""

import dataclasses
import json
import os
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st
from support.arrays import assert_close, mesh_of
from support.processes import ROOT

import gpt2_jax
from gpt2_jax.checkpoints import pretrained, tensors
from gpt2_jax.checkpoints.formats import huggingface, peft
from gpt2_jax.core.errors import UserError
from gpt2_jax.model.config import GPTConfig, LoRA
from gpt2_jax.model.edits import Listening
from gpt2_jax.model.gpt2 import bind
from gpt2_jax.model.pretrained_model import params_of
from gpt2_jax.training.optimizers.parts import decay_mask
from gpt2_jax.training.step import nll

GOLDEN = ROOT / 'tests' / 'golden' / 'huggingface'
LM = ('plain', 'mistral', 'untied')


@pytest.fixture(autouse=True)
def at_root(monkeypatch):
  monkeypatch.chdir(ROOT)  # the golden adapters name their base by a path from there


def golden(name):
  """(source, parameters, what transformers computed)."""
  source = pretrained.open_source(GOLDEN / name)
  return source, tensors.load_params(source), np.load(GOLDEN / name / 'expected.npz')


def tensors_of(config, params):
  source = tensors.source_of(config, params, 'here')
  return {name: source.tensor(name) for name in tensors.shapes(config)}


# --- the same numbers as transformers and PEFT ------------------------------------------------------


@pytest.mark.parametrize('name', LM)
def test_logits_gradients_and_a_step(name):
  source, params, want = golden(name)
  x = jnp.asarray(want['tokens'], jnp.int32)
  tx = optax.chain(
    optax.clip_by_global_norm(1.0),
    optax.adamw(1e-2, b1=0.9, b2=0.95, eps=1e-3, weight_decay=0.1, mask=decay_mask),
  )

  @jax.jit
  def compute(params):
    listen = Listening(record=('resid_pre', 'pattern'))
    out = bind(source.config, params).transformer(x, listen=listen)
    gradients = jax.grad(lambda p: nll(bind(source.config, p), x).total)(params)
    updates, _ = tx.update(gradients, tx.init(params), params)
    return (
      bind(source.config, params)(x),
      jnp.concatenate([out.found['resid_pre'], out.x_BTD[None]]),
      out.found['pattern'],
      gradients,
      optax.apply_updates(params, updates),
    )

  logits, states, attentions, gradients, stepped = compute(params)
  assert_close(logits, want['logits'])
  assert_close(states, want['hidden_states'])
  assert_close(attentions, want['attentions'])
  errors = {}  # of gradients, each by its largest value
  for kind, tree in (('grad', gradients), ('step', stepped)):
    have = tensors_of(source.config, tree)
    names = [n.removeprefix(f'{kind}/') for n in want if n.startswith(f'{kind}/')]
    assert {n.removeprefix('transformer.') for n in names} == have.keys()
    for n in names:
      found, right = have[n.removeprefix('transformer.')], want[f'{kind}/{n}']
      if kind == 'grad':
        errors[n] = np.abs(found - right).max()
        assert_close(found, right)
      else:  # AdamW's first step magnifies an error of its gradient up to lr / eps = 10 times
        assert_close(found, right, 1e-6 + 10 * errors[n] / np.abs(right).max())


def test_an_old_bin_is_the_same_model():
  have, want = (pretrained.open_source(GOLDEN / name) for name in ('old_bin', 'plain'))
  drop = lambda c: dataclasses.replace(c, layer_norm_epsilon=0)
  assert drop(have.config) == drop(want.config)
  for name in tensors.shapes(want.config):
    np.testing.assert_array_equal(have.tensor(name), want.tensor(name))


@pytest.mark.parametrize('name', ['sequence', 'token'])
def test_classification_heads(name):
  model, want = gpt2_jax.from_pretrained(GOLDEN / name), np.load(GOLDEN / name / 'expected.npz')
  lengths = want['lengths'] if 'lengths' in want else [11, 11]
  logits = jax.jit(lambda p, x, n: bind(model.config, p)(x, lengths_B=n))(
    params_of(model), jnp.asarray(want['tokens'], jnp.int32), jnp.asarray(lengths)
  )
  assert_close(logits, want['logits'])
  rows = [row[:n].tolist() for row, n in zip(want['tokens'], lengths)]
  for have, logits in zip(gpt2_jax.classify(model, rows), want['logits']):
    best = np.array(['no', 'perhaps', 'yes'])[logits.argmax(-1)]
    assert have.label == best.tolist()
  with pytest.raises(UserError, match='has a head for'):
    gpt2_jax.generate(model, [[1, 2]])


@pytest.mark.parametrize('name', ['lora', 'lora_sequence'])
def test_adapters_are_pefts_merged_and_unmerged(name):
  model, want = gpt2_jax.from_pretrained(GOLDEN / name), np.load(GOLDEN / name / 'expected.npz')
  assert model.config.lora is not None and model.config.lora.r == 3
  merged = gpt2_jax.merge_adapters(model)
  assert merged.config.lora is None
  for m in (model, merged):
    assert_close(
      jax.jit(lambda p, x, m=m: bind(m.config, p)(x))(
        params_of(m), jnp.asarray(want['tokens'], jnp.int32)
      ),
      want['logits'],
    )


@pytest.mark.parametrize('name', ['lora', 'lora_sequence'])
def test_adapters_come_back_as_they_were(name, tmp_path):
  gpt2_jax.save_pretrained(gpt2_jax.from_pretrained(GOLDEN / name), tmp_path / 'out', to='peft')
  have, want = (
    safetensors.numpy.load_file(folder / 'adapter_model.safetensors')
    for folder in (tmp_path / 'out', GOLDEN / name)
  )
  assert have.keys() == want.keys()
  for n, tensor in want.items():
    np.testing.assert_array_equal(have[n], tensor)
  keys = [
    json.loads((folder / 'adapter_config.json').read_text())
    for folder in (tmp_path / 'out', GOLDEN / name)
  ]
  for key in (
    'peft_type',
    'task_type',
    'r',
    'lora_alpha',
    'fan_in_fan_out',
    'bias',
    'base_model_name_or_path',
  ):
    assert keys[0][key] == keys[1][key]
  assert set(keys[0]['target_modules']) == set(keys[1]['target_modules'])


def test_features_of_texts_do_not_depend_on_their_company():
  model, want = gpt2_jax.from_pretrained(GOLDEN / 'plain'), np.load(GOLDEN / 'plain' / 'expected.npz')
  rows = [want['tokens'][0].tolist(), [5, 6, 7], want['tokens'][1].tolist()]
  a, short, b = gpt2_jax.features(model, rows)
  for i, have in enumerate((a, b)):
    assert_close(have.hidden_states, want['hidden_states'][:, i])
    assert_close(have.attentions, want['attentions'][:, i])
    np.testing.assert_array_equal(have.last_hidden_state, have.hidden_states[-1])
  assert short.attentions.shape == (2, 3, 3, 3) and short.hidden_states.shape == (3, 3, 15)
  (alone,) = gpt2_jax.features(model, [5, 6, 7], hidden_states=False)
  assert alone.hidden_states is None
  assert_close(alone.attentions, short.attentions)
  with pytest.raises(UserError, match='17 tokens'):
    gpt2_jax.features(model, [1] * 17)


# --- round trips -----------------------------------------------------------------------------------


def random_source(config, dtype, seed=0) -> tensors.Source:
  rng = np.random.default_rng(seed)
  values = {
    name: rng.standard_normal(shape).astype(dtype) for name, shape in tensors.shapes(config).items()
  }
  return tensors.Source(config, values.__getitem__, dtype, 'random')


configs = st.builds(
  lambda heads, width, **fields: GPTConfig(n_embd=heads * width, n_head=heads, **fields),
  heads=st.sampled_from([1, 2, 3, 5]),
  width=st.integers(1, 4),
  n_layer=st.integers(1, 3),
  vocab_size=st.sampled_from([7, 97, 128]),
  n_positions=st.integers(1, 9),
  n_inner=st.sampled_from([None, 1, 13]),
  vocab_multiple=st.sampled_from([1, 8, 128]),
  tie_word_embeddings=st.booleans(),
  reorder_and_upcast_attn=st.booleans(),
  activation_function=st.sampled_from(['gelu_new', 'relu', 'gelu']),
  head=st.sampled_from(['lm', 'lm', 'sequence_classification', 'token_classification']),
  num_labels=st.integers(1, 4),
)


@settings(deadline=None, max_examples=25)
@given(
  config=configs,
  dtype=st.sampled_from(tensors.DTYPES),
  prefix=st.booleans(),
  max_shard_size=st.sampled_from([1, 300, 2000, 10**9]),
  seed=st.integers(0, 2**16),
)
def test_round_trip_is_bit_exact(tmp_path_factory, config, dtype, prefix, max_shard_size, seed):
  folder = tmp_path_factory.mktemp('round')
  source = random_source(config, dtype, seed)
  pretrained.write(source, folder / 'a', 'hf', max_shard_size=max_shard_size)
  if not prefix:  # as GPT2Model and the released files have it
    for path in (folder / 'a').glob('*.safetensors*'):
      if path.suffix == '.json':
        path.write_text(path.read_text().replace('"transformer.', '"'))
      else:
        state = safetensors.numpy.load_file(path)
        safetensors.numpy.save_file(
          {n.removeprefix('transformer.'): t for n, t in state.items()}, path, {'format': 'pt'}
        )
  opened = pretrained.open_source(folder / 'a')
  ours = ('init_scheme', 'vocab_multiple', 'num_labels', 'classifier_dropout')
  for field in dataclasses.fields(GPTConfig):
    if field.name not in ours:
      assert getattr(opened.config, field.name) == getattr(config, field.name), field.name
  assert opened.dtype == dtype
  params = tensors.load_params(dataclasses.replace(opened, config=config), 'float32')
  back = tensors.source_of(config, params, 'ours', dtype=dtype, keys=opened.keys)
  pretrained.write(back, folder / 'b', 'hf')
  again = pretrained.open_source(folder / 'b')
  for name in tensors.shapes(config):
    for have in (opened, back, again):
      tensor = have.tensor(name)
      assert tensor.dtype == np.dtype(dtype)
      assert tensor.tobytes() == source.tensor(name).tobytes(), name
  shutil.rmtree(folder)


def test_an_export_keeps_every_key_and_is_whole(tmp_path):
  shutil.copytree(GOLDEN / 'plain', tmp_path / 'in')
  keys = json.loads((tmp_path / 'in' / 'config.json').read_text())
  keys |= {'task_specific_params': {'text-generation': {'max_length': 50}}, 'summary_type': 'mean'}
  (tmp_path / 'in' / 'config.json').write_text(json.dumps(keys))
  gpt2_jax.save_pretrained(gpt2_jax.from_pretrained(tmp_path / 'in'), tmp_path / 'out')
  have = json.loads((tmp_path / 'out' / 'config.json').read_text())
  assert {k: v for k, v in keys.items() if k != 'transformers_version'}.items() <= (
    have | {'task_specific_params': keys['task_specific_params']}
  ).items()
  assert have['task_specific_params'] == keys['task_specific_params']
  with safetensors.safe_open(tmp_path / 'out' / 'model.safetensors', 'np') as file:
    assert file.metadata() == {'format': 'pt'}
  assert json.loads((tmp_path / 'out' / 'generation_config.json').read_text()) == json.loads(
    (GOLDEN / 'plain' / 'generation_config.json').read_text()
  )
  card = (tmp_path / 'out' / 'README.md').read_text()
  assert card.startswith('---\nlibrary_name: transformers\n') and 'Converted by gpt2_jax' in card
  assert not [p for p in tmp_path.iterdir() if p.name.startswith('.')]


def test_bfloat16_parameters_halve_the_memory_and_stay_bfloat16(tmp_path):
  model = gpt2_jax.from_pretrained(GOLDEN / 'plain', dtype='bfloat16')
  leaves = jax.tree.leaves(params_of(model))
  assert {leaf.dtype for leaf in leaves} == {np.dtype(ml_dtypes.bfloat16)}
  want = np.load(GOLDEN / 'plain' / 'expected.npz')
  (have,) = gpt2_jax.features(model, want['tokens'][0].tolist(), attentions=False)
  assert_close(have.last_hidden_state, want['hidden_states'][-1, 0], 0.1)
  gpt2_jax.save_pretrained(model, tmp_path / 'out', dtype='bfloat16')
  assert pretrained.open_source(tmp_path / 'out').dtype == 'bfloat16'


def test_straight_onto_a_mesh(tmp_path):
  """Each device gets its shard only, and a model on a mesh is written like any other."""
  config = GPTConfig(vocab_size=97, n_positions=8, n_embd=16, n_layer=2, n_head=4, vocab_multiple=8)
  source = random_source(config, 'float32')
  pretrained.write(source, tmp_path / 'in', 'hf')
  with mesh_of(1, 2, 4):
    mesh = jax.sharding.get_mesh()
  model = gpt2_jax.from_pretrained(tmp_path / 'in', mesh=mesh)
  weight = model.model.h.mlp.c_fc.weight[...]
  assert weight.addressable_shards[0].data.shape == (2, 8, 16)
  assert len(weight.sharding.device_set) == 8
  (have,) = gpt2_jax.features(model, [1, 2, 3])
  (want,) = gpt2_jax.features(gpt2_jax.from_pretrained(tmp_path / 'in'), [1, 2, 3])
  assert_close(have.hidden_states, want.hidden_states)
  gpt2_jax.save_pretrained(model, tmp_path / 'out')
  assert (tmp_path / 'out' / 'model.safetensors').read_bytes() == (
    tmp_path / 'in' / 'model.safetensors'
  ).read_bytes()
  with mesh_of(1, 1, 8):
    mesh = jax.sharding.get_mesh()
  with pytest.raises(UserError, match='model.n_head = 4 is not divisible by mesh.tensor = 8'):
    gpt2_jax.from_pretrained(tmp_path / 'in', mesh=mesh)


# --- what can't be used says so, and leaves nothing behind ------------------------------------------


def broken(tmp_path, name='plain'):
  shutil.copytree(GOLDEN / name, tmp_path / 'broken')
  return tmp_path / 'broken'


def edit(path, **changes):
  path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def retensor(path, change):
  state = safetensors.numpy.load_file(path)
  change(state)
  safetensors.numpy.save_file(state, path)


def refused(folder, tmp_path, match):
  """Neither read nor converted."""
  with pytest.raises(UserError, match=match):
    gpt2_jax.from_pretrained(folder)
  with pytest.raises(UserError, match=match):
    pretrained.write(pretrained.open_source(folder), tmp_path / 'out', 'hf')
  assert sorted(p.name for p in tmp_path.iterdir()) == ['broken']


@pytest.mark.parametrize(
  'keys,match',
  [
    ({'rope_theta': 1e4}, "can't honour: {'rope_theta': 10000.0}"),
    ({'add_cross_attention': True}, 'add_cross_attention'),
    ({'quantization_config': {'bits': 4}}, 'quantization_config'),
    ({'model_type': 'llama'}, "model_type is 'llama'"),
    ({'activation_function': 'snake'}, "'snake' must be one of"),
    ({'n_embd': 16}, 'must be a multiple of n_head'),
    ({'n_embd': 18}, r'wte.weight \[97, 15\] instead of \[97, 18\]'),
    ({'n_layer': 3}, 'lacks the tensors: h.2.ln_1.weight'),
    ({'n_layer': 1}, 'has tensors that this GPT-2 does not: h.1.'),
    ({'n_layer': 'two'}, "n_layer = 'two' must be a whole number from 1"),
    ({'tie_word_embeddings': False}, 'lacks the tensors: lm_head.weight'),
  ],
)
def test_a_config_that_does_not_fit(tmp_path, keys, match):
  folder = broken(tmp_path)
  edit(folder / 'config.json', **keys)
  refused(folder, tmp_path, match)


@pytest.mark.parametrize(
  'change,match',
  [
    (lambda s: s.pop('transformer.h.1.mlp.c_fc.bias'), r'lacks the tensors: h\.1\.mlp\.c_fc\.bias'),
    (lambda s: s.update(extra=np.zeros(3, np.float32)), 'tensors that this GPT-2 does not: extra'),
    (
      lambda s: s.update({'transformer.wpe.weight': np.zeros((4, 15), np.float32)}),
      r'wpe.weight \[4, 15\] instead of \[16, 15\]',
    ),
    (
      lambda s: s['transformer.wte.weight'].__setitem__((3, 4), np.nan),
      'the tensor wte.weight has 1 values that are NaN or infinite',
    ),
    (lambda s: s.update({'transformer.ln_f.bias': np.zeros(15, np.int64)}), 'dtype I64'),
    (
      lambda s: s.update({'lm_head.weight': np.zeros((97, 15), np.float32)}),
      'lm_head.weight differs from wte.weight',
    ),
  ],
)
def test_tensors_that_do_not_fit(tmp_path, change, match):
  folder = broken(tmp_path)
  retensor(folder / 'model.safetensors', change)
  refused(folder, tmp_path, match)


@settings(deadline=None, max_examples=20)
@given(share=st.floats(0, 1, exclude_max=True))
def test_a_file_that_was_cut_short(tmp_path_factory, share):
  folder = broken(tmp_path_factory.mktemp('cut'))
  content = (folder / 'model.safetensors').read_bytes()
  (folder / 'model.safetensors').write_bytes(content[: int(share * len(content))])
  refused(folder, folder.parent, "model.safetensors can't be read")
  shutil.rmtree(folder.parent)


@pytest.mark.parametrize('name', ['../model.safetensors', '/etc/passwd', '..', 'sub/x.safetensors'])
def test_an_index_that_points_elsewhere(tmp_path, name):
  folder = broken(tmp_path)
  (folder / 'model.safetensors').rename(folder / 'shard.safetensors')
  (folder / 'model.safetensors.index.json').write_text(
    json.dumps({'weight_map': {'transformer.wte.weight': name}})
  )
  refused(folder, tmp_path, 'names a file outside of its folder')


def test_a_link_that_leaves_the_folder(tmp_path):
  folder = broken(tmp_path)
  target = folder / 'elsewhere'
  target.mkdir()
  (folder / 'model.safetensors').rename(target / 'model.safetensors')
  inner = folder / 'inner'
  inner.mkdir()
  shutil.copy(folder / 'config.json', inner)
  os.symlink(target / 'model.safetensors', inner / 'model.safetensors')
  refused(inner, tmp_path, 'outside of its folder')


def test_an_index_that_lies(tmp_path):
  folder = tmp_path / 'broken'
  source = pretrained.open_source(GOLDEN / 'plain')
  pretrained.write(source, folder, 'hf', max_shard_size=5000)
  index = folder / 'model.safetensors.index.json'
  content = json.loads(index.read_text())
  shards = sorted(set(content['weight_map'].values()))
  assert len(shards) > 1 and shards[0].startswith('model-00001-of-')
  content['weight_map']['transformer.wte.weight'] = shards[-1]
  index.write_text(json.dumps(content))
  refused(folder, tmp_path, 'it lacks transformer.wte.weight, which')
  (folder / shards[-1]).unlink()
  refused(folder, tmp_path, f'{shards[-1]} is missing')


def test_a_place_that_is_taken_stays_as_it_is(tmp_path):
  (tmp_path / 'out').mkdir()
  (tmp_path / 'out' / 'mine').write_text('keep')
  source = pretrained.open_source(GOLDEN / 'plain')
  with pytest.raises(UserError, match='is there already'):
    pretrained.write(source, tmp_path / 'out', 'hf')
  assert (tmp_path / 'out' / 'mine').read_text() == 'keep'
  with pytest.raises(UserError, match='no option of the format'):
    pretrained.write(source, tmp_path / 'new', 'hf', approximate=True)
  with pytest.raises(UserError, match="format 'onnx' is none of flax, gguf, hf, llmc, nanogpt"):
    pretrained.write(source, tmp_path / 'new', 'onnx')


@pytest.mark.parametrize(
  'keys,match',
  [
    ({'use_dora': True}, "can't be honoured: {'use_dora': True}"),
    ({'bias': 'all'}, "'bias': 'all'"),
    ({'target_modules': ['c_attn', 'wte']}, "'wte' is none of"),
    ({'target_modules': ['c_attn']}, 'has tensors that this GPT-2 does not: h.0.mlp.c_proj.lora_A'),
    ({'r': 4}, r'h.0.attn.c_attn.lora_A \[3, 15\] instead of \[4, 15\]'),
    ({'peft_type': 'IA3'}, 'LORA can be read'),
    ({'base_model_name_or_path': None}, 'does not name the model'),
    ({'base_model_name_or_path': '../nowhere!'}, 'neither a file or folder here nor a name'),
  ],
)
def test_adapters_that_cannot_be_honoured(tmp_path, keys, match):
  folder = broken(tmp_path, 'lora')
  edit(folder / 'adapter_config.json', **keys)
  refused(folder, tmp_path, match)


def test_adapters_on_adapters(tmp_path):
  """A base that has adapters is merged; one that is the adapters themselves is refused."""
  first = pretrained.open_source(GOLDEN / 'lora')
  gpt2_jax.save_pretrained(gpt2_jax.from_pretrained(GOLDEN / 'lora'), tmp_path / 'a', to='peft')
  edit(tmp_path / 'a' / 'adapter_config.json', base_model_name_or_path=str(GOLDEN / 'lora'))
  both = pretrained.open_source(tmp_path / 'a')
  name = 'h.0.attn.c_attn.weight'
  A, B = (first.read(f'h.0.attn.c_attn.lora_{x}').astype(np.float64) for x in 'AB')
  want = first.read(name) + 2 * 7 / 3 * (B @ A).T
  assert np.abs(want - first.read(name)).max() > 0.1
  assert_close(peft.merged(both).read(name), want, 1e-6)
  edit(tmp_path / 'a' / 'adapter_config.json', base_model_name_or_path=str(tmp_path / 'a'))
  with pytest.raises(UserError, match='name themselves'):
    pretrained.open_source(tmp_path / 'a')


def test_what_adapters_may_be():
  with pytest.raises(UserError, match='r = 0 must be a whole number from 1'):
    LoRA(0, 1.0)
  with pytest.raises(UserError, match='has no adapters to write'):
    pretrained.write(pretrained.open_source(GOLDEN / 'plain'), 'runs/never', 'peft')
  assert huggingface.recognises(GOLDEN / 'plain') and not huggingface.recognises(GOLDEN)

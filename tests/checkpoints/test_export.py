"""Exports: a GGUF as other readers read it, StableHLO programs run without this package."""

import dataclasses
import json
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.arrays import assert_close, mesh_of
from support.processes import ROOT, environment

from gpt2_jax.checkpoints.formats import gguf, stablehlo
from gpt2_jax.checkpoints.tensors import Source, load_params, shapes
from gpt2_jax.core.errors import UserError
from gpt2_jax.decoding.generate import generate_tokens
from gpt2_jax.model.config import GPTConfig
from gpt2_jax.model.gpt2 import bind
from gpt2_jax.tokenizer import bpe

TINY = GPTConfig(vocab_size=13, n_positions=8, n_embd=12, n_layer=2, n_head=3, vocab_multiple=8)
BYTES = dataclasses.replace(TINY, vocab_size=257)
NAMES = {
  'attn_norm': 'ln_1',
  'attn_qkv': 'attn.c_attn',
  'attn_output': 'attn.c_proj',
  'ffn_norm': 'ln_2',
  'ffn_up': 'mlp.c_fc',
  'ffn_down': 'mlp.c_proj',
}  # llama.cpp's, ours


def make(config: GPTConfig, dtype='float32', *, std=0.3, seed=0, words=None, **fields) -> Source:
  """A source with random tensors: scales near 1 and biases that matter."""
  sizes = shapes(config)

  def read(name: str) -> np.ndarray:
    rng = np.random.default_rng([seed, *name.encode()])
    x = rng.normal(0, std, sizes[name])
    return (x + (1 if 'ln_' in name and 'weight' in name else 0)).astype(dtype)

  return Source(config, read, dtype, 'tiny', tokenizer=words, **fields)


def bits(x: np.ndarray) -> np.ndarray:
  return np.ascontiguousarray(x).view(np.uint8)


# ------------------------------------------------------------------------------------------- GGUF


def read_gguf(path):
  reader = pytest.importorskip('gguf').GGUFReader(path)
  return (
    reader,
    {t.name: t for t in reader.tensors},
    {k: f.contents() for k, f in reader.fields.items()},
  )


@settings(deadline=None, max_examples=15)
@given(
  st.builds(
    lambda H, N, **sizes: GPTConfig(**sizes, n_embd=H * N, n_head=N),
    H=st.integers(1, 5),
    N=st.integers(1, 4),
    n_layer=st.integers(1, 3),
    vocab_size=st.integers(257, 300),
    n_positions=st.integers(1, 9),
    n_inner=st.none() | st.integers(1, 20),
    tie_word_embeddings=st.booleans(),
    layer_norm_epsilon=st.sampled_from([1e-5, 1e-6]),
  ),
  st.sampled_from(['float32', 'bfloat16', 'float16']),
)
def test_gguf_holds_every_tensor_bit_by_bit(tmp_path_factory, config, dtype):
  source = make(config, dtype, words=bpe.load('byte'))
  path = tmp_path_factory.mktemp('gguf') / 'odd.gguf'
  gguf.write(source, path)
  _, tensors, fields = read_gguf(path)

  want = {
    'token_embd.weight': 'wte.weight',
    'position_embd.weight': 'wpe.weight',
    'output_norm.weight': 'ln_f.weight',
    'output_norm.bias': 'ln_f.bias',
  }
  if not config.tie_word_embeddings:
    want['output.weight'] = 'lm_head.weight'
  want |= {
    f'blk.{i}.{theirs}.{part}': f'h.{i}.{ours}.{part}'
    for i in range(config.n_layer)
    for theirs, ours in NAMES.items()
    for part in ('weight', 'bias')
  }
  assert set(tensors) == set(want)
  for theirs, ours in want.items():
    expected = source.tensor(ours)
    if theirs == 'position_embd.weight' or expected.ndim == 1:
      expected = expected.astype(np.float32)
    elif theirs.startswith('blk'):
      expected = expected.T  # [out, in]
    tensor = tensors[theirs]
    assert (
      tensor.tensor_type.name
      == {'float32': 'F32', 'float16': 'F16', 'bfloat16': 'BF16'}[str(expected.dtype)]
    )
    assert tensor.data_offset % 32 == 0
    np.testing.assert_array_equal(tensor.shape[::-1], expected.shape)  # ggml's order is reversed
    np.testing.assert_array_equal(bits(tensor.data).ravel(), bits(expected).ravel())
  for key, value in {
    'general.architecture': 'gpt2',
    'general.name': 'odd',
    'gpt2.block_count': config.n_layer,
    'gpt2.context_length': config.n_positions,
    'gpt2.embedding_length': config.n_embd,
    'gpt2.feed_forward_length': config.F,
    'gpt2.attention.head_count': config.n_head,
    'gpt2.attention.layer_norm_epsilon': np.float32(config.layer_norm_epsilon),
    'general.file_type': {'float32': 0, 'float16': 1, 'bfloat16': 32}[dtype],
  }.items():
    assert fields[key] == value, key


def test_gguf_holds_the_tokenizer(tmp_path):
  words = bpe.train_bpe(['the token of the model, the tokens of the models. ' * 3], 290)
  V = words.vocab_size + 3
  gguf.write(make(dataclasses.replace(TINY, vocab_size=V), words=words), tmp_path / 'x.gguf')
  _, _, fields = read_gguf(tmp_path / 'x.gguf')
  words.save(tmp_path)
  vocab = json.loads((tmp_path / 'vocab.json').read_text())
  tokens = fields['tokenizer.ggml.tokens']
  assert {token: i for i, token in enumerate(tokens[:-3])} == vocab
  assert tokens[-3:] == [f'[PAD{i}]' for i in range(V - 3, V)]
  assert fields['tokenizer.ggml.token_type'] == [1] * (V - 4) + [3, 5, 5, 5]  # 3 control, 5 unused
  merges = (tmp_path / 'merges.txt').read_text().split('\n')[1:-1]
  assert fields['tokenizer.ggml.merges'] == merges and len(merges) == len(words.merges)
  assert (fields['tokenizer.ggml.model'], fields['tokenizer.ggml.pre']) == ('gpt2', 'gpt-2')
  for name in ('bos', 'eos', 'unknown'):
    assert fields[f'tokenizer.ggml.{name}_token_id'] == words.eot


def graph(tensors, fields, tokens_T):
  """Logits [T, V] in float64 from a GGUF alone, step by step as llama.cpp's graph of a GPT-2."""
  get = lambda name: np.asarray(tensors[name].data, np.float64)
  field = lambda name: fields[f'gpt2.{name}']
  linear = lambda x, name: x @ get(f'{name}.weight').T + get(f'{name}.bias')

  def norm(x, name):
    x = x - x.mean(-1, keepdims=True)
    x = x / np.sqrt((x * x).mean(-1, keepdims=True) + field('attention.layer_norm_epsilon'))
    return x * get(f'{name}.weight') + get(f'{name}.bias')

  T, N = len(tokens_T), field('attention.head_count')
  x = get('token_embd.weight')[tokens_T] + get('position_embd.weight')[:T]
  for i in range(field('block_count')):
    qkv = linear(norm(x, f'blk.{i}.attn_norm'), f'blk.{i}.attn_qkv')
    q, k, v = (part.reshape(T, N, -1).swapaxes(0, 1) for part in np.split(qkv, 3, axis=-1))
    scores = q @ k.swapaxes(1, 2) / np.sqrt(q.shape[-1])
    weights = np.exp(scores - scores.max(-1, keepdims=True)) * np.tri(T)
    heads = (weights / weights.sum(-1, keepdims=True)) @ v
    x = x + linear(heads.swapaxes(0, 1).reshape(T, -1), f'blk.{i}.attn_output')
    u = linear(norm(x, f'blk.{i}.ffn_norm'), f'blk.{i}.ffn_up')
    u = u / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (u + 0.044715 * u**3)))
    x = x + linear(u, f'blk.{i}.ffn_down')
  head = 'output.weight' if 'output.weight' in tensors else 'token_embd.weight'
  return norm(x, 'output_norm') @ get(head).T


def test_gguf_holds_added_tokens_and_holes(tmp_path):
  bpe.load('byte').save(tmp_path / 'words')
  path = tmp_path / 'words/tokenizer.json'
  content = json.loads(path.read_text())
  extra = content['added_tokens'][0] | {'special': False, 'id': 259, 'content': '<user>'}
  pad = extra | {'special': True, 'id': 258, 'content': '<|pad|>'}
  content['added_tokens'] += [pad, extra]
  path.write_text(json.dumps(content))
  config = tmp_path / 'words/tokenizer_config.json'
  config.write_text(json.dumps(json.loads(config.read_text()) | {'pad_token': '<|pad|>'}))
  words = bpe.load(tmp_path / 'words')
  V260 = dataclasses.replace(TINY, vocab_size=260)
  gguf.write(make(V260, words=words), tmp_path / 'x.gguf')
  _, _, fields = read_gguf(tmp_path / 'x.gguf')
  assert fields['tokenizer.ggml.tokens'][256:] == ['<|endoftext|>', '[PAD257]', '<|pad|>', '<user>']
  assert fields['tokenizer.ggml.token_type'][255:] == [1, 3, 5, 3, 4]  # 4: user-defined
  assert fields['tokenizer.ggml.padding_token_id'] == 258
  config.write_text(json.dumps(json.loads(config.read_text()) | {'add_prefix_space': True}))
  with pytest.raises(UserError, match='add_prefix_space'):
    gguf.write(make(V260, words=bpe.load(tmp_path / 'words')), tmp_path / 'y.gguf')


@pytest.mark.parametrize('tied', [True, False])
def test_gguf_in_llama_cpps_graph_gives_our_logits(tmp_path, tied):
  config = dataclasses.replace(BYTES, tie_word_embeddings=tied, n_inner=20, layer_norm_epsilon=1e-2)
  source = make(config, words=bpe.load('byte'))
  gguf.write(source, tmp_path / 'x.gguf')
  _, tensors, fields = read_gguf(tmp_path / 'x.gguf')
  tokens = np.random.default_rng(0).integers(0, 257, (1, 8))
  assert_close(logits_of(source, tokens)[0], graph(tensors, fields, tokens[0]))


@pytest.mark.slow  # to import torch; the test above says as much
def test_gguf_in_transformers_gives_our_logits(tmp_path):
  for package in ('gguf', 'accelerate'):  # which transformers needs for it
    pytest.importorskip(package)
  torch = pytest.importorskip('torch')
  transformers = pytest.importorskip('transformers')
  config = dataclasses.replace(BYTES, n_positions=1024)  # it reads no other
  source = make(config, words=bpe.load('byte'))
  gguf.write(source, tmp_path / 'x.gguf')
  theirs = transformers.GPT2LMHeadModel.from_pretrained(tmp_path, gguf_file='x.gguf')
  tokens = np.random.default_rng(0).integers(0, 257, (3, 8))
  with torch.no_grad():
    want = theirs(torch.tensor(tokens)).logits.numpy()
  assert_close(logits_of(source, tokens), want)


def test_gguf_narrower_than_its_source_keeps_the_rest_wide(tmp_path):
  source = make(BYTES, words=bpe.load('byte'))
  gguf.write(source.astype('float16'), tmp_path / 'x.gguf')
  _, tensors, _ = read_gguf(tmp_path / 'x.gguf')
  np.testing.assert_array_equal(tensors['position_embd.weight'].data, source.tensor('wpe.weight'))
  np.testing.assert_array_equal(
    tensors['token_embd.weight'].data, source.tensor('wte.weight').astype(np.float16)
  )


@pytest.mark.parametrize(
  'change, message',
  [
    (dict(activation_function='gelu'), "activation_function = 'gelu'"),
    (dict(activation_function='relu'), "activation_function = 'relu'"),
    (dict(scale_attn_weights=False), 'scale_attn_weights'),
    (dict(scale_attn_by_inverse_layer_idx=True), 'scale_attn_by_inverse_layer_idx'),
    (dict(head='token_classification'), 'token_classification'),
    (dict(vocab_size=256), '257 ids'),
  ],
)
def test_gguf_refuses_what_llama_cpp_cannot_compute(tmp_path, change, message):
  source = make(dataclasses.replace(BYTES, **change), words=bpe.load('byte'))
  with pytest.raises(UserError, match=re.escape(message)):
    gguf.write(source, tmp_path / 'x.gguf')
  assert not list(tmp_path.iterdir())


def test_gguf_refuses_a_model_without_tokenizer_and_nan(tmp_path):
  with pytest.raises(UserError, match='tiny has no tokenizer'):
    gguf.write(make(BYTES), tmp_path / 'x.gguf')
  source = make(BYTES, words=bpe.load('byte'))
  bad = dataclasses.replace(source, read=lambda name: source.read(name) * np.float32(np.nan))
  with pytest.raises(UserError, match='NaN'):
    gguf.write(bad, tmp_path / 'x.gguf')


def test_missing_packages_are_named(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, 'gguf', None)
  with pytest.raises(UserError, match=re.escape('pip install gguf')):
    gguf.write(make(BYTES, words=bpe.load('byte')), tmp_path / 'x.gguf')


# -------------------------------------------------------------------------------------- StableHLO


def logits_of(source: Source, tokens: np.ndarray) -> np.ndarray:
  """All logits by this package's plain forward pass, without a cache: [B, T, V]."""
  forward = jax.jit(lambda params, tokens: bind(source.config, params)(tokens))
  return np.asarray(forward(load_params(source), tokens))


SCRIPT = """
import contextlib, json, os, pathlib, sys
os.chdir(sys.argv[1])
readme = pathlib.Path('README.md').read_text()
code = readme.split('```python\\n')[1].split('```')[0]
start, end = code.index('prompts = '), code.index('lengths = ')
load, rest = code[:start], code[end:].replace('range(3)', f'range({sys.argv[2]})')
rest = rest.replace('  new.append', '  seen.append(logits)\\n  new.append')
results, scope = [], {}
exec(load, scope)
for prompts in json.loads(sys.argv[3]):
  scope |= {'prompts': prompts, 'seen': []}
  with contextlib.redirect_stdout(sys.stderr):
    exec(rest, scope)
  results.append({'tokens': scope['np'].stack(scope['new'], 1).tolist(),
                  'logits': scope['np'].stack(scope['seen'], 1).tolist()})
assert not [name for name in sys.modules if name.split('.')[0] in ('gpt2_jax', 'flax')]
print(json.dumps(results))
"""


def run_readme(folder, steps: int, batches):
  """Runs the README's program in a process of its own: for each batch, tokens [B, N], logits."""
  done = subprocess.run(
    [sys.executable, '-W', 'error', '-c', SCRIPT, folder, str(steps), json.dumps(batches)],
    env=environment(),
    capture_output=True,
    text=True,
    timeout=300,
  )
  assert done.returncode == 0, done.stderr
  return json.loads(done.stdout)


@pytest.fixture
def flatbuffers():
  return pytest.importorskip('flatbuffers')


@pytest.mark.slow
def test_stablehlo_generates_as_we_do(tmp_path, flatbuffers):
  config = dataclasses.replace(
    TINY,
    n_positions=16,
    tie_word_embeddings=False,
    n_inner=20,
    activation_function='quick_gelu',
    scale_attn_by_inverse_layer_idx=True,
    reorder_and_upcast_attn=True,
  )
  source = make(config, std=1)
  stablehlo.write(source, tmp_path / 'out')
  batches = [[[5, 1, 12]], [[3, 1, 4, 1, 5, 9], [2], [7, 0, 11]]]
  N = 10  # the longest row ends with its last token at the last position
  results = run_readme(tmp_path / 'out', N, batches)
  params = load_params(source)
  for prompts, result in zip(batches, results):
    want = generate_tokens(config, params, prompts, do_sample=False, max_new_tokens=N)
    for prompt, generated, row, logits in zip(prompts, want, result['tokens'], result['logits']):
      assert generated.tokens == row[:N]
      text = np.array([prompt + row[:N]])
      full = logits_of(source, text)[0]
      assert_close(logits, full[len(prompt) :])  # after each new token, beside the cacheless pass
      assert full[len(prompt) - 1].argmax() == row[0]


@pytest.mark.slow
def test_stablehlo_of_bfloat16_weights_on_a_mesh(tmp_path, flatbuffers):
  source = make(TINY, 'bfloat16')
  with mesh_of(1, 2, 2):  # 13 ids and 3 heads don't divide by it, and needn't
    stablehlo.write(source, tmp_path / 'out')
  [result] = run_readme(tmp_path / 'out', 2, [[[5, 1, 12], [7]]])
  for prompt, row, logits in zip([[5, 1, 12], [7]], result['tokens'], result['logits']):
    assert_close(logits, logits_of(source, np.array([prompt + row[:2]]))[0, len(prompt) :])


def test_stablehlo_folder_says_what_it_holds(tmp_path, flatbuffers):
  from safetensors.numpy import load_file

  source = make(BYTES, 'float16', words=bpe.load('byte'))
  stablehlo.write(source, tmp_path / 'out')
  manifest = json.loads((tmp_path / 'out/manifest.json').read_text())
  arrays = load_file(tmp_path / 'out/model.safetensors')
  described = lambda x: {'shape': list(x.shape), 'dtype': str(x.dtype)}
  assert manifest['parameters']['arrays'] == {name: described(x) for name, x in arrays.items()}
  for i in range(2):  # stacked, with the axes that we have
    np.testing.assert_array_equal(
      bits(arrays['h.attn.c_attn.weight'][i]).ravel(),
      bits(source.tensor(f'h.{i}.attn.c_attn.weight')).ravel(),
    )
  np.testing.assert_array_equal(arrays['wte.weight'], source.tensor('wte.weight'))  # not padded
  assert manifest['platforms'] == ['cpu', 'cuda', 'tpu']
  assert manifest['programs']['prefill']['inputs'][1] == {
    'name': 'tokens',
    'shape': ['b', 't'],
    'dtype': 'int32',
  }
  assert manifest['programs']['decode_step']['outputs'] == [
    {'name': 'logits', 'shape': ['b', 257], 'dtype': 'float32'},
    *({'name': n, 'shape': [2, 'b', 3, 8, 4], 'dtype': 'float32'} for n in 'kv'),
  ]
  assert GPTConfig(**manifest['config']) == dataclasses.replace(BYTES, vocab_multiple=1)
  assert bpe.load(tmp_path / 'out/tokenizer').vocab_size == 257
  for name in manifest['programs']:
    program = (tmp_path / f'out/{name}.bin').read_bytes()
    assert len(program) < 100_000  # no weights in it
    assert str(ROOT).encode() not in program and b'.py' not in program


def test_stablehlo_refuses_a_classifier_and_a_missing_package(tmp_path, monkeypatch):
  with pytest.raises(UserError, match='sequence_classification'):
    stablehlo.write(make(dataclasses.replace(TINY, head='sequence_classification')), tmp_path / 'x')
  for name in [n for n in sys.modules if n.startswith('jax._src.export.serialization')]:
    monkeypatch.delitem(sys.modules, name)
  monkeypatch.setitem(sys.modules, 'flatbuffers', None)
  with pytest.raises(UserError, match=re.escape('pip install flatbuffers')):
    stablehlo.write(make(TINY), tmp_path / 'x')

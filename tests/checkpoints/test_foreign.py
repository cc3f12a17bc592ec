"""Formats of torch, nanoGPT, llm.c and Flax: golden files by torch and flax (golden/make_foreign.py),
round trips to the bit, an independent nanoGPT, and files that are broken or hostile.
"""

import dataclasses
import io
import json
import os
import pickle
import shutil
import struct
import tempfile
import zipfile
from pathlib import Path

import flax.serialization
import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.arrays import assert_close
from support.processes import ROOT

from gpt2_jax.checkpoints.formats import (
  flax_msgpack,
  huggingface,
  llmc,
  nanogpt,
  torch_files,
  torch_writing,
)
from gpt2_jax.checkpoints.tensors import DTYPES, Source, Tensor, load_params, shapes
from gpt2_jax.core.errors import UserError
from gpt2_jax.model.config import GPTConfig
from gpt2_jax.model.gpt2 import bind

GOLDEN = ROOT / 'tests' / 'golden'
SIZES = dict(vocab_size=13, n_positions=8, n_embd=12, n_layer=2, n_head=3)
CONFIG = json.dumps(SIZES | {'model_type': 'gpt2', 'bos_token_id': 0, 'eos_token_id': 0})
FORMATS = {
  'nanogpt': (nanogpt, 'gelu', DTYPES),
  'llmc': (llmc, 'gelu_new', DTYPES[:2]),
  'flax': (flax_msgpack, 'gelu_new', DTYPES),
}
few = settings(deadline=None, max_examples=15)


@pytest.fixture(scope='session')
def expected() -> dict[str, np.ndarray]:
  with np.load(GOLDEN / 'foreign_expected.npz') as arrays:
    return dict(arrays)


def assert_bits(have: np.ndarray, want: np.ndarray) -> None:
  assert (have.dtype, have.shape) == (want.dtype, want.shape)
  assert have.tobytes() == want.tobytes()


def assert_holds(source: Source, tensors: dict[str, np.ndarray]) -> None:
  for name, value in tensors.items():
    assert_bits(source.tensor(name), value)


def folder(path: Path, weights: str, content: bytes, config: str = CONFIG) -> Path:
  """A folder of Hugging Face's kind."""
  path.mkdir(exist_ok=True)
  (path / 'config.json').write_text(config)
  (path / weights).write_bytes(content)
  return path


@st.composite
def sources(draw, activation: str, dtypes) -> tuple[Source, dict[str, np.ndarray]]:
  """A model of any sizes whose tensors have any bits that are finite numbers."""
  heads = draw(st.integers(1, 3))
  config = GPTConfig(
    vocab_size=draw(st.integers(1, 140)),
    n_positions=draw(st.integers(1, 5)),
    n_head=heads,
    n_embd=heads * draw(st.integers(1, 4)),
    n_layer=draw(st.integers(1, 3)),
    activation_function=activation,
    embd_pdrop=0.0,
    attn_pdrop=0.0,
    resid_pdrop=0.0,
  )
  dtype = np.dtype(draw(st.sampled_from(dtypes)))
  rng, has_bias = np.random.default_rng(draw(st.integers(0, 99))), draw(st.booleans())
  values = {}
  for name, shape in shapes(config).items():
    value = np.frombuffer(rng.bytes(int(np.prod(shape)) * dtype.itemsize), dtype)
    with np.errstate(invalid='ignore'):
      value = np.where(np.isfinite(value), value, dtype.type(0)).reshape(shape)
    values[name] = value if has_bias or not name.endswith('bias') else np.zeros_like(value)
  return Source(config, values.__getitem__, dtype.name, 'a test'), values


# Golden files


@pytest.mark.parametrize('name', ['foreign_state', 'foreign_state_legacy'])
def test_state_dicts(tmp_path, name, expected):
  content = (GOLDEN / f'{name}.pt').read_bytes()
  assert torch_files.is_torch_file(GOLDEN / f'{name}.pt')
  source = huggingface.open_source(folder(tmp_path / 'hf', 'pytorch_model.bin', content))
  assert_holds(source, expected)


@pytest.mark.parametrize('name', ['foreign_views', 'foreign_views_legacy'])
def test_views(name):
  value = torch_files.read(GOLDEN / f'{name}.pt')
  assert value['list'] == [1, -(2**40), 1e-300, None, True, 'é']
  assert value['tuple'] == (0.9, 0.95)
  views = value['views']
  with np.load(GOLDEN / 'foreign_views.npz') as want:
    assert views.keys() == set(want)
    for key, tensor in views.items():
      have = tensor.read()
      assert (tensor.shape, tensor.dtype) == (have.shape, have.dtype.name)
      assert_bits(have.astype(np.float32) if key == 'bfloat' else have, want[key])
  assert views['bfloat'].dtype == 'bfloat16'
  # a tensor that shares another's storage is not another tensor: see how nanogpt knows a tied head
  assert views['row'].read.storage is views['base'].read.storage


def test_nanogpt(expected):
  path = GOLDEN / 'foreign_nanogpt.pt'
  assert nanogpt.recognises(path) and not nanogpt.recognises(GOLDEN / 'foreign_state.pt')
  source = nanogpt.open_source(path)
  c = source.config
  assert {key: getattr(c, key) for key in SIZES} == SIZES
  assert (c.activation_function, c.resid_pdrop, source.dtype) == ('gelu', 0.2, 'float32')
  assert source.record == {
    'iter_num': 2000,
    'best_val_loss': pytest.approx(1.4697),
    'config': {'dataset': 'shakespeare_char', 'learning_rate': 1e-3, 'compile': True},
  }
  assert_holds(source, expected)
  state = torch_files.read(path)['optimizer']['state'][0]
  np.testing.assert_allclose(state['exp_avg'].read(), 0.1, rtol=1e-6)  # of a gradient of ones


def test_nanogpt_compiled_without_biases_in_bfloat16(tmp_path, expected):
  shutil.copy(GOLDEN / 'foreign_nanogpt_nobias.pt', tmp_path / 'ckpt.pt')
  assert nanogpt.recognises(tmp_path)
  source = nanogpt.open_source(tmp_path)
  assert source.dtype == 'bfloat16'
  assert_holds(
    source,
    {
      key: (np.zeros_like(value) if key.endswith('bias') else value).astype('bfloat16')
      for key, value in expected.items()
    },
  )
  nanogpt.write(source, tmp_path / 'out.pt')
  written = torch_files.read(tmp_path / 'out.pt')
  assert written['model_args']['bias'] is False
  assert not any(key.endswith('bias') for key in written['model'])


@pytest.mark.parametrize('version,dtype', llmc.VERSIONS.items())
def test_llmc(tmp_path, version, dtype, expected):
  path = GOLDEN / f'foreign_llmc_v{version}.bin'
  assert llmc.recognises(path)
  source = llmc.open_source(path)
  assert {key: getattr(source.config, key) for key in SIZES} == SIZES
  assert source.config.activation_function == 'gelu_new'
  assert_holds(source, {key: value.astype(dtype) for key, value in expected.items()})
  llmc.write(source, tmp_path / 'again.bin')
  assert (tmp_path / 'again.bin').read_bytes() == path.read_bytes()


def test_llmc_of_any_size_is_opened_in_no_time(tmp_path):
  path = tmp_path / 'xl.bin'
  header = np.zeros(256, '<i4')
  header[:8] = (20240326, 3, 1024, 50257, 48, 25, 1600, 50304)
  path.write_bytes(header.tobytes())
  os.truncate(path, 1024 + 6_230_444_800 + 4 * 47 * 1600)  # GPT-2 XL's parameters, and padding
  source = llmc.open_source(path)
  assert source.tensor('h.47.mlp.c_proj.bias').shape == (1600,)
  assert source.tokenizer is not None


def test_flax(tmp_path, expected):
  content = (GOLDEN / 'foreign_flax_model.msgpack').read_bytes()
  path = folder(tmp_path / 'flax', flax_msgpack.FILE, content)
  assert flax_msgpack.recognises(path) and flax_msgpack.recognises(path / flax_msgpack.FILE)
  source = flax_msgpack.open_source(path)
  assert {key: getattr(source.config, key) for key in SIZES} == SIZES
  assert_holds(source, expected)
  flax_msgpack.write(source, tmp_path / 'again')
  assert (tmp_path / 'again' / flax_msgpack.FILE).read_bytes() == content
  bare = flax.serialization.msgpack_serialize(
    flax.serialization.msgpack_restore(content)['transformer']
  )  # FlaxGPT2Model's
  assert_holds(flax_msgpack.open_source(folder(tmp_path / 'bare', flax_msgpack.FILE, bare)), expected)


def test_flax_untied_and_in_pieces(tmp_path, monkeypatch):
  """Arrays above 1 GiB, here 500 bytes, are maps of pieces; flax itself reads what we write."""
  monkeypatch.setattr(flax.serialization, 'MAX_CHUNK_SIZE', 500)
  monkeypatch.setattr(flax_msgpack, 'CHUNK', 500)
  config = GPTConfig(**SIZES, tie_word_embeddings=False)
  rng = np.random.default_rng(1)
  values = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes(config).items()}
  source = Source(config, values.__getitem__, 'float32', 'a test')
  flax_msgpack.write(source, tmp_path / 'out')
  content = (tmp_path / 'out' / flax_msgpack.FILE).read_bytes()
  tree = flax.serialization.msgpack_restore(content)
  np.testing.assert_array_equal(tree['lm_head']['kernel'], values['lm_head.weight'].T)
  np.testing.assert_array_equal(
    tree['transformer']['h']['1']['mlp']['c_fc']['kernel'], values['h.1.mlp.c_fc.weight'].T
  )
  np.testing.assert_array_equal(tree['transformer']['ln_f']['scale'], values['ln_f.weight'])
  assert flax.serialization.to_bytes(tree) == content
  again = flax_msgpack.open_source(tmp_path / 'out')
  assert again.config.tie_word_embeddings is False
  assert_holds(again, values)


# Round trips


@pytest.mark.parametrize('kind', FORMATS)
@few
@given(data=st.data())
def test_round_trips_are_exact(kind, data):
  module, activation, dtypes = FORMATS[kind]
  source, values = data.draw(sources(activation, dtypes))
  with tempfile.TemporaryDirectory() as scratch:
    first, second = Path(scratch) / 'first', Path(scratch) / 'second'
    module.write(source, first)
    assert module.recognises(first)
    opened = module.open_source(first)
    sizes = dataclasses.replace(source.config, n_inner=opened.config.n_inner)
    assert opened.config == sizes
    assert opened.dtype == source.dtype
    assert_holds(opened, values)
    module.write(opened, second)
    files = sorted(first.iterdir()) if first.is_dir() else [first]
    again = sorted(second.iterdir()) if second.is_dir() else [second]
    assert [f.read_bytes() for f in files] == [f.read_bytes() for f in again]


plain = st.one_of(
  st.none(),
  st.booleans(),
  st.integers(-(2**70), 2**70),
  st.text(max_size=5),
  st.floats(allow_nan=False),
)


@st.composite
def tensors(draw) -> Tensor:
  dtype = np.dtype(draw(st.sampled_from(sorted(torch_files.STORAGES.values()))))
  shape = tuple(draw(st.lists(st.integers(0, 4), max_size=3)))
  value = np.random.default_rng(draw(st.integers(0, 9))).integers(0, 2, shape).astype(dtype)
  return Tensor(shape, dtype.name, lambda: value)


nested = st.recursive(
  plain | tensors(),
  lambda inner: st.one_of(
    st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=3), inner, max_size=3)
  ),
)


def as_bits(value, read):
  """With tensors as (dtype, shape, bytes), and the types of all else."""
  if isinstance(value, dict):
    return {key: as_bits(item, read) for key, item in value.items()}
  if isinstance(value, list):
    return [as_bits(item, read) for item in value]
  if isinstance(value, (str, int, float, type(None))):
    return type(value), value
  array = read(value)
  return array.dtype.name, array.shape, array.tobytes()


def assert_read_again(value, load, read) -> None:
  with tempfile.TemporaryDirectory() as scratch:
    path = Path(scratch) / 'value.pt'
    torch_writing.write(path, value)
    assert torch_files.is_torch_file(path)
    with zipfile.ZipFile(path) as archive:
      assert archive.testzip() is None
    assert as_bits(load(path), read) == as_bits(value, lambda tensor: tensor.read())


@few
@given(nested)
def test_torch_files_round_trip(value):
  assert_read_again(value, torch_files.read, lambda tensor: tensor.read())


# With torch itself


@few
@given(nested)
def test_torch_loads_what_we_write(value):
  torch = pytest.importorskip('torch')
  assert_read_again(
    value,
    lambda path: torch.load(path, weights_only=True),
    lambda tensor: (
      tensor.view(torch.int16).numpy().view('bfloat16')
      if tensor.dtype == torch.bfloat16
      else tensor.numpy()
    ),
  )


def test_torch_loads_a_nanogpt_that_we_write(tmp_path, expected):
  torch = pytest.importorskip('torch')
  source = nanogpt.open_source(GOLDEN / 'foreign_nanogpt.pt')
  nanogpt.write(source, tmp_path / 'ckpt.pt')
  have = torch.load(tmp_path / 'ckpt.pt', weights_only=True)
  want = torch.load(GOLDEN / 'foreign_nanogpt.pt', weights_only=True)
  masks = {f'transformer.h.{i}.attn.bias' for i in range(2)}
  assert have['model'].keys() == want['model'].keys() - masks
  for key, tensor in have['model'].items():
    assert torch.equal(tensor, want['model'][key])
  assert have['model_args'] == want['model_args']
  assert have['iter_num'] == want['iter_num']
  head, wte = have['model']['lm_head.weight'], have['model']['transformer.wte.weight']
  assert head.data_ptr() == wte.data_ptr()  # written once
  with zipfile.ZipFile(tmp_path / 'ckpt.pt') as archive:
    for info in archive.infolist():
      assert (info.header_offset + 30 + len(info.filename) + len(info.extra)) % 64 == 0


def nanogpt_logits(torch, model: dict, ids: np.ndarray, n_head: int, gelu: str) -> np.ndarray:
  """nanoGPT's forward pass after its architecture, in float64. `model` is its state dict."""
  F = torch.nn.functional
  w = {
    key.removeprefix('_orig_mod.').removeprefix('transformer.'): value.double()
    for key, value in model.items()
  }
  linear = lambda x, name: F.linear(x, w[f'{name}.weight'], w.get(f'{name}.bias'))
  norm = lambda x, name: F.layer_norm(
    x, x.shape[-1:], w[f'{name}.weight'], w.get(f'{name}.bias'), 1e-5
  )
  ids = torch.from_numpy(ids)
  x = w['wte.weight'][ids] + w['wpe.weight'][: ids.shape[1]]
  layers = 1 + max(int(key.split('.')[1]) for key in w if key.startswith('h.'))
  for i in range(layers):
    heads = [
      part.unflatten(-1, (n_head, -1)).transpose(1, 2)
      for part in linear(norm(x, f'h.{i}.ln_1'), f'h.{i}.attn.c_attn').chunk(3, -1)
    ]
    y = F.scaled_dot_product_attention(*heads, is_causal=True)
    x = x + linear(y.transpose(1, 2).flatten(2), f'h.{i}.attn.c_proj')
    y = F.gelu(linear(norm(x, f'h.{i}.ln_2'), f'h.{i}.mlp.c_fc'), approximate=gelu)
    x = x + linear(y, f'h.{i}.mlp.c_proj')
  return F.linear(norm(x, 'ln_f'), w['lm_head.weight']).numpy()


@pytest.mark.parametrize(
  'name,model,gelu',
  [
    ('foreign_nanogpt.pt', 'foreign_nanogpt.pt', 'none'),
    ('foreign_nanogpt_nobias.pt', 'foreign_nanogpt_nobias.pt', 'none'),
    ('foreign_llmc_v3.bin', 'foreign_nanogpt.pt', 'tanh'),
  ],
)
def test_logits_are_nanogpts(name, model, gelu):
  """llm.c's reference model is nanoGPT's with the tanh form of GELU."""
  torch = pytest.importorskip('torch')
  source = (llmc if name.endswith('bin') else nanogpt).open_source(GOLDEN / name)
  ids = np.random.default_rng(0).integers(0, 13, (2, 8))
  state = torch.load(GOLDEN / model, weights_only=True)['model']
  want = nanogpt_logits(torch, state, ids, 3, gelu)
  other = nanogpt_logits(torch, state, ids, 3, 'none' if gelu == 'tanh' else 'tanh')
  forward = jax.jit(lambda params, ids: bind(source.config, params)(ids))
  have = np.asarray(forward(load_params(source), ids))[..., :13]
  assert_close(have, want)
  assert np.abs(want - other).max() / np.abs(want).max() > 5e-5  # the test can tell them apart


# What a format can't express


def source_with(**fields) -> Source:
  config = GPTConfig(**SIZES | {'activation_function': 'gelu'} | fields)
  return Source(config, lambda name: np.zeros(shapes(config)[name], np.float32), 'float32', 'a test')


LIMITS = {
  'scale_attn_weights': dict(scale_attn_weights=False),
  'scale_attn_by_inverse_layer_idx': dict(scale_attn_by_inverse_layer_idx=True),
  'reorder_and_upcast_attn': dict(reorder_and_upcast_attn=True),
  'tie_word_embeddings': dict(tie_word_embeddings=False),
  'layer_norm_epsilon': dict(layer_norm_epsilon=1e-6),
  'n_inner': dict(n_inner=40),
  'head': dict(head='token_classification'),
  'activation_function': dict(activation_function='gelu_10'),
}


@pytest.mark.parametrize('field', LIMITS)
@pytest.mark.parametrize('kind', FORMATS)
def test_what_cannot_be_expressed_is_refused_by_name(tmp_path, kind, field):
  module, activation, _ = FORMATS[kind]
  source = source_with(**dict(activation_function=activation) | LIMITS[field])
  if kind == 'flax' and field in ('tie_word_embeddings', 'layer_norm_epsilon', 'n_inner'):
    module.write(source, tmp_path / 'out')
    assert getattr(module.open_source(tmp_path / 'out').config, field) == LIMITS[field][field]
    return
  with pytest.raises(UserError, match=field):
    module.write(source, tmp_path / 'out')
  assert not (tmp_path / 'out').exists()


def test_nanogpt_approximates_only_if_asked(tmp_path):
  source = source_with(activation_function='gelu_new')
  with pytest.raises(UserError, match='--approximate'):
    nanogpt.write(source, tmp_path / 'ckpt.pt')
  nanogpt.write(source, tmp_path / 'ckpt.pt', approximate=True)
  assert nanogpt.open_source(tmp_path / 'ckpt.pt').config.activation_function == 'gelu'
  with pytest.raises(UserError, match="can't express activation_function"):
    nanogpt.write(source_with(activation_function='relu'), tmp_path / 'relu.pt', approximate=True)
  with pytest.raises(UserError, match='one dropout'):
    nanogpt.write(source_with(embd_pdrop=0.0), tmp_path / 'dropout.pt')


def test_llmc_has_no_float16(tmp_path):
  source = source_with(activation_function='gelu_new').astype('float16')
  with pytest.raises(UserError, match='--dtype float32'):
    llmc.write(source, tmp_path / 'model.bin')


def test_nanogpts_padded_vocabulary_has_gpt2s_tokenizer():
  assert nanogpt.released_tokenizer(50304).vocab_size == 50257
  assert nanogpt.released_tokenizer(65) is None


# Broken and hostile files


def archive(program: bytes, storages=(b'\0' * 16,), method=zipfile.ZIP_STORED, **entries) -> bytes:
  """A zip file of torch's with any pickle."""
  content = io.BytesIO()
  with zipfile.ZipFile(content, 'w', method) as file:
    file.writestr('archive/data.pkl', program)
    for name, value in entries.items():
      file.writestr(f'archive/{name}', value)
    for i, storage in enumerate(storages):
      file.writestr(f'archive/data/{i}', storage)
  return content.getvalue()


def legacy(program: bytes, at: int = 3) -> bytes:
  """A file of the old format with any pickle in one of its five places."""
  pickles = [pickle.dumps(x, 2) for x in (torch_files.MAGIC, 1001, {'little_endian': True}, {}, [])]
  pickles[at] = program
  return b''.join(pickles)


def calls(module: str, name: str, argument: str) -> dict[str, bytes]:
  """Programs that call a function, in all ways that a pickle knows."""
  text, where = argument.encode(), f'{module}\n{name}\n'.encode()
  packed = b'X' + struct.pack('<I', len(text)) + text
  short = lambda s: b'\x8c' + bytes([len(s)]) + s.encode()
  return {
    'reduce': b'\x80\x02c' + where + packed + b'\x85R.',
    'text': b'c' + where + b'(V' + text + b'\ntR.',
    'inst': b'(V' + text + b'\ni' + where + b'.',
    'obj': b'(c' + where + packed + b'o.',
    'stack global': b'\x80\x04' + short(module) + short(name) + b'\x93' + packed + b'\x85R.',
    'newobj': b'\x80\x02c' + where + packed + b'\x85\x81.',
    'build': b'\x80\x02ccollections\nOrderedDict\n)R(c' + where + packed + b'\x85Rdb.',
    'persistent': b'\x80\x02c' + where + packed + b'\x85RQ.',
  }


@pytest.mark.parametrize(
  'target',
  [
    'os.system',
    'posix.system',
    'builtins.eval',
    'builtins.exec',
    'torch.load',
    'collections.OrderedDict.fromkeys',
  ],
)
def test_nothing_is_called(tmp_path, target):
  canary = tmp_path / 'canary'
  module, _, name = target.partition('.')
  if target.startswith('collections'):  # hidden behind a module that is allowed
    module, name = 'collections', 'OrderedDict.fromkeys'
  argument = f'touch {canary}' if name == 'system' else f'open({str(canary)!r}, "w")'
  path = tmp_path / 'ckpt.pt'
  for program in calls(module, name, argument).values():
    for content in (archive(program), *(legacy(program, at) for at in range(5))):
      path.write_bytes(content)
      with pytest.raises(UserError, match=name):
        torch_files.read(path)
    path.write_bytes(archive(program))
    with pytest.raises(UserError, match='nothing was run'):
      nanogpt.open_source(path)
  assert not canary.exists()


def test_what_is_allowed_cannot_be_changed(tmp_path):
  """BUILD would set attributes of our own functions."""
  path = tmp_path / 'x.pt'
  before = torch_files._rebuild.__defaults__, dict(vars(torch_files._rebuild))
  state = b'}(X\x0c\0\0\0__defaults__NX\x01\0\0\0aNu'
  for program in (
    b'\x80\x02ctorch._utils\n_rebuild_tensor_v2\n' + state + b'b.',
    b'\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(}' + state + b'tb.',
  ):
    path.write_bytes(archive(program))
    torch_files.read(path)
  assert (torch_files._rebuild.__defaults__, dict(vars(torch_files._rebuild))) == before


def tensor_program(
  offset=0, shape=(2, 2), strides=(2, 1), numel=4, kind='FloatStorage', key='0'
) -> bytes:
  """A pickle of one tensor."""
  text = lambda s: b'X' + struct.pack('<I', len(s)) + s.encode()
  plain = lambda value: pickle.dumps(value, 2)[2:-1]
  return (
    b'\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(('
    + text('storage')
    + f'ctorch\n{kind}\n'.encode()
    + text(key)
    + text('cpu')
    + plain(numel)
    + b'tQ'
    + plain(offset)
    + plain(shape)
    + plain(strides)
    + b'\x89NtR.'
  )


def test_tensors_stay_within_their_storages(tmp_path):
  path = tmp_path / 'x.pt'
  path.write_bytes(archive(tensor_program()))
  assert torch_files.read(path).read().shape == (2, 2)
  for fields in (
    dict(offset=1),
    dict(offset=-1),
    dict(strides=(3, 1)),
    dict(strides=(-2, 1)),
    dict(shape=(3, 2)),
    dict(shape=(2**40, 2)),
    dict(shape=(-1, 2)),
    dict(strides=(1,)),
    dict(shape=(10**6, 2), strides=(0, 1)),  # one element, read a million times
    dict(numel=2**40, shape=(2**40,), strides=(1,)),
    dict(numel=5),
    dict(numel=-4),
    dict(numel=2**700),
    dict(offset=2**700),
    dict(shape=(True, 2)),
    dict(shape='ab'),
    dict(kind='DoubleStorage'),
    dict(key='7'),
    dict(key='../data.pkl'),
  ):
    path.write_bytes(archive(tensor_program(**fields)))
    with pytest.raises(UserError, match=r'x\.pt can\'t be read'):
      torch_files.read(path)
  path.write_bytes(archive(tensor_program(kind='QInt8Storage')))
  with pytest.raises(UserError, match='QInt8Storage'):
    torch_files.read(path)


def test_other_tricks(tmp_path):
  path = tmp_path / 'x.pt'
  deep = b'\x80\x02' + b']' * 100_000 + b'a' * 99_999 + b'.'
  for content in (
    archive(b'\x80\x02K\x01.', method=zipfile.ZIP_DEFLATED),
    archive(b'\x80\x02}.', byteorder=b'big'),
    archive(b'\x80\x02X\xff\xff\xff\x7fa.'),  # a text of 2 GB
    archive(b'\x80\x05\x96' + struct.pack('<Q', 2**40) + b'.'),  # a bytearray of 1 TB
    archive(b'\x80\x02\x8b\xff\xff\xff\x7f.'),
    archive(b'I' + b'9' * 9999 + b'\n.'),
    archive(b'\x80\x02\x82\x01.'),
    archive(b'\x80\xff.'),
    archive(b''),
    archive(b'.'),
    b'PK\3\4' + bytes(99),
    b'\x80',
    b'',
    pickle.dumps({}),
    legacy(pickle.dumps(7, 2), at=4),
  ):
    path.write_bytes(content)
    with pytest.raises(UserError, match=r'x\.pt can\'t be read'):
      torch_files.read(path)
  path.write_bytes(archive(b'\x80\x02}r\xff\xff\xff\xff.'))  # a memo of 2**32 entries
  assert torch_files.read(path) == {}
  path.write_bytes(archive(deep))
  assert isinstance(torch_files.read(path), list)
  assert not nanogpt.recognises(path)
  assert not nanogpt.recognises(tmp_path / 'missing.pt') and not nanogpt.recognises(tmp_path)


def test_a_limit_on_pickles(tmp_path, monkeypatch):
  monkeypatch.setattr(torch_files, 'MAX_PICKLE', 100)
  path = tmp_path / 'x.pt'
  program = b'\x80\x02' + b'}0' * 100 + b'}.'
  for content in (archive(program), legacy(program)):
    path.write_bytes(content)
    with pytest.raises(UserError, match="can't be read"):
      torch_files.read(path)


FILES = {
  'foreign_nanogpt.pt': nanogpt,
  'foreign_nanogpt_nobias.pt': nanogpt,
  'foreign_llmc_v5.bin': llmc,
  'foreign_flax_model.msgpack': flax_msgpack,
  'foreign_state_legacy.pt': huggingface,
}
WEIGHTS = {flax_msgpack: flax_msgpack.FILE, huggingface: 'pytorch_model.bin'}


def read_all(content: bytes, module, scratch: Path) -> None:
  """Recognises, opens and reads a file with this content."""
  path = scratch / 'file'
  if module in WEIGHTS:
    path = folder(scratch / 'folder', WEIGHTS[module], content)
  else:
    path.write_bytes(content)
  module.recognises(path)
  source = module.open_source(path)
  with np.load(GOLDEN / 'foreign_expected.npz') as names, np.errstate(invalid='ignore'):
    for name in names:
      source.tensor(name)


@pytest.mark.parametrize('name', FILES)
@few
@given(data=st.data())
def test_cut_files_are_refused(name, data):
  content = (GOLDEN / name).read_bytes()
  cut = data.draw(st.integers(0, len(content) - 1))
  with tempfile.TemporaryDirectory() as scratch:
    with pytest.raises(UserError, match=scratch):
      read_all(content[:cut], FILES[name], Path(scratch))


@pytest.mark.parametrize('name', FILES)
@few
@given(data=st.data())
def test_changed_files_are_read_or_refused(name, data):
  """Whatever bytes are changed: another number, or an error that names the file."""
  content = bytearray((GOLDEN / name).read_bytes())
  end = data.draw(st.sampled_from([100, 4000, len(content)]))  # heads are where harm is done
  for _ in range(data.draw(st.integers(1, 4))):
    content[data.draw(st.integers(0, end - 1))] = data.draw(st.integers(0, 255))
  with tempfile.TemporaryDirectory() as scratch:
    try:
      read_all(bytes(content), FILES[name], Path(scratch))
    except UserError as e:
      assert scratch in str(e)


@few
@given(data=st.data())
def test_a_changed_bit_of_a_zip_file_is_refused(data):
  """In whatever entry: no other number gets in."""
  content = bytearray((GOLDEN / 'foreign_nanogpt.pt').read_bytes())
  with zipfile.ZipFile(io.BytesIO(content)) as archive:
    entries = [
      info
      for info in archive.infolist()
      if info.filename.endswith('data.pkl') or info.filename.split('/')[-2] == 'data'
    ]
  entry = data.draw(st.sampled_from(entries))
  name, extra = struct.unpack('<HH', content[entry.header_offset + 26 : entry.header_offset + 30])
  at = entry.header_offset + 30 + name + extra + data.draw(st.integers(0, entry.file_size - 1))
  content[at] ^= 1 << data.draw(st.integers(0, 7))
  with tempfile.TemporaryDirectory() as scratch:
    path = Path(scratch) / 'ckpt.pt'
    path.write_bytes(content)
    with pytest.raises(UserError, match='CRC-32'):
      value = torch_files.read(path)
      for part in jax.tree.leaves(value):
        if isinstance(part, Tensor):
          part.read()
      raise AssertionError('it was read')


def test_a_zip_file_without_checksums_is_read(tmp_path):
  """torch.serialization.set_crc32_options(False) leaves zeros in all of the headers."""
  content = bytearray((GOLDEN / 'foreign_nanogpt.pt').read_bytes())
  with zipfile.ZipFile(io.BytesIO(content)) as archive:
    sums = [struct.pack('<I', info.CRC) for info in archive.infolist()]
    start = archive.start_dir
  for crc in sums:
    at = content.index(crc, start)
    content[at : at + 4] = bytes(4)
  (tmp_path / 'ckpt.pt').write_bytes(content)
  want = torch_files.read(GOLDEN / 'foreign_nanogpt.pt')['model']
  have = torch_files.read(tmp_path / 'ckpt.pt')['model']
  for name, each in want.items():
    assert_bits(have[name].read(), each.read())


def changed(**parts) -> dict:
  """The golden nanoGPT checkpoint, to be written with other parts."""
  value = torch_files.read(GOLDEN / 'foreign_nanogpt.pt')
  model = {key: tensor for key, tensor in value['model'].items() if not key.endswith('.attn.bias')}
  return {
    'model': model | parts.pop('model', {}),
    'model_args': value['model_args'] | parts.pop('model_args', {}),
  } | parts


def tensor(*shape, dtype='float32', value=1.0) -> Tensor:
  return Tensor(shape, dtype, lambda: np.full(shape, value, dtype))


@pytest.mark.parametrize(
  'parts,message',
  [
    (dict(model={'transformer.extra': tensor(2)}), 'extra'),
    (dict(model={'transformer.h.2.ln_1.weight': tensor(12)}), r'h\.2\.ln_1\.weight'),
    (dict(model={'transformer.ln_f.weight': tensor(11)}), r'ln_f\.weight \[11\] instead of \[12\]'),
    (dict(model={'transformer.h.0.attn.c_attn.weight': tensor(12, 36)}), r'\[36, 12\] instead of'),
    (dict(model={'transformer.ln_f.weight': tensor(12, dtype='int64')}), 'int64'),
    (dict(model={'transformer.ln_f.weight': tensor(12, value=np.nan)}), 'NaN'),
    (dict(model={'transformer.ln_f.weight': 3}), 'something else than tensors'),
    (dict(model={'lm_head.weight': tensor(13, 12)}), 'nanoGPT ties'),
    (dict(model_args={'n_layer': 3}), r'lacks the tensors: h\.2'),
    (dict(model_args={'n_layer': 10**12}), 'n_layer'),
    (dict(model_args={'vocab_size': 10**12}), 'vocab_size = 1000000000000 must be'),
    (dict(model_args={'vocab_size': 10**8}), r'wte\.weight is \(13, 12\)'),
    (dict(model_args={'block_size': 4}), r'wpe\.weight is \(8, 12\)'),
    (dict(model_args={'n_head': 5}), 'multiple of n_head'),
    (dict(model_args={'n_head': 0}), 'n_head = 0 must be a whole number from 1'),
    (dict(model_args={'n_embd': '12'}), "n_embd = '12' must be a whole number"),
    (dict(model_args={'dropout': 'x'}), 'dropout'),
    (dict(model_args={'bias': False}), 'bias = False'),
    (dict(model_args={'use_rmsnorm': True}), 'use_rmsnorm'),
    (dict(model_args=[], model=[]), 'no model and model_args'),
  ],
)
def test_nanogpts_that_contradict_themselves(tmp_path, parts, message):
  value = changed(**parts) if isinstance(parts.get('model', {}), dict) else parts
  torch_writing.write(tmp_path / 'ckpt.pt', value)
  with pytest.raises(UserError, match=message) as error:
    nanogpt.open_source(tmp_path).tensor('ln_f.weight')
  assert 'ckpt.pt' in str(error.value)


def test_nanogpt_lacks_a_tensor_or_has_an_equal_head(tmp_path):
  value = changed()
  head = value['model']['transformer.wte.weight'].read()
  value['model']['lm_head.weight'] = Tensor(head.shape, 'float32', lambda: head)  # a copy
  torch_writing.write(tmp_path / 'ckpt.pt', value)
  nanogpt.open_source(tmp_path)
  for name, message in (
    ('h.1.mlp.c_fc.bias', r'lacks the tensors: h\.1\.mlp\.c_fc\.bias'),
    ('wte.weight', 'wte.weight is missing'),
  ):
    value = changed()
    del value['model'][f'transformer.{name}']
    torch_writing.write(tmp_path / f'{name}.pt', value)
    with pytest.raises(UserError, match=message):
      nanogpt.open_source(tmp_path / f'{name}.pt')


@pytest.mark.parametrize(
  'at,value,message',
  [
    (0, 20240520, 'no header'),
    (1, 1, 'version 1'),
    (2, 0, 'make no sense'),
    (3, 129, 'no sense'),
    (4, 2**31 - 1, 'bytes instead of'),
    (5, 5, 'multiple of n_head'),
    (6, -12, 'make no sense'),
    (7, 256, 'bytes instead of'),
  ],
)
def test_llmc_headers(tmp_path, at, value, message):
  content = bytearray((GOLDEN / 'foreign_llmc_v3.bin').read_bytes())
  content[4 * at : 4 * at + 4] = struct.pack('<i', value)
  (tmp_path / 'model.bin').write_bytes(content)
  assert llmc.recognises(tmp_path / 'model.bin') == (at != 0)
  with pytest.raises(UserError, match=message) as error:
    llmc.open_source(tmp_path / 'model.bin')
  assert 'model.bin' in str(error.value)
  assert not llmc.recognises(tmp_path)


@pytest.mark.parametrize(
  'content,message',
  [
    (b'', 'too early'),
    (b'\x81\xa1a\xc0', 'no array'),
    (b'\xdf\xff\xff\xff\xff', 'too early'),
    (b'\x81\xa1a' * 5000 + b'\x01', 'recursion'),
    (b'\x01', 'no array'),
    (b'\x80\x80', 'behind'),
    (b'\x81\xdb\xff\xff\xff\xff', 'too early'),
    (b'\x81\x01\x01', 'names'),
    (b'\x81\xa1a\xd4\x02\x00', 'extension'),
    (b'\x81\xa1a\xc9\xff\xff\xff\xff\x01\x93\x91\x04\xa7float32\xc6\xff\xff\xff\xf0', 'exceeds'),
    (b'\x81\xa1a\xc7\x15\x01\x93\x91\xcf' + b'\xff' * 8 + b'\xa7float32\xc4\x08', 'incomplete'),
    (
      b'\x81\xa1a\xc7\x1d\x01\x93\x91\xcf' + b'\xff' * 8 + b'\xa7float32\xc4\x08aaaaaaaa',
      'contradicts',
    ),
    (b'\x81\xa1a\xd8\x01\x93\x91\x01\xa6object\xc4\x04aaaa', 'object'),
    (b'\x81\xa1a\x81\xb9__msgpack_chunked_array__\xc3', 'pieces'),
  ],
)
def test_flax_files_that_are_not(tmp_path, content, message):
  path = folder(tmp_path / 'flax', flax_msgpack.FILE, content)
  with pytest.raises(UserError, match=message) as error:
    flax_msgpack.open_source(path)
  assert flax_msgpack.FILE in str(error.value)


def test_flax_files_that_another_config_describes(tmp_path):
  content = (GOLDEN / 'foreign_flax_model.msgpack').read_bytes()
  for keys, message in (
    ({'n_embd': 24}, 'wte.weight'),
    ({'n_layer': 3}, r'h\.2'),
    ({'n_layer': 1}, r'h\.1'),
    ({'tie_word_embeddings': False}, 'lm_head'),
  ):
    path = folder(
      tmp_path / 'flax', flax_msgpack.FILE, content, json.dumps(json.loads(CONFIG) | keys)
    )
    with pytest.raises(UserError, match=message):
      flax_msgpack.open_source(path)
  (path / 'config.json').unlink()
  with pytest.raises(UserError, match=r'config\.json is missing'):
    flax_msgpack.open_source(path)

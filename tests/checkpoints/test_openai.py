"""OpenAI's folders: against TensorFlow's own files (golden/make_openai.py), and hostile ones."""

import dataclasses
import hashlib
import importlib.util
import json
import shutil
import struct
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.arrays import assert_close
from support.processes import ROOT, run

from gpt2_jax.checkpoints.formats import openai, tensor_bundle
from gpt2_jax.checkpoints.formats.crc32c import crc32c, masked_crc32c
from gpt2_jax.checkpoints.opening import Opening
from gpt2_jax.checkpoints.tensors import Source, Tensor, load_params, shapes
from gpt2_jax.core.errors import UserError
from gpt2_jax.model.config import GPTConfig
from gpt2_jax.model.gpt2 import bind
from gpt2_jax.tokenizer import bpe

GOLDEN = ROOT / 'tests' / 'golden' / 'openai'
EXPECTED = dict(np.load(GOLDEN / 'expected.npz'))
CONFIG = GPTConfig(
  vocab_size=13,
  n_positions=8,
  n_embd=12,
  n_layer=2,
  n_head=3,
  embd_pdrop=0.0,
  attn_pdrop=0.0,
  resid_pdrop=0.0,
)
INDEX, DATA = 'model.ckpt.index', 'model.ckpt.data-00000-of-00001'


def made(seed: int = 0, dtype: str = 'float32', spoil=lambda tensors: None, **fields) -> Source:
  """A random model, in memory."""
  config = dataclasses.replace(CONFIG, **fields)
  rng = np.random.default_rng(seed)
  tensors = {name: rng.normal(size=shape).astype(dtype) for name, shape in shapes(config).items()}
  spoil(tensors)
  return Source(config, tensors.__getitem__, dtype, 'made')


def same_bits(have: np.ndarray, want: np.ndarray) -> None:
  assert have.dtype == want.dtype and have.shape == want.shape
  assert have.tobytes() == want.tobytes()


def same_model(have: Source, want: Source) -> None:
  assert have.config == want.config and have.dtype == want.dtype
  for name in shapes(want.config):
    same_bits(have.tensor(name), want.tensor(name))


def bundle(path: Path, tensors: dict[str, np.ndarray]) -> dict[str, Tensor]:
  """Writes a checkpoint; returns it opened."""
  tensor_bundle.write(
    path,
    {
      name: Tensor(value.shape, str(value.dtype), lambda value=value: value)
      for name, value in tensors.items()
    },
  )
  return tensor_bundle.read(path)


def edited(folder: Path, **changes) -> Path:
  """The golden variables in a folder, with some changed, or removed (None)."""
  folder.mkdir(exist_ok=True)
  (folder / 'hparams.json').write_text((GOLDEN / 'plain' / 'hparams.json').read_text())
  tensors = EXPECTED | {name.replace('__', '/'): value for name, value in changes.items()}
  bundle(folder / 'model.ckpt', {k: v for k, v in tensors.items() if v is not None})
  return folder


@pytest.fixture
def plain(tmp_path) -> Path:
  """A copy of the golden folder."""
  return Path(shutil.copytree(GOLDEN / 'plain', tmp_path / 'plain'))


# What TensorFlow wrote.


@pytest.mark.parametrize('folder', ['plain', 'tuned', 'shards'])
def test_reads_what_tensorflow_wrote(folder):
  assert openai.recognises(GOLDEN / folder)
  source = openai.open_source(GOLDEN / folder)
  assert source.config == CONFIG and source.dtype == 'float32' and source.tokenizer is None
  for name in shapes(CONFIG):
    want = EXPECTED[openai.variable(name)]
    same_bits(source.tensor(name), want[0] if want.ndim == 3 else want)


@pytest.mark.parametrize('folder', ['plain', 'tuned', 'shards'])
def test_writes_the_same_bytes_as_tensorflow(folder, tmp_path):
  openai.write(openai.open_source(GOLDEN / folder), tmp_path / 'new')
  for file in ('checkpoint', 'hparams.json', INDEX, DATA):
    assert (tmp_path / 'new' / file).read_bytes() == (GOLDEN / 'plain' / file).read_bytes()


def test_reads_tensorflows_types():
  tensors = tensor_bundle.read(GOLDEN / 'types')
  for dtype in ('float16', 'bfloat16', 'float64', 'int32', 'int64'):
    same_bits(tensors[f'x/{dtype}'].read(), np.arange(-3, 3).astype(dtype))
  same_bits(tensors['x/scalar'].read(), np.array(2.5, np.float32))
  same_bits(tensors['x/empty'].read(), np.zeros((0, 3), np.float32))
  with pytest.raises(UserError, match='x/string is of the type DT_7'):
    tensors['x/string'].read()
  with pytest.raises(UserError, match=r"'x' is saved in slices .* without a partitioner"):
    tensor_bundle.read(GOLDEN / 'sliced')


def test_same_logits_as_openais_code():
  """Against openai/gpt-2 `src/model.py`, in float64, from TensorFlow's variables."""
  w = {name.removeprefix('model/'): value.astype(np.float64) for name, value in EXPECTED.items()}
  tokens = np.array([[3, 1, 4, 1, 5, 9, 2, 6]])
  T, N = tokens.shape[1], CONFIG.n_head

  def norm(x, scope):
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    return x * w[f'{scope}/g'] + w[f'{scope}/b']

  def conv1d(x, scope):
    return x @ w[f'{scope}/w'][0] + w[f'{scope}/b']

  def attn(x, scope):
    q, k, v = (
      part.reshape(T, N, -1).swapaxes(0, 1)
      for part in np.split(conv1d(x, f'{scope}/c_attn'), 3, axis=-1)
    )
    scores = q @ k.swapaxes(1, 2) / np.sqrt(q.shape[-1])
    scores = np.where(np.tri(T, dtype=bool), scores, -1e10)
    scores = np.exp(scores - scores.max(-1, keepdims=True))
    heads = scores / scores.sum(-1, keepdims=True) @ v
    return conv1d(heads.swapaxes(0, 1).reshape(T, -1), f'{scope}/c_proj')

  def mlp(x, scope):
    h = conv1d(x, f'{scope}/c_fc')
    h = 0.5 * h * (1 + np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3)))
    return conv1d(h, f'{scope}/c_proj')

  x = w['wte'][tokens[0]] + w['wpe'][:T]
  for i in range(CONFIG.n_layer):
    x = x + attn(norm(x, f'h{i}/ln_1'), f'h{i}/attn')
    x = x + mlp(norm(x, f'h{i}/ln_2'), f'h{i}/mlp')
  want = norm(x, 'ln_f') @ w['wte'].T

  source = openai.open_source(GOLDEN / 'plain')
  params = load_params(source)
  logits = jax.jit(lambda params, x: bind(source.config, params)(x))(params, jnp.array(tokens))
  assert_close(logits[0, :, : CONFIG.vocab_size], want)


# What we write.


@settings(deadline=None, max_examples=10)
@given(
  st.integers(0, 2**31),
  st.integers(1, 40),
  st.integers(1, 9),
  st.integers(1, 4),
  st.integers(1, 3),
  st.integers(1, 5),
)
def test_model_round_trip(tmp_path_factory, seed, V, Q, L, N, H):
  path = tmp_path_factory.mktemp('model')
  source = made(seed, vocab_size=V, n_positions=Q, n_embd=N * H, n_layer=L, n_head=N)
  openai.write(source, path / '1')
  again = openai.open_source(path / '1')
  same_model(again, source)
  openai.write(again, path / '2')
  for file in ('checkpoint', 'hparams.json', INDEX, DATA):
    assert (path / '1' / file).read_bytes() == (path / '2' / file).read_bytes()


ARRAYS = st.tuples(
  st.sampled_from(['float32', 'float64', 'int32', 'int64', 'bfloat16', 'float16']),
  st.lists(st.integers(0, 5), max_size=4),
  st.integers(0, 2**31),
)


@settings(deadline=None, max_examples=25)
@given(
  st.dictionaries(
    st.text(st.characters(codec='utf-8', exclude_characters='\0'), min_size=1), ARRAYS, max_size=60
  ),
  st.integers(1, 3000),
)
def test_bundle_round_trip(tmp_path_factory, arrays, block):
  """Bit for bit, NaNs included, from tables of one block to tables of a block for each entry."""
  path = tmp_path_factory.mktemp('bundle') / 'x'
  tensors = {}
  for name, (dtype, shape, seed) in arrays.items():
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    tensors[name] = np.frombuffer(np.random.default_rng(seed).bytes(size), dtype).reshape(shape)
  with mock.patch.object(tensor_bundle, 'BLOCK', block):
    found = bundle(path, tensors)
  assert list(found) == sorted(tensors, key=str.encode)
  for name, value in tensors.items():
    same_bits(found[name].read(), value)


def test_many_variables_fill_several_blocks(tmp_path):
  tensors = {f'a/long/prefix/{i:06d}': np.full(1, i, np.float32) for i in range(12000)}
  found = bundle(tmp_path / 'x', tensors)
  assert (tmp_path / 'x.index').stat().st_size > tensor_bundle.BLOCK
  assert found.keys() == tensors.keys()
  same_bits(found['a/long/prefix/011999'].read(), np.array([11999], np.float32))


def test_tensorflow_reads_what_we_write(tmp_path):
  if importlib.util.find_spec('tensorflow') is None:  # not imported here: it warns
    pytest.skip('no tensorflow')
  source = made(n_layer=11, n_embd=24)
  with mock.patch.object(tensor_bundle, 'BLOCK', 300):
    openai.write(source, tmp_path / 'blocks')
  openai.write(source, tmp_path / 'plain')
  want = {openai.variable(name): source.tensor(name) for name in shapes(source.config)}
  np.savez(tmp_path / 'want.npz', **want)  # pyright: ignore[reportArgumentType]
  for folder in ('blocks', 'plain'):
    done = run(
      '-c',
      f"""
import numpy as np, tensorflow as tf
reader = tf.train.load_checkpoint({str(tmp_path / folder)!r})
want = np.load({str(tmp_path / 'want.npz')!r})
assert set(reader.get_variable_to_shape_map()) == set(want)
for name, value in want.items():
  have = reader.get_tensor(name)
  assert have.shape == ((1,) if name.endswith('/w') else ()) + value.shape, name
  assert have.dtype == value.dtype and have.tobytes() == value.tobytes(), name
print('all read')
""",
    )
    assert 'all read' in done.stdout, done.stderr


def test_writes_the_released_vocabulary(tmp_path):
  source = dataclasses.replace(made(), tokenizer=bpe.load('gpt2'))
  openai.write(source, tmp_path / 'new')
  for name, sha256 in (
    ('encoder.json', '196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783'),
    ('vocab.bpe', '1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5'),
  ):
    assert hashlib.sha256((tmp_path / 'new' / name).read_bytes()).hexdigest() == sha256


def test_tokenizer_round_trip(tmp_path):
  ours = bpe.train_bpe(['the cat sat on the mat, the cat sat äöü'] * 3, 270)
  source = dataclasses.replace(made(vocab_size=ours.vocab_size), tokenizer=ours)
  openai.write(source, tmp_path / 'new')
  again = openai.open_source(tmp_path / 'new').tokenizer
  assert again is not None and again.sha256 == ours.sha256


def test_gpt2s_tokenizer_goes_with_gpt2s_vocabulary(tmp_path):
  openai.write(made(vocab_size=50257, n_embd=3), tmp_path / 'new')
  found = openai.open_source(tmp_path / 'new').tokenizer
  assert found is not None and found.sha256 == bpe.load('gpt2').sha256


@pytest.mark.parametrize(
  'fields',
  [
    {'tie_word_embeddings': False},
    {'n_inner': 20},
    {'layer_norm_epsilon': 1e-6},
    {'scale_attn_weights': False},
    {'scale_attn_by_inverse_layer_idx': True},
    {'reorder_and_upcast_attn': True},
    {'activation_function': 'gelu'},
    {'head': 'sequence_classification'},
  ],
)
def test_refuses_to_write_what_the_format_lacks(fields, tmp_path):
  with pytest.raises(UserError, match=f"can't express {next(iter(fields))} = "):
    openai.write(made(**fields), tmp_path / 'new')
  assert not (tmp_path / 'new').exists()


def test_equal_functions_under_other_names_are_written(tmp_path):
  openai.write(made(n_inner=48, activation_function='gelu_pytorch_tanh'), tmp_path / 'new')
  assert openai.open_source(tmp_path / 'new').config == CONFIG


def test_refuses_other_dtypes(tmp_path):
  with pytest.raises(UserError, match='made is bfloat16: say --dtype float32'):
    openai.write(made(dtype='bfloat16'), tmp_path / 'new')
  openai.write(made(dtype='bfloat16').astype('float32'), tmp_path / 'new')


def test_refuses_nan(tmp_path):
  def spoil(tensors):
    tensors['h.1.mlp.c_fc.bias'][3] = np.nan

  with pytest.raises(UserError, match='h.1.mlp.c_fc.bias has 1 values that are NaN'):
    openai.write(made(spoil=spoil), tmp_path / 'new')


# Checksums.


def bitwise(data: bytes) -> int:
  crc = 0xFFFFFFFF
  for byte in data:
    crc ^= byte
    for _ in range(8):
      crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
  return crc ^ 0xFFFFFFFF


@pytest.mark.parametrize(
  'data, want',
  [
    (b'123456789', 0xE3069283),
    (b'', 0),
    (bytes(32), 0x8A9136AA),
    (b'\xff' * 32, 0x62A8AB43),
    (bytes(range(32)), 0x46DD794E),
    (bytes(range(31, -1, -1)), 0x113FDB5C),
  ],
)
def test_crc32c_of_the_rfc(data, want):
  """RFC 3720, appendix B.4; the first is the check value of the catalogues of CRCs."""
  assert crc32c(np.frombuffer(data, np.uint8)) == want == bitwise(data)


@settings(deadline=None, max_examples=25)
@given(st.binary(max_size=2000), st.sampled_from([1, 2, 8, 64]))
def test_crc32c(data, lanes):
  with mock.patch('gpt2_jax.checkpoints.formats.crc32c.LANES', lanes):
    assert crc32c(np.frombuffer(data, np.uint8)) == bitwise(data)


def test_crc32c_of_several_rows():
  data = np.random.default_rng(0).bytes(2 * 2**16 + 4321)
  assert crc32c(np.frombuffer(data, np.uint8)) == bitwise(data)


# Broken and hostile files.


def spoilt(folder: Path, match: str) -> None:
  with pytest.raises(UserError, match=match):
    source = openai.open_source(folder)
    for name in shapes(source.config):
      source.tensor(name)


@settings(deadline=None, max_examples=25)
@given(st.sampled_from([INDEX, DATA]), st.floats(0, 1, exclude_max=True))
def test_a_file_cut_short(tmp_path_factory, name, part):
  folder = Path(shutil.copytree(GOLDEN / 'plain', tmp_path_factory.mktemp('cut') / 'x'))
  whole = (folder / name).read_bytes()
  (folder / name).write_bytes(whole[: int(part * len(whole))])
  spoilt(folder, rf'{name} can\'t be read: .* cut short or broken')


def test_a_file_cut_short_after_opening(plain):
  source = openai.open_source(plain)
  (plain / DATA).write_bytes(b'')
  with pytest.raises(UserError, match='ends within model/wte'):
    source.tensor('wte.weight')
  (plain / DATA).unlink()
  with pytest.raises(UserError, match=DATA):
    source.tensor('wte.weight')


def test_flipped_bits_of_the_index(plain):
  """Each byte: an error, or (in the footer, whose zeros mean nothing) the same tensors."""
  whole = (plain / INDEX).read_bytes()

  def entries():
    found = tensor_bundle.read(plain / 'model.ckpt')
    return {name: (t.shape, t.dtype, t.read.args) for name, t in found.items()}

  want = entries()
  harmless = []
  for at in range(len(whole)):
    (plain / INDEX).write_bytes(whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :])
    try:
      found = entries()
    except UserError as e:
      assert 'model.ckpt.index' in str(e) and "can't be read" in str(e)
      continue
    assert found == want
    harmless.append(at)
  used = whole.rindex(b'\0\0\0\0\x01\0\0\0\0\xc0\xf2\xa1\xb0')  # the block of no entries, not read
  assert min(harmless) >= used and len(harmless) < 70


@settings(deadline=None, max_examples=20)
@given(st.integers(0, (GOLDEN / 'plain' / DATA).stat().st_size * 8 - 1))
def test_flipped_bits_of_the_data(tmp_path_factory, bit):
  folder = Path(shutil.copytree(GOLDEN / 'plain', tmp_path_factory.mktemp('flip') / 'x'))
  data = bytearray((folder / DATA).read_bytes())
  data[bit // 8] ^= 1 << bit % 8
  (folder / DATA).write_bytes(data)
  with pytest.raises(UserError, match=f"{DATA} can't be read: the checksum of model/.* is wrong"):
    for tensor in tensor_bundle.read(folder / 'model.ckpt').values():
      tensor.read()


def table(path: Path, entries, kind: int = 0) -> None:
  """An index with such entries, whose checksums are right, though its blocks may be marked."""
  data = bytearray(tensor_bundle._to_table([(b'', b'\x08\x01'), *entries]))
  if kind:
    at = data.index(b'\0\0\0\0\x01\0\0\0\0\xc0\xf2\xa1\xb0') - 5  # the end of the first block
    data[at] = kind
    data[at + 1 : at + 5] = struct.pack('<I', masked_crc32c(np.frombuffer(data[: at + 1], np.uint8)))
  path.write_bytes(data)


def entry(size: int = 4, offset: int = 0, shard: int = 0, dims=(1,), dtype: int = 1) -> bytes:
  field = tensor_bundle._field
  shape = b''.join(field(2, field(1, n)) for n in dims)
  return field(1, dtype) + field(2, shape) + field(3, shard) + field(4, offset) + field(5, size)


@pytest.mark.parametrize(
  'entries, match',
  [
    ([(b'x', entry(size=8))], 'x has 8 bytes, but is float32'),
    ([(b'x', entry(size=2**62, dims=(2**60,)))], 'x ends at byte'),
    ([(b'x', entry(offset=2**63))], 'x ends at byte'),
    ([(b'x', entry(shard=1))], 'shard 1 of 1'),
    ([(b'x', entry(dims=(2**64 - 1,)))], 'x has 4 bytes'),  # -1
    ([(b'x', entry(dims=[1] * 300))], 'a tensor has 300 dimensions'),
    ([(b'x', b'\x08')], 'a number has no end'),
    ([(b'x', b'\x08' + b'\xff' * 11)], 'a number has no end'),
    ([(b'x', b'\x12\x7f')], 'a field has no end'),
    ([(b'x', b'\x0f')], 'unknown kind 7'),
    ([(b'\xc3', entry())], 'decode'),
    ([(b'x', entry()), (b'x', entry())], 'not in order'),
    ([(b'y', entry()), (b'x', entry())], 'not in order'),
    ([(b'x' * 5000, entry())], 'an entry of a block is broken'),
  ],
)
def test_hostile_entries(entries, match, tmp_path):
  """Checksums are right here: who means harm can compute them."""
  table(tmp_path / 'x.index', entries)
  (tmp_path / 'x.data-00000-of-00001').write_bytes(bytes(64))
  with pytest.raises(UserError, match=match):
    tensor_bundle.read(tmp_path / 'x')


@settings(deadline=None, max_examples=25)
@given(
  st.lists(
    st.tuples(
      st.binary(min_size=1, max_size=9).filter(lambda key: key[0] < 255), st.binary(max_size=40)
    ),
    max_size=4,
  )
)
def test_entries_of_any_bytes(tmp_path_factory, entries):
  path = tmp_path_factory.mktemp('any')
  table(path / 'x.index', entries)
  (path / 'x.data-00000-of-00001').write_bytes(bytes(64))
  try:
    found = tensor_bundle.read(path / 'x')
    for tensor in found.values():
      tensor.read()
  except UserError as e:
    assert 'x.' in str(e)


def test_a_compressed_index(tmp_path):
  table(tmp_path / 'x.index', [(b'x', entry())], kind=1)
  with pytest.raises(UserError, match=r'compressed \(kind 1\)'):
    tensor_bundle.read(tmp_path / 'x')


def test_a_huge_index_is_not_read(plain):
  with open(plain / INDEX, 'r+b') as file:
    file.truncate(2**40)  # takes no room
  spoilt(plain, 'at most 4,194,304 bytes')


def test_missing_files(plain):
  (plain / DATA).unlink()
  spoilt(plain, f'{DATA} is not there, but {INDEX} needs it: fetch it')
  (plain / INDEX).unlink()
  assert not openai.recognises(plain)
  spoilt(plain, f'lacks {INDEX}')


@pytest.mark.parametrize(
  'changes, match',
  [
    ({'model__h1__mlp__c_fc__b': None}, 'lacks the tensors:? h.1.mlp.c_fc.bias'),
    ({'model__h1__mlp__c_fc__g': np.zeros(3, np.float32)}, 'does not: model/h1/mlp/c_fc/g'),
    ({'model__ln_f__g': np.zeros(3, np.float32)}, r'ln_f.weight \[3\] instead of \[12\]'),
    (
      {'model__h0__mlp__c_fc__w': np.zeros((1, 48, 12), np.float32)},
      r'h.0.mlp.c_fc.weight \[48, 12\] instead of \[12, 48\]',
    ),
    ({'model__h0__mlp__c_fc__w': np.zeros((12, 48), np.float32)}, r'OpenAI\'s are \[1, in, out\]'),
    ({'model__wte': None}, r'embeddings of \[\] and'),
    ({'model__h2__ln_1__b': np.zeros(12, np.float32)}, 'but 3 layers'),
    ({'model__wte': np.zeros((13, 12), np.int64)}, 'tensors of dtype int64'),
    ({'model__wte': np.full((13, 12), np.inf, np.float32)}, 'wte.weight has 156 values that are NaN'),
  ],
)
def test_wrong_variables(changes, match, tmp_path):
  spoilt(edited(tmp_path / 'x', **changes), match)


def test_half_precision_is_read(tmp_path):
  halves = {name.replace('/', '__'): value.astype(np.float16) for name, value in EXPECTED.items()}
  source = openai.open_source(edited(tmp_path / 'x', **halves))
  assert source.dtype == 'float16'
  same_bits(source.tensor('wpe.weight'), EXPECTED['model/wpe'].astype(np.float16))


@pytest.mark.parametrize(
  'text, match',
  [
    ('{', "can't be read"),
    ('[]', 'it must hold n_vocab'),
    ('[' * 10**5, "can't be read"),
    ('{"n_vocab": 13}', 'it must hold n_vocab, n_ctx'),
    ('\xff', "can't be read"),
    ({'n_ctx': '8'}, "n_ctx = '8' must be a whole number"),
    ({'n_ctx': True}, 'n_ctx = True must be a whole number'),
    ({'n_head': 0}, 'n_head = 0 must be a whole number from 1'),
    ({'n_head': 5}, 'multiple of n_head = 5'),
    ({'n_layer': 10**9}, 'n_layer = 1000000000 must be'),
    ({'n_layer': 10**4}, '10000 layers'),
    ({'n_ctx': 9}, r'\[9, 12\]'),
    ({'n_vocab': 10**30}, 'n_vocab = 1'),
    ({'n_vocab': 10**8}, 'contradicts'),
    ({'sparse': 1}, "can't honour: sparse"),
  ],
)
def test_hparams(text, match, plain):
  hparams = json.loads((plain / 'hparams.json').read_text())
  text = text if isinstance(text, str) else json.dumps(hparams | text)
  (plain / 'hparams.json').write_bytes(text.encode('latin-1'))
  spoilt(plain, match)


@pytest.mark.parametrize(
  'name',
  ['../other/model.ckpt', '/etc/passwd', '..', '', '.', 'a/..', '..\\..\\x', '-x', 'x\0y', 'x*'],
)
def test_checkpoint_names_nothing_outside_of_the_folder(name, plain):
  shutil.copytree(plain, plain.parent / 'other')
  bundle(plain.parent / 'other' / 'model.ckpt', {'evil': np.zeros(1, np.float32)})
  (plain / 'checkpoint').write_text(f'model_checkpoint_path: "{name}"\n')
  same_model(openai.open_source(plain), openai.open_source(GOLDEN / 'plain'))
  (plain / INDEX).unlink()
  spoilt(plain, 'lacks model.ckpt.index: .* name the checkpoint')


def test_checkpoint_of_a_folder_that_was_moved(tmp_path):
  folder = Path(shutil.copytree(GOLDEN / 'tuned', tmp_path / 'x'))
  (folder / 'checkpoint').write_text('model_checkpoint_path: "/home/me/run1/model-7"\n')
  same_model(openai.open_source(folder), openai.open_source(GOLDEN / 'plain'))
  (folder / 'checkpoint').write_bytes(b'\xff')
  spoilt(folder, "checkpoint can't be read")
  (folder / 'checkpoint').unlink()
  spoilt(folder, 'lacks model.ckpt.index')


def test_recognises_nothing_else(tmp_path):
  assert not openai.recognises(tmp_path / 'none')
  assert not openai.recognises(tmp_path)
  (tmp_path / 'hparams.json').write_text('{}')
  assert not openai.recognises(tmp_path)
  assert not openai.recognises(tmp_path / 'hparams.json')


def test_a_head_beside_the_model_and_settings_that_are_off(plain, capfd):
  source = openai.open_source(plain)
  want = {name: source.tensor(name) for name in shapes(source.config)}
  hparams = json.loads((plain / 'hparams.json').read_text())
  (plain / 'hparams.json').write_text(json.dumps(hparams | {'n_inner': None, 'precision': False}))
  arrays = {name: tensor.read() for name, tensor in tensor_bundle.read(plain / openai.PREFIX).items()}
  head = {'model/heads/value/w': np.ones((12, 1), np.float64)}
  bundle(plain / openai.PREFIX, arrays | head)
  with pytest.raises(UserError, match='model/heads/value/w.*--ignore-extra'):
    openai.open_source(plain)
  source = openai.open_source(plain, Opening(ignore_extra=True))
  assert 'left out' in capfd.readouterr().err and source.dtype == 'float32'
  for name, value in want.items():
    same_bits(source.tensor(name), value)
  bundle(plain / openai.PREFIX, arrays | {'model/h0/attn/q_norm/g': np.ones(3, np.float32)})
  with pytest.raises(UserError, match='model/h0/attn/q_norm/g.*model itself'):
    openai.open_source(plain, Opening(ignore_extra=True))

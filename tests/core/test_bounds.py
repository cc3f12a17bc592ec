"""Every value from outside is in its bounds, or an error in one line, and nothing else."""

import dataclasses
import functools
import json
import math
import shutil
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags as absl_flags
from hypothesis import given, settings
from hypothesis import strategies as st
from ml_collections import ConfigDict
from support.processes import ROOT

import gpt2_jax
from configs import base
from gpt2_jax.checkpoints import model_card, pretrained
from gpt2_jax.checkpoints.formats import (
  huggingface_config,
  llmc,
  nanogpt,
  openai,
  torch_files,
  torch_writing,
)
from gpt2_jax.cli import flags, main
from gpt2_jax.core.bounds import Bool, Choice, DType, Float, Int, Optional, Place, Text, Tuple
from gpt2_jax.core.errors import UserError
from gpt2_jax.data import splits
from gpt2_jax.decoding.generate import own_ends
from gpt2_jax.model import sizes
from gpt2_jax.model.config import LORA, MODEL, GPTConfig, LoRA
from gpt2_jax.model.gpt2 import bind, make_params
from gpt2_jax.training import knobs, memory_estimate, run_data, run_plan, train
from gpt2_jax.training.run import evaluate

GOLDEN = ROOT / 'tests' / 'golden'
LONG = 'x' * 200_000
VALUES = [
  'x',
  '',
  LONG,
  '\0',
  -1,
  0,
  1,
  3,
  2**31,
  2**63,
  -(2**63),
  10**30,
  10**4000,
  1.5,
  math.nan,
  math.inf,
  -1e300,
  1e30,
  1e-300,
  None,
  True,
  False,
  [],
  [1],
  [2, 3],
  ['x'],
  [[]],
  {},
  {'a': 1},
]


def said(error: Exception) -> str:
  """The message, which must be one line, and short."""
  text = str(error)
  assert '\n' not in text and 10 < len(text) < 1200, text[:2000]
  return text


# --- tables ---------------------------------------------------------------------------------------


def sections(config):
  return {name: section for name, section in config.items() if isinstance(section, ConfigDict)}


def test_every_knob_and_field_has_a_row():
  config = base.get_config()
  assert {name: set(section) for name, section in sections(config).items()} == {
    name: set(table) for name, table in knobs.SECTIONS.items()
  }
  assert set(config) - sections(config).keys() == set(knobs.TOP)
  names = lambda made: {field.name for field in dataclasses.fields(made)}
  assert names(GPTConfig) == {*MODEL, 'lora'} and names(LoRA) == set(LORA)
  assert names(splits.Settings) == set(splits.SETTINGS)
  knobs.check(config)


@pytest.mark.parametrize('verb', flags.FLAGS)
def test_every_flag_has_a_row(verb):
  """Beside those that tyro checks by itself, and what may be any text."""
  for field in dataclasses.fields(getattr(main, verb)):
    by_type = field.type is bool or 'Literal' in str(field.type)
    elsewhere = ('prompt', 'prompt_ids', 'options', 'opening', 'api_key', 'overrides')
    if field.name not in (*elsewhere, 'allow_host', 'allow_origin') and not by_type:
      assert field.name in flags.FLAGS[verb], field.name


@pytest.mark.parametrize(
  'kind,right,wrong',
  [
    (
      Int(1, 5),
      [1, 5, np.int64(3), np.uint8(2), jnp.int32(4)],
      [0, 6, 1.0, '1', True, None, 10**5000],
    ),
    (
      Float(0, 1),
      [0, 1, 0.5, np.float32(0.5), jnp.bfloat16(0.5)],
      [-1e-9, 1.1, math.nan, math.inf, '0.5', True, 1j, [], 10**400],
    ),
    (Float(0, 1, open_low=True, open_high=True), [0.5], [0, 1, 1.0]),
    (Bool(), [True, np.False_], [0, 1, 'true', None]),
    (Choice(('a', 'b')), ['a'], ['c', '', None, [], ['a'], 1]),
    (
      DType(('float32', 'bfloat16')),
      ['float32', np.float32, jnp.bfloat16, np.dtype('float32'), 'f4'],
      [None, 'int8', np.int8, float, jnp.complex64, 'fl', 3, [], {}, 'f4,f4'],
    ),
    (Text(3, empty=False), ['abc'], ['', 'abcd', '\ud800', 3, None, b'a']),
    (Place(), ['a/b', ROOT, 'text:**/*.txt'], ['', ' ', 'a\0', 'a' * 256, 'a/' * 2048, 3, None]),
    (Optional(Int(1, 5)), [None, 1], [0, 'x']),
    (Tuple(Int(0, 9), 2), [(1, 2), [1, 2]], [(1,), (1, 2, 3), 'ab', (1, 10), 3, None]),
  ],
)
def test_kinds(kind, right, wrong):
  for value in right:
    taken = kind.check('knob', value)
    assert type(taken).__module__ in ('builtins', 'pathlib')
  for value in wrong:
    with pytest.raises(UserError, match=r'^knob = (.|\n)* must ') as error:
      kind.check('knob', value)
    said(error.value)


ANY = st.recursive(
  st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
  lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
  max_leaves=5,
)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(sorted(MODEL)), ANY)
def test_a_field_takes_any_value_or_says_why_not(name, value):
  try:
    taken = MODEL[name].check(name, value)
  except UserError as e:
    assert len(str(e)) < 600
  else:
    assert MODEL[name].check(name, taken) == taken and json.loads(json.dumps(taken)) == taken


# --- models ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  'fields',
  [
    {},
    dict(n_inner=50),
    dict(tie_word_embeddings=False, n_positions=1),
    dict(head='sequence_classification', num_labels=3),
    dict(head='token_classification', num_labels=3, tie_word_embeddings=False),
    dict(lora=dict(r=5, alpha=1, target_modules=('c_attn', 'mlp.c_proj'), dropout=0)),
  ],
)
def test_parameters_are_counted_without_making_them(fields):
  config = GPTConfig(**dict(vocab_size=97, n_embd=36, n_head=3, n_layer=2, vocab_multiple=1) | fields)
  made = jax.eval_shape(lambda: make_params(config, 0))
  assert sizes.num_params(config) == sum(leaf.size for leaf in jax.tree.leaves(made))


def test_a_model_that_no_machine_holds():
  with pytest.raises(UserError, match='has 30,300,003,790,000,000 parameters, and no machine'):
    GPTConfig(n_embd=5 * 10**6, n_head=1, n_inner=10**9, n_layer=3, vocab_size=1, n_positions=1)
  assert GPTConfig(n_embd=2**16, n_head=64, n_layer=200).n_layer == 200  # 10**13 parameters


@functools.cache
def traced(config: GPTConfig):
  """The logits' shape; nothing is computed."""
  params = jax.eval_shape(lambda: make_params(config, 0))
  return jax.eval_shape(lambda p: bind(config, p)(jnp.zeros((1, 1), jnp.int32)), params).shape


def works(open_source, *arguments) -> bool:
  """Whether what is there can be opened; it can then be used and written again."""
  try:
    source = open_source(*arguments)
  except UserError as e:
    said(e)
    return False
  config = source.config
  assert traced(dataclasses.replace(config, vocab_size=config.vocab_size))
  json.dumps(huggingface_config.config_to_dict(source))
  model_card.model_card(source)
  model = types.SimpleNamespace(source=source, config=config)
  assert all(type(i) is int for i in own_ends(model) or [])  # pyright: ignore[reportArgumentType]
  return True


@pytest.mark.parametrize(
  'folder,file',
  [
    ('plain', 'config.json'),
    ('plain', 'generation_config.json'),
    ('sequence', 'config.json'),
    ('lora', 'adapter_config.json'),
  ],
)
def test_any_value_in_hugging_faces_files(folder, file, tmp_path, monkeypatch):
  monkeypatch.chdir(ROOT)  # adapters name their base by a path from there
  copy = tmp_path / 'model'
  shutil.copytree(GOLDEN / 'huggingface' / folder, copy)
  path = copy / file
  keys = json.loads(path.read_text()) if path.exists() else {'eos_token_id': 0, 'bos_token_id': 0}
  assert works(pretrained.open_source, copy)
  results = {}
  for key in keys:
    for value in VALUES:
      path.write_text(json.dumps(keys | {key: value}))
      results[key, repr(value)[:20]] = works(pretrained.open_source, copy)
  assert set(results.values()) == {True, False}


@pytest.mark.parametrize('key', openai.HPARAMS)
def test_any_value_in_openais_hparams(key, tmp_path):
  copy = tmp_path / 'model'
  shutil.copytree(GOLDEN / 'openai' / 'plain', copy)
  hparams = json.loads((copy / 'hparams.json').read_text())
  for value in VALUES:
    (copy / 'hparams.json').write_text(json.dumps(hparams | {key: value}))
    assert works(openai.open_source, copy) == (
      value is hparams[key]
      or (key == 'n_head' and (type(value) is int and value > 0 and hparams['n_embd'] % value == 0))
    ), value


@pytest.mark.parametrize('key', [*nanogpt.SIZES, 'dropout', 'bias'])
def test_any_value_in_nanogpts_model_args(key, tmp_path):
  checkpoint = torch_files.read(GOLDEN / 'foreign_nanogpt.pt')
  for i, value in enumerate(VALUES):
    if not isinstance(value, int) or abs(value) < 2**62:  # what torch's pickles of ours hold
      changed = checkpoint | {'model_args': checkpoint['model_args'] | {key: value}}
      torch_writing.write(tmp_path / f'{i}.pt', changed)
      works(nanogpt.open_source, tmp_path / f'{i}.pt')
    args = checkpoint['model_args'] | {key: value}
    try:
      nanogpt._config(tmp_path, args, nanogpt._tensors(tmp_path, checkpoint['model']))
    except UserError as e:
      said(e)


@pytest.mark.parametrize('place', range(1, 8))
def test_any_number_in_llmcs_header(place, tmp_path):
  data = bytearray((GOLDEN / 'foreign_llmc_v3.bin').read_bytes())
  for value in (-(2**31), -1, 0, 1, 2, 3, 7, 2**16, 2**31 - 1):
    data[4 * place : 4 * place + 4] = value.to_bytes(4, 'little', signed=True)
    (tmp_path / 'model.bin').write_bytes(data)
    works(llmc.open_source, tmp_path / 'model.bin')


# --- runs -----------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def run_of(tmp_path_factory):
  """(section, knob, value) -> the config of a small run with that value."""
  folder = tmp_path_factory.mktemp('run')
  (folder / 'a.txt').write_text('some text, and more of it\n' * 40)

  def make(section, knob, value):
    values = base.get_config().to_dict()
    values['model'] |= dict(n_positions=8, n_embd=12, n_layer=1, n_head=3)
    values['data'] |= dict(
      corpus=f'text:{folder / "a.txt"}',
      tokenizer='byte',
      split='tail',
      val_fraction=0.1,
      directory=str(folder / 'data'),
    )
    values['train'] |= dict(steps=3, global_batch_tokens=16)
    (values[section] if section else values)[knob] = value
    return ConfigDict(values)

  return make


def accepted(config) -> bool:
  """Whether a run may begin; if so, it is planned and its data are opened."""
  try:
    made = run_plan.make_plan(config, devices=jax.devices()[:1])
    run_data.check_prompt(made, run_data.open_data(made).tokenizer)
  except UserError as e:
    said(e)
    return False
  rates = np.asarray([made.schedule(step) for step in range(3)])
  assert np.isfinite(rates).all() and made.G % made.A == 0
  assert traced(made.model)
  return True


@pytest.mark.parametrize('section', ['', *knobs.SECTIONS])
def test_any_value_of_any_knob(section, run_of, monkeypatch, tmp_path):
  monkeypatch.chdir(tmp_path)  # where a relative folder would be made
  table = knobs.SECTIONS[section] if section else knobs.TOP
  results = {
    (knob, i): accepted(run_of(section, knob, value))
    for knob in table
    for i, value in enumerate(VALUES)
  }
  assert set(results.values()) == {True, False}
  for knob in table:  # what is wrong of every kind
    assert not any(results[knob, VALUES.index(value)] for value in ([[]], {'a': 1}))


@pytest.mark.parametrize(
  'knob,value,says',
  [
    ('train.seed', -1, 'from 0 to'),
    ('evaluate.batch_rows', 0, 'from 1 to 1,048,576'),
    ('evaluate.batch_rows', 10**12, 'from 1 to'),
    ('train.global_batch_tokens', 10**30, 'from 1 to'),
    ('train.steps', 10**30, 'from 1 to'),
    ('model.n_layer', 10**30, 'from 1 to 65,536'),
    ('model.vocab_size', 2**31, 'from 1 to'),
    ('log.sample_top_k', -1, 'from 1 to'),
    ('log.sample_temperature', math.nan, 'nan must lie in'),
    ('log.sample_tokens', -1, 'from 1 to'),
    ('optim.ema_decay', 2, r'must lie in \[0, 1\)'),
    ('optim.weight_decay', -1, 'must lie in'),
    ('optim.warmup_steps', -5, 'from 0 to'),
    ('optim.peak_lr', math.nan, 'must lie in'),
    ('train.stepz', 3, 'there is no knob train.stepz; near it: train.steps'),
    ('train.compiler_options', 'x', 'is not xla_NAME=VALUE'),
  ],
)
def test_what_was_seen_is_said_at_the_start(knob, value, says, run_of, tmp_path):
  section, _, name = knob.partition('.')
  with pytest.raises(UserError, match=f'{knob}.*{says}|{says}') as error:
    train.train(run_of(section, name, value), tmp_path / 'run')
  assert knob in said(error.value) and not (tmp_path / 'run').exists()


def test_a_sample_of_ids_that_the_model_has_not_is_refused_before_training(run_of):
  made = run_plan.make_plan(run_of('log', 'sample_prompt', 'é'), devices=jax.devices()[:1])
  made_up = types.SimpleNamespace(encode=lambda text: [5, 300], eot=256)
  with pytest.raises(UserError, match='log.sample_prompt holds token id 300'):
    run_data.check_prompt(made, made_up)  # pyright: ignore[reportArgumentType]


def test_no_batch_of_an_evaluation_is_larger_than_its_split(run_of, monkeypatch):
  made = run_plan.make_plan(run_of('evaluate', 'batch_rows', 2**20), devices=jax.devices()[:1])
  split, shapes = run_data.open_data(made).splits['val'], []
  step = lambda params, tokens, weights: shapes.append(tokens.shape) or np.array([weights.sum(), 1.0])
  stop = types.SimpleNamespace(due=lambda: False)
  with jax.set_mesh(made.mesh):
    means = evaluate(step, None, split, made, stop)  # pyright: ignore[reportArgumentType]
  rows = -(-(len(split) - 1) // made.T)
  assert shapes == [(1, rows, made.T + 1)] and means['eval/loss'] == len(split) - 1


def test_divisors_of_large_numbers():
  assert memory_estimate.divisors(36) == [1, 2, 3, 4, 6, 9, 12, 18, 36] and memory_estimate.divisors(
    1
  ) == [1]
  assert len(memory_estimate.divisors(2**30)) == 31


# --- command lines --------------------------------------------------------------------------------


@pytest.mark.parametrize(
  'words',
  [
    ['sample', '--checkpoint', 'x', '--seed', LONG],
    ['sample', '--checkpoint', 'x', '--' + LONG],
    ['sample', '--checkpoint', 'x', '--seed', '1' * 200_000],
    ['convert', 'a', 'b', '--to', LONG],
    ['sample', '--checkpoint', LONG],
    ['sample', '--checkpoint', '/nowhere', '--batch-size', '0'],
    ['evaluate', '--checkpoint', 'x', '--tasks', LONG],
    ['reproduce', LONG],
    [LONG],
    ['plan', '--config', LONG, '--topology', 'v4'],
    ['prepare', '--corpus', LONG, '--output', 'o'],
    ['serve', '--checkpoint', 'x', '--slots', '-1'],
    ['serve', '--checkpoint', 'x', '--timeout', 'nan'],
    ['bias', '--checkpoint', 'x', '--samples', str(10**30)],
  ],
)
def test_a_command_line_is_answered_in_short(words, capsys):
  with pytest.raises(SystemExit) as e:
    main.main(words)
  out = capsys.readouterr()
  assert e.value.code == 2 or str(e.value.code).startswith('error: --')
  assert len(out.out + out.err + str(e.value.code)) < 1500
  assert 'Traceback' not in out.err


@pytest.mark.parametrize(
  'word',
  [
    f'--config.train.steps={"1" * 200_000}',
    f'--config.{LONG}=1',
    f'--config.train.steps={LONG}',
    '--num_processes=0',
    f'--process_id={"1" * 5000}',
  ],
)
def test_launch_is_answered_in_short(word, monkeypatch):
  import launch

  argv = ['launch.py', f'--config={ROOT}/configs/tiny.py', word]
  monkeypatch.setattr('sys.argv', argv)
  absl_flags.FLAGS.unparse_flags()
  with pytest.raises(SystemExit) as e:
    launch.parse_flags(argv)
  assert str(e.value.code).startswith('error: ') and len(str(e.value.code)) < 700


# --- Python ---------------------------------------------------------------------------------------


BFLOAT16 = [
  'bfloat16',
  jnp.bfloat16,
  jnp.dtype('bfloat16'),
  np.dtype(jnp.bfloat16),
  jnp.bfloat16(0).dtype,
]
FLOAT32 = ['float32', jnp.float32, np.float32, np.dtype('float32'), 'f4', np.dtype('>f4')]
OTHERS = ['int8', jnp.int8, np.float64, float, jnp.complex64, 'nonsense', 32, [], object()]


@pytest.fixture(scope='module')
def model():
  return gpt2_jax.from_pretrained(GOLDEN / 'huggingface' / 'plain')


@pytest.mark.parametrize('dtypes,name', [(BFLOAT16, 'bfloat16'), (FLOAT32, 'float32')])
def test_dtypes_are_what_jax_takes(dtypes, name, model, tmp_path):
  for i, dtype in enumerate(dtypes):
    config = GPTConfig(n_embd=12, n_head=3, dtype=dtype, reduce_dtype=dtype)
    assert (config.dtype, config.reduce_dtype) == (name, name)
    assert model.source.astype(dtype).dtype == name
    if i < 2:
      read = gpt2_jax.from_pretrained(GOLDEN / 'huggingface' / 'plain', dtype=dtype)
      assert read.config.dtype == name and read.model.wte.weight.dtype == name
      gpt2_jax.save_pretrained(model, tmp_path / f'{i}', dtype=dtype)
      assert pretrained.open_source(tmp_path / f'{i}').dtype == name


@pytest.mark.parametrize('dtype', OTHERS, ids=lambda dtype: str(dtype)[:12])
def test_other_dtypes_are_refused_with_those_that_work(dtype, model, tmp_path):
  for call in (
    lambda: gpt2_jax.from_pretrained(tmp_path, dtype=dtype),
    lambda: GPTConfig(dtype=dtype),
    lambda: gpt2_jax.save_pretrained(model, tmp_path / 'out', dtype=dtype),
  ):
    with pytest.raises(UserError, match='dtype = .* must be one of float32, bfloat16') as error:
      call()
    said(error.value)
  assert not (tmp_path / 'out').exists()


def test_prompts_and_options_are_of_any_natural_type(model):
  want = gpt2_jax.generate(model, [[1, 2, 3], [4, 5, 6]], max_new_tokens=3, seed=3, top_k=7)
  ids = [[1, 2, 3], [4, 5, 6]]
  made: Any
  for made in (
    tuple(map(tuple, ids)),
    np.array(ids, np.uint16),
    jnp.array(ids),
    [np.array(ids[0]), jnp.array(ids[1])],
    (list(jnp.array(row)) for row in ids),
  ):
    have = gpt2_jax.generate(
      model,
      made,
      max_new_tokens=np.int64(3),
      seed=np.uint8(3),
      top_k=jnp.int32(7),
      temperature=np.float32(1),
    )
    assert have == want
  for made in (np.array(ids[0]), jnp.array(ids[0]), tuple(ids[0]), list(jnp.array(ids[0]))):
    assert gpt2_jax.features(model, made)[0].tokens == ids[0]
  assert gpt2_jax.generate(
    model,
    ids[0],
    max_new_tokens=3,
    stop_token_ids=np.array([3]),
    bad_words_ids=np.array([[5]]),
    eos_token_id=jnp.array([1]),
  )
  for made in ([1.5], [[1, 2.0]], [None], np.array([0.5]), [[1, 'a']]):
    with pytest.raises(UserError, match='neither a text nor a list of ids'):
      gpt2_jax.generate(model, made)
  with pytest.raises(UserError, match='bits, but the vocabulary'):
    gpt2_jax.generate(model, [10**5000])

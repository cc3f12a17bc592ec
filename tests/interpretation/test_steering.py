"""Steering vectors are differences of means, and are added; probes read activations."""

import json

import numpy as np
import pytest
from support.arrays import assert_close, mesh_of
from support.models import byte_model

import gpt2_jax
from gpt2_jax.cli import main
from gpt2_jax.core.errors import UserError
from gpt2_jax.decoding import device_loop
from gpt2_jax.interpretation.activations import activations
from gpt2_jax.interpretation.steering import SteeringVector, load, steering, steering_vector
from gpt2_jax.model.edits import run
from gpt2_jax.model.gpt2 import bind, init_params

TOWARD, AWAY = ['abc', 'ab', 'abcabcabc'], ['xyz!', 'q']
ASKED = dict(max_new_tokens=6, seed=1, top_logprobs=2)


@pytest.fixture(scope='module')
def model():
  return byte_model()


@pytest.fixture(scope='module')
def folder(model, tmp_path_factory):
  """Of the checkpoint, with a vector in it and its texts."""
  folder = tmp_path_factory.mktemp('steering')
  gpt2_jax.save_pretrained(model, folder / 'model')
  (folder / 'toward.txt').write_text('\n'.join(TOWARD))
  (folder / 'away.txt').write_text('\n'.join(AWAY))
  return folder


def one_by_one(model, text, site, layer):
  """[T, …] of a text alone."""
  tokens_BT = np.array([model.tokenizer.encode(text)])
  return np.asarray(run(model, tokens_BT, record=(site,))[1][site][layer, 0])


@pytest.mark.parametrize(
  'site, tokens',
  [
    ('resid_post', 'last'),
    pytest.param('z', 'mean', marks=pytest.mark.slow),
    pytest.param('mlp_post', 'all', marks=pytest.mark.slow),
  ],
)
def test_a_vector_is_the_difference_of_means(model, site, tokens):
  pick = {'last': lambda x: x[-1:], 'mean': lambda x: x.mean(0)[None], 'all': lambda x: x}[tokens]
  means = [
    np.concatenate([pick(one_by_one(model, text, site, 1)) for text in texts]).mean(0)
    for texts in (TOWARD, AWAY)
  ]
  vector = steering_vector(model, TOWARD, AWAY, site=site, layer=-1, tokens=tokens)
  assert_close(vector.value, means[0] - means[1])
  assert (vector.site, vector.layer, vector.tokens) == (site, 1, tokens)


def test_it_is_added_and_saved(model, tmp_path):
  vector = steering_vector(model, TOWARD, AWAY, site='z', layer=0)
  vector.save(tmp_path / 'v.safetensors')
  again = load(tmp_path / 'v.safetensors')
  np.testing.assert_array_equal(again.value, vector.value)
  assert repr(again.edits(2)) == repr(vector.edits(2))
  plain = one_by_one(model, 'abc', 'z', 0)
  tokens_BT = np.array([model.tokenizer.encode('abc')])
  _, found = run(model, tokens_BT, again.edits(-1.5), record=('z',))
  assert_close(found['z'][0, 0], plain - 1.5 * vector.value)


def test_scale_0_changes_no_bit_and_compiles_nothing(model):
  vector = steering_vector(model, TOWARD, AWAY, layer=1)
  want = gpt2_jax.generate(model, ['ab', 'xyz'], **ASKED)
  before = device_loop.start._cache_size(), device_loop.advance._cache_size()
  assert gpt2_jax.generate(model, ['ab', 'xyz'], edits=vector.edits(0), **ASKED) == want
  assert (device_loop.start._cache_size(), device_loop.advance._cache_size()) == before
  assert gpt2_jax.generate(model, ['ab', 'xyz'], edits=vector.edits(3), **ASKED) != want


@pytest.mark.slow
def test_activations_do_not_depend_on_the_mesh(model):
  want = activations(model, TOWARD, layer=1, tokens='all')
  with mesh_of(2, 2, 2):
    spread = bind(model.config, init_params(model.config, 0))
  assert_close(activations(spread, TOWARD, layer=1, tokens='all', tokenizer=model.tokenizer), want)


@pytest.mark.slow
def test_from_texts_to_a_steered_sample(model, folder, capsys):
  checkpoint, file = str(folder / 'model'), folder / 'v:1.safetensors'
  texts = ['--toward', str(folder / 'toward.txt'), '--away', str(folder / 'away.txt')]
  main.main(['steer', '--checkpoint', checkpoint, *texts, '--layer', '-1', '--output', str(file)])
  assert '3 texts less 2, resid_post of layer 1' in capsys.readouterr().out
  vector = steering_vector(model, TOWARD, AWAY, layer=1)
  assert_close(load(file).value, vector.value)
  flags = ['--prompt', 'ab', 'xyz', '--max-new-tokens', '6', '--seed', '1', '--json']
  main.main(['sample', '--checkpoint', checkpoint, *flags, '--steer', f'{file}:3', str(file)])
  lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
  want = gpt2_jax.generate(model, ['ab', 'xyz'], edits=[vector.edits(3), vector.edits()], **ASKED)
  assert [line['tokens'] for line in lines] == [result.tokens for result in want]
  assert lines[0]['steer'] == [f'{file}:3', str(file)]
  plain = gpt2_jax.generate(model, ['ab', 'xyz'], **ASKED)
  main.main(['sample', '--checkpoint', checkpoint, *flags, '--steer', f'{file}:0'])
  lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
  assert [line['tokens'] for line in lines] == [result.tokens for result in plain]


def test_what_is_no_vector_is_said(model, folder, tmp_path):
  with pytest.raises(UserError, match='no activation of a token'):
    steering_vector(model, TOWARD, AWAY, site='pattern', layer=0)
  with pytest.raises(UserError, match='layer = 2 is not among 0 … 1'):
    steering_vector(model, TOWARD, AWAY, layer=2)
  with pytest.raises(UserError, match='no direction between them'):
    steering_vector(model, TOWARD, TOWARD, layer=1)
  with pytest.raises(UserError, match='last, mean, all'):
    activations(model, TOWARD, layer=1, tokens='first')
  with pytest.raises(UserError, match='there is no file'):
    steering(f'{tmp_path}/nowhere:2')
  narrow = tmp_path / 'narrow'
  SteeringVector(np.ones(31, np.float32), 'resid_post', 0).save(narrow)
  for scale in ('nan', '1e99'):
    with pytest.raises(UserError, match='finite'):
      steering(f'{narrow}:{scale}')
  with pytest.raises(UserError, match='has shape'):
    gpt2_jax.generate(model, 'ab', edits=steering(str(narrow)), **ASKED)
  for content in (b'', b'x' * 100, narrow.read_bytes()[:-7], (folder / 'toward.txt').read_bytes()):
    narrow.write_bytes(content)
    with pytest.raises(UserError, match="can't be read"):
      steering(str(narrow))
  SteeringVector(np.ones((2, 3), np.float32), 'resid_post', 0).save(narrow)
  with pytest.raises(UserError, match='no steering vector'):
    steering(str(narrow))
  with pytest.raises(SystemExit) as end:
    main.main(['sample', '--checkpoint', str(folder / 'model'), '--steer', str(narrow)])
  assert 'no steering vector' in str(end.value.code) and '\n' not in str(end.value.code)
  flags = ['--toward', str(folder / 'toward.txt'), '--away', str(folder / 'away.txt')]
  with pytest.raises(SystemExit) as end:
    main.main(['steer', '--checkpoint', 'x', *flags, '--layer', '1', '--output', '/nowhere/v'])
  assert 'no folder /nowhere' in str(end.value.code)


@pytest.mark.slow
def test_a_served_text_is_steered(model):
  httpx = pytest.importorskip('httpx')
  pytest.importorskip('fastapi')
  from support.serving import serve

  edits = steering_vector(model, TOWARD, AWAY, layer=0).edits(2)
  [want] = gpt2_jax.generate(model, 'abxy', edits=edits, do_sample=False, max_new_tokens=8)
  with serve({'tiny': model}, slots=2, edits=edits) as running:
    asked = dict(prompt='abxy', max_tokens=8, temperature=0, logprobs=0)
    answer = httpx.post(running.url + '/v1/completions', json=asked, timeout=60).json()
  [choice] = answer['choices']
  assert choice['text'] == want.text
  np.testing.assert_allclose(
    choice['logprobs']['token_logprobs'], want.logprobs, rtol=1e-4, atol=1e-5
  )

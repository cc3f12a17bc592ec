"""Patches between two texts, their pictures, and the command."""

import json
import warnings

import numpy as np
import pytest
from support.arrays import assert_close
from support.models import byte_model

import gpt2_jax
from gpt2_jax.cli import main
from gpt2_jax.core.errors import UserError
from gpt2_jax.interpretation import patching
from gpt2_jax.interpretation.pictures import heat_map
from gpt2_jax.interpretation.prompt_pairs import patch_texts
from gpt2_jax.model.edits import Edit, run

CLEAN, CORRUPTED, ANSWERS = 'ab $x$ a', 'cb $x$ c', ('b', ' ')


@pytest.fixture(scope='module')
def model():
  return byte_model()


@pytest.fixture(scope='module')
def checkpoint(model, tmp_path_factory):
  folder = tmp_path_factory.mktemp('pairs') / 'model'
  gpt2_jax.save_pretrained(model, folder)
  return str(folder)


@pytest.fixture(scope='module')
def by_position(model):
  return patch_texts(model, CLEAN, CORRUPTED, ANSWERS)


def test_a_share_is_of_the_way_from_one_text_to_the_other(model, by_position):
  ids = [model.tokenizer.encode(text) for text in (CLEAN, CORRUPTED)]
  right, wrong = (model.tokenizer.encode(answer)[0] for answer in ANSWERS)
  logits, found = run(model, ids, record=('resid_pre',))
  differ = lambda logits_BTV: (logits_BTV[:, -1, right] - logits_BTV[:, -1, wrong]).tolist()
  clean, corrupted = differ(logits)
  assert_close([by_position.clean_difference, by_position.corrupted_difference], [clean, corrupted])
  value = found['resid_pre'][1, 0, 5]
  edit = Edit('resid_pre', value=value, layer=1, position=5, row=1)
  _, patched = differ(run(model, ids, edit)[0])
  want = (patched - corrupted) / (clean - corrupted)
  assert by_position.restored.shape == (2, len(CLEAN))
  np.testing.assert_allclose(by_position.restored[1, 5], want, rtol=1e-3, atol=1e-4)
  # the embeddings of the two tokens that differ are all that differs: what comes before is as it was
  np.testing.assert_allclose(by_position.restored[0, 1:7], 0, atol=1e-4)
  both = patch_texts(model, CLEAN, CORRUPTED, ANSWERS, by=())
  np.testing.assert_allclose(both.restored, 1, rtol=1e-4)


def test_other_answers_and_texts_compile_nothing(model, by_position):
  before = patching._chunk._cache_size()
  other = patch_texts(model, 'xyz12345', 'xyz02345', ('q', 'r'))
  assert patching._chunk._cache_size() == before
  assert not np.allclose(other.differences, by_position.differences)


def test_pictures(model, by_position, tmp_path):
  with warnings.catch_warnings():
    warnings.simplefilter('error')
    figure = by_position.figure()
    figure.savefig(tmp_path / 'map.png', dpi=50)
    image, bar = figure.axes
    assert [t.get_text() for t in image.get_xticklabels()][:3] == ['0 a|c', '1 b', '2 ·']
    np.testing.assert_array_equal(image.images[0].get_array(), by_position.restored)
    assert image.images[0].get_clim()[0] == -image.images[0].get_clim()[1]
    assert bar.get_ylabel() == 'share restored'
    three = heat_map(np.arange(24.0).reshape(2, 3, 4), ('layer', 'head', 'position'))
    assert [ax.get_title() for ax in three.axes[:2]] == ['layer 0', 'layer 1']
    many = heat_map(np.zeros((2, 200)), ('layer', 'neuron'))
    assert len(many.axes[0].get_xticks()) <= 64
  with pytest.raises(UserError, match='two axes, or three'):
    heat_map(np.zeros((2, 2)), ('layer',))


def test_the_command(checkpoint, by_position, tmp_path, capsys):
  texts = ['--clean', CLEAN, '--corrupted', CORRUPTED, '--answers', *ANSWERS]
  files = ['--png', str(tmp_path / 'map.png'), '--json', str(tmp_path / 'map.json')]
  main.main(['patch', '--checkpoint', checkpoint, *texts, '--over', 'resid_pre', *files])
  printed = capsys.readouterr().out.splitlines()
  assert printed[0].startswith('b over ·: ') and len(printed) == 9
  largest = np.unravel_index(np.abs(by_position.restored).argmax(), by_position.restored.shape)
  assert printed[1].startswith(f'  resid_pre layer {largest[0]} position {largest[1]} ')
  told = json.loads((tmp_path / 'map.json').read_text())
  assert_close(told['restored'], by_position.restored, 1e-4)
  assert (told['by'], told['answers']) == (['position'], list(ANSWERS))
  assert (tmp_path / 'map.png').read_bytes().startswith(b'\x89PNG')


@pytest.mark.parametrize(
  'changes, says',
  [
    (dict(clean='abc'), 'the clean text has 3 tokens and the corrupted one 8'),
    (dict(clean=CORRUPTED), 'are the same'),
    (dict(answers=('b', 'ab')), "the answer 'ab' is 2 tokens, not one"),
    (
      dict(answers=('b', '')),
      "the answer '' is 0 tokens, not one; with a blank before it, ' ', it is",
    ),
    (dict(answers=('b', 'b')), 'two different tokens'),
    (dict(over='resid'), 'it has embed, pos_embed'),
    (dict(over='embed'), 'outside of the blocks'),
    (dict(over='z', by=('neuron', 'key')), "no axis 'key'"),
    (dict(clean='a' * 65, corrupted='b' * 65), 'has no room'),
  ],
)
def test_what_cannot_be_patched_is_said(model, changes, says):
  asked = dict(clean=CLEAN, corrupted=CORRUPTED, answers=ANSWERS, over='resid_pre') | changes
  with pytest.raises(UserError, match=says) as error:
    patch_texts(model, **asked)
  assert '\n' not in str(error.value)


def test_the_command_says_it_before_a_model_is_read():
  texts = ['--clean', 'a', '--corrupted', 'b', '--answers', 'a', 'b']
  for more, says in ((['--over', 'resid'], 'it has'), (['--png', '/nowhere/a.png'], 'no folder')):
    with pytest.raises(SystemExit) as end:
      main.main(['patch', '--checkpoint', 'nowhere', *texts, *more])
    assert says in str(end.value.code) and '\n' not in str(end.value.code)

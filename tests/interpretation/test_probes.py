"""A linear probe finds what is linear in an activation, and is scored on what it has not seen."""

import re
from pathlib import Path

import numpy as np
import pytest
from support.models import byte_model

from gpt2_jax.core.errors import UserError
from gpt2_jax.interpretation.activations import activations
from gpt2_jax.interpretation.probes import fit_probes

sklearn = pytest.importorskip('sklearn', reason='probes need the extra: pip install -e .[probes]')

RNG = np.random.default_rng(0)
TEXTS = [''.join(RNG.choice(list('abcdefgh'), 12)) for _ in range(64)]


@pytest.fixture(scope='module')
def model():
  return byte_model()


def test_the_last_letter_is_read_off_the_embedding_and_noise_is_not(model):
  letters = [text[-1] for text in TEXTS]
  [probe] = fit_probes(model, TEXTS, letters, layers=[0], site='resid_pre')
  assert probe.fitted == probe.held_out == 1 and probe.chance < 0.5 and probe.counts == (48, 16)
  assert probe.predict(model, TEXTS).tolist() == letters
  noise = RNG.permutation(letters)
  assert fit_probes(model, TEXTS, noise, layers=[0], site='resid_pre')[0].held_out < 0.6


def test_it_is_the_library_on_single_activations(model):
  from sklearn.linear_model import LogisticRegression
  from sklearn.pipeline import make_pipeline
  from sklearn.preprocessing import StandardScaler

  labels = [text.count('a') > 1 for text in TEXTS]
  assert 10 < sum(labels) < 54
  probes = fit_probes(model, TEXTS, labels, site='z', tokens='mean', held_out=0.5, seed=3)
  assert [probe.layer for probe in probes] == [0, 1] and probes[1].direction.shape == (1, 4, 8)
  rows = activations(model, TEXTS, site='z', layer=1, tokens='mean').reshape(64, -1)
  want = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
  from sklearn.model_selection import train_test_split

  left, right = train_test_split(np.arange(64), test_size=0.5, random_state=3, stratify=labels)
  want.fit(rows[left], np.array(labels)[left])
  assert probes[1].held_out == want.score(rows[right], np.array(labels)[right])
  assert probes[1].predict(model, TEXTS).tolist() == want.predict(rows).tolist()
  [alone] = fit_probes(
    model, TEXTS, labels, layers=[-1], site='z', tokens='mean', held_out=0.5, seed=3
  )
  np.testing.assert_allclose(alone.direction, probes[1].direction, rtol=1e-4, atol=1e-6)


def test_each_token_has_a_label_and_a_text_is_on_one_side(model):
  texts = TEXTS[:24] + ['abc']
  vowels = [[letter in 'ae' for letter in text] for text in texts]
  [probe] = fit_probes(model, texts, vowels, layers=[0], site='resid_pre', tokens='all')
  assert probe.held_out > 0.95 and sum(probe.counts) == 24 * 12 + 3
  assert probe.counts[1] in (7 * 12, 6 * 12 + 3)
  assert probe.predict(model, 'ab').tolist() == [True, False]


def test_the_example_of_the_page(model):
  page = (Path(__file__).parents[2] / 'docs' / 'interpretability.md').read_text()
  (example,) = re.findall(r'^```py\n(.*?)^```', page, re.M | re.S)
  names = dict(model=model, texts=TEXTS, labels=[text[0] > 'd' for text in TEXTS])
  exec(example, names)
  assert names['probe'].direction.shape == (1, 32) and len(names['by_layer']) == 2


@pytest.mark.parametrize(
  'labels, options, says',
  [
    ([0, 1], {}, 'one for each of 64 texts'),
    ([[0]] * 64, dict(tokens='all'), 'one for each token'),
    ([0] * 64, {}, 'one label alone'),
    ([0] * 63 + [1], {}, 'can not be split'),
    ([0, 1] * 32, dict(held_out=1.0), 'held_out = 1.0'),
    ([0, 1] * 32, dict(layers=[5]), 'layer = 5'),
    ([0, 1] * 32, dict(C=-1), 'C = -1'),
  ],
)
def test_what_cannot_be_fitted_is_said(model, labels, options, says):
  with pytest.raises(UserError, match=says) as error:
    fit_probes(model, TEXTS, labels, **dict(layers=[1]) | options)
  assert '\n' not in str(error.value)

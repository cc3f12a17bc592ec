"""No two seeds are one: at every door, beyond 32 bits too; below, keys are JAX's."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.models import byte_model
from support.serving import PAGE

import gpt2_jax
from gpt2_jax.core import seeds
from gpt2_jax.core.errors import UserError
from gpt2_jax.data import labelled_texts, token_batches, token_store
from gpt2_jax.evaluation import bias
from gpt2_jax.model import gpt2 as model_lib
from gpt2_jax.training.longer_context import stretched
from gpt2_jax.training.step import row_keys

ALIKE = (5, 2**32 + 5, 2**63 + 5, 2**64 - 2**32 + 5)  # in their lower 32 bits
bits = lambda key: tuple(np.asarray(jax.random.key_data(key)).ravel().tolist())


def check_differ(of) -> None:
  """That `of` maps these seeds to different values, one to the same each time."""
  made = [of(seed) for seed in ALIKE]
  assert len(set(made)) == len(ALIKE) and of(ALIKE[0]) == made[0]


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1))
def test_different_seeds_have_different_keys(a, b):
  assert (bits(seeds.key(a)) == bits(seeds.key(b))) == (a == b)
  assert bits(seeds.key(a)) == tuple(seeds.key_data(a).tolist())
  low = a % 2**32
  assert bits(seeds.key(low)) == bits(jax.random.key(low))
  with jax.enable_x64(True):
    assert bits(seeds.key(a % 2**63)) == bits(jax.random.key(a % 2**63))


@pytest.mark.parametrize('implementation', ['rbg', 'unsafe_rbg'])
def test_keys_of_another_generator(implementation):
  with jax.default_prng_impl(implementation):
    check_differ(lambda seed: bits(seeds.key(seed)))
    assert bits(seeds.key(5)) == bits(jax.random.key(5)) == tuple(seeds.key_data(5).tolist())


@pytest.mark.parametrize('seed', [-1, 2**64, 10**30, 1.0, '5', True, None, float('nan'), [1]])
def test_what_is_no_seed_is_refused(seed):
  model = byte_model(**PAGE)
  for use in (seeds.key, seeds.key_data, lambda seed: gpt2_jax.generate(model, 'a', seed=seed)):
    with pytest.raises(UserError, match='must be a whole number from 0 to') as error:
      use(seed)
    assert len(str(error.value)) < 200


def test_texts_differ():
  model, options = byte_model(**PAGE), dict(max_new_tokens=12, min_new_tokens=12)
  check_differ(lambda seed: tuple(gpt2_jax.generate(model, 'a', seed=seed, **options)[0].tokens))
  check_differ(lambda seed: ''.join(gpt2_jax.stream(model, 'a', seed=seed, **options)))


def test_weights_dropout_and_order_differ(tmp_path):
  config = byte_model(**PAGE).config
  weights = lambda seed: np.asarray(model_lib.init_params(config, seed)['wpe']['weight'])
  check_differ(lambda seed: weights(seed).tobytes())
  params = model_lib.init_params(config, 0)
  longer = gpt2_jax.GPTConfig(vocab_size=257, n_positions=300, n_embd=32, n_layer=2, n_head=2)
  check_differ(
    lambda seed: np.asarray(stretched(longer, params, 'extend', seed)['wpe']['weight']).tobytes()
  )
  check_differ(lambda seed: bits(row_keys(seed, np.int32(3), 0, 2)))
  np.arange(1000, dtype='<u2').tofile(tmp_path / 'train.bin')
  split = token_store.open_store(tmp_path).splits['train']
  check_differ(
    lambda seed: token_batches.TokenBatches(split, 8, 4, seed, 1000).rows(0, range(4)).tobytes()
  )
  examples = labelled_texts.Split('train', tuple((f'{i}', [i], 0) for i in range(50)))
  check_differ(
    lambda seed: str(labelled_texts.LabelledBatches(examples, 8, 4, seed, 257).documents(0))
  )
  for made in (token_batches.TokenBatches, labelled_texts.LabelledBatches):
    with pytest.raises(UserError, match='seed = -1'):
      made(split if made is token_batches.TokenBatches else examples, 8, 4, -1, 1000)


def test_bias_probes_differ(monkeypatch):
  drawn = []
  monkeypatch.setattr(
    bias,
    'generate',
    lambda model, prompt, *, num_return_sequences, seed, **_: (
      (drawn.append(seed), [])[1] or [type('', (), {'text': 'a'})] * num_return_sequences
    ),
  )
  for seed in ALIKE:
    bias.occupations(None, samples=1, seed=seed, groups=('White man', 'White woman'))
  assert len(set(drawn)) == 2 * len(ALIKE)
  assert drawn[0] == np.random.SeedSequence([5, 0, 0]).generate_state(1)[0] >> 1  # as it was

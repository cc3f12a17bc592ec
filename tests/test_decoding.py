"""Decoding equals the full forward pass, and a sample depends on its prompt and seed alone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import mesh_of
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2_jax import tokenizer
from gpt2_jax.decoding import loop
from gpt2_jax.decoding.generate import generate, generate_tokens
from gpt2_jax.decoding.processors import TopK, TopP, make_processors
from gpt2_jax.errors import UserError
from gpt2_jax.model import bind, init_params

PROMPTS = [[1, 2, 3], [5, 6, 7, 8, 9, 10, 11], [3] * 20, [96]]
SAMPLED = dict(temperature=0.9, top_k=40, top_p=0.95, seed=3, max_new_tokens=12)


@pytest.fixture
def params(tiny):
  return init_params(tiny, 0)


def ids(results):
  return [result.tokens for result in results]


def test_greedy_is_the_argmax_of_the_full_forward_pass(tiny, params):
  forward = jax.jit(lambda x_1S: bind(tiny, params)(x_1S)[0])
  results = generate_tokens(tiny, params, PROMPTS, do_sample=False, max_new_tokens=40)
  for prompt, result in zip(PROMPTS, results):
    sequence = prompt + result.tokens
    logits_SV = np.asarray(forward(jnp.asarray([sequence + [0] * (32 - len(sequence))])))
    want_SV = logits_SV[len(prompt) - 1:len(sequence) - 1]
    assert result.tokens == want_SV.argmax(-1).tolist()
    logprobs = np.asarray(jax.nn.log_softmax(want_SV))[range(len(result.tokens)), result.tokens]
    np.testing.assert_allclose(result.logprobs, logprobs, rtol=1e-4, atol=1e-5)
    assert len(sequence) == 32 and result.finish_reason == 'context'


@pytest.mark.parametrize('options', [dict(do_sample=False, max_new_tokens=12), SAMPLED])
def test_a_row_does_not_depend_on_its_batch(tiny, params, options):
  together = ids(generate_tokens(tiny, params, PROMPTS, **options))
  alone = [ids(generate_tokens(tiny, params, prompt, **options))[0] for prompt in PROMPTS]
  backwards = ids(generate_tokens(tiny, params, PROMPTS[::-1], **options))
  assert together == alone == backwards[::-1]


@pytest.mark.parametrize('mesh', [(8, 1, 1), (2, 2, 2)])
def test_a_mesh_changes_no_token(tiny, params, mesh):
  for options in (dict(do_sample=False, max_new_tokens=12), SAMPLED):
    want = ids(generate_tokens(tiny, params, PROMPTS, **options))
    with mesh_of(*mesh):
      have = ids(generate_tokens(tiny, init_params(tiny, 0), PROMPTS, **options))
    assert have == want


def test_one_row_on_a_mesh_of_one_device(tiny, params):
  """Axes of size 1 are axes still."""
  want = ids(generate_tokens(tiny, params, [1, 2, 3], **SAMPLED))
  with mesh_of(1, 1, 1):
    assert ids(generate_tokens(tiny, init_params(tiny, 0), [1, 2, 3], **SAMPLED)) == want


def test_seeds(tiny, params):
  draw = lambda seed, n=1: ids(generate_tokens(
      tiny, params, [1, 2, 3], seed=seed, num_return_sequences=n, max_new_tokens=12))
  assert draw(1) == draw(1) != draw(2)
  several = draw(1, 3)
  assert several[:1] == draw(1) and len({tuple(row) for row in several}) == 3


def test_samples_have_the_models_distribution(tiny, params):
  """Chi-square over 4,000 draws of the next token, at temperature 1.5."""
  n = 4000
  results = generate_tokens(tiny, params, [4, 5, 6], temperature=1.5, num_return_sequences=n,
                            max_new_tokens=1)
  counts = np.bincount([result.tokens[0] for result in results], minlength=97)
  probs = np.asarray(jax.nn.softmax(bind(tiny, params)(jnp.array([[4, 5, 6]]))[0, -1] / 1.5))
  usual = probs * n >= 5
  want = np.append(probs[usual], probs[~usual].sum()) * n
  have = np.append(counts[usual], counts[~usual].sum())
  chi2, freedom = ((have - want) ** 2 / np.maximum(want, 1e-9)).sum(), len(want) - 1
  assert chi2 < freedom + 5 * np.sqrt(2 * freedom)


def test_top_p_keeps_the_crossing_token():
  logits_BV = jnp.log(jnp.array([[0.1, 0.5, 0.15, 0.25]]))
  kept = lambda p: np.isfinite(TopP(p)(logits_BV))[0].tolist()
  assert kept(0.4) == [False, True, False, False]
  assert kept(0.6) == [False, True, False, True]  # 0.25 crosses
  assert kept(0.8) == [False, True, True, True]
  assert kept(0.95) == [True, True, True, True]
  assert kept(1e-6) == [False, True, False, False]  # the likeliest always stays


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 60), st.floats(0.01, 0.99), st.integers(0, 1000))
def test_processors_keep_what_they_say(k, p, seed):
  logits_BV = jnp.asarray(np.random.default_rng(seed).normal(size=(2, 50)) * 2, jnp.float32)
  probs_BV = np.asarray(jax.nn.softmax(logits_BV))
  kept = np.isfinite(TopK(k)(logits_BV))
  assert (kept.sum(-1) == min(k, 50)).all()
  assert (np.where(kept, probs_BV, 1).min(-1) >= np.where(kept, 0, probs_BV).max(-1)).all()
  kept = np.isfinite(TopP(p)(logits_BV))
  mass = np.where(kept, probs_BV, 0).sum(-1)
  least = np.where(kept, probs_BV, 1).min(-1)
  assert (mass >= p - 1e-5).all() and (mass - least < p + 1e-5).all()


def test_the_end_of_text_ends_a_row(tiny, params):
  free = generate_tokens(tiny, params, PROMPTS[:3], do_sample=False, max_new_tokens=10)
  eos = free[0].tokens[4]
  stopped = generate_tokens(tiny, params, PROMPTS[:3], do_sample=False, max_new_tokens=10,
                            eos_token_id=eos)
  first = free[0].tokens.index(eos)
  assert stopped[0].tokens == free[0].tokens[:first] and stopped[0].finish_reason == 'stop'
  for one, other in zip(stopped, free):
    if eos not in other.tokens:
      assert one.tokens == other.tokens and one.finish_reason == 'length'
    assert len(one.logprobs) == len(one.tokens)


def test_other_prompts_and_numbers_compile_nothing(tiny, params):
  generate_tokens(tiny, params, [1, 2, 3], **SAMPLED)
  compiled = loop.decode._cache_size()
  for prompt in ([1], [4] * 14):
    for temperature, k, p, n in ((0.5, 3, 0.5, 9), (2.0, 90, 0.8, 15)):
      generate_tokens(tiny, params, prompt, temperature=temperature, top_k=k, top_p=p, seed=9,
                      max_new_tokens=n)
  assert loop.decode._cache_size() == compiled


def test_texts_in_and_out(tiny):
  config = dataclasses.replace(tiny, vocab_size=257)
  model, t = bind(config, init_params(config, 0)), tokenizer.load('byte')
  results = generate(model, ['ab', ''], tokenizer=t, num_return_sequences=2, max_new_tokens=5)
  assert [result.prompt for result in results] == [0, 0, 1, 1]
  for result in results:
    assert result.text == t.decode(result.tokens)
  model.tokenizer = t
  assert generate(model, 'ab', max_new_tokens=5)[0].text == results[0].text
  assert generate(model, t.encode('ab'), max_new_tokens=5)[0].tokens == results[0].tokens


@pytest.mark.parametrize('prompts,options,says', [
    ([1] * 32, {}, 'context of 32 .* no room'), ([97], {}, 'token id 97, but .* 97 ids'),
    ([], {}, 'there is no prompt'), ([[]], {}, 'has no ids'), ('text', {}, 'needs a tokenizer'),
    ([1], dict(temperature=0), 'temperature = 0 must be positive'),
    ([1], dict(top_k=0), 'top_k = 0'), ([1], dict(top_p=1.5), 'top_p = 1.5'),
    ([1], dict(max_new_tokens=0), 'max_new_tokens = 0'),
    ([1], dict(do_sample=False, num_return_sequences=2), 'needs do_sample'),
])
def test_what_cannot_be_is_refused(tiny, params, prompts, options, says):
  with pytest.raises(UserError, match=says):
    generate_tokens(tiny, params, prompts, **options)


def test_processors_are_only_those_asked_for():
  assert make_processors() == ()
  assert [type(p).__name__ for p in make_processors(0.5, 3, 0.9)] == ['Temperature', 'TopK', 'TopP']

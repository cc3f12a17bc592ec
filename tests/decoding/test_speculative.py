"""Guessing ahead changes no greedy token and no distribution, only the number of rounds."""

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.arrays import mesh_of
from support.models import tiny_gpt2

from gpt2_jax.core.errors import UserError
from gpt2_jax.decoding.decoder import Decoder, TextRequest
from gpt2_jax.decoding.device_loop import advance, start
from gpt2_jax.decoding.generate import generate_tokens
from gpt2_jax.decoding.host_loop import group, request_of
from gpt2_jax.model.gpt2 import bind, init_params

V = 13
TARGET = tiny_gpt2(vocab_size=V, n_embd=16, n_layer=2, n_head=2, n_inner=24, initializer_range=0.4)
DRAFT = dataclasses.replace(TARGET, n_embd=8, n_layer=1, n_inner=16)
PROMPTS = [[1, 2, 3], [5, 6, 7, 8, 9, 10, 11, 5, 6], [3, 4] * 10, [12]]
SEED = 2  # of the target
SAMPLED: dict[str, Any] = dict(seed=3, temperature=0.8, max_new_tokens=14)


@pytest.fixture(scope='module')
def params():
  return init_params(TARGET, SEED)


def guessing(who: str, k: int) -> dict[str, Any]:
  if who == 'lookup':
    return dict(prompt_lookup_num_tokens=k, max_matching_ngram_size=3)
  config, seed = (TARGET, SEED) if who == 'itself' else (DRAFT, 1)
  params = init_params(config, seed)
  return dict(assistant=(config, broken(params) if who == 'NaN' else params), num_assistant_tokens=k)


def broken(params):
  return jax.tree.map(lambda x: x * jnp.nan, params)


def told(results):
  return [(result.tokens, result.finish_reason) for result in results]


def rounds(params, prompts, *, assistant=None, **options) -> tuple[int, np.ndarray]:
  """How many rounds follow the first token, and how many new tokens the rows get."""
  decoder = Decoder.of(TextRequest.of(TARGET, params, prompts, assistant=assistant, **options))
  job = decoder.job
  request, N = request_of(job, group(decoder.rows, whole=False), [row.ids for row in decoder.rows])
  state, _ = start(job.config, job.params, job.search, request, N=N, K=0)
  state, running = advance(job.config, job.params, job.search, request, state, N)
  assert not running
  history, *_ = job.search.results(state)
  return int(state.t) - 1, np.asarray(history.new_B)


def greedy(who: str) -> dict[str, Any]:
  """Options by which some rows meet their end id, and others the end of the context."""
  if who == 'lookup':
    return dict(do_sample=False, eos_token_id=9)
  return dict(do_sample=False, eos_token_id=10, repetition_penalty=1.2, no_repeat_ngram_size=3)


@pytest.mark.parametrize(
  'who,k',
  [
    pytest.param('draft', 1, marks=pytest.mark.slow),
    pytest.param('draft', 5, marks=pytest.mark.slow),
    ('itself', 3),
    ('lookup', 4),
  ],
)
def test_greedy_tokens_are_those_of_one_at_a_time(params, who, k):
  """Also with processors that look at the guesses so far."""
  ends = set()
  for limit in (40, 18):
    options = dict(greedy(who), max_new_tokens=limit)
    want = generate_tokens(TARGET, params, PROMPTS, **options)
    have = generate_tokens(TARGET, params, PROMPTS, **options, **guessing(who, k))
    assert told(have) == told(want)
    for one, other in zip(have, want):
      np.testing.assert_allclose(one.logprobs, other.logprobs, rtol=1e-4, atol=1e-4)
    ends |= {result.finish_reason for result in want}
  assert ends == {'context', 'length', 'stop'}


def test_rounds(params):
  """All guesses of the target itself are kept, and many that go on as before."""
  prompts = [[7, 8, 2], [5, 5, 1], [9, 3, 6], PROMPTS[2]]
  made, new_B = rounds(params, prompts, **greedy('itself'), **guessing('itself', 3))
  assert new_B.max() == 29 and made == (29 - 1) / 4
  made, new_B = rounds(params, prompts, **greedy('lookup'), **guessing('lookup', 4))
  assert new_B.max() == 29 and made < 29 / 2


@pytest.mark.slow
def test_nan(params):
  """A draft's make its guesses worse, no more; the model's own are told."""
  options = dict(greedy('draft'), max_new_tokens=40)
  have = generate_tokens(TARGET, params, PROMPTS, **options, **guessing('NaN', 5))
  assert told(have) == told(generate_tokens(TARGET, params, PROMPTS, **options))
  drawn = generate_tokens(TARGET, params, PROMPTS, **SAMPLED, **guessing('NaN', 3))
  tokens = np.concatenate([result.tokens for result in drawn])
  assert (tokens == 0).mean() < 0.4  # what is drawn from NaN
  with pytest.raises(UserError, match='prompt 0, .* NaN'):
    generate_tokens(TARGET, broken(params), PROMPTS, **options, **guessing('draft', 5))


TEMPERATURE, TOP_K, PENALTY = 1.4, 6, 1.5


def exact(params, prompt: list[int], n: int) -> np.ndarray:
  """The distribution of n new tokens, [V] * n: a full forward pass, and NumPy for the processors."""
  texts = np.array([[*prompt, *more] for more in itertools.product(range(V), repeat=n - 1)])
  logits = np.asarray(jax.jit(lambda x: bind(TARGET, params)(x))(jnp.asarray(texts)), np.float64)
  probs = np.ones([V] * n)
  for i in range(n):
    scores = logits[:, len(prompt) - 1 + i]
    seen = (texts[:, : len(prompt) + i, None] == np.arange(V)).any(1)
    scores = np.where(seen, np.where(scores > 0, scores / PENALTY, scores * PENALTY), scores)
    scores = scores / TEMPERATURE
    least = np.sort(scores)[:, -TOP_K, None]
    p = np.where(scores >= least, np.exp(scores - scores.max(-1, keepdims=True)), 0)
    p = (p / p.sum(-1, keepdims=True)).reshape([V] * n)  # axes: the n - 1 tokens, then the next
    p = p[(slice(None),) * i + (0,) * (n - 1 - i)]  # the same whatever comes later
    probs = probs * p.reshape([V] * (i + 1) + [1] * (n - 1 - i))
  return probs


def surprise(have: np.ndarray, want: np.ndarray) -> float:
  """Chi-square of counts, in standard deviations above its mean; cells of fewer than 5 are one."""
  usual = want >= 5
  have, want = (np.append(x[usual], x[~usual].sum()) for x in (have, want))
  freedom = len(want) - 1
  return (((have - want) ** 2 / np.maximum(want, 1e-9)).sum() - freedom) / np.sqrt(2 * freedom)


@pytest.mark.parametrize('who', [pytest.param('draft', marks=pytest.mark.slow), 'lookup'])
def test_samples_have_the_models_distribution(params, who):
  """Processors and all: the first token, two guesses or what replaces them, and what follows."""
  n, rows, prompt = 4, 4000, [3, 4, 6, 3, 4]
  results = generate_tokens(
    TARGET,
    params,
    prompt,
    num_return_sequences=rows,
    max_new_tokens=n,
    temperature=TEMPERATURE,
    top_k=TOP_K,
    repetition_penalty=PENALTY,
    **guessing(who, 2),
  )
  have = np.zeros([V] * n)
  np.add.at(have, tuple(np.array([result.tokens for result in results]).T), 1)
  want = rows * exact(params, prompt, n)
  assert want.sum() == pytest.approx(rows)
  for others in ((1, 2, 3), (0, 3), (0, 1), (2, 3), (0,)):
    assert surprise(have.sum(others), want.sum(others)) < 4, others


@pytest.mark.slow
@pytest.mark.parametrize('who,mesh', [('draft', (2, 2, 2)), ('lookup', (8, 1, 1))])
def test_a_row_depends_on_its_prompt_and_seed_alone(params, who, mesh):
  draw = lambda prompts, params: told(
    generate_tokens(TARGET, params, prompts, **SAMPLED, **guessing(who, 3))
  )
  want = draw(PROMPTS, params)
  assert draw(PROMPTS[::-1], params) == want[::-1]
  if who == 'draft':
    assert draw(PROMPTS[1], params) == want[1:2]
  with mesh_of(*mesh):
    assert draw(PROMPTS, init_params(TARGET, SEED)) == want


@pytest.mark.parametrize(
  'options,says',
  [
    (dict(assistant=(DRAFT, {}), num_assistant_tokens=0), 'num_assistant_tokens = 0 must be'),
    (dict(prompt_lookup_num_tokens=0), 'prompt_lookup_num_tokens = 0 must be'),
    (dict(prompt_lookup_num_tokens=32), 'less than the context of 32'),
    (dict(prompt_lookup_num_tokens=2, max_matching_ngram_size=0), 'max_matching_ngram_size = 0'),
    (dict(prompt_lookup_num_tokens=2, num_beams=3), 'num_beams > 1 and prompt_lookup'),
    (dict(assistant=(DRAFT, {}), penalty_alpha=0.6, do_sample=False), 'alpha and assistant_model'),
    (dict(assistant=(DRAFT, {}), prompt_lookup_num_tokens=2), 'lookup_num_tokens and assistant'),
    (dict(assistant=(dataclasses.replace(DRAFT, vocab_size=11), {})), '11 ids, the model 13'),
    (dict(assistant=(dataclasses.replace(DRAFT, n_positions=16), {})), 'context of 16 .* 32'),
  ],
)
def test_what_cannot_be_is_refused(params, options, says):
  with pytest.raises(UserError, match=says):
    generate_tokens(TARGET, params, PROMPTS, **options)

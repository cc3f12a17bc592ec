"""Beam search and contrastive search find what transformers' find, and what there is to find."""

import dataclasses
import functools
import itertools
import json

import jax
import numpy as np
import pytest
from golden.make_searches import CASES, COMMON, PROMPTS, SIZES, weights
from hypothesis import given, settings
from hypothesis import strategies as st
from support.arrays import mesh_of
from support.processes import ROOT

from gpt2_jax.checkpoints.tensors import Source, load_params
from gpt2_jax.core.errors import UserError
from gpt2_jax.decoding.beams import Beams
from gpt2_jax.decoding.decoder import Decoder, TextRequest
from gpt2_jax.decoding.from_options import make_search
from gpt2_jax.decoding.generate import generate_tokens
from gpt2_jax.decoding.host_loop import run
from gpt2_jax.decoding.options import Options
from gpt2_jax.model.config import GPTConfig
from gpt2_jax.model.gpt2 import bind, init_params
from gpt2_jax.tokenizer import bpe

CONFIG = GPTConfig(**SIZES, vocab_multiple=8)
SMALL = GPTConfig(
  vocab_size=5, n_positions=16, n_embd=8, n_layer=1, n_head=2, vocab_multiple=2, initializer_range=0.5
)
GREEDY = dict(do_sample=False)
BEAMS, GROUPS, CONTRASTIVE = (COMMON | CASES[name][-1] for name in ('beams', 'groups', 'contrastive'))
DRAWN = BEAMS | dict(do_sample=True, seed=3)


@pytest.fixture(scope='module')
def params():
  return load_params(Source(CONFIG, weights().__getitem__, 'float32', 'made'))


@pytest.fixture(scope='module')
def small():
  return init_params(SMALL, 0)


def found(results):
  return [(result.prompt, result.tokens, result.finish_reason) for result in results]


def scores(results):
  return [result.score for result in results]


@pytest.mark.parametrize('name', CASES)
def test_what_transformers_find(params, name):
  for options, want in json.loads((ROOT / f'tests/golden/searches/{name}.json').read_text()):
    results = generate_tokens(CONFIG, params, PROMPTS, **COMMON | options)
    tokens, score = zip(*itertools.chain(*want))
    assert [result.tokens for result in results] == list(tokens), options
    if name != 'contrastive':
      np.testing.assert_allclose(scores(results), score, rtol=2e-5)


@settings(deadline=None, max_examples=15)
@given(st.floats(-1, 2), st.integers(1, 3), st.lists(st.integers(0, 4), min_size=1, max_size=5))
def test_with_enough_beams_nothing_is_missed(small, length_penalty, n, prompt):
  """25 beams are all texts of two tokens of five; so the best of three tokens are found."""
  decoder = Decoder.of(
    TextRequest.of(
      SMALL,
      small,
      prompt,
      **GREEDY,
      num_beams=25,
      num_return_sequences=20 if n > 1 else 5,
      max_new_tokens=n,
      eos_token_id=3,
      early_stopping='never',
      length_penalty=length_penalty,
      top_logprobs=5,
    )
  )
  for _ in decoder.run():
    pass
  texts = [
    text
    for m in range(1, n + 1)
    for text in itertools.product(range(5), repeat=m)
    if 3 not in text[:-1] and (text[-1] == 3 or m == n)
  ]
  sums = dict(zip(texts, sums_of(small, prompt, texts)))
  ranks = {text: sums[text] / len(text) ** length_penalty for text in texts}
  have = [tuple(row.new) for row in decoder.rows]
  close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
  close([ranks[text] for text in have], sorted(ranks.values(), reverse=True)[: len(have)])
  assert len(set(have)) == len(have)
  close([row.score for row in decoder.rows], [ranks[text] for text in have])
  close([sum(row.logprobs) for row in decoder.rows], [sums[text] for text in have])
  for row in decoder.rows:
    close([top[token] for top, token in zip(row.top, row.new)], row.logprobs)


forward = jax.jit(lambda params, x_BT: jax.nn.log_softmax(bind(SMALL, params)(x_BT)))


def sums_of(params, prompt, texts):
  """Log-probabilities of texts after a prompt, by the full forward pass."""
  x_BT = np.zeros((128, 8), int)
  for row, text in zip(x_BT, texts):
    row[: len(prompt) + len(text)] = (*prompt, *text)
  logprobs_BTV = np.asarray(forward(params, x_BT))
  return [
    sum(logprobs_TV[len(prompt) - 1 + i, token] for i, token in enumerate(text))
    for logprobs_TV, text in zip(logprobs_BTV, texts)
  ]


@pytest.mark.parametrize('search', ['one beam', 'no contrast'])
def test_what_greedy_decoding_finds(params, search):
  # beams are penalised by log-probability, others by logit; so small a penalty does nothing
  common = COMMON | dict(repetition_penalty=1.0001)
  decoder = Decoder.of(TextRequest.of(CONFIG, params, PROMPTS, **common))
  options = (
    BEAMS | dict(early_stopping=True)
    if search == 'one beam'
    else (CONTRASTIVE | dict(penalty_alpha=0.0))
  )
  search, *_ = make_search(CONFIG, Options.of(**options), ends=2, assistant=None)
  job = dataclasses.replace(decoder.job, search=search)
  if isinstance(search, Beams):
    one = dataclasses.replace(search, num_beams=1, returned=1)
    job = dataclasses.replace(job, search=one, width=1)
  for _ in run(job, decoder.rows):
    pass
  have, want = decoder.results(), generate_tokens(CONFIG, params, PROMPTS, **common)
  assert found(have) == found(want)
  for one, other in zip(have, want):
    np.testing.assert_allclose(one.logprobs, other.logprobs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('options', [BEAMS, DRAWN, GROUPS, CONTRASTIVE])
def test_a_prompt_does_not_depend_on_others(params, options):
  one = generate_tokens(CONFIG, params, PROMPTS, **options)
  R = len(one) // 4
  other = generate_tokens(CONFIG, params, [PROMPTS[2], [7], PROMPTS[0], [8] * 9], **options)
  tokens = lambda results: [result.tokens for result in results]
  assert tokens(other)[:R] == tokens(one)[2 * R : 3 * R]
  assert tokens(other)[2 * R : 3 * R] == tokens(one)[:R]


@pytest.mark.slow
@pytest.mark.parametrize(
  'options,mesh', [(DRAWN, (8, 1, 1)), (GROUPS, (2, 2, 2)), (CONTRASTIVE, (2, 2, 2))]
)
def test_a_mesh_changes_nothing(params, options, mesh):
  want = generate_tokens(CONFIG, params, PROMPTS, **options)
  with mesh_of(*mesh):
    placed = load_params(Source(CONFIG, weights().__getitem__, 'float32', 'made'))
    have = generate_tokens(CONFIG, placed, PROMPTS, **options)
  assert found(have) == found(want)
  if options is not CONTRASTIVE:
    np.testing.assert_allclose(scores(have), scores(want), rtol=1e-4)


def test_seeds(params):
  draw = lambda seed: found(generate_tokens(CONFIG, params, PROMPTS, **DRAWN | dict(seed=seed)))
  assert draw(1) == draw(1) != draw(2)


@pytest.mark.slow
def test_beams_are_drawn_without_replacement(small):
  """Chi-square over 600 draws of two tokens of five."""
  n, counts = 600, np.zeros((5, 5))
  for seed in range(n):
    one, other = generate_tokens(
      SMALL, small, [1, 2], num_beams=2, num_return_sequences=2, max_new_tokens=1, seed=seed
    )
    counts[tuple(sorted((*one.tokens, *other.tokens)))] += 1
  probs = np.exp(sums_of(small, [1, 2], [(token,) for token in range(5)]))
  pairs = np.triu(np.outer(probs / (1 - probs), probs) + np.outer(probs, probs / (1 - probs)), k=1)
  usual = pairs * n >= 5
  want = np.append(pairs[usual], 1 - pairs[usual].sum()) * n
  have = np.append(counts[usual], n - counts[usual].sum())
  assert ((have - want) ** 2 / want).sum() < len(want) - 1 + 5 * np.sqrt(2 * (len(want) - 1))


def test_out_of_time(params):
  """The best beams so far are told: those that run are ranked among the finished ones."""
  results = generate_tokens(CONFIG, params, PROMPTS, **BEAMS, max_time=1e-9)
  assert {result.finish_reason for result in results} == {'time'}
  assert all(len(result.tokens) == 1 for result in results)
  assert scores(results[:3]) == sorted(scores(results[:3]), reverse=True)


def test_a_regular_expression(small):
  config = dataclasses.replace(SMALL, vocab_size=257)
  params = init_params(config, 0)
  results = generate_tokens(
    config,
    params,
    'x',
    tokenizer=bpe.load('byte'),
    regex='ab|c[de]',
    **GREEDY,
    num_beams=4,
    num_return_sequences=3,
  )
  assert {result.text for result in results} == {'ab', 'cd', 'ce'}
  assert scores(results) == sorted(scores(results), reverse=True)
  np.testing.assert_allclose(
    scores(results), [sum(result.logprobs) / 2 for result in results], rtol=1e-5
  )


def test_nothing_to_write(small):
  config = dataclasses.replace(SMALL, vocab_size=257)
  results = generate_tokens(
    config,
    init_params(config, 0),
    'x',
    tokenizer=bpe.load('byte'),
    regex='',
    **GREEDY,
    num_beams=4,
    num_return_sequences=3,
  )
  assert [(result.text, result.finish_reason) for result in results] == [('', 'stop')] * 3
  assert scores(results) == [0] * 3


def test_no_result(params, small):
  broken = jax.tree.map(lambda x: np.full_like(x, np.nan), params)
  with pytest.raises(UserError, match='logits are NaN'):
    generate_tokens(CONFIG, broken, PROMPTS, **BEAMS)
  with pytest.raises(UserError, match='prompt 0'):  # five texts of one token
    generate_tokens(
      SMALL,
      small,
      [1],
      **GREEDY,
      num_beams=25,
      num_return_sequences=25,
      max_new_tokens=1,
      eos_token_id=3,
      top_logprobs=5,
    )


@pytest.mark.parametrize(
  'options,says',
  [
    (dict(num_beams=0), 'num_beams = 0'),
    (dict(num_beams=2, num_return_sequences=3), 'num_return_sequences = 3 .* num_beams = 2'),
    (dict(num_return_sequences=2), 'num_return_sequences = 2'),
    (dict(length_penalty=2.0), 'length_penalty = 2.0 .* num_beams > 1'),
    (dict(early_stopping=True, num_beam_groups=2), 'early_stopping = True, num_beam_groups = 2 w'),
    (dict(num_beams=2, early_stopping='always'), "early_stopping = 'always' must be"),
    (dict(num_beams=2, length_penalty=float('nan')), 'length_penalty = nan'),
    (dict(num_beams=2, context='slide'), "context = 'slide'"),
    (dict(num_beams=4, num_beam_groups=3, diversity_penalty=1.0), 'multiple of num_beam_groups = 3'),
    (dict(num_beams=4, num_beam_groups=2), 'diversity_penalty = 0.0'),
    (dict(num_beams=4, diversity_penalty=1.0), 'num_beam_groups = 1'),
    (dict(num_beams=4, num_beam_groups=2, diversity_penalty=-1.0), 'diversity_penalty = -1.0 must'),
    (dict(num_beams=4, num_beam_groups=2, diversity_penalty=1.0, do_sample=True), 'do_sample=False'),
    (dict(penalty_alpha=0.6), 'needs do_sample=False and top_k'),
    (dict(penalty_alpha=0.6, top_k=4, do_sample=True), 'needs do_sample=False'),
    (dict(penalty_alpha=1.5, top_k=4), 'penalty_alpha = 1.5'),
    (dict(penalty_alpha=0.6, top_k=0), 'top_k = 0'),
    (dict(penalty_alpha=0.6, top_k=4, num_beams=2), 'num_beams > 1 and penalty_alpha are different'),
  ],
)
def test_what_does_not_go_together(small, options, says):
  with pytest.raises(UserError, match=says):
    generate_tokens(SMALL, small, [1], **GREEDY | options)

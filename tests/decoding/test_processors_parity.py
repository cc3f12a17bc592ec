"""The same scores as transformers' logits processors, alone and together (`parity` extra)."""

import logging
import math

import jax
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

torch = pytest.importorskip('torch', reason='parity tests need the extra: pip install -e .[parity]')
transformers = pytest.importorskip('transformers', reason='parity tests need the extra parity')

from support.scores import EOS, apply, make_history, random_scores  # noqa: E402

from gpt2_jax.decoding.from_options import make_processors  # noqa: E402
from gpt2_jax.decoding.options import Options  # noqa: E402
from gpt2_jax.decoding.samplers import SAMPLERS  # noqa: E402
from gpt2_jax.decoding.warpers import MinP, TopP, Typical  # noqa: E402

B, S, V = 4, 24, 61
ids_ = st.lists(st.integers(0, V - 1), min_size=1, max_size=5)
words_ = st.lists(st.integers(0, 3), min_size=1, max_size=4)
share = st.floats(0.01, 0.99)
OPTIONS = dict(
  repetition_penalty=st.floats(0.5, 2),
  no_repeat_ngram_size=st.integers(1, 5),
  bad_words_ids=st.lists(words_, min_size=1, max_size=5).map(lambda words: [[V - 1]] + words),
  sequence_bias=st.dictionaries(
    words_.map(tuple), st.floats(-9, 9) | st.just(-math.inf), min_size=1, max_size=6
  ),
  min_length=st.integers(1, S + 1),
  min_new_tokens=st.integers(1, 8),
  forced_bos_token_id=st.integers(0, V - 1),
  forced_eos_token_id=ids_,
  remove_invalid_values=st.just(True),
  exponential_decay_length_penalty=st.tuples(st.integers(0, 4), st.floats(0.8, 1.5)),
  suppress_tokens=ids_,
  begin_suppress_tokens=ids_,
  temperature=st.floats(0.3, 3),
  top_k=st.integers(1, V + 9),
  top_p=share,
  min_p=share,
  typical_p=share,
  epsilon_cutoff=st.floats(1e-4, 0.3),
  eta_cutoff=st.floats(1e-4, 0.3),
  renormalize_logits=st.just(True),
  prefix_allowed_tokens_fn=ids_,
)


@pytest.fixture(scope='module')
def theirs():
  """Hugging Face's processors for options, and what they make of scores."""
  logging.getLogger('transformers').setLevel(logging.ERROR)
  model = transformers.GPT2LMHeadModel(
    transformers.GPT2Config(
      vocab_size=V, n_positions=S, n_embd=4, n_layer=1, n_head=1, bos_token_id=0, eos_token_id=EOS
    )
  )

  def process(scores_BV, tokens_BS, prompt, limit, options, eos, prefix, num_beams):
    config = transformers.GenerationConfig(
      **options, num_beams=num_beams, num_return_sequences=1, max_length=prompt + limit
    )
    config._eos_token_tensor = torch.tensor(eos)
    processors = model._get_logits_processor(
      config, input_ids_seq_length=prompt, prefix_allowed_tokens_fn=prefix, device='cpu'
    )
    tokens_BS, scores_BV = torch.tensor(tokens_BS), torch.tensor(scores_BV)
    return processors(tokens_BS, scores_BV).numpy()

  torch.distributions.Distribution.set_default_validate_args(False)  # rows where nothing is left
  yield process
  torch.distributions.Distribution.set_default_validate_args(True)


def softmax(x_BV):
  e_BV = np.exp(np.float64(x_BV) - x_BV.max(-1, keepdims=True))
  return e_BV / e_BV.sum(-1, keepdims=True)


def check(theirs, options, seed, *, do_sample=True, num_beams=1, invalid=False):
  rng = np.random.default_rng(seed)
  length = int(rng.integers(1, S + 1))
  prompt, limit = int(rng.integers(max(1, length - 6), length + 1)), int(rng.integers(1, 9))
  limit = max(limit, length - prompt + 1)
  tokens_BS = rng.integers(0, rng.integers(1, 6), (B, S))
  scores_BV = random_scores(rng, B, V, forbidden=rng.choice([0, 0.3, 0.9]))
  if num_beams > 1:
    scores_BV = np.array(jax.nn.log_softmax(scores_BV))
  if invalid:
    scores_BV[rng.random((B, V)) < 0.02] = rng.choice([math.nan, math.inf])
  eos = [EOS] if seed % 2 else [EOS, V - 1, 5]
  options = dict(options, do_sample=do_sample)
  listed = options.pop('prefix_allowed_tokens_fn', None)
  prefix = listed and (
    lambda prompt, ids: [i for i in listed if (prompt + int(sum(ids))) % 2 or i > 9] or [7]
  )
  want_BV = theirs(scores_BV, tokens_BS[:, :length], prompt, limit, options, eos, prefix, num_beams)
  made = make_processors(
    Options(**options, num_beams=num_beams), V=V, eos=eos, ends=eos, prefix_allowed_tokens_fn=prefix
  )
  have_BV, same = scores_BV, np.ones(B, bool)
  history = make_history(tokens_BS, length, prompt, limit, which_B=np.arange(B) // num_beams)
  for processor in made:  # one at a time: no combination is compiled
    if isinstance(processor, TopP | MinP | Typical):  # of tokens that tie they keep some, we all
      probs_BV = np.asarray(jax.nn.softmax(have_BV))
      same &= [len(set(p[p > 0])) == (row > -math.inf).sum() for p, row in zip(probs_BV, have_BV)]
    have_BV = np.asarray(apply((processor,), have_BV, history))
  nothing = np.isneginf(have_BV).all(-1)
  assert not np.isfinite(want_BV[nothing]).any() and not np.isnan(have_BV).any()
  same &= np.isfinite(want_BV.max(-1))  # of no token, and of inf, their softmax makes NaN
  np.testing.assert_array_equal(np.isneginf(have_BV[same]), np.isneginf(want_BV[same]))
  powers = 'exponential_decay_length_penalty' in options  # theirs are of float64
  np.testing.assert_allclose(
    softmax(have_BV[same]), softmax(want_BV[same]), atol=1e-5 if powers else 1e-6
  )


@pytest.mark.parametrize('name', OPTIONS)
@settings(deadline=None, max_examples=25, derandomize=True)
@given(data=st.data(), seed=st.integers(0, 10_000), num_beams=st.sampled_from([1, 2]))
def test_each_alone(theirs, name, data, seed, num_beams):
  invalid = name == 'remove_invalid_values'
  check(theirs, {name: data.draw(OPTIONS[name])}, seed, num_beams=num_beams, invalid=invalid)


@settings(deadline=None, max_examples=100, derandomize=True)
@given(
  st.fixed_dictionaries({}, optional=OPTIONS),
  st.integers(0, 10_000),
  st.sampled_from([1, 2]),
  st.booleans(),
)
def test_any_combination(theirs, options, seed, num_beams, do_sample):
  suppressed = options.get('suppress_tokens', ())
  assume(options.get('forced_bos_token_id') not in suppressed)  # they refuse these
  assume(not set(options.get('forced_eos_token_id', [V])) <= set(suppressed))
  if not do_sample:
    options = {name: value for name, value in options.items() if not SAMPLERS[name].draws}
  check(theirs, options, seed, do_sample=do_sample, num_beams=num_beams)

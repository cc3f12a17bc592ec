"""Greedy decoding and beam search find what transformers' `generate` finds (`parity` extra)."""

import functools

import numpy as np
import pytest
from golden.make_searches import PAD, SIZES, weights
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip('torch', reason='parity tests need the extra: pip install -e .[parity]')
transformers = pytest.importorskip('transformers', reason='parity tests need the extra parity')

from gpt2_jax.checkpoints.tensors import Source, load_params  # noqa: E402
from gpt2_jax.decoding.generate import generate_tokens  # noqa: E402
from gpt2_jax.model.config import GPTConfig  # noqa: E402

CONFIG = GPTConfig(**SIZES, vocab_multiple=8)
PROMPTS = [[1, 2, 3], [5, 6, 7, 8, 9, 10, 11], [3] * 20, [95]]
COMMON = dict(do_sample=False, max_new_tokens=8, suppress_tokens=[PAD])

numbers = functools.partial(st.floats, allow_nan=False, width=32)
searching = st.fixed_dictionaries(
  dict(length_penalty=numbers(-1, 2), early_stopping=st.sampled_from([False, True, 'never']))
)
processing = st.fixed_dictionaries(
  dict(
    repetition_penalty=numbers(1.0625, 2),
    no_repeat_ngram_size=st.integers(2, 4),
    min_new_tokens=st.integers(1, 5),
  )
)
# few combinations, as each is compiled; 1 beam is greedy decoding
options = st.one_of(
  processing,
  *(
    st.builds(
      lambda R, *parts, K: (
        {'num_beams': K, 'num_return_sequences': R}
        | {name: value for part in parts for name, value in part.items()}
      ),
      st.integers(1, K),
      searching,
      *more,
      K=st.just(K),
    )
    for K, more in ((2, ()), (3, (processing,)), (5, ()))
  ),
)


@functools.cache
def pair(seed):
  """(their model, our parameters, ids that are likely to come)"""
  config = transformers.GPT2Config(**SIZES, bos_token_id=0, eos_token_id=0)
  theirs = transformers.GPT2LMHeadModel(config).eval()
  state = {f'transformer.{name}': torch.tensor(x) for name, x in weights(seed).items()}
  theirs.load_state_dict(state | {'lm_head.weight': state['transformer.wte.weight']})
  params = load_params(Source(CONFIG, weights(seed).__getitem__, 'float32', 'made'))
  with torch.no_grad():
    ends = [theirs(torch.tensor([prompt])).logits[0, -1, :PAD].topk(4).indices for prompt in PROMPTS]
  return theirs, params, torch.cat(ends).tolist()


def their_results(model, eos, options, **inputs):
  """What theirs returns for a batch that is padded on the left: (new ids, score) of each result."""
  longest = max(map(len, PROMPTS))
  rows = torch.tensor([[PAD] * (longest - len(prompt)) + prompt for prompt in PROMPTS])
  real = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in PROMPTS])
  out = model.generate(
    rows,
    attention_mask=real,
    pad_token_id=PAD,
    eos_token_id=eos,
    return_dict_in_generate=True,
    output_scores=True,
    **options,
    **inputs,
  )
  tokens = [
    row[: next((i for i, token in enumerate(row) if token in (*eos, PAD)), None)]
    for row in out.sequences[:, longest:].tolist()
  ]
  scores = getattr(out, 'sequences_scores', None)
  return tokens, None if scores is None else scores.numpy()


@settings(deadline=None, max_examples=20, derandomize=True)  # or now and then two beams tie
@given(options, st.integers(0, 3), st.lists(st.integers(0, 15), min_size=2, max_size=2, unique=True))
def test_searches(options, seed, which):
  theirs, params, likely = pair(seed)
  eos = [likely[i] for i in which]
  results = generate_tokens(CONFIG, params, PROMPTS, eos_token_id=eos, **COMMON, **options)
  tokens, scores = their_results(theirs, eos, COMMON | options)
  assert [result.tokens for result in results] == tokens
  if scores is not None:
    np.testing.assert_allclose([result.score for result in results], scores, rtol=1e-4)


@pytest.mark.parametrize('seed', range(3))
def test_beams_under_a_function(seed):
  """Those that it forbids are never among the beams, and it is asked for each beam."""
  theirs, params, likely = pair(seed)
  allowed = lambda which, ids: [i for i in range(97) if (i + int(ids[-1]) + which) % 7 == 0]
  options = COMMON | dict(num_beams=3, num_return_sequences=3, length_penalty=0.5)
  results = generate_tokens(
    CONFIG, params, PROMPTS, eos_token_id=likely[:2], prefix_allowed_tokens_fn=allowed, **options
  )
  tokens, scores = their_results(theirs, likely[:2], options, prefix_allowed_tokens_fn=allowed)
  assert [result.tokens for result in results] == tokens
  np.testing.assert_allclose([result.score for result in results], scores, rtol=1e-4)

"""Decoding equals the full forward pass, and a sample depends on its prompt and seed alone."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.arrays import mesh_of
from support.models import byte_model, tiny_gpt2

from gpt2_jax.checkpoints.pretrained import from_pretrained, save_pretrained
from gpt2_jax.core.errors import UserError
from gpt2_jax.decoding import device_loop
from gpt2_jax.decoding.generate import generate, generate_tokens, stream
from gpt2_jax.model.gpt2 import bind, init_params
from gpt2_jax.model.pretrained_model import Pretrained
from gpt2_jax.tokenizer import bpe

PROMPTS = [[1, 2, 3], [5, 6, 7, 8, 9, 10, 11], [3] * 20, [96]]
SAMPLED = dict(temperature=0.9, top_k=40, top_p=0.95, seed=3, max_new_tokens=12)


@pytest.fixture
def params(tiny):
  return init_params(tiny, 0)


@pytest.fixture(scope='module')
def tiny_params():
  """`tiny` and its parameters, for tests that hypothesis repeats."""
  config = tiny_gpt2()
  return config, init_params(config, 0)


def ids(results):
  return [result.tokens for result in results]


def test_greedy_is_the_argmax_of_the_full_forward_pass(tiny, params):
  forward = jax.jit(lambda x_1S: bind(tiny, params)(x_1S)[0])
  results = generate_tokens(tiny, params, PROMPTS, do_sample=False, max_new_tokens=40)
  for prompt, result in zip(PROMPTS, results):
    sequence = prompt + result.tokens
    logits_SV = np.asarray(forward(jnp.asarray([sequence + [0] * (32 - len(sequence))])))
    want_SV = logits_SV[len(prompt) - 1 : len(sequence) - 1]
    assert result.tokens == want_SV.argmax(-1).tolist()
    logprobs = np.asarray(jax.nn.log_softmax(want_SV))[range(len(result.tokens)), result.tokens]
    np.testing.assert_allclose(result.logprobs, logprobs, rtol=1e-4, atol=1e-5)
    assert len(sequence) == 32 and result.finish_reason == 'context'


@pytest.mark.parametrize(
  'options', [pytest.param(dict(do_sample=False, max_new_tokens=12), marks=pytest.mark.slow), SAMPLED]
)
def test_a_row_does_not_depend_on_its_batch(tiny, params, options):
  together = ids(generate_tokens(tiny, params, PROMPTS, **options))
  alone = [ids(generate_tokens(tiny, params, prompt, **options))[0] for prompt in PROMPTS]
  backwards = ids(generate_tokens(tiny, params, PROMPTS[::-1], **options))
  assert together == alone == backwards[::-1]


@pytest.mark.slow
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
  draw = lambda seed, n=1: ids(
    generate_tokens(tiny, params, [1, 2, 3], seed=seed, num_return_sequences=n, max_new_tokens=12)
  )
  assert draw(1) == draw(1) != draw(2)
  several = draw(1, 3)
  assert several[:1] == draw(1) and len({tuple(row) for row in several}) == 3


def test_samples_have_the_models_distribution(tiny, params):
  """Chi-square over 4,000 draws of the next token, at temperature 1.5."""
  n = 4000
  results = generate_tokens(
    tiny, params, [4, 5, 6], temperature=1.5, num_return_sequences=n, max_new_tokens=1
  )
  counts = np.bincount([result.tokens[0] for result in results], minlength=97)
  probs = np.asarray(jax.nn.softmax(bind(tiny, params)(jnp.array([[4, 5, 6]]))[0, -1] / 1.5))
  usual = probs * n >= 5
  want = np.append(probs[usual], probs[~usual].sum()) * n
  have = np.append(counts[usual], counts[~usual].sum())
  chi2, freedom = ((have - want) ** 2 / np.maximum(want, 1e-9)).sum(), len(want) - 1
  assert chi2 < freedom + 5 * np.sqrt(2 * freedom)


def test_the_end_of_text_ends_a_row(tiny, params):
  free = generate_tokens(tiny, params, PROMPTS[:3], do_sample=False, max_new_tokens=10)
  eos = free[0].tokens[4]
  stopped = generate_tokens(
    tiny, params, PROMPTS[:3], do_sample=False, max_new_tokens=10, eos_token_id=eos
  )
  first = free[0].tokens.index(eos)
  assert stopped[0].tokens == free[0].tokens[:first] and stopped[0].finish_reason == 'stop'
  for one, other in zip(stopped, free):
    if eos not in other.tokens:
      assert one.tokens == other.tokens and one.finish_reason == 'length'
    assert len(one.logprobs) == len(one.tokens)


def test_other_prompts_and_numbers_compile_nothing(tiny, params):
  generate_tokens(tiny, params, [1, 2, 3], **SAMPLED)
  compiled = device_loop.start._cache_size(), device_loop.advance._cache_size()
  for prompt in ([1], [4] * 14):
    for temperature, k, p, n in ((0.5, 3, 0.5, 9), (2.0, 90, 0.8, 15)):
      generate_tokens(
        tiny, params, prompt, temperature=temperature, top_k=k, top_p=p, seed=9, max_new_tokens=n
      )
  assert (device_loop.start._cache_size(), device_loop.advance._cache_size()) == compiled


def test_texts_in_and_out(tiny):
  config = dataclasses.replace(tiny, vocab_size=257)
  model, t = bind(config, init_params(config, 0)), bpe.load('byte')
  results = generate(model, ['ab', ''], tokenizer=t, num_return_sequences=2, max_new_tokens=5)
  assert [result.prompt for result in results] == [0, 0, 1, 1]
  for result in results:
    assert result.text == t.decode(result.tokens)
  model = Pretrained(model, t)
  assert generate(model, 'ab', max_new_tokens=5)[0].text == results[0].text
  assert generate(model, t.encode('ab'), max_new_tokens=5)[0].tokens == results[0].tokens


@pytest.mark.parametrize(
  'prompts,options,says',
  [
    ([1] * 32, {}, 'context of 32 .* no room'),
    ([97], {}, 'token id 97, but .* 97 ids'),
    ([], {}, 'there is no prompt'),
    ([[]], {}, 'has no ids'),
    ('text', {}, 'needs a tokenizer'),
    ([1], dict(temperature=0), 'temperature = 0 must be positive'),
    ([1], dict(top_k=0), 'top_k = 0'),
    ([1], dict(top_p=1.5), 'top_p = 1.5'),
    ([1], dict(max_new_tokens=0), 'max_new_tokens = 0'),
    ([1], dict(do_sample=False, num_return_sequences=2), 'needs do_sample'),
    ([1], dict(temperatur=0.5), "no option 'temperatur' .* do you mean temperature"),
    ([1], dict(temperature=-1), 'temperature = -1 must be positive'),
    ([1], dict(top_p=0), 'top_p = 0'),
    ([1], dict(stop_strings='x'), 'need a tokenizer'),
    ([1], dict(context='wrap'), "context = 'wrap'"),
    ([1], dict(top_logprobs=-1), 'top_logprobs'),
    ([1], dict(max_time=0), 'max_time = 0'),
    ([1], dict(eos_token_id=97), 'eos_token_id'),
    ([1], dict(stop_token_ids=[-1]), 'stop_token_ids'),
  ],
)
def test_what_cannot_be_is_refused(tiny, params, prompts, options, says):
  with pytest.raises(UserError, match=says):
    generate_tokens(tiny, params, prompts, **options)


@pytest.mark.slow
def test_every_position_of_the_whole_context(tiny):
  """Prompts of 1, 2, 1022 and 1023 ids, continued to the 1024th: as one full forward pass has it."""
  config = dataclasses.replace(tiny, n_positions=1024, n_embd=16, n_layer=2, n_inner=24)
  params, rng = init_params(config, 0), np.random.default_rng(0)
  prompts = [rng.integers(0, 97, n).tolist() for n in (1, 2, 1022, 1023)]
  results = generate_tokens(config, params, prompts, do_sample=False, max_new_tokens=2000)
  whole = np.array([prompt + result.tokens for prompt, result in zip(prompts, results)])
  assert whole.shape == (4, 1024)
  assert {result.finish_reason for result in results} == {'context'}
  logits_BTV = np.asarray(jax.jit(lambda x_BT: bind(config, params)(x_BT))(whole))
  for prompt, result, logits_TV in zip(prompts, results, logits_BTV):
    want_TV = logits_TV[len(prompt) - 1 : -1]
    assert result.tokens == want_TV.argmax(-1).tolist()
    logprobs = np.asarray(jax.nn.log_softmax(want_TV))[range(len(result.tokens)), result.tokens]
    np.testing.assert_allclose(result.logprobs, logprobs, rtol=1e-4, atol=1e-4)


@settings(max_examples=15, deadline=None)
@given(
  st.lists(st.lists(st.integers(0, 96), min_size=1, max_size=16), min_size=4, max_size=4),
  st.integers(0, 2**31),
  st.sampled_from([{}, dict(repetition_penalty=1.3, top_p=0.8)]),
)
def test_any_batch_is_its_rows(tiny_params, prompts, seed, options):
  """Composition of the batch: each of four random prompts as if it were alone."""
  tiny, params = tiny_params
  options = dict(seed=seed, max_new_tokens=9) | options
  together = ids(generate_tokens(tiny, params, prompts, **options))
  for i in (seed % 4, (seed + 1) % 4):
    assert ids(generate_tokens(tiny, params, prompts[i], **options)) == [together[i]]


def test_several_results_read_the_prompt_once(tiny, params, monkeypatch):
  read = []
  monkeypatch.setattr(
    device_loop,
    'prefill',
    lambda model, request, N, real=device_loop.prefill: (
      read.append(request.prompts_AP.shape[0]),
      real(model, request, N),
    )[1],
  )
  several = ids(
    generate_tokens(tiny, params, [[1, 2], [3]], num_return_sequences=7, seed=5, max_new_tokens=11)
  )
  assert read == [2]
  alone = ids(generate_tokens(tiny, params, [3], num_return_sequences=2, seed=5, max_new_tokens=11))
  assert several[7:9] == alone


@pytest.mark.slow
def test_a_sliding_context_reads_its_last_half_again(tiny, params):
  """Window after window, greedily, by full forward passes."""
  prompts = [[1, 2, 3], [7] * 29]
  options = dict(do_sample=False, max_new_tokens=45, context='slide')
  results = generate_tokens(tiny, params, prompts, **options)
  forward = jax.jit(lambda x_1S: bind(tiny, params)(x_1S)[0])
  for prompt, result in zip(prompts, results):
    assert result.finish_reason == 'length' and len(result.logprobs) == 45
    sequence, window = list(prompt), list(prompt)
    while len(sequence) < len(prompt) + 45:
      if len(window) == 32:
        window = window[-16:]
      logits_SV = np.asarray(forward(jnp.asarray([window + [0] * (32 - len(window))])))
      token = int(logits_SV[len(window) - 1].argmax())
      sequence.append(token)
      window.append(token)
    assert result.tokens == sequence[len(prompt) :]
  assert ids(generate_tokens(tiny, params, prompts[1], **options)) == [results[1].tokens]


def test_top_logprobs_are_the_models(tiny, params):
  [result] = generate_tokens(tiny, params, [4, 5], seed=2, max_new_tokens=6, top_logprobs=3, top_k=9)
  logprobs = jax.nn.log_softmax(bind(tiny, params)(jnp.asarray([[4, 5, *result.tokens]]))[0])
  for place, (top, token, logprob) in enumerate(
    zip(result.top_logprobs, result.tokens, result.logprobs)
  ):
    row = np.asarray(logprobs[1 + place])
    assert list(top) == np.argsort(-row)[:3].tolist()
    np.testing.assert_allclose(list(top.values()), np.sort(row)[::-1][:3], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(logprob, row[token], rtol=1e-4, atol=1e-5)


def test_logits_that_are_nan_are_named(tiny, params):
  bad = params | {'ln_f': {**params['ln_f'], 'bias': params['ln_f']['bias'] + jnp.nan}}
  with pytest.raises(UserError, match='prompt 0, position 3: the logits are NaN'):
    generate_tokens(tiny, bad, [1, 2, 3], max_new_tokens=3)
  with pytest.raises(UserError, match='position 3: the options forbid every token'):
    generate_tokens(tiny, params, [1, 2, 3], max_new_tokens=3, suppress_tokens=range(97))


@pytest.fixture(scope='module')
def writer():
  """A model that writes bytes."""
  return byte_model()


def test_a_stream_is_the_text_in_valid_pieces(writer):
  favoured = dict.fromkeys(writer.tokenizer.encode('añ日本🎉'), 4.0)  # characters of several bytes
  whole = 0
  for seed in range(6):
    options = dict(max_new_tokens=40, seed=seed, sequence_bias=favoured, stop_strings=['a日', 'ñ'])
    [want] = generate(writer, 'ab', **options)
    pieces, shown = stream(writer, 'ab', **options), []
    while True:
      try:
        shown.append(next(pieces))
      except StopIteration as end:
        assert end.value == want
        break
    assert ''.join(shown) == want.text
    for i in range(1, len(shown)):  # a cut never falls into a character
      assert not shown[i - 1].endswith('\ufffd') or want.text.count('\ufffd')
    whole += len(shown) > 3
  assert whole > 2


def test_stop_strings_end_a_text_before_them(writer):
  letters = dict.fromkeys(writer.tokenizer.encode('abcdefgh'), 9.0)
  options = dict(max_new_tokens=40, seed=1, sequence_bias=letters)
  [free] = generate(writer, 'ab', **options)
  wanted = free.text[5:8]  # three tokens
  [stopped] = generate(writer, 'ab', stop_strings=['never to be seen', wanted], **options)
  assert stopped.finish_reason == 'stop' and stopped.text == free.text[: free.text.index(wanted)]
  assert stopped.tokens == free.tokens[: len(stopped.tokens)] and len(stopped.tokens) < 40
  assert writer.tokenizer.decode(stopped.tokens).endswith(wanted)


def test_ids_and_budgets_stop(writer):
  [free] = generate(writer, 'ab', max_new_tokens=40, seed=1)
  [stopped] = generate(writer, 'ab', max_new_tokens=40, seed=1, stop_token_ids=[free.tokens[7]])
  first = free.tokens.index(free.tokens[7])
  assert stopped.tokens == free.tokens[:first] and stopped.finish_reason == 'stop'
  [late] = generate(
    writer, 'ab', max_new_tokens=40, seed=1, stop_token_ids=[free.tokens[7]], min_new_tokens=first + 1
  )
  assert len(late.tokens) > first and late.tokens[:first] == free.tokens[:first]
  [timed] = generate(writer, 'ab', max_new_tokens=40, seed=1, max_time=1e-9)
  assert timed.finish_reason == 'time' and timed.tokens == free.tokens[:1]


def test_an_end_that_the_vocabulary_has_not_is_no_end(tiny, tmp_path):
  """As in many a small checkpoint, whose config.json kept GPT-2's 50256."""
  save_pretrained(bind(tiny, init_params(tiny, 0)), tmp_path / 'model')
  file = tmp_path / 'model' / 'config.json'
  file.write_text(json.dumps(json.loads(file.read_text()) | {'eos_token_id': 50256}))
  (tmp_path / 'model' / 'generation_config.json').unlink(missing_ok=True)
  [result] = generate(from_pretrained(tmp_path / 'model'), [1, 2], max_new_tokens=5)
  assert len(result.tokens) == 5 and result.finish_reason == 'length'


def test_a_regular_expression_is_matched(writer):
  pytest.importorskip('outlines_core')
  for seed in range(3):
    [result] = generate(writer, 'ab', max_new_tokens=40, seed=seed, regex=r'(\d{2,3}-)+é[a-c]+!')
    assert result.finish_reason in ('stop', 'length')
    if result.finish_reason == 'stop':
      assert re.fullmatch(r'(\d{2,3}-)+é[a-c]+!', result.text)
  assert result.text[:2].isdigit()
  [empty] = generate(writer, 'ab', max_new_tokens=4, regex='', eos_token_id=())
  assert empty.tokens == [] and empty.finish_reason == 'stop'


def test_processors_of_ones_own(tiny, params):
  @jax.tree_util.register_dataclass
  @dataclasses.dataclass(frozen=True)
  class Odd:  # only ids that are odd, and none twice
    lift: float

    def __call__(self, scores_BV, history):
      V = scores_BV.shape[-1]
      wanted_BV = (jnp.arange(V) % 2 == 1) & (history.counts(V) == 0)
      return jnp.where(wanted_BV, scores_BV + self.lift, -jnp.inf)

  options = dict(seed=1, max_new_tokens=10, logits_processor=[Odd(0.5)])
  want = generate_tokens(tiny, params, PROMPTS, **options)
  for result, prompt in zip(want, PROMPTS):
    everything = prompt + result.tokens
    assert all(token % 2 for token in result.tokens)
    assert len(set(result.tokens)) == len(result.tokens) and not set(prompt) & set(result.tokens)
    assert len(everything) == len(prompt) + 10
  with mesh_of(2, 2, 2):
    have = generate_tokens(tiny, init_params(tiny, 0), PROMPTS, **options)
  assert ids(have) == ids(want)


def test_the_parameters_are_prepared_once_and_anew_when_they_change(writer):
  from gpt2_jax.decoding.generate import prepare

  before = prepare(writer)
  assert prepare(writer) is before
  [one] = generate(writer, 'ab', max_new_tokens=8, do_sample=False)
  weight = writer.model.wte.weight[...]
  writer.model.wte.weight[...] = weight[::-1]
  [other] = generate(writer, 'ab', max_new_tokens=8, do_sample=False)
  writer.model.wte.weight[...] = weight
  assert one != other and generate(writer, 'ab', max_new_tokens=8, do_sample=False) == [one]

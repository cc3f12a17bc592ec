"""The smallest models: one, two or eight positions, one to three ids, one layer, one head, width 1.

Each door gives what a plain full forward pass does, or refuses in one line that names the limit.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gpt2_jax
from gpt2_jax.core.errors import UserError
from gpt2_jax.evaluation import token_scores
from gpt2_jax.model.config import GPTConfig
from gpt2_jax.model.gpt2 import GPT2
from gpt2_jax.tokenizer import bpe
from gpt2_jax.tokenizer.bpe import Tokenizer
from gpt2_jax.tokenizer.tables import EOT, Added, Tables
from gpt2_jax.training.watch.run_summary import fit_prompt

rare = lambda *size: pytest.param(size, marks=pytest.mark.slow)
SIZES = [(1, 2, 2), rare(2, 3, 2), (8, 3, 2), rare(2, 1, 1), rare(3, 2, 1)]  # positions, ids, width


def letters(V: int) -> Tokenizer:
  """V - 1 letters, and the end of a text."""
  vocab = {letter: i for i, letter in enumerate('abcdefgh'[: V - 1])} | {EOT: V - 1}
  return Tokenizer([], Tables(vocab, [], [Added(V - 1, EOT)], {}, False, V - 1))


def make(P: int, V: int, D: int, seed: int = 0, *, bias: float = 0.7) -> gpt2_jax.Pretrained:
  config = GPTConfig(
    vocab_size=V,
    n_positions=P,
    n_embd=D,
    n_layer=1,
    n_head=1,
    vocab_multiple=1,
    initializer_range=0.8,
    embd_pdrop=0,
    attn_pdrop=0,
    resid_pdrop=0,
  )
  params = gpt2_jax.init_params(config, seed)
  if D == 1:  # a layer norm leaves its bias alone
    params['ln_f']['bias'] = params['ln_f']['bias'] + bias
  model = gpt2_jax.bind(config, params)
  model = gpt2_jax.Pretrained(model, bpe.load('byte') if V == 257 else letters(V))
  return model


@pytest.fixture(scope='module', params=SIZES, ids=lambda size: 'P{}-V{}-D{}'.format(*size))
def small(request) -> gpt2_jax.Pretrained:
  return make(*request.param)


@pytest.fixture(scope='module')
def plain(small):
  """Log-probabilities after each of some ids, [T, V], by a forward pass over all of them."""
  return reference(small)


def reference(model: GPT2):
  forward = jax.jit(lambda tokens_1P: jax.nn.log_softmax(model(tokens_1P)[0]))

  def logprobs_TV(ids):
    padded = np.zeros((1, model.config.n_positions), np.int32)  # what follows is not seen
    padded[0, : len(ids)] = ids
    return np.asarray(forward(jnp.asarray(padded)))[: len(ids)]

  return logprobs_TV


def greedy(logprobs_TV, ids: list[int], P: int, most: int = 99) -> list[int]:
  new: list[int] = []
  while len(new) < most and len(ids) + len(new) < P:
    new.append(int(logprobs_TV([*ids, *new])[-1].argmax()))
  return new


def write(model: GPT2, **options):
  """Of a prompt of one id, without an id that ends it."""
  return gpt2_jax.generate(model, [[0]], eos_token_id=(), max_new_tokens=20, **options)


GREEDY = [
  dict(do_sample=False),
  dict(top_k=1),
  dict(temperature=2e-38),
  dict(do_sample=False, penalty_alpha=0.0, top_k=2),
  dict(do_sample=False, prompt_lookup_num_tokens=1, max_matching_ngram_size=99),
  dict(do_sample=False, assistant_model=True),
]


@pytest.mark.parametrize('options', GREEDY, ids=lambda options: [*options][-1])
def test_every_search_that_is_greedy_writes_the_likeliest(small, plain, options):
  c = small.config
  if 'assistant_model' in options:
    options = options | {'assistant_model': make(c.n_positions, c.vocab_size, c.n_embd, seed=1)}
  if c.n_positions == 1:
    with pytest.raises(UserError, match=r'n_positions = 1|context of 1|at most 1'):
      write(small, **options)
    return
  [result] = write(small, **options)
  assert result.tokens == greedy(plain, [0], c.n_positions) and result.finish_reason == 'context'
  want_NV = plain([0, *result.tokens])
  np.testing.assert_allclose(
    result.logprobs, want_NV[range(len(result.tokens)), result.tokens], atol=1e-5
  )


def test_beams_are_the_likeliest_of_all_texts(small, plain):
  """With more beams than there are texts of three ids."""
  P, V = small.config.n_positions, small.config.vocab_size
  if P == 1:
    return
  N = min(3, P - 1)
  total = lambda new: sum(plain([0, *new])[t, token] for t, token in enumerate(new))
  ranked = sorted(itertools.product(range(V), repeat=N), key=total, reverse=True)
  options = dict(do_sample=False, max_new_tokens=N, eos_token_id=())
  beams = V**N + 1
  [best] = gpt2_jax.generate(small, [[0]], num_beams=beams, **options)
  assert total(best.tokens) == pytest.approx(total(ranked[0]), abs=1e-5)
  assert best.score == pytest.approx(total(best.tokens) / N, abs=1e-4)
  with pytest.raises(UserError, match='fewer texts than num_return_sequences'):
    gpt2_jax.generate(small, [[0]], num_beams=beams, num_return_sequences=beams, **options)


def test_a_context_that_slides(small, plain):
  P = small.config.n_positions
  if P == 1:
    return
  ids, window = [0], [0]
  for _ in range(20):
    token = int(plain(window)[-1].argmax())
    ids.append(token)
    window = [*window, token]
    if len(window) == P:
      window = ids[-(P // 2) :]
  [result] = write(small, do_sample=False, context='slide')
  assert result.tokens == ids[1:] and result.finish_reason == 'length'


def test_options_larger_than_the_vocabulary(small, plain):
  P, V = small.config.n_positions, small.config.vocab_size
  with pytest.raises(UserError, match=f'top_logprobs = {V + 1}: the vocabulary has {V} ids'):
    write(small, top_logprobs=V + 1)
  if P == 1:
    return
  have = write(small, top_k=V + 50, top_p=0.999999, seed=3, top_logprobs=V)[0]
  assert have.tokens == write(small, seed=3)[0].tokens
  for t, top in enumerate(have.top_logprobs):
    want_V = plain([0, *have.tokens[:t]])[-1]
    np.testing.assert_allclose([top[i] for i in range(V)], want_V, atol=1e-5)


def test_contrastive_search_of_states_that_are_zero():
  """None is like another: the likeliest token is taken, and nothing becomes NaN."""
  model = make(4, 3, 1, bias=0)
  [result] = write(model, do_sample=False, penalty_alpha=0.6, top_k=3, top_logprobs=3)
  assert result.tokens == [0, 0, 0]
  np.testing.assert_allclose(result.logprobs, np.log(1 / 3), atol=1e-6)


def test_searches_refuse_what_is_beyond_the_context(small):
  P, V = small.config.n_positions, small.config.vocab_size
  with pytest.raises(UserError, match=f'context of {P}|n_positions = {P}'):
    write(small, prompt_lookup_num_tokens=P)
  with pytest.raises(UserError, match=f'prompt 0 has {P} tokens|n_positions = {P}'):
    gpt2_jax.generate(small, [[0] * P])
  if P > 1:
    with pytest.raises(UserError, match=f'context of {P - 1}'):
      write(small, assistant_model=make(P - 1, V, 2))


@pytest.mark.parametrize('V', [1, 3])
def test_automata_of_tiny_vocabularies(V):
  model = make(8, V, 2)
  text = lambda **options: gpt2_jax.generate(model, '', max_new_tokens=7, **options)[0].text
  if V > 2:
    assert text(regex='(ab){2}') == 'abab' and text(regex='') == ''
    found = {text(stop_strings=['ba', 'bb'], seed=seed) for seed in range(8)}
    assert len(found) > 1 and not any('ba' in each or 'bb' in each for each in found)
  with pytest.raises(UserError, match='no tokens to write a match with'):
    text(regex='z')


def test_scores_of_windows(small, plain):
  """Windows and strides up to the context; each token once."""
  P, V = small.config.n_positions, small.config.vocab_size
  tokens = (np.arange(7) * 5 % V).tolist()
  for window, stride in {(1, 1), (P, P), (P, max(1, P // 2))}:
    requests = token_scores.rolling(tokens, window=window, stride=stride, prefix=V - 1)
    assert [t for r in requests for t in r.target] == tokens
    for request, scored in zip(requests, token_scores.score(small, requests)):
      ids = [*request.context, *request.target]
      want_TV = plain(ids[:-1][-P:])[-len(request.target) :]
      np.testing.assert_allclose(
        scored.logprobs, want_TV[range(len(request.target)), request.target], atol=1e-5
      )
  with pytest.raises(UserError, match=f'context is {P}'):
    token_scores.score(small, [token_scores.Request([0], [0] * (P + 1))])


def test_features_and_attention(small):
  data = pytest.importorskip('gpt2_jax.serving.attention_data').attention_data
  P, V = small.config.n_positions, small.config.vocab_size
  [found] = gpt2_jax.features(small, [[V - 1] * P])
  assert found.attentions.shape == (1, 1, P, P)
  np.testing.assert_allclose(found.attentions.sum(-1), 1, atol=1e-5)
  with pytest.raises(UserError, match=f'prompt 0 has {P + 1} tokens'):
    gpt2_jax.features(small, [[0] * (P + 1)])
  lens = data(small, '')['lens']
  assert [len(row[0]) for row in lens] == [min(5, V)] * 2
  assert sum(p for _, p in lens[-1][0]) == pytest.approx(1, abs=1e-3)


@pytest.mark.slow
def test_programs_for_elsewhere(small, plain, tmp_path):
  gpt2_jax.save_pretrained(small, tmp_path / 'out', to='stablehlo')
  program = jax.export.deserialize((tmp_path / 'out' / 'prefill.bin').read_bytes())
  from safetensors.numpy import load_file

  params = load_file(tmp_path / 'out' / 'model.safetensors')
  P = small.config.n_positions
  for T in {1, P}:
    logits, *_ = program.call(params, jnp.zeros((1, T), jnp.int32), jnp.asarray([T], jnp.int32))
    np.testing.assert_allclose(jax.nn.log_softmax(logits[0]), plain([0] * T)[-1], atol=1e-5)


def test_the_sample_after_training_has_room():
  """What a run is to begin with is cut to its end, at whole characters."""
  config = lambda P: GPTConfig(vocab_size=257, n_positions=P, n_embd=2, n_layer=1, n_head=1)
  byte = bpe.load('byte')
  assert fit_prompt('import os', byte, config(10)) == 'import os'
  assert fit_prompt('import os', byte, config(9)) == 't os'
  assert fit_prompt('é' * 9, byte, config(7)) == 'é' == fit_prompt('é' * 9, byte, config(6))
  assert fit_prompt('é', byte, config(1)) == '' == fit_prompt('é', byte, config(2))
  assert fit_prompt('\n', byte, config(2)) == '\n'
  for P in (1, 2, 3):
    assert len(byte.encode(fit_prompt('aéé', byte, config(P)))) < P


SERVED = {
  'p1': (1, 257, 8),
  'p2': (2, 257, 8),
  'p8': (8, 257, 8),
  'p64': (64, 257, 8),
  'p8-v2': (8, 2, 2),
  'p2-v1': (2, 1, 1),
}
NAMES = [
  pytest.param(name, marks=() if name in ('p1', 'p64') else pytest.mark.slow) for name in SERVED
]


@pytest.fixture(scope='module')
def server():
  pytest.importorskip('fastapi', reason='the server needs the extra serve')
  from support.serving import serve

  with serve({name: make(*size) for name, size in SERVED.items()}, slots=2) as running:
    yield running


def ask(server, model: str, path: str = '/v1/completions', **body):
  import httpx

  return httpx.post(server.url + path, json=dict(body, model=model), timeout=120)


@pytest.mark.parametrize('name', NAMES)
def test_served_answers_are_those_of_sample(server, name):
  """As much as the context holds, of the shortest and the longest prompts."""
  P, V, _ = SERVED[name]
  model = server.serving.engines[name].model
  options = dict(seed=5, temperature=0.8, top_k=300)
  for n in {n for n in (1, P - 1) if 0 < n < P}:
    ids = [(7 * i + 1) % V for i in range(n)]
    [want] = gpt2_jax.generate(model, [ids], max_new_tokens=P - n, **options)
    answer = ask(server, name, prompt=ids, max_tokens=P - n, logprobs=5, **options)
    assert answer.status_code == 200, answer.text
    [have] = answer.json()['choices']
    assert have['logprobs']['token_ids'] == want.tokens and have['text'] == want.text
    np.testing.assert_allclose(have['logprobs']['token_logprobs'], want.logprobs, atol=1e-4)
    assert all(len(top) <= min(6, V) for top in have['logprobs']['top_logprobs'])
    [short] = ask(server, name, prompt=ids, **options).json()['choices']  # max_tokens: what is left
    want_text = gpt2_jax.generate(model, [ids], max_new_tokens=min(16, P - n), **options)[0].text
    assert short['text'] == want_text


@pytest.mark.parametrize('name', NAMES)
def test_served_scores_and_refusals(server, name):
  P, V, _ = SERVED[name]
  ids = [(5 * i) % V for i in range(P)]
  model = server.serving.engines[name].model
  answer = ask(server, name, prompt=ids, max_tokens=0, echo=True, logprobs=1)
  assert answer.status_code == 200, answer.text
  found = answer.json()['choices'][0]['logprobs']
  want_TV = reference(model)(ids)
  assert found['token_ids'] == ids and found['token_logprobs'][0] is None
  np.testing.assert_allclose(found['token_logprobs'][1:], want_TV[range(P - 1), ids[1:]], atol=1e-4)
  for body, param in (
    (dict(prompt=ids), 'prompt'),
    (dict(prompt=[0], max_tokens=P), 'max_tokens'),
    (dict(prompt=[0] * (P + 1), max_tokens=0), 'prompt'),
  ):
    answer = ask(server, name, **body)
    error = answer.json()['error']
    assert answer.status_code == 400 and error['code'] == 'context_length_exceeded'
    assert f'{P} tokens' in error['message'] and error['param'] == ('prompt' if P == 1 else param)
  assert ask(server, name, '/v1/features', input='').status_code == 200
  lens = ask(server, name, '/v1/attention', input='').json()['lens']
  assert len(lens[0][0]) == min(5, V)


def test_served_streams_and_the_best_of_several(server):
  """Of a model whose context is eight ids."""
  import httpx
  from support.serving import events

  body = dict(prompt='ab', seed=2, stop=['\x00'])
  whole = ask(server, 'p8', **body, n=3).json()['choices']
  with httpx.stream(
    'POST', server.url + '/v1/completions', json=body | dict(stream=True, model='p8'), timeout=120
  ) as answer:
    pieces = events(answer.iter_lines())
  assert ''.join(piece['choices'][0]['text'] for piece in pieces) == whole[0]['text']
  [best] = ask(server, 'p8', **body, best_of=3).json()['choices']
  assert best['text'] in [choice['text'] for choice in whole]


def test_all_programs_of_a_small_model_are_compiled_at_the_start(server):
  server.serving.engines['p1'].warm()
  assert [server.serving.engines[name].batch.chunks for name in SERVED] == [
    [1],
    [2],
    [8],
    [32, 64],
    [8],
    [2],
  ]


def test_protocols_that_write_refuse_a_context_without_room():
  """Before anything is read; so do the prompts of `bias`, which come after other probes."""
  from types import SimpleNamespace
  from typing import Any

  from gpt2_jax.evaluation import example_tasks

  protocol: Any = SimpleNamespace(name='lambada/some')
  scorer: Any = SimpleNamespace(model=make(3, 2, 2))
  with pytest.raises(UserError, match='lambada/some writes 3 tokens after a text: a context of 3'):
    example_tasks.written_word(scorer, protocol, None)  # type: ignore[arg-type]

"""A server answers as `generate` does, whatever else it is asked, and whoever asks."""

import concurrent.futures
import contextlib
import dataclasses
import json
import re
import socket
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.processes import ROOT

pytest.importorskip('fastapi', reason='the server needs the extra serve')
httpx = pytest.importorskip('httpx', reason='the client of these tests, of the extra test')

from support.serving import CONFIG, events, serve, tiny_model  # noqa: E402

import gpt2_jax  # noqa: E402
from gpt2_jax.cli.serve import Serve, model_names  # noqa: E402
from gpt2_jax.core.bounds import Bool, Int  # noqa: E402
from gpt2_jax.core.errors import UserError  # noqa: E402
from gpt2_jax.decoding.from_options import make_processors  # noqa: E402
from gpt2_jax.decoding.generate import prepare  # noqa: E402
from gpt2_jax.decoding.options import Options  # noqa: E402
from gpt2_jax.serving import programs, slot_state  # noqa: E402
from gpt2_jax.serving.device_batch import DeviceBatch  # noqa: E402
from gpt2_jax.serving.hosts import Hosts  # noqa: E402
from gpt2_jax.serving.schemas import ApiError, Limits  # noqa: E402

TEXT = 'A prompt that is read in two chunks, as it has more bytes than one of them holds. ' * 2
LONG = TEXT[:132]


@pytest.fixture(scope='module')
def server():
  """Its cache lies in blocks of 32 positions, as a large one does."""
  limits = Limits(body_bytes=20_000, texts=8, features_values=50_000)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(slot_state, 'BLOCK_BYTES', 1)
    with serve(slots=4, queue=16, limits=limits) as running:
      yield running


def post(server, path='/v1/completions', **body):
  return httpx.post(server.url + path, json=body, timeout=120)


def complete(server, **body) -> list[dict]:
  """The choices."""
  answer = post(server, **body)
  assert answer.status_code == 200, answer.text
  return answer.json()['choices']


RARE = dict(
  repetition_penalty=1.3, no_repeat_ngram_size=2, min_new_tokens=9, min_p=0.02, typical_p=0.9
)
# the same options in OpenAI's words and in those of `generate`
SAME = [
  (dict(temperature=0), dict(do_sample=False)),
  (dict(), dict()),
  (
    dict(temperature=0.7, top_k=20, top_p=0.9, n=2),
    dict(temperature=0.7, top_k=20, top_p=0.9, num_return_sequences=2),
  ),
  (
    dict(
      presence_penalty=1.5, frequency_penalty=-0.5, logit_bias={'65': 3, '66': -100}, stop=['e', 'AA']
    ),
    dict(
      presence_penalty=1.5,
      frequency_penalty=-0.5,
      sequence_bias={65: 3.0, 66: -100.0},
      stop_strings=('e', 'AA'),
    ),
  ),
  (RARE, RARE),
]


@pytest.mark.slow
@pytest.mark.parametrize('ours, theirs', SAME)
def test_the_text_is_that_of_generate(server, ours, theirs):
  model = server.serving.engines['tiny'].model
  for prompt in ('a', LONG):
    want = gpt2_jax.generate(model, prompt, max_new_tokens=25, seed=7, **theirs)
    have = complete(server, prompt=prompt, max_tokens=25, seed=7, logprobs=0, **ours)
    assert [choice['text'] for choice in have] == [result.text for result in want]
    for choice, result in zip(have, want):
      tokens = result.tokens[: len(choice['logprobs']['token_ids'])]  # none of what was cut off
      assert choice['logprobs']['token_ids'] == tokens and (tokens or not choice['text'])
      assert choice['logprobs']['token_logprobs'] == pytest.approx(
        result.logprobs[: len(tokens)], abs=2e-4
      )
      assert choice['finish_reason'] == result.finish_reason


MIXED = [
  dict(prompt=prompt, max_tokens=4 + 7 * i, seed=i, logprobs=2, echo=i % 2 == 0, **options)
  for i, (prompt, options) in enumerate(
    (prompt, options)
    for options in (
      {},
      {'temperature': 0},
      {'top_k': 5},
      {'top_p': 0.5, 'n': 2, 'stop': 'a'},
      {'presence_penalty': 2, 'logit_bias': {'65': 4}},
      RARE,
    )
    for prompt in ('x', LONG[:77])
  )
]


def test_texts_do_not_depend_on_what_else_is_asked(server):
  """To the last bit of the log-probabilities."""
  alone = [complete(server, **body) for body in MIXED]
  with concurrent.futures.ThreadPoolExecutor(len(MIXED)) as pool:
    together = list(pool.map(lambda body: complete(server, **body), MIXED))
  assert together == alone
  server.settle()


def test_each_rule_is_that_of_the_library():
  """A row for each rule, side by side: its scores are those that `generate` chooses by."""
  B, V, S, eos = len(slot_state.RULES), CONFIG.vocab_size, CONFIG.n_positions, np.asarray([7])

  def value(kind):
    return (
      True if isinstance(kind, Bool) else 2 + 20 * (not kind.low) if isinstance(kind, Int) else 0.3
    )

  asked = [{name: value(rule.kind)} for name, rule in slot_state.RULES.items()]
  rng = np.random.default_rng(0)
  logits_BV = jnp.asarray(2 * rng.standard_normal((B, V)), jnp.float32)
  state = slot_state.empty(prepare(tiny_model())[0], B=B)
  lengths_B = jnp.full(B, 9)
  history = dataclasses.replace(
    state.history,
    tokens_BS=jnp.asarray(rng.integers(0, 2, (B, S))),
    lengths_B=lengths_B,
    prompt_B=lengths_B - 8,
    reason_B=jnp.zeros_like(lengths_B),
  )
  numbers = [slot_state.choice_of(V, numbers) for numbers in asked]
  choice = jax.tree.map(lambda *x: jnp.stack(x), *numbers)
  assert {*slot_state.COMMON} < {*slot_state.RULES}
  found_BV = jax.jit(programs.process)(choice, logits_BV, history, eos)
  for b, options in enumerate(asked):
    row = lambda x, b=b: x[b : b + 1]
    [rule] = make_processors(Options(**options), V=V, eos=eos, ends=eos)
    want_1V = rule(row(logits_BV), jax.tree.map(row, history))
    np.testing.assert_allclose(row(found_BV), want_1V, rtol=1e-6, err_msg=str(options))
    assert (want_1V != row(logits_BV)).any() or 'remove_invalid_values' in options


@pytest.mark.parametrize('B', [1, 3])
def test_no_program_copies_a_cache(monkeypatch, B):
  """It is written in place, as compiled for a CPU; of one row as of several, in blocks."""
  monkeypatch.setattr(slot_state, 'BLOCK_BYTES', 1)
  form, params = prepare(tiny_model())
  state, row = slot_state.empty(form, B=B), slot_state.blank(form)
  ids_T = np.zeros(32, np.int32)
  for program in (
    programs.step.lower(form, params, np.asarray([256]), state),
    programs.prefill.lower(form, params, row, 0, ids_T, ids_T, False),
  ):
    text = program.compile().as_text()
    shapes = {
      ','.join(map(str, shape))
      for x in jax.tree.leaves((state.cache, row))
      for shape in (x.shape, (1, *x.shape))
    }
    copied = set(re.findall(r' = f32\[([\d,]*)\]\S* copy\(', text)) & shapes
    assert 'dynamic-update-slice' in text or 'scatter' in text
    assert not copied


def test_a_step_in_bfloat16_passes_over_no_cache(monkeypatch):
  """To write one position of a narrow cache, XLA for CPUs would make all of it wide, and round it."""
  monkeypatch.setattr(slot_state, 'BLOCK_BYTES', 1)
  config = dataclasses.replace(CONFIG, dtype='bfloat16', n_layer=1)
  model = gpt2_jax.bind(config, gpt2_jax.init_params(config, 0))
  form, params = prepare(gpt2_jax.Pretrained(model, tiny_model().tokenizer))
  state = slot_state.empty(form, B=3)
  shapes = {','.join(map(str, x.shape)) for x in jax.tree.leaves(state.cache)}
  text = programs.step.lower(form, params, np.asarray([256]), state).compile().as_text()
  made = re.findall(r' = \w+\[([\d,]*)\]\S* (\S*convert|copy)\(', text)
  assert made and shapes and not [op for shape, op in made if shape in shapes]


def test_int8_is_made_wide_once_on_a_cpu():
  """A server's programs make one token each: the weights' steps are wide before, the same numbers."""
  config = dataclasses.replace(CONFIG, n_layer=1)
  small = gpt2_jax.quantize(gpt2_jax.bind(config, gpt2_jax.init_params(config, 0)))
  model = gpt2_jax.Pretrained(small, tiny_model().tokenizer)
  batch = DeviceBatch('tiny', model, 1)
  dtypes = lambda params: {str(x.dtype) for x in jax.tree.leaves(params)}
  assert dtypes(prepare(model)[1]) == {'int8', 'float32'} and dtypes(batch.params) == {'float32'}
  logits = jax.jit(lambda params: gpt2_jax.bind(small.config, params)(jnp.arange(9)[None]))
  np.testing.assert_array_equal(logits(batch.params), logits(prepare(model)[1]))


def test_a_prompt_is_read_once(server):
  """However many texts begin with it: each reads its last id alone, in its first step."""
  before = server.value('prompt_tokens_total')
  choices = complete(server, prompt=LONG, max_tokens=3, n=6, seed=1)
  assert len({choice['text'] for choice in choices}) > 1
  assert server.value('prompt_tokens_total') - before == len(LONG) - 1 + 6


def stream(server, **body):
  with httpx.stream(
    'POST', server.url + '/v1/completions', json=body | {'stream': True}, timeout=120
  ) as answer:
    assert answer.status_code == 200
    return events(answer.iter_lines())


def test_pieces_joined_are_the_whole(server):
  """Text, log-probabilities and usage; held back for stop strings and characters in several bytes."""
  for body in (
    dict(prompt='ab', max_tokens=40, seed=3, logprobs=1, n=2, echo=True),
    dict(prompt=['ab', 'é'], max_tokens=40, seed=4, logprobs=3, stop=['a', 'bcd']),
    dict(prompt='ab', max_tokens=25, seed=5),
  ):
    whole = post(server, **body).json()
    pieces = stream(server, stream_options={'include_usage': True}, **body)
    assert pieces[-1]['usage'] == whole['usage'] and pieces[-1]['choices'] == []
    assert all(piece['usage'] is None for piece in pieces[:-1])
    for i, choice in enumerate(whole['choices']):
      mine = [p['choices'][0] for p in pieces[:-1] if p['choices'][0]['index'] == i]
      assert ''.join(piece['text'] for piece in mine) == choice['text']
      assert [piece['finish_reason'] for piece in mine] == [None] * (len(mine) - 1) + [
        choice['finish_reason']
      ]
      if 'logprobs' in body:
        for name, values in choice['logprobs'].items():
          assert [x for piece in mine for x in piece['logprobs'][name]] == values
    if 'stop' not in body:
      assert len(pieces) > 5, 'it came in pieces'


@pytest.mark.slow
def test_log_probabilities_of_a_given_text(server):
  """`echo` without new tokens: each token's log-probability is the full forward pass's."""
  import jax
  import numpy as np

  model = server.serving.engines['tiny'].model
  [choice] = complete(server, prompt=TEXT[:150], max_tokens=0, echo=True, logprobs=5)
  found = choice['logprobs']
  assert choice['text'] == TEXT[:150] == ''.join(found['tokens'])
  assert found['text_offset'] == list(range(150))
  ids = found['token_ids']
  want_TV = np.asarray(jax.nn.log_softmax(model(np.array([ids]))[0]))
  assert found['token_logprobs'][0] is None and found['top_logprobs'][0] is None
  np.testing.assert_allclose(found['token_logprobs'][1:], want_TV[range(149), ids[1:]], atol=2e-4)
  for t, top in enumerate(found['top_logprobs'][1:]):
    best = np.sort(want_TV[t])[::-1][:5]
    np.testing.assert_allclose(sorted(top.values(), reverse=True)[:5], best, atol=2e-4)
    assert found['tokens'][t + 1] in top and len(top) <= 6


@pytest.mark.slow
def test_the_best_of_several_is_the_likeliest_per_token(server):
  all_of_them = complete(server, prompt='q', n=6, max_tokens=12, seed=1, logprobs=0, stop='e')
  mean = lambda choice: (
    sum(choice['logprobs']['token_logprobs']) / max(1, len(choice['logprobs']['token_logprobs']))
  )
  answer = post(server, prompt='q', n=2, best_of=6, max_tokens=12, seed=1, stop='e').json()
  usage = post(server, prompt='q', n=6, max_tokens=12, seed=1, stop='e').json()['usage']
  assert answer['usage'] == usage, 'what was thrown away was written too'
  without_stops = [c for c in all_of_them if c['finish_reason'] == 'length']
  if len(without_stops) == 6:
    want = sorted(all_of_them, key=mean, reverse=True)[:2]
    assert [c['text'] for c in answer['choices']] == [c['text'] for c in want]
  assert {c['text'] for c in answer['choices']} <= {c['text'] for c in all_of_them}


REFUSED = [  # status, param, body
  (400, 'max_tokens', dict(prompt='a', max_tokens='5')),
  (400, 'max_tokens', dict(prompt='a', max_tokens=True)),
  (400, 'max_tokens', dict(prompt='a', max_tokens=-1)),
  (400, 'max_tokens', dict(prompt='a', max_tokens=160)),
  (400, 'prompt', dict(prompt='a' * 200)),
  (400, 'prompt', dict(prompt=[1, 257])),
  (400, 'prompt', dict(prompt=[1, -1])),
  (400, 'prompt', dict(prompt=[])),
  (400, 'prompt', dict(prompt=[[1], []])),
  (400, 'prompt', dict(prompt=['a', 1])),
  (400, 'prompt', dict(prompt={'a': 1})),
  (400, 'prompt', dict(prompt=['a'] * 5, n=2)),
  (400, 'temperature', dict(prompt='a', temperature=2.5)),
  (400, 'temperature', dict(prompt='a', temperature='hot')),
  (400, 'top_p', dict(prompt='a', top_p=1.5)),
  (400, 'top_k', dict(prompt='a', top_k=0)),
  (400, 'n', dict(prompt='a', n=0)),
  (400, 'best_of', dict(prompt='a', n=3, best_of=2)),
  (400, 'best_of', dict(prompt='a', best_of=2, stream=True)),
  (400, 'stream', dict(prompt='a', stream='yes')),
  (400, 'stream_options', dict(prompt='a', stream_options={'include_usage': True})),
  (400, 'logprobs', dict(prompt='a', logprobs=6)),
  (400, 'echo', dict(prompt='a', echo=1)),
  (400, 'stop', dict(prompt='a', stop='')),
  (400, 'stop', dict(prompt='a', stop=list('abcde'))),
  (400, 'stop', dict(prompt='a', stop=5)),
  (400, 'presence_penalty', dict(prompt='a', presence_penalty=3)),
  (400, 'frequency_penalty', dict(prompt='a', frequency_penalty=[])),
  (400, 'logit_bias', dict(prompt='a', logit_bias={'x': 1})),
  (400, 'logit_bias', dict(prompt='a', logit_bias={'999': 1})),
  (400, 'logit_bias', dict(prompt='a', logit_bias={'1': 101})),
  (400, 'seed', dict(prompt='a', seed=2**63)),
  (400, 'seed', dict(prompt='a', seed=1.5)),
  (400, 'suffix', dict(prompt='a', suffix='z')),
  (400, 'user', dict(prompt='a', user=5)),
  (400, 'temprature', dict(prompt='a', temprature=1)),
  (404, 'model', dict(prompt='a', model='other')),
  (413, None, dict(prompt='a' * 30_000)),
]


def assert_error(answer, status, param=None):
  """OpenAI's form, and nothing of the program's insides."""
  assert answer.status_code == status, answer.text
  error = answer.json()['error']
  assert set(error) == {'message', 'type', 'param', 'code'}
  assert error['param'] == param and error['message'] and error['type']
  assert 'Traceback' not in answer.text and '.py' not in answer.text


NEUTRAL = dict(
  suffix='',
  store=False,
  metadata={},
  service_tier='auto',
  user='me',
  safety_identifier='me',
  seed=None,
  logit_bias={},
  n=None,
  echo=False,
  logprobs=None,
  best_of=None,
  stop=None,
  min_p=0,
  min_tokens=0,
  repetition_penalty=1.0,
  length_penalty=1,
  stop_token_ids=[],
  ignore_eos=False,
  use_beam_search=False,
  prompt_cache_key=None,
  stream=False,
  stream_options={'include_usage': False, 'include_obfuscation': False},
)


def test_what_clients_send_of_themselves_is_taken_where_it_asks_for_nothing(server):
  plain = complete(server, prompt='ab', max_tokens=3, temperature=0)
  assert complete(server, prompt='ab', max_tokens=3, temperature=0, **NEUTRAL) == plain
  assert complete(server, prompt='ab', max_tokens=3, temperature=0, **dict.fromkeys(NEUTRAL)) == plain
  pieces = stream(
    server,
    prompt='ab',
    max_tokens=3,
    temperature=0,
    stream_options=dict(include_usage=True, include_obfuscation=False),
  )
  assert pieces[-1]['usage']['completion_tokens'] == 3
  asks = dict(
    suffix='z',
    store=True,
    metadata={'a': 'b'},
    service_tier='flex',
    min_tokens=1,
    stop_token_ids=[3],
    ignore_eos=True,
    prompt_cache_key='x',
  )
  for name, value in asks.items():
    answer = post(server, prompt='a', **{name: value})
    assert_error(answer, 400, name)
    error = answer.json()['error']
    assert error['code'] == 'unsupported_parameter' and name in error['message']
  body = dict(prompt='a', stream=True, stream_options={'include_obfuscation': True})
  assert_error(post(server, **body), 400, 'stream_options')


def test_a_temperature_of_almost_nothing(server):
  """Draws the likeliest token, though the scores divided by it are infinite."""
  for prompt in ('ab', 'q'):
    want = complete(server, prompt=prompt, max_tokens=8, temperature=0)
    for temperature in (5e-324, 1e-38, 1e-30):
      assert complete(server, prompt=prompt, max_tokens=8, temperature=temperature) == want


def test_head_is_get_without_its_body(server):
  for path in (
    '/',
    '/attention',
    '/patching',
    '/favicon.ico',
    '/healthz',
    '/v1/models',
    '/v1/models/tiny',
    '/openapi.json',
    '/static/icon.svg',
    '/v1/models/none',
    '/v1/nothing',
    '/v1/completions',
    '/healthz/?a=1',
  ):
    get, head = (httpx.request(method, server.url + path) for method in ('GET', 'HEAD'))
    assert head.status_code == get.status_code and not head.content, path
    same = lambda answer: {k: v for k, v in answer.headers.items() if k != 'date'}
    assert same(head) == same(get) and get.content
  head = httpx.head(server.url + '/metrics')  # which change
  assert head.status_code == 200 and not head.content and int(head.headers['content-length']) > 1000


def test_methods_and_paths(server):
  for method, path, allow in (
    ('GET', '/v1/completions', 'POST'),
    ('OPTIONS', '/v1/completions', 'POST'),
    ('PUT', '/v1/features', 'POST'),
    ('DELETE', '/v1/models/tiny', 'GET, HEAD'),
    ('POST', '/v1/models', 'GET, HEAD'),
    ('OPTIONS', '/healthz', 'GET, HEAD'),
  ):
    answer = httpx.request(method, server.url + path)
    assert_error(answer, 405)
    assert answer.headers['allow'] == allow and allow in answer.json()['error']['message']
    assert not [name for name in answer.headers if name.startswith('access-control')]
  body = dict(prompt='a', max_tokens=2, temperature=0)
  assert post(server, '/v1/completions/', **body).json()['choices'] == complete(server, **body)
  assert post(server, '/v1/completions?api-version=1', **body).status_code == 200
  assert httpx.get(server.url + '/v1/models/').json() == httpx.get(server.url + '/v1/models').json()
  for name in ('a%2Fb', '%00', 'ü', '..%2f..', '%ff', 'x' * 9000):
    answer = httpx.get(server.url + '/v1/models/' + name)
    assert_error(answer, 404, 'model')
    assert len(answer.text) < 500


def test_a_body_says_what_it_is(server):
  good = json.dumps(dict(prompt='a', max_tokens=2, temperature=0)).encode()
  send_ = lambda content, **headers: httpx.post(
    server.url + '/v1/completions',
    content=content,
    timeout=60,
    headers={name.replace('_', '-'): value for name, value in headers.items()},
  )
  for headers, says in (
    ({}, 'Content-Type is missing'),
    ({'Content_Type': 'text/plain'}, "Content-Type is 'text/plain'"),
    ({'Content_Type': 'multipart/form-data; boundary=x'}, 'Content-Type is'),
    ({'Content_Type': 'application/jsonx'}, 'Content-Type is'),
    ({'Content_Type': 'application/json', 'Content_Encoding': 'gzip'}, "Content-Encoding is 'gzip'"),
  ):
    answer = send_(good, **headers)
    assert_error(answer, 415)
    assert says in answer.json()['error']['message']
  want = complete(server, prompt='a', max_tokens=2, temperature=0)
  for headers in (
    {'Content_Type': 'application/json; charset=utf-8'},
    {'Content_Type': 'Application/JSON', 'Content_Encoding': 'identity'},
  ):
    assert send_(good, **headers).json()['choices'] == want
  in_pieces = send_((piece for piece in (good[:9], good[9:])), Content_Type='application/json')
  assert in_pieces.request.headers['transfer-encoding'] == 'chunked'
  assert in_pieces.json()['choices'] == want
  for content, says in (
    (b'{"prompt": "\xff"}', 'utf-8'),
    (b'[' * 10_000, 'nested'),
    (b'{"seed": 1' + b'0' * 5000 + b'}', 'digits'),
    (b'{', 'line 1'),
  ):
    answer = send_(content, Content_Type='application/json')
    assert_error(answer, 400)
    assert says in answer.json()['error']['message']


LARGE = 'x' * 9_000
WRONG = [
  None,
  True,
  -1,
  0,
  3,
  2**70,
  -(2**70),
  int('9' * 4000),
  1e308,
  5e-324,
  float('nan'),
  float('inf'),
  '',
  'x',
  LARGE,
  '\ud800',
  [],
  [[]],
  [None],
  [[[1]]],
  ['x'] * 200,
  [2**70],
  [LARGE],
  [1.5],
  {},
  {'a': 1},
  {LARGE: 1},
  {'9' * 4000: 1},
  {'1': float('nan')},
  {'include_usage': 'x'},
  [{}],
  [[1] * 200],
]


@pytest.mark.parametrize('route', ['/v1/completions', '/v1/features', '/v1/attention'])
def test_any_value_of_any_field_is_taken_or_refused_by_its_name(server, route):
  """Never a 500, and never a long value sent back."""
  from gpt2_jax.serving.schemas import AttentionRequest, Completion, FeaturesRequest

  kind = {
    '/v1/completions': Completion,
    '/v1/features': FeaturesRequest,
    '/v1/attention': AttentionRequest,
  }[route]
  good = dict(prompt='a', max_tokens=1) if kind is Completion else dict(input='a')
  with httpx.Client(base_url=server.url, timeout=120) as client:
    for name in [*kind.model_fields, 'nothing', LARGE]:
      for value in WRONG:
        body = json.dumps(good | {name: value})
        answer = client.post(route, content=body, headers={'Content-Type': 'application/json'})
        said = (name[:50], str(value)[:50], answer.text[:300])
        if answer.status_code != 200:
          error = answer.json()['error']
          assert answer.status_code in (400, 404), said
          assert len(answer.text) < 1000 and '\n' not in error['message'], said
          assert set(error) == {'message', 'type', 'param', 'code'} and error['param'], said
          if name != LARGE:
            assert (error['param'] == name and name in error['message']) or (
              error['code'] in ('context_length_exceeded', 'model_not_found')
            ), said
  server.settle()


def test_a_connection_goes_on_after_errors(server):
  """Each answer belongs to its request, whatever was refused before it."""
  body = json.dumps(dict(prompt='a', max_tokens=1)).encode()
  post_ = lambda path, content, kind=b'application/json': (
    b'POST '
    + path
    + b' HTTP/1.1\r\nHost: localhost\r\nContent-Type: '
    + kind
    + b'\r\nContent-Length: %d\r\n\r\n' % len(content)
    + content
  )
  requests = [
    post_(b'/v1/completions', body),
    post_(b'/v1/nothing', body * 50),
    post_(b'/v1/completions', b'{' * 999),
    post_(b'/v1/completions', body, b'text/plain'),
    post_(b'/healthz', body * 99),
    b'HEAD /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n',
    post_(b'/v1/completions', body),
    b'GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n',
  ]
  found = send(server, b''.join(requests))
  assert re.findall(rb'HTTP/1.1 (\d+)', found) == [
    b'200',
    b'404',
    b'400',
    b'415',
    b'405',
    b'200',
    b'200',
    b'200',
  ]
  bad = send(server, b'NO HTTP AT ALL\r\n\r\n')
  assert bad.startswith(b'HTTP/1.1 400') and json.loads(bad.partition(b'\r\n\r\n')[2])['error']


def test_what_cannot_be_honoured_is_said_by_name(server):
  for status, param, body in REFUSED:
    assert_error(post(server, **body), status, param)
  raw = lambda content, kind='application/json': httpx.post(
    server.url + '/v1/completions', content=content, headers={'Content-Type': kind}, timeout=60
  )
  for content in (
    b'',
    b'{',
    b'[]',
    b'null',
    b'\xff\xfe',
    b'{"prompt": NaN}',
    b'"a"',
    b'[' * 10_000,
    b'{"prompt": "a", "temperature": Infinity}',
  ):
    answer = raw(content)
    assert answer.status_code == 400 and answer.json()['error']['message'], content
  assert_error(httpx.get(server.url + '/v1/nothing'), 404)
  assert_error(httpx.get(server.url + '/v1/completions'), 405)
  codes = [
    post(server, **body).json()['error']['code']
    for body in (
      dict(prompt='a' * 200),
      dict(prompt='a', max_tokens=160),
      dict(prompt='a', model='other'),
    )
  ]
  assert codes == ['context_length_exceeded', 'context_length_exceeded', 'model_not_found']


def test_any_text_is_continued(server):
  for prompt in (
    '',
    None,
    '\x00\x01\x1b[2J\r\n\x7f',
    '<script>alert(1)</script>',
    '\u202e\ufeff😀',
    '\ud800',
    [256],
    [[1], [2, 3]],
    ['', 'a'],
  ):
    body = json.dumps(dict(prompt=prompt, max_tokens=3, echo=True, user='x', seed=-(2**63)))
    answer = httpx.post(
      server.url + '/v1/completions',
      content=body,
      timeout=60,
      headers={'Content-Type': 'application/json'},
    )
    assert answer.status_code == 200 and answer.json()['choices'], answer.text
    assert answer.headers['content-type'] == 'application/json'
    assert answer.headers['x-content-type-options'] == 'nosniff'
  model = dict(prompt='a', model='\ud800<b>')
  answer = httpx.post(
    server.url + '/v1/completions',
    content=json.dumps(model),
    headers={'Content-Type': 'application/json'},
  )
  assert_error(answer, 404, 'model')


def test_other_routes(server):
  assert httpx.get(server.url + '/healthz').json() == {'status': 'ok'}
  [model] = httpx.get(server.url + '/v1/models').json()['data']
  assert model['id'] == 'tiny' and model['context_length'] == CONFIG.n_positions
  assert httpx.get(server.url + '/v1/models/tiny').json()['id'] == 'tiny'
  assert_error(httpx.get(server.url + '/v1/models/huge'), 404, 'model')
  assert 'gpt2_jax_slots{model="tiny"} 4.0' in httpx.get(server.url + '/metrics').text
  icon = httpx.get(server.url + '/static/icon.svg')
  assert icon.status_code == 200 and "default-src 'self'" in icon.headers['content-security-policy']


def send(server, data: bytes, seconds: float = 20) -> bytes:
  """What is answered to some bytes."""
  with socket.create_connection(('127.0.0.1', server.port), timeout=seconds) as connection:
    connection.sendall(data)
    found = b''
    while more := connection.recv(65536):
      found += more
    return found


def test_static_files_are_those_of_the_package_only(server):
  secret = (ROOT / 'gpt2_jax/serving/app.py').read_bytes()[:60]
  for path in (
    '../app.py',
    '..%2fapp.py',
    '%2e%2e/app.py',
    '..%5capp.py',
    '%2fetc/passwd',
    '//etc/passwd',
    '....//app.py',
    'icon.svg/../../app.py',
    'icon.svg%00.html',
    '.',
    '%252e%252e/app.py',
    '',
  ):
    line = f'GET /static/{path} HTTP/1.1\r\n'
    found = send(server, f'{line}Host: localhost\r\nConnection: close\r\n\r\n'.encode())
    assert found.split(b' ')[1] in (b'400', b'404', b'405'), (path, found[:100])
    assert secret not in found and b'root:' not in found


@pytest.mark.slow
def test_features_are_those_of_the_library(server):
  import numpy as np

  model = server.serving.engines['tiny'].model
  answer = post(
    server, '/v1/features', input=['ab', 'c'], hidden_states=True, attentions=True, embedding='last'
  ).json()
  for found, want in zip(answer['data'], gpt2_jax.features(model, ['ab', 'c'])):
    assert found['tokens'] == want.tokens
    np.testing.assert_allclose(found['hidden_states'], want.hidden_states, rtol=1e-6)
    np.testing.assert_allclose(found['attentions'], want.attentions, rtol=1e-6)
    np.testing.assert_allclose(found['embedding'], want.last_hidden_state[-1], rtol=1e-6)
  assert answer['usage'] == {'prompt_tokens': 3, 'total_tokens': 3}
  assert 'attentions' not in post(server, '/v1/features', input='a').json()['data'][0]
  for body in (dict(input='a' * 161), dict(input=[]), dict(input=5), dict(input=['a' * 150] * 60)):
    assert_error(post(server, '/v1/features', **body), 400, 'input')
  assert_error(post(server, '/v1/features', input='a', hidden_states='no'), 400, 'hidden_states')
  assert_error(
    post(server, '/v1/features', input='a' * 150, attentions=True, hidden_states=True), 400, 'input'
  )


@pytest.mark.slow
def test_attention_of_a_text(server):
  pytest.importorskip('gpt2_jax.serving.attention_data', reason='the attention view is not there')
  answer = post(server, '/v1/attention', input='abc', lens=2)
  assert answer.status_code == 200 and answer.json()['tokens'] == ['a', 'b', 'c']
  assert_error(post(server, '/v1/attention', input='a' * 161), 400, 'input')


@pytest.mark.slow
def test_who_leaves_gives_up_the_slot(server):
  """Many ask for long texts and leave at once, streaming or not; the slots are free again."""
  before = server.value('texts_total', model='tiny', reason='cancelled')
  for streams in (True, False):
    body = json.dumps(dict(prompt='a', max_tokens=159, stream=streams, n=4)).encode()
    head = (
      f'POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n'
      f'Content-Length: {len(body)}\r\n\r\n'
    ).encode()
    connections = [socket.create_connection(('127.0.0.1', server.port)) for _ in range(4)]
    for connection in connections:
      connection.sendall(head + body)
    until = time.monotonic() + 60
    while not server.value('slots_used') and time.monotonic() < until:
      time.sleep(0.002)
    for connection in connections:
      connection.close()
    server.settle()
  assert server.value('texts_total', model='tiny', reason='cancelled') > before
  assert server.value('queue_length') == 0
  assert complete(server, prompt='a', max_tokens=2)


def test_pages_of_other_sites_may_read_answers_if_they_are_named():
  """Preflights, errors and answers say so; no other site's, and none unless one is named."""
  origin = 'https://notes.example'
  with serve(api_key='sesame', slots=4, origins=[origin], limits=Limits(body_bytes=999)) as running:
    preflight = {
      'Origin': origin,
      'Access-Control-Request-Method': 'POST',
      'Access-Control-Request-Headers': 'authorization,content-type',
    }
    answer = httpx.options(running.url + '/v1/completions', headers=preflight)
    assert answer.status_code == 200 and answer.headers['access-control-allow-origin'] == origin
    allowed = answer.headers['access-control-allow-headers'].lower()
    assert 'authorization' in allowed and 'content-type' in allowed
    assert 'POST' in answer.headers['access-control-allow-methods']
    key = {'Authorization': 'Bearer sesame', 'Content-Type': 'application/json'}
    good = json.dumps(dict(prompt='a', max_tokens=1))
    for status, content, headers in (
      (200, good, key),
      (401, good, {}),
      (415, good, key | {'Content-Type': 'a/b'}),
      (400, '{}x', key),
      (404, good[:-1] + ', "model": "x"}', key),
      (413, ' ' * 2000, key),
    ):
      for asks in (origin, 'https://other.example'):
        answer = httpx.post(
          running.url + '/v1/completions', content=content, headers=headers | {'Origin': asks}
        )
        assert answer.status_code == (status if asks == origin else 403)
        assert (answer.headers.get('access-control-allow-origin') == origin) == (asks == origin)
    answer = httpx.options(running.url + '/v1/completions', headers=preflight | {'Origin': 'null'})
    assert answer.status_code == 400 and 'access-control-allow-origin' not in answer.headers


def test_a_name_that_is_not_the_server_s_is_refused(server):
  """A page whose name is made to lead here (DNS rebinding) gets nothing, with or without an Origin;
  our own pages and programs do.
  """
  body = dict(prompt='a', max_tokens=1)
  ask = lambda **headers: httpx.post(server.url + '/v1/completions', json=body, headers=headers)
  evil, ours = f'evil.example:{server.port}', f'localhost:{server.port}'
  for headers in (dict(Host=evil), dict(Host=evil, Origin=f'http://{evil}')):
    answer = ask(**headers)
    assert_error(answer, 403)
    assert '--allow-host' in answer.text and 'evil.example' in answer.text
    for path in ('/', '/metrics', '/healthz', '/static/style.css'):
      assert httpx.get(server.url + path, headers=headers).status_code == 403
  for origin in (f'http://{evil}', 'http://localhost:1', 'null', f'http://{ours}.evil.example'):
    answer = ask(Host=ours, Origin=origin)
    assert_error(answer, 403)
    assert '--allow-origin' in answer.text
  for headers in ({}, dict(Host='127.0.0.1'), dict(Host=ours, Origin=f'http://{ours}')):
    assert ask(**headers).status_code == 200
  assert b' 200 ' in send(server, b'GET /healthz HTTP/1.0\r\n\r\n')[:20]


@pytest.mark.parametrize(
  'address,allowed,name,admitted',
  [
    ('127.0.0.1', (), 'LocalHost.:80', True),
    ('127.0.0.1', (), '[::1]:80', True),
    ('127.0.0.1', (), '192.168.1.5', False),
    ('127.0.0.1', (), '127.0.0.1.evil.example', False),
    ('192.168.1.5', (), '192.168.1.5:80', True),
    ('192.168.1.5', (), '192.168.1.6:80', False),
    ('box.lan', (), 'box.lan', True),
    ('0.0.0.0', (), '192.168.1.6', True),  # an address leads where it says
    ('::', (), '[fe80::1]:80', True),
    ('0.0.0.0', (), 'evil.example', False),
    ('0.0.0.0', ('GPT.example.org',), 'gpt.example.org', True),
    ('0.0.0.0', ('*',), 'any.example', True),
    ('127.0.0.1', (), '[', False),
  ],
)
def test_names_of_a_server(address, allowed, name, admitted):
  hosts = Hosts(allowed)
  hosts.bound(address)
  with contextlib.nullcontext() if admitted else pytest.raises(ApiError, match='--allow-host'):
    hosts.check({b'host': name.encode()})


@pytest.mark.parametrize('packets', [1, 3])
def test_too_many_headers_are_refused_however_they_come(server, packets):
  """In one packet, too, which the parser takes however long it is."""
  for size, status in ((15_000, b'200'), (17_000, b'431')):
    whole = b'GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nX-A: %s\r\n\r\n'
    whole %= b'a' * size
    with socket.create_connection(('127.0.0.1', server.port), timeout=60) as connection:
      for i in range(packets):
        connection.sendall(whole[i * len(whole) // packets : (i + 1) * len(whole) // packets])
        time.sleep(0.05)
      assert connection.recv(100).split()[1] == status


def test_more_connections_than_there_may_be():
  """Are told so, when to come again, in the form of other errors; the others are served."""
  with serve(slots=4) as running:
    running.serving.connections = 2
    with httpx.Client(base_url=running.url) as one, httpx.Client(base_url=running.url) as two:
      for client in (one, two):
        assert client.get('/healthz').status_code == 200
      answer = httpx.get(running.url + '/healthz')
      assert_error(answer, 503)
      assert answer.headers['retry-after'] and answer.headers['connection'] == 'close'
      assert one.get('/healthz').status_code == 200


def test_a_key_is_asked_for():
  with serve(api_key='sesame', slots=4) as running:
    url = running.url + '/v1/models'
    for key in (None, 'Basic sesame', 'sesame', 'Bearer', 'Bearer sesame2', 'Bearer ł'):
      headers = {} if key is None else {'Authorization': key.encode()}
      for path in ('/v1/models', '/metrics', '/v1/nothing'):
        assert_error(httpx.get(running.url + path, headers=headers), 401)
    assert httpx.get(url, headers={'Authorization': 'Bearer sesame'}).status_code == 200
    assert httpx.get(running.url + '/healthz').status_code == 200
    assert httpx.get(running.url + '/static/icon.svg').status_code == 200


@pytest.mark.slow
def test_no_more_than_the_queue_holds_wait():
  """Beyond it: 429, and when to come again. What was taken is written."""
  with serve(slots=4, queue=2) as running:
    ask = lambda i: post(running, prompt='a', max_tokens=100, seed=i, n=3)
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
      answers = list(pool.map(ask, range(16)))
    refused = [answer for answer in answers if answer.status_code == 429]
    assert refused and len(refused) < 16
    assert all(answer.status_code in (200, 429) for answer in answers)
    assert all(answer.headers['retry-after'] for answer in refused)
    assert_error(refused[0], 429)


@pytest.mark.slow
def test_a_request_may_take_so_long_only():
  with serve(slots=4, limits=Limits(seconds=0.0)) as running:
    assert_error(post(running, prompt='a', max_tokens=150), 504)
    last = stream(running, prompt='a', max_tokens=150)[-1]
    assert last['error']['code'] == 'timeout'
    running.settle()


def test_a_server_that_is_being_stopped_refuses():
  with serve(slots=4) as running:
    running.serving.passes = 1  # something still runs
    running.serving.drain()
    assert_error(post(running, prompt='a'), 503)
    assert_error(httpx.get(running.url + '/healthz'), 503)
    running.serving.passes = 0


def test_models_have_names(tmp_path):
  (tmp_path / 'mine').mkdir()
  assert model_names((f'{tmp_path}/mine/', 'someone/gpt2')) == ['mine', 'someone/gpt2']
  for twice in (('gpt2', 'gpt2'), ()):
    with pytest.raises(UserError):
      model_names(twice)


FLAGS = [
  ('--slots 0 must be a whole number from 1', dict(slots=0)),
  ('--slots -3', dict(slots=-3)),
  ('--queue -1', dict(queue=-1)),
  ('--port 65536 must be a whole number from 0', dict(port=65536)),
  ('--port -1', dict(port=-1)),
  ('--port 9', dict(port=10**300 - 1)),
  ('--timeout nan', dict(timeout=float('nan'))),
  ('--timeout inf', dict(timeout=float('inf'))),
  ('--max-connections 0', dict(max_connections=0)),
  ('--max-tokens -5', dict(max_tokens=-5)),
  ('--max-body-bytes -', dict(max_body_bytes=-(10**4000))),
  ("--host '' can't be listened at", dict(host='')),
  ("--host 'no such host' can't", dict(host='no such host')),
  ("--host '198.51.100.7' can't", dict(host='198.51.100.7')),
  ('--allow-host', dict(allow_host=('https://example.org',))),
  ('--allow-host', dict(allow_host=('example.org:80',))),
  ('--allow-origin', dict(allow_origin=('example.org',))),
  ('--allow-origin', dict(allow_origin=('https://example.org/page',))),
]


@pytest.mark.parametrize('says, flags', FLAGS)
def test_flags_are_checked_before_a_model_is_read(says, flags):
  with pytest.raises(UserError) as error:
    Serve(('/there/is/none',), **dict(port=0) | flags).run()
  assert says in str(error.value) and len(str(error.value)) < 300


def test_a_port_that_is_taken():
  with socket.socket() as taken:
    taken.bind(('127.0.0.1', 0))
    taken.listen()
    port = taken.getsockname()[1]
    with pytest.raises(UserError, match=f'port {port} of 127.0.0.1 is taken .*--port 0'):
      Serve(('/there/is/none',), port=port).run()


def test_files_that_may_be_open(monkeypatch, capsys):
  """Connections are as many as the system allows, which is said; none: refused."""
  import resource

  from gpt2_jax.serving import server as lib

  limits = [256, 1 << 20]
  monkeypatch.setattr(resource, 'getrlimit', lambda _: tuple(limits))
  monkeypatch.setattr(resource, 'setrlimit', lambda _, new: limits.__setitem__(0, new[0]))
  assert lib.allowed(1000) == 1000 and limits[0] == 1000 + lib.OTHER_FILES + lib.BACKLOG
  limits[:] = [256, 256]
  assert lib.allowed(100) == 100 and not capsys.readouterr().out
  assert lib.allowed(10**30) == 256 - lib.OTHER_FILES
  assert 'ulimit -n allows 256 open files' in capsys.readouterr().out
  limits[:] = [64, 64]
  with pytest.raises(UserError, match='ulimit -n allows 64 open files'):
    lib.allowed(1000)


def test_slots_that_no_memory_holds():
  form, params = prepare(tiny_model())
  [device] = params['wte']['weight'].devices()
  slot_state.check_memory(form, 8, device)
  for B in (10**9, 10**400):
    with pytest.raises(UserError, match=r'slots need .* GiB .*: at most --slots \d+'):
      slot_state.check_memory(form, B, device)


@pytest.mark.slow
def test_a_model_of_several_names():
  with serve({'one': tiny_model(1), 'two': tiny_model(2)}, slots=4) as running:
    texts = {
      name: complete(running, prompt='a', max_tokens=20, seed=1, model=name)[0]['text']
      for name in ('one', 'two')
    }
    assert texts['one'] != texts['two']
    assert complete(running, prompt='a', max_tokens=20, seed=1)[0]['text'] == texts['one']


def test_seeds_beyond_32_bits_are_seeds(server):
  """As those of `generate`; a negative one, which OpenAI's may be, counts from 2**64 down."""
  write = lambda seed: complete(server, prompt='a', max_tokens=12, seed=seed)[0]['text']
  texts = {seed: write(seed) for seed in (5, 2**32 + 5, 2**62 + 5, -1, 2**32 - 1)}
  assert len(set(texts.values())) == len(texts)
  model = server.serving.engines['tiny'].model
  for seed, text in texts.items():
    assert text == gpt2_jax.generate(model, 'a', max_new_tokens=12, seed=seed % 2**64)[0].text
  for seed in (2**63, -(2**63) - 1, 1.5):
    assert_error(post(server, prompt='a', seed=seed), 400, 'seed')


def test_special_tokens_of_a_request(server):
  """Text, and a note; the token where it is asked for."""
  text, ids = 'a<|endoftext|>b', [64, 256, 65]
  options = dict(max_tokens=3, temperature=0)
  plain = post(server, prompt=text, **options).json()
  assert "'<|endoftext|>' in a prompt is read as text" in plain['note']
  assert plain['usage']['prompt_tokens'] == len(text)
  special = post(server, prompt=text, allow_special=True, **options).json()
  assert special['usage']['prompt_tokens'] == 3 and 'note' not in special
  assert special['choices'] == complete(server, prompt=ids, **options)
  assert 'note' not in post(server, prompt='a', **options).json()
  with httpx.stream(
    'POST', f'{server.url}/v1/completions', timeout=60, json=dict(prompt=text, stream=True, **options)
  ) as answer:
    assert ['note' in event for event in events(answer.iter_lines())][:2] == [True, False]
  for route in ('features', 'attention'):
    found = post(server, f'/v1/{route}', input=text, allow_special=True).json()
    assert (found['data'][0]['tokens'] if route == 'features' else found['ids']) == ids
  assert_error(post(server, prompt='a', allow_special='yes'), 400, 'allow_special')

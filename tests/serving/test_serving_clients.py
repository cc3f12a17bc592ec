"""A server under all sorts of clients: OpenAI's own, random ones, fuzzers, vandals; and its end."""

import asyncio
import concurrent.futures
import contextlib
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import forked
from support.processes import ROOT, environment

pytest.importorskip('fastapi', reason='the server needs the extra serve')
httpx = pytest.importorskip('httpx', reason='a client, of the extra test')

from support.serving import events, serve, tiny_model  # noqa: E402

import gpt2_jax  # noqa: E402

pytestmark = pytest.mark.slow


@pytest.fixture(scope='module')
def server():
  with serve(slots=4, queue=64) as running:
    yield running


@pytest.fixture
def client(server):
  openai = pytest.importorskip('openai', reason="OpenAI's client, of the extra serve-test")
  with openai.OpenAI(base_url=server.url + '/v1', api_key='none', max_retries=0, timeout=120) as made:
    yield made


def test_openai_client(client):
  import openai

  assert [model.id for model in client.models.list()] == ['tiny']
  ask = lambda **more: client.completions.create(
    **dict(model='tiny', prompt='ab', max_tokens=20, seed=1) | more
  )
  whole = ask(n=2, logprobs=3, echo=True)
  assert [choice.index for choice in whole.choices] == [0, 1]
  assert whole.usage.total_tokens == whole.usage.completion_tokens + 2
  assert whole.object == 'text_completion'
  logprobs = whole.choices[0].logprobs
  assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.top_logprobs) == 22
  assert whole.choices[0].text.startswith('ab') and whole.choices[0].finish_reason == 'length'
  assert ask().choices[0].text == ask().choices[0].text != ask(seed=2).choices[0].text
  pieces = list(ask(stream=True, stream_options={'include_usage': True}))
  assert ''.join(p.choices[0].text for p in pieces if p.choices) == ask().choices[0].text
  assert pieces[-1].usage.completion_tokens == 20
  [best] = ask(best_of=3).choices
  assert best.text in [choice.text for choice in ask(n=3).choices]
  text = ask().choices[0].text
  letter = next(c for c in text if c.isascii())  # most bytes of a random model are no characters
  [stopped] = ask(stop=['no such text', letter]).choices
  assert stopped.finish_reason == 'stop' and stopped.text == text[: text.index(letter)]
  assert ask(extra_body={'top_k': 1}).choices[0].text == ask(temperature=0).choices[0].text
  assert len(ask(prompt=[[1, 2], [3]], n=2, max_tokens=1).choices) == 4
  with pytest.raises(openai.BadRequestError) as error:
    ask(max_tokens=10_000)
  assert error.value.code == 'context_length_exceeded' and error.value.param == 'max_tokens'
  with pytest.raises(openai.BadRequestError, match='suffix'):
    ask(suffix='z')
  with pytest.raises(openai.NotFoundError):
    ask(model='huge')


def test_openai_client_key():
  openai = pytest.importorskip('openai', reason="OpenAI's client, of the extra serve-test")
  with serve(slots=4, api_key='sesame') as running:
    make = lambda key: openai.OpenAI(base_url=running.url + '/v1', api_key=key, max_retries=0)
    with make('sesame') as client:
      assert client.models.list().data
    with make('open') as client, pytest.raises(openai.AuthenticationError):
      client.models.list()


BODIES = st.lists(
  st.fixed_dictionaries(
    dict(
      prompt=st.text(max_size=30) | st.lists(st.integers(0, 256), min_size=1, max_size=90),
      max_tokens=st.integers(0, 40),
      seed=st.integers(0, 9),
    ),
    optional=dict(
      temperature=st.sampled_from([0, 0.3, 1, 2]),
      top_p=st.floats(0, 1),
      top_k=st.integers(1, 300),
      n=st.integers(1, 3),
      logprobs=st.integers(0, 5),
      echo=st.booleans(),
      stop=st.sampled_from(['a', ['e', 'bc'], ['é']]),
      presence_penalty=st.floats(-2, 2),
      frequency_penalty=st.floats(-2, 2),
      logit_bias=st.dictionaries(st.integers(0, 256).map(str), st.floats(-100, 100), max_size=5),
    ),
  ),
  min_size=2,
  max_size=6,
)


@settings(
  max_examples=15,
  deadline=None,
  derandomize=True,
  suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(bodies=BODIES)
def test_any_mix_gives_what_each_gives_alone(bodies):
  """To the last bit; and in any order of arrival."""
  if 'server' not in shared:
    pytest.skip('the server did not start')
  server = shared['server']
  ask = lambda body: httpx.post(
    server.url + '/v1/completions',
    timeout=300,
    content=json.dumps(body),
    headers={'Content-Type': 'application/json'},
  )
  alone = [ask(body).json()['choices'] for body in bodies]
  with concurrent.futures.ThreadPoolExecutor(len(bodies)) as pool:
    together = [answer.json()['choices'] for answer in pool.map(ask, bodies)]
    backwards = [answer.json()['choices'] for answer in pool.map(ask, bodies[::-1])][::-1]
  assert together == alone == backwards


shared: dict = {}


@pytest.fixture(autouse=True)
def _share(server):
  """For hypothesis, which repeats a test's body but not its fixtures."""
  shared['server'] = server
  yield
  server.settle()


def test_schemathesis_finds_no_500(server):
  schemathesis = pytest.importorskip('schemathesis', reason='a fuzzer, of the extra serve-test')
  schema = schemathesis.openapi.from_url(server.url + '/openapi.json')
  paths = []
  for result in schema.get_all_operations():
    operation = result.ok()
    paths.append(operation.path)

    @settings(
      max_examples=40,
      deadline=None,
      derandomize=True,
      database=None,
      suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy())
    def attack(case):
      answer = case.call(base_url=server.url, timeout=120)
      assert answer.status_code < 500, answer.text
      if answer.status_code >= 400:
        assert set(answer.json()['error']) == {'message', 'type', 'param', 'code'}

    attack()
  assert '/v1/completions' in paths and '/v1/features' in paths


def test_values_of_200_000_characters(server):
  """Of any field, or as a field's name: an answer that is short, at once, and never a 500."""
  from gpt2_jax.serving.schemas import Completion

  text, number = 'x' * 200_000, '1' + '0' * 4000
  bodies = [
    json.dumps({name: value} | (dict(prompt='a') if name != 'prompt' else {}))
    for name in Completion.model_fields
    for value in (text, [text], [text] * 4, {text: text}, {text: 1}, [[text]])
  ]
  bodies += [
    json.dumps({text: 1}),
    json.dumps(dict(prompt='a', stop=text)),
    *(f'{{"prompt": "a", "{name}": {number}}}' for name in Completion.model_fields),
  ]
  for body in bodies:
    answer = httpx.post(
      server.url + '/v1/completions',
      content=body,
      timeout=60,
      headers={'Content-Type': 'application/json'},
    )
    assert answer.status_code in (200, 400, 404), (body[:60], answer.text[:200])
    assert len(answer.text) < 1000, (body[:60], answer.text[:200])


def request(body: dict, path: str = '/v1/completions') -> bytes:
  content = json.dumps(body).encode()
  return (
    f'POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n'
    f'Content-Length: {len(content)}\r\n\r\n'
  ).encode() + content


async def vandal(port: int, kind: int) -> None:
  """Comes with a long text to write, and misbehaves; whatever it meets is fine."""
  rng, writer = random.Random(kind), None
  try:
    reader, writer = await asyncio.open_connection('127.0.0.1', port)
    whole = request(dict(prompt='a', max_tokens=150, stream=kind % 2 == 0, n=rng.randint(1, 4)))
    if kind % 5 == 0:
      writer.write(whole[: rng.randrange(len(whole))])  # half a request
    elif kind % 5 == 1:
      writer.write(bytes(rng.randrange(256) for _ in range(200)) + b'\r\n\r\n')
    elif kind % 5 == 2:
      writer.write(b'GET / HTTP/1.1\r\n' + b'X-Flood: 1\r\n' * 5000)
    else:
      writer.write(whole)
      if kind % 5 == 3:
        await asyncio.wait_for(reader.read(300), 5)
    await asyncio.sleep(rng.random() * 0.3)
  except (OSError, TimeoutError):
    pass
  finally:
    if writer:
      writer.transport.abort() if kind % 3 else writer.close()


def test_a_thousand_clients_that_vanish(server, caplog):
  """Some behave, and their answers are right; in the end nothing is left of the others, in the log
  neither.
  """
  body = dict(prompt='well', max_tokens=30, seed=4)
  ask = lambda: httpx.post(server.url + '/v1/completions', json=body, timeout=300)
  answer = ask()
  assert answer.status_code == 200, answer.text
  want = answer.json()['choices']

  async def all_of_them():
    gate = asyncio.Semaphore(100)

    async def one(kind):
      async with gate:
        await vandal(server.port, kind)

    await asyncio.gather(*map(one, range(1000)))

  with concurrent.futures.ThreadPoolExecutor(5) as pool:
    run = pool.submit(asyncio.run, all_of_them())
    good = []
    while not run.done():
      good += list(pool.map(lambda _: ask(), range(2)))
    run.result()
  assert all(answer.status_code in (200, 429) for answer in good)
  right = [answer.json()['choices'] for answer in good if answer.status_code == 200]
  assert all(choices == want for choices in right)
  server.settle()
  assert ask().json()['choices'] == want
  assert httpx.get(server.url + '/healthz').status_code == 200
  assert [record.message for record in caplog.records if record.name == 'asyncio'] == []


def test_a_reader_that_does_not_read_blocks_nobody(server):
  """Its texts are written at the others' pace; what it does not take is dropped."""
  lazy = socket.create_connection(('127.0.0.1', server.port))
  lazy.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
  lazy.sendall(request(dict(prompt='a', max_tokens=150, n=20, stream=True, logprobs=5)))
  for seed in range(5):
    answer = httpx.post(
      server.url + '/v1/completions', timeout=120, json=dict(prompt='a', max_tokens=50, seed=seed)
    )
    assert answer.status_code == 200
  server.settle()
  lazy.close()


def test_headers_that_never_end_are_cut_off(server):
  with socket.create_connection(('127.0.0.1', server.port), timeout=60) as connection:
    connection.sendall(b'GET /healthz HTTP/1.1\r\n')
    began, answered = time.monotonic(), b'-'
    while answered and answered != b'':
      try:
        connection.sendall(b'X-Slow: 1\r\n')
      except OSError:
        break
      connection.settimeout(0.5)
      try:
        answered = connection.recv(100)
      except TimeoutError:
        assert time.monotonic() - began < 60
      except OSError:
        break


def test_headers_of_a_later_request_are_cut_off_too(server, monkeypatch):
  from gpt2_jax.serving import server as server_lib

  monkeypatch.setattr(server_lib, 'HEADER_SECONDS', 0.3)
  with socket.create_connection(('127.0.0.1', server.port), timeout=20) as connection:
    for _ in range(2):  # a connection that is kept is not cut off between requests
      connection.sendall(b'GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n')
      answer = connection.recv(1000)
      while not answer.endswith(b'{"status":"ok"}'):  # headers and body may come apart
        answer += connection.recv(1000)
      assert answer.startswith(b'HTTP/1.1 200')
      time.sleep(0.6)
    connection.sendall(b'GET /healthz HTTP/1.1\r\nX-')
    assert connection.recv(1000) == b''


def test_a_connection_that_takes_nothing_is_closed():
  from gpt2_jax.serving.schemas import Limits

  with serve(slots=2, limits=Limits(send_seconds=0.5)) as running:
    body = dict(input='a' * 150, attentions=True, hidden_states=True)
    whole = httpx.post(running.url + '/v1/features', json=body, timeout=60).content
    times = (16 << 20) // len(whole)  # more than the sockets' buffers hold
    open_now = running.server.server_state.connections

    def wait_for(count):
      until = time.monotonic() + 60
      while len(open_now) != count:
        assert time.monotonic() < until, f'{len(open_now)} connections are open, not {count}'
        time.sleep(0.01)

    wait_for(0)
    with socket.create_connection(('127.0.0.1', running.port), timeout=60) as lazy:
      lazy.sendall(request(body, '/v1/features') * times)
      wait_for(1)
      wait_for(0)
      taken = b''
      with contextlib.suppress(ConnectionResetError):
        while piece := lazy.recv(1 << 20):
          taken += piece
    assert len(taken) < times * len(whole)


def test_a_turn_that_is_too_long_in_coming(monkeypatch):
  from gpt2_jax.serving import endpoints
  from gpt2_jax.serving.schemas import Limits

  made = endpoints.features_data
  monkeypatch.setattr(endpoints, 'features_data', lambda *asked: time.sleep(1.5) or made(*asked))
  with (
    serve(slots=2, limits=Limits(seconds=0.5)) as running,
    concurrent.futures.ThreadPoolExecutor(2) as pool,
  ):
    ask = lambda _: httpx.post(running.url + '/v1/features', json=dict(input='a'), timeout=60)
    answers = sorted(pool.map(ask, range(2)), key=lambda answer: answer.status_code)
    assert [answer.status_code for answer in answers] == [200, 504]
    assert answers[1].json()['error']['code'] == 'timeout'


def test_a_body_that_never_comes_is_not_waited_for():
  from gpt2_jax.serving.schemas import Limits

  with serve(slots=4, limits=Limits(read_seconds=0.5, body_bytes=5000)) as running:
    for head, status in (
      (b'Content-Length: 100', b'408'),
      (b'Content-Length: 10000', b'413'),
      (b'Transfer-Encoding: chunked', b'413'),
      (b'Content-Length: x', b'400'),
    ):
      with socket.create_connection(('127.0.0.1', running.port), timeout=60) as connection:
        connection.sendall(
          b'POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: '
          b'application/json\r\n' + head + b'\r\n\r\n'
        )
        if b'chunked' in head:
          connection.sendall(2 * (b'1000\r\n' + b' ' * 4096 + b'\r\n'))
        else:
          connection.sendall(b'{')
        assert connection.recv(100).split(b' ')[1] == status, head


def test_a_request_that_ends_a_process_is_finished_first(tmp_path):
  """`gpt2-jax serve` as a process: SIGTERM while a text streams. It comes whole, and status 0."""
  gpt2_jax.save_pretrained(tiny_model(), tmp_path / 'tiny')
  with socket.socket() as free:
    free.bind(('127.0.0.1', 0))
    port = free.getsockname()[1]
  process = forked.Popen(
    [
      sys.executable,
      '-m',
      'gpt2_jax',
      'serve',
      '--checkpoint',
      str(tmp_path / 'tiny'),
      '--port',
      str(port),
      '--slots',
      '2',
    ],
    cwd=ROOT,
    env=environment(),
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )
  try:
    url, body = f'http://127.0.0.1:{port}', dict(prompt='a', max_tokens=150, seed=1)
    for _ in range(600):
      try:
        httpx.get(url + '/healthz')
        break
      except httpx.TransportError:
        assert process.poll() is None, process.stdout and process.stdout.read()
        time.sleep(0.2)
    want = httpx.post(url + '/v1/completions', json=body, timeout=120).json()['choices'][0]['text']
    with httpx.stream(
      'POST', url + '/v1/completions', json=body | {'stream': True}, timeout=120
    ) as answer:
      lines = answer.iter_lines()
      first = next(lines)
      os.kill(process.pid, signal.SIGTERM)
      with httpx.Client() as late:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:  # refused by an answer, or, once all is done, at the door
          try:
            if late.post(url + '/v1/completions', json=body, timeout=60).status_code == 503:
              break
          except httpx.TransportError:
            break
      pieces = events([first, *lines])
    assert ''.join(piece['choices'][0]['text'] for piece in pieces) == want
    assert pieces[-1]['choices'][0]['finish_reason'] == 'length'
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0, out
    assert 'Traceback' not in out and re.search(r'SIGTERM', out)
  finally:
    process.kill()
    process.wait()


def test_nothing_of_a_broken_model_is_left():
  """A NaN ends its own text with an error; the slot serves the next text as if it had not been."""
  import jax.numpy as jnp

  model = tiny_model()
  weight = model.model.wte.weight
  weight[...] = weight[...].at[65].set(jnp.nan)  # of A; its logit is NaN always
  with serve({'tiny': model}, slots=2) as running:
    answer = httpx.post(running.url + '/v1/completions', json=dict(prompt='b'), timeout=120)
    assert answer.status_code == 500 and 'NaN' in answer.json()['error']['message']
    running.settle()

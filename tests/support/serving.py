"""A server of the real application in a thread of this process; a browser that reaches only it."""

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from support.models import byte_model, tiny_gpt2

CHROMIUM = next(
  (
    path
    for path in map(
      Path, ('/usr/bin/chromium', '/usr/bin/chromium-browser', '/usr/bin/google-chrome')
    )
    if path.exists()
  ),
  None,
)
ARGUMENTS = [
  '--no-sandbox',
  '--disable-gpu',
  '--disable-background-networking',
  '--disable-component-update',
  '--disable-sync',
  '--no-first-run',
]
CONFIG = tiny_gpt2(vocab_size=257, n_positions=160, n_layer=2, n_inner=None, vocab_multiple=128)
PAGE = dict(n_positions=256, n_head=2, initializer_range=0.2)  # of a `byte_model`, behind the pages


def tiny_model(seed: int = 0):
  """Bytes in, bytes out. Of 160 positions, so that a long prompt is read in two chunks."""
  return byte_model(seed, n_positions=CONFIG.n_positions)


class Running:
  """A server that runs: where it is, and what it counts."""

  def __init__(self, app, server):
    self.app, self.server, self.serving = app, server, app.state.serving
    self.port = server.servers[0].sockets[0].getsockname()[1]
    self.url = f'http://127.0.0.1:{self.port}'

  def value(self, name: str, **labels: str) -> float:
    """A number of `/metrics`; labels default to the one model."""
    return (
      self.serving.metrics.registry.get_sample_value(f'gpt2_jax_{name}', labels or {'model': 'tiny'})
      or 0.0
    )

  def settle(self, seconds: float = 60) -> None:
    """Waits until nothing is written any more."""
    until = time.monotonic() + seconds
    while not self.serving.idle or self.value('slots_used'):
      assert time.monotonic() < until, 'slots are still in use'
      time.sleep(0.01)


@contextlib.contextmanager
def serve(models=None, **options) -> Iterator[Running]:
  """`options` are `make_app`'s."""
  from gpt2_jax.serving.app import make_app
  from gpt2_jax.serving.server import make_server

  app = make_app(models or {'tiny': tiny_model()}, **options)
  server = make_server(app, host='127.0.0.1', port=0, log_level='warning')
  thread = threading.Thread(target=server.run)
  thread.start()
  try:
    while not server.started:
      assert thread.is_alive(), 'the server did not start'
      time.sleep(0.01)
    yield Running(app, server)
  finally:
    server.should_exit = True
    thread.join(60)
    for engine in app.state.serving.engines.values():
      engine.thread.join(60)
      assert not engine.thread.is_alive()
  assert not thread.is_alive()


def events(lines) -> list[dict]:
  """The objects of server-sent events; the last one must be OpenAI's."""
  found = [line.removeprefix('data: ') for line in lines if line]
  assert found.pop() == '[DONE]'
  return [json.loads(line) for line in found]


@pytest.fixture(scope='module')
def byte_server() -> Iterator[tuple[str, Any]]:
  """The address of a server of a `byte_model` named 'bytes', and the model."""
  for package in ('fastapi', 'uvicorn', 'prometheus_client'):
    pytest.importorskip(package)
  model = byte_model(**PAGE)
  with serve({'bytes': model}) as running:
    yield running.url, model


@pytest.fixture(scope='module')
def browser() -> Iterator[Any]:
  api = pytest.importorskip('playwright.sync_api')
  if CHROMIUM is None:
    pytest.skip('needs a browser: apt-get install chromium')
  with api.sync_playwright() as playwright:
    opened = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
    yield opened
    opened.close()


@pytest.fixture
def open_page(browser, byte_server) -> Iterator[Callable[..., Any]]:
  """Opens a path of the server; keyword arguments are those of a browser's context.

  In the end, no page may have asked anybody else for anything, nor have complained.
  """
  address, _ = byte_server
  outside, complaints, contexts = [], [], []

  def guard(route):
    if route.request.url.startswith(address + '/'):
      return route.continue_()
    outside.append(route.request.url)
    route.abort()

  def said(message):
    refused = message.text.startswith('Failed to load resource')  # what a test does on purpose
    if message.type in ('error', 'warning') and not refused:
      complaints.append(message.text)

  def open_(path: str = '/', **options):
    context = browser.new_context(base_url=address, **options)
    contexts.append(context)
    context.route('**/*', guard)
    page = context.new_page()
    page.set_default_timeout(20_000)
    page.on('console', said)
    page.on('pageerror', lambda error: complaints.append(str(error)))
    page.goto(path)
    return page

  yield open_
  for context in contexts:
    context.close()
  assert not outside
  assert not complaints


def audit(page) -> list[str]:
  """What axe finds that keeps people out: serious and critical violations, and where."""
  axe = pytest.importorskip('axe_playwright_python.sync_playwright')
  found = axe.Axe().run(page).response['violations']
  return [
    f'{violation["id"]}: {node["html"][:120]} {node["failureSummary"][:300]}'
    for violation in found
    if violation['impact'] in ('serious', 'critical')
    for node in violation['nodes']
  ]


def until(page, holds: str) -> None:
  """Waits for an expression of JavaScript; Playwright's own wait is kept out by the page's CSP."""
  end = time.monotonic() + 20
  while not page.evaluate(holds):
    assert time.monotonic() < end, holds
    page.wait_for_timeout(20)

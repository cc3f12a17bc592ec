"""A server in a thread of this process, on a real socket, with a tiny random model."""

import contextlib
import json
import threading
import time
from collections.abc import Iterator

import gpt2_jax
from gpt2_jax import tokenizer
from gpt2_jax.config import GPTConfig

CONFIG = GPTConfig(vocab_size=257, n_positions=160, n_embd=32, n_layer=2, n_head=4,
                   initializer_range=0.3, embd_pdrop=0, attn_pdrop=0, resid_pdrop=0)


def tiny_model(seed: int = 0):
  """Bytes in, bytes out. Of 160 positions, so that a long prompt is read in two chunks."""
  model = gpt2_jax.bind(CONFIG, gpt2_jax.init_params(CONFIG, seed))
  model.tokenizer = tokenizer.load('byte')
  return model


class Running:
  """A server that runs: where it is, and what it counts."""

  def __init__(self, app, port: int):
    self.app, self.port, self.url = app, port, f'http://127.0.0.1:{port}'
    self.serving = app.state.serving

  def value(self, name: str, **labels: str) -> float:
    """A number of `/metrics`; labels default to the one model."""
    return self.serving.metrics.registry.get_sample_value(
        f'gpt2_jax_{name}', labels or {'model': 'tiny'}) or 0.0

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
    yield Running(app, server.servers[0].sockets[0].getsockname()[1])
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

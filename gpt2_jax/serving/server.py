"""uvicorn, with an end that finishes what runs, and without patience for slow headers."""

import logging
import signal
from typing import Any

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

HEADER_BYTES = 16 << 10  # of a request's line and headers
HEADER_SECONDS = 10.0  # for them to arrive
KEEP_SECONDS = 30  # of a connection between two requests

log = logging.getLogger('uvicorn.error')


class Protocol(H11Protocol):
  """Closes connections whose headers do not arrive, and those that take nothing of an answer, which
  uvicorn would keep for ever.
  """

  def connection_made(self, transport: Any) -> None:
    super().connection_made(transport)
    self.patience = self.stalled = None
    self.await_headers()

  def data_received(self, data: bytes) -> None:
    super().data_received(data)
    self.await_headers()

  def await_headers(self) -> None:
    """Sets or lifts the limit on the time that a request's headers take."""
    waits = self.cycle is None or self.cycle.response_complete
    if not waits and self.patience:
      self.patience = self.patience.cancel()
    elif waits and not self.patience:
      self.patience = self.loop.call_later(HEADER_SECONDS, self.transport.close)

  def pause_writing(self) -> None:
    super().pause_writing()
    seconds = self.config.app.state.serving.limits.send_seconds  # type: ignore[union-attr]
    self.stalled = self.loop.call_later(seconds, self.transport.abort)

  def resume_writing(self) -> None:
    super().resume_writing()
    if self.stalled:
      self.stalled = self.stalled.cancel()

  def connection_lost(self, exc: Exception | None) -> None:
    for timer in filter(None, (self.patience, self.stalled)):
      timer.cancel()
    super().connection_lost(exc)


class Server(uvicorn.Server):
  """At the first SIGTERM or SIGINT it refuses new requests and finishes the others; at a second one
  it leaves.
  """

  def __init__(self, app: FastAPI, config: uvicorn.Config):
    super().__init__(config)
    self.serving = app.state.serving

  def handle_exit(self, sig: int, frame: Any) -> None:
    if self.serving.draining:
      self.should_exit = self.force_exit = True
    else:
      log.info('%s: what runs is finished', signal.Signals(sig).name)
      self.serving.drain()

  async def on_tick(self, counter: int) -> bool:
    if self.serving.draining and self.serving.idle:
      self.should_exit = True  # uvicorn waits for the last bytes of answers
    return await super().on_tick(counter)


def make_server(app: FastAPI, *, host: str, port: int, connections: int = 1000,
                log_level: str = 'info') -> Server:
  """A server of an application, ready to `run`.

  Args:
    app: of `make_app`.
    host, port: where it listens; port 0: any that is free.
    connections: so many at a time; beyond that, the answer is 503.
    log_level: uvicorn's.
  """
  return Server(app, uvicorn.Config(
      app, host=host, port=port, http=Protocol, ws='none', loop='asyncio', log_level=log_level,
      access_log=False, proxy_headers=False, server_header=False, limit_concurrency=connections,
      timeout_keep_alive=KEEP_SECONDS, h11_max_incomplete_event_size=HEADER_BYTES,
      timeout_graceful_shutdown=10))

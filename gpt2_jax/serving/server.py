"""uvicorn, with an end that finishes what runs, and without patience for slow headers."""

import asyncio
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
  """Closes a connection whose first request does not arrive; uvicorn waits for ever."""

  def connection_made(self, transport: Any) -> None:
    super().connection_made(transport)
    self.patience = self.loop.call_later(HEADER_SECONDS, self.hurry)

  def hurry(self) -> None:
    if self.cycle is None and not self.transport.is_closing():
      self.transport.close()

  def connection_lost(self, exc: Exception | None) -> None:
    self.patience.cancel()
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


async def started(server: Server) -> int:
  """The port, once it listens."""
  while not server.started:
    await asyncio.sleep(0.01)
  return server.servers[0].sockets[0].getsockname()[1]

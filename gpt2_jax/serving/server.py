"""uvicorn, with an end that finishes what runs, and without patience for slow headers."""

import contextlib
import errno
import logging
import signal
import socket
from collections.abc import Sequence
from typing import Any

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from gpt2_jax.core.errors import UserError, brief
from gpt2_jax.serving.middleware import HEADER_BYTES
from gpt2_jax.serving.schemas import ApiError, dumps

HEADER_SECONDS = 10.0  # for them to arrive
KEEP_SECONDS = 30  # of a connection between two requests
OTHER_FILES = 100  # that a server may have open beside its connections: half are told that it is full
BACKLOG = 2048  # connections that wait to be accepted, all of them at once

log = logging.getLogger('uvicorn.error')


async def crowded(scope, receive, send) -> None:
  """Answers connections beyond the most that there may be."""
  await ApiError(
    503,
    'The server has too many connections. Try again later.',
    headers={'Retry-After': '1', 'Connection': 'close'},
  ).response()(scope, receive, send)


class Quiet:
  """A transport to which nothing is written once it is closed: asyncio logs each such write."""

  def __init__(self, transport: Any):
    self._transport = transport

  def write(self, data: bytes) -> None:
    if not self._transport.is_closing():
      self._transport.write(data)

  def __getattr__(self, name: str) -> Any:
    return getattr(self._transport, name)


class Protocol(H11Protocol):
  """Closes connections whose headers do not arrive, and those that take nothing of an answer, which
  uvicorn would keep for ever. What uvicorn itself refuses has the form of other errors.
  """

  def connection_made(self, transport: Any) -> None:
    super().connection_made(Quiet(transport))  # type: ignore[arg-type]
    most = self.config.app.state.serving.connections  # type: ignore[union-attr]
    if len(self.connections) > most:
      self.app = crowded
    if len(self.connections) > most + OTHER_FILES // 2:  # soon there is no file to answer with
      transport.abort()
    self.patience = self.stalled = None
    self.await_headers()

  def data_received(self, data: bytes) -> None:
    super().data_received(data)
    self.await_headers()

  def send_400_response(self, msg: str) -> None:
    body = dumps(ApiError(400, msg).body())
    for event in (
      h11.Response(
        status_code=400,
        headers=[('Content-Type', 'application/json'), ('Connection', 'close')],
        reason=b'Bad Request',
      ),
      h11.Data(data=body),
      h11.EndOfMessage(),
    ):
      self.transport.write(self.conn.send(event) or b'')
    self.transport.close()

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

  def __init__(self, app: FastAPI, config: uvicorn.Config, sockets: Sequence[socket.socket]):
    super().__init__(config)
    self.serving, self.bound = app.state.serving, list(sockets)

  def run(self, sockets: list[socket.socket] | None = None) -> None:
    """Serves, until it is told to stop. Raises: UserError: the port was taken meanwhile."""
    super().run(sockets or self.bound)

  async def startup(self, sockets: list[socket.socket] | None = None) -> None:
    host, port = self.bound[0].getsockname()[:2]
    try:
      await super().startup(sockets)
    except OSError as e:
      raise _refused(host, port, e) from None
    log.info('http://%s:%d (Ctrl-C ends it)', f'[{host}]' if ':' in host else host, port)

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


def _refused(host: str, port: int, e: OSError) -> UserError:
  """The error for an address that can't be listened at."""
  if e.errno == errno.EADDRINUSE:
    return UserError(
      f'port {port} of {host} is taken by another program: choose another one with '
      '--port; --port 0 takes any that is free.'
    )
  if e.errno == errno.EACCES:
    return UserError(
      f'port {port} of {host} is not for this user: choose one above 1023 with --port.'
    )
  return UserError(
    f"--host {brief(host)} can't be listened at ({e.strerror or e}): name an address "
    'of this machine, 127.0.0.1 for it alone or 0.0.0.0 for all.'
  )


def bind(host: str, port: int) -> list[socket.socket]:
  """Sockets that have an address, one for each of a name's; nobody is answered yet.

  Raises:
    UserError: it is no address of this machine, or is taken.
  """
  try:
    if not host:
      raise OSError('it is empty')
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
  except (OSError, UnicodeError) as e:
    raise _refused(host, port, e if isinstance(e, OSError) else OSError('it is no name')) from None
  sockets, missing = [], None
  for family, kind, protocol, _, address in dict.fromkeys(found):
    try:
      sockets.append(_bound(family, kind, protocol, address))
    except OSError as e:
      if e.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
        raise _refused(host, port, e) from None
      missing = e  # localhost's IPv6 perhaps, where there is none
  if missing and not sockets:
    raise _refused(host, port, missing)
  return sockets


def _bound(family: int, kind: int, protocol: int, address: Any) -> socket.socket:
  made = socket.socket(family, kind, protocol)
  try:
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if family == socket.AF_INET6:
      made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    made.bind(address)
  except OSError:
    made.close()
    raise
  return made


def _files() -> int:
  """How many files this process may have open."""
  try:
    import resource
  except ImportError:  # a system without such a limit
    return 1 << 30
  soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
  return 1 << 30 if soft == resource.RLIM_INFINITY else soft


def allowed(connections: int) -> int:
  """How many connections there can be: so many, or what the system's limit of open files leaves,
  which is raised as far as it may be.

  Raises:
    UserError: it leaves none.
  """
  wanted = connections + OTHER_FILES + BACKLOG
  if _files() < wanted:
    with contextlib.suppress(ImportError, ValueError, OSError, OverflowError):
      import resource

      _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
      more = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
      resource.setrlimit(resource.RLIMIT_NOFILE, (more, hard))
  soft = _files()
  if soft <= OTHER_FILES:
    raise UserError(
      f'ulimit -n allows {soft} open files, and a server needs more than '
      f'{OTHER_FILES}: set it to 1100.'
    )
  most = min(connections, soft - OTHER_FILES)
  if most < connections:
    print(
      f'ulimit -n allows {soft} open files: at most {most} connections at a time, not '
      f'{brief(connections)}.',
      flush=True,
    )
  return most


def make_server(
  app: FastAPI,
  *,
  host: str = '127.0.0.1',
  port: int = 0,
  connections: int = 1000,
  log_level: str = 'info',
  sockets: Sequence[socket.socket] = (),
) -> Server:
  """A server of an application, ready to `run`.

  Args:
    app: of `make_app`.
    host, port: where it listens; port 0: any that is free. By that name it may be asked, too.
    connections: so many at a time; beyond that, the answer is 503.
    log_level: uvicorn's.
    sockets: of `bind`, which has been asked for host and port.

  Raises:
    UserError: host and port can't be listened at.
  """
  bound = sockets or bind(host, port)
  for address in (host, *(each.getsockname()[0] for each in bound)):
    app.state.serving.hosts.bound(address)
  app.state.serving.connections = connections
  # asyncio accepts all that wait before any is looked at
  backlog = min(BACKLOG, max(1, _files() - connections - OTHER_FILES * 3 // 4))
  return Server(
    app,
    uvicorn.Config(
      app,
      http=Protocol,
      ws='none',
      loop='asyncio',
      log_level=log_level,
      access_log=False,
      proxy_headers=False,
      server_header=False,
      backlog=backlog,
      timeout_keep_alive=KEEP_SECONDS,
      h11_max_incomplete_event_size=HEADER_BYTES,
      timeout_graceful_shutdown=10,
    ),
    bound,
  )

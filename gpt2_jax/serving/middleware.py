"""What stands between the network and the application."""

import asyncio
import hmac
import logging
import time
from collections.abc import MutableMapping
from typing import Any

from starlette.requests import ClientDisconnect

from gpt2_jax.serving.hosts import Hosts
from gpt2_jax.serving.metrics import Metrics
from gpt2_jax.serving.schemas import ApiError, Limits

HEADERS = [
  (
    b'content-security-policy',
    b"default-src 'self'; frame-ancestors 'none'; form-action 'self'; base-uri 'none'",
  ),
  (b'x-content-type-options', b'nosniff'),
  (b'referrer-policy', b'no-referrer'),
]
HEADER_BYTES = 16 << 10  # of a request's line and headers
PAGES = ('/', '/attention', '/patching', '/favicon.ico')
OPEN = (*PAGES, '/healthz', '/openapi.json')  # without a key; and /static/

log = logging.getLogger('gpt2_jax.serving')


class Gone(Exception):
  """The client takes nothing more."""


class Guard:
  """An ASGI middleware: hosts, keys, sizes and times of requests, headers of answers, errors, counts.

  HEAD is answered as GET, but for the body; a path with a slash at its end as the one without.
  """

  def __init__(
    self, app: Any, *, limits: Limits, metrics: Metrics, hosts: Hosts, api_key: str | None
  ):
    self.app, self.limits, self.metrics, self.hosts = app, limits, metrics, hosts
    self.key = None if api_key is None else api_key.encode()

  async def __call__(self, scope, receive, send) -> None:
    if scope['type'] != 'http':
      return await self.app(scope, receive, send)
    head = scope['method'] == 'HEAD'
    method = 'GET' if head else scope['method']
    scope = {**scope, 'method': method, 'path': _plain(scope['path'])}
    exchange = Exchange(self.limits, receive, send, head=head)
    began = time.monotonic()
    try:
      if _header_bytes(scope) > HEADER_BYTES:  # they came at once: uvicorn counts what is incomplete
        raise ApiError(
          431,
          f'The headers are larger than this server takes, {HEADER_BYTES} bytes.',
          headers={'Connection': 'close'},
        )
      headers = dict(scope['headers'])
      self.hosts.check(headers)
      self._admit(scope['path'], headers)
      await self.app(scope, exchange.receive, exchange.send)
    except ApiError as e:
      await exchange.refuse(e, scope)
    except (Gone, ClientDisconnect, OSError):
      exchange.status = exchange.status or 499
    except Exception:
      if exchange.error is not None:  # what Starlette makes of it
        return await exchange.refuse(exchange.error, scope)
      log.exception('%s %s', scope['method'], scope['path'].encode('ascii', 'backslashreplace'))
      await exchange.refuse(ApiError(500, 'The server has failed; its log says how.'), scope)
    finally:
      route = getattr(scope.get('route'), 'path', 'other')
      self.metrics.requests.labels(route, str(exchange.status or 499)).inc()
      self.metrics.duration.labels(route).observe(time.monotonic() - began)

  def _admit(self, path: str, headers: dict[bytes, bytes]) -> None:
    """Raises: ApiError: without the key, or too large."""
    if self.key is not None and path not in OPEN and not path.startswith('/static/'):
      kind, _, key = headers.get(b'authorization', b'').partition(b' ')
      if not hmac.compare_digest(key.strip(), self.key) or kind.lower() != b'bearer':
        raise ApiError(
          401,
          'Incorrect API key: send the header "Authorization: Bearer KEY".',
          code='invalid_api_key',
          headers={'WWW-Authenticate': 'Bearer'},
        )
    length = headers.get(b'content-length', b'0')
    if not length.isdigit() or int(length) > self.limits.body_bytes:
      raise too_large(self.limits)


def _plain(path: str) -> str:
  """A path without the slash at its end; of files it means a folder."""
  return path if path.startswith('/static/') else path.rstrip('/') or '/'


def _header_bytes(scope) -> int:
  """How long a request's line and headers are, but for what is the same in all."""
  line = len(scope['raw_path']) + len(scope['query_string'])
  return line + sum(len(name) + len(value) + 4 for name, value in scope['headers'])  # ': ' and CRLF


def too_large(limits: Limits) -> ApiError:
  return ApiError(
    413,
    f'The body is larger than this server takes, {limits.body_bytes} bytes.',
    headers={'Connection': 'close'},
  )


class Exchange:
  """A request and its answer, within their limits."""

  def __init__(self, limits: Limits, receive, send, *, head: bool):
    """`head`: whether the answer's headers alone are asked for."""
    self.limits, self._receive, self._send, self.head = limits, receive, send, head
    self.size, self.status, self.whole = 0, 0, False
    self.error: ApiError | None = None  # of the body; FastAPI would make its own of it
    self.deadline = time.monotonic() + limits.read_seconds

  async def receive(self) -> dict[str, Any]:
    if self.whole:  # waits for the client to leave, as long as it takes
      return await self._receive()
    try:
      async with asyncio.timeout(self.deadline - time.monotonic()):
        message = await self._receive()
    except TimeoutError:
      self.error = ApiError(408, 'The body took too long to arrive.', headers={'Connection': 'close'})
      raise self.error from None
    if message['type'] == 'http.request':
      self.size += len(message.get('body', b''))
      if self.size > self.limits.body_bytes:
        self.error = too_large(self.limits)
        raise self.error
      self.whole = not message.get('more_body', False)
    return message

  async def send(self, message: MutableMapping[str, Any]) -> None:
    if self.error is not None:
      raise self.error
    if message['type'] == 'http.response.start':
      self.status = message['status']
      message = {**message, 'headers': [*message.get('headers', ()), *HEADERS]}
    elif self.head:
      message = {**message, 'body': b''}
    try:
      async with asyncio.timeout(self.limits.send_seconds):
        await self._send(message)
    except TimeoutError:
      raise Gone from None

  async def refuse(self, error: ApiError, scope) -> None:
    """Answers with an error, if no answer has begun."""
    self.error = None
    if not self.status:
      try:
        await error.response()(scope, self.receive, self.send)
      except (Gone, OSError):
        self.status = 499

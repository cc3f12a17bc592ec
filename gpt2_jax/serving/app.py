"""The HTTP application: OpenAI's completions, features, metrics, pages."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import Response, StreamingResponse
from fastapi.staticfiles import StaticFiles
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

from gpt2_jax.errors import UserError, brief
from gpt2_jax.model import GPT2
from gpt2_jax.serving.api import (
  ApiError,
  AttentionRequest,
  Completion,
  FeaturesRequest,
  Json,
  Limits,
  dumps,
  refusal,
)
from gpt2_jax.serving.attention import attention_data
from gpt2_jax.serving.completions import Answer, encode
from gpt2_jax.serving.engine import Engine
from gpt2_jax.serving.features import features_data
from gpt2_jax.serving.guard import Guard
from gpt2_jax.serving.metrics import Metrics
from gpt2_jax.serving.route import Route

STATIC = Path(__file__).parent / 'static'
SHORT = 4096  # bytes of a body


class Serving:
  """What one application has: its engines, limits and counts."""

  def __init__(self, models: dict[str, GPT2], limits: Limits, slots: int, queue: int):
    self.limits, self.metrics = limits, Metrics()
    self.engines = {
      name: Engine(name, model, self.metrics, slots=slots, queue=queue)
      for name, model in models.items()
    }
    self.draining = False
    self.connections = 1000  # at a time, as `make_server` sets it
    self.alone = asyncio.Semaphore(1)  # whole passes beside the engines, one at a time
    self.behind = 0  # of them, how many wait
    self.queue = queue

  def engine(self, name: str | None) -> Engine:
    """Raises: ApiError: there is no such model, or the server is being stopped."""
    if self.draining:
      raise ApiError(503, 'The server is being stopped.', headers={'Retry-After': '10'})
    found = self.engines.get(name if name is not None else next(iter(self.engines)))
    if found is None:
      raise ApiError(
        404,
        f'The model {brief(name)} does not exist; there is {", ".join(self.engines)}.',
        param='model',
        code='model_not_found',
      )
    return found

  async def apart(self, work: Callable[[], Any]) -> Json:
    """The answer that `work` makes, in another thread. Once begun, it is finished.

    Raises:
      ApiError: too many wait for such work, its turn is too long in coming, or the input can't be
        used.
    """
    if self.behind >= self.queue:
      raise ApiError(
        429,
        'The server is busy: too many requests wait. Try again later.',
        code='rate_limit_exceeded',
        headers={'Retry-After': '1'},
      )
    self.behind += 1
    try:
      async with asyncio.timeout(self.limits.seconds):
        await self.alone.acquire()
      try:
        return await run_in_threadpool(lambda: Json(work()))
      finally:
        self.alone.release()
    except TimeoutError:
      raise ApiError(
        504, 'The request waited longer than this server allows.', code='timeout'
      ) from None
    except UserError as e:
      raise ApiError(400, str(e), param='input') from None
    finally:
      self.behind -= 1

  def drain(self) -> None:
    """Refuses new requests; those that run are finished."""
    self.draining = True
    for engine in self.engines.values():
      engine.queue.close()

  @property
  def idle(self) -> bool:
    return not self.behind and all(engine.queue.idle for engine in self.engines.values())


async def unless_gone(request: Request, work: Awaitable[Response]) -> Response:
  """The answer that `work` makes; it is cancelled if the client leaves before."""
  task = asyncio.ensure_future(work)

  async def leaves():
    while (await request.receive())['type'] != 'http.disconnect':
      pass

  watch = asyncio.ensure_future(leaves())
  try:
    await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
    return task.result() if task.done() else Response(status_code=499)
  finally:
    for each in (task, watch):
      each.cancel()
    await asyncio.gather(task, watch, return_exceptions=True)


def make_app(
  models: dict[str, GPT2],
  *,
  slots: int = 8,
  queue: int = 64,
  limits: Limits | None = None,
  api_key: str | None = None,
  roots: Mapping[str, str] | None = None,
  origins: Sequence[str] = (),
) -> FastAPI:
  """The application that serves some models by name.

  Args:
    models: each with its tokenizer, on one device. The first one is the default.
    slots: texts that a model writes at a time.
    queue: texts that may wait for a slot; beyond that, requests are refused with 429.
    limits: of requests.
    api_key: that requests must bring, but for the pages and `/healthz`.
    roots: where models came from, as a command line would name them; default: their names.
    origins: of other sites, whose pages may read answers (CORS); '*': of all.

  Raises:
    UserError: a model that can't be served.
  """
  limits = limits or Limits()
  serving = Serving(models, limits, slots, queue)

  @contextlib.asynccontextmanager
  async def lifespan(_):
    yield
    serving.drain()

  app = FastAPI(
    title='gpt2_jax',
    docs_url=None,
    redoc_url=None,
    lifespan=lifespan,
    default_response_class=Json,
    redirect_slashes=False,
  )
  app.router.route_class = Route
  app.state.serving = serving
  app.add_middleware(Guard, limits=limits, metrics=serving.metrics, api_key=api_key)
  if origins:  # around the guard, so that its refusals can be read too
    app.add_middleware(
      CORSMiddleware,
      allow_origins=origins,
      allow_methods=['GET', 'HEAD', 'POST'],
      allow_headers=['Authorization', 'Content-Type'],
      expose_headers=['Retry-After'],
    )
  pages = StaticFiles(directory=STATIC)
  app.mount('/static', pages, 'static')

  @app.exception_handler(ApiError)
  async def api_error(_, e: ApiError):
    return e.response()

  @app.exception_handler(RequestValidationError)
  async def invalid(_, e: RequestValidationError):
    return refusal([*e.errors()]).response()

  @app.exception_handler(HTTPException)
  async def http_error(_, e: HTTPException):
    headers, says = dict(e.headers or {}), f'{e.detail}.'
    if e.status_code == 405:  # only what one route takes is known
      headers = {'Allow': 'GET, HEAD' if 'GET' in str(headers) else 'POST'}
      says = f'{e.detail}: this address takes {headers["Allow"]}.'
    return ApiError(e.status_code, says, headers=headers).response()

  @app.get('/', include_in_schema=False)
  async def playground(request: Request):
    return await pages.get_response('index.html', request.scope)

  @app.get('/attention', include_in_schema=False)
  async def attention_page(request: Request):
    return await pages.get_response('attention.html', request.scope)

  @app.get('/favicon.ico', include_in_schema=False)
  async def icon(request: Request):
    return await pages.get_response('icon.svg', request.scope)

  @app.get('/healthz')
  async def health():
    """200 while requests are taken."""
    if serving.draining:
      raise ApiError(503, 'The server is being stopped.')
    return {'status': 'ok'}

  @app.get('/metrics', response_class=Response)
  async def metrics():
    """Counts, in Prometheus' format."""
    return Response(generate_latest(serving.metrics.registry), media_type=CONTENT_TYPE_LATEST)

  def describe(name: str) -> dict[str, Any]:
    return {
      'id': name,
      'object': 'model',
      'created': 0,
      'owned_by': 'gpt2_jax',
      'context_length': serving.engines[name].model.config.n_positions,
      'root': (roots or {}).get(name, name),
    }

  @app.get('/v1/models')
  async def list_models():
    """The models that are served."""
    return {'object': 'list', 'data': [describe(name) for name in serving.engines]}

  @app.get('/v1/models/{name:path}')
  async def one_model(name: str):
    """A model that is served."""
    return describe(serving.engine(name).name)

  @app.post('/v1/completions')
  async def completions(asked: Completion, request: Request):
    """Continues a text, texts, ids or lists of ids, as OpenAI's API does."""
    engine = serving.engine(asked.model)
    # another thread costs more than to tokenise a short text
    short = int(request.headers.get('content-length', SHORT + 1)) <= SHORT
    answer = (
      Answer(engine, asked, limits)
      if short
      else (await run_in_threadpool(Answer, engine, asked, limits))
    )
    ticket = answer.submit(limits.seconds)
    if asked.stream:
      return StreamingResponse(
        sse(answer.stream(ticket)),
        media_type='text/event-stream',
        headers={'Cache-Control': 'no-cache'},
      )
    return await unless_gone(request, answer.whole(ticket))

  @app.post('/v1/features')
  async def features(asked: FeaturesRequest, request: Request):
    """Hidden states, attention weights and embeddings of texts."""
    engine = serving.engine(asked.model)
    return await unless_gone(request, serving.apart(lambda: features_data(engine, asked, limits)))

  @app.post('/v1/attention')
  async def attention(asked: AttentionRequest, request: Request):
    """Attention weights of a text, and what each layer would say next."""
    engine = serving.engine(asked.model)

    def work():
      special = bool(asked.allow_special)
      [ids] = encode(engine, asked.input, param='input', allow_special=special)
      most = min(limits.attention_tokens, engine.model.config.n_positions)
      if len(ids) > most:
        raise ApiError(
          400,
          f'The text has {len(ids)} tokens; the attention of at most {most} is shown.',
          param='input',
          code='context_length_exceeded',
        )
      return attention_data(
        engine.model, asked.input, lens=asked.lens, max_tokens=most, allow_special=special
      )

    return await unless_gone(request, serving.apart(work))

  return app


async def sse(objects: AsyncIterator[dict[str, Any]]) -> AsyncIterator[bytes]:
  """Objects as server-sent events, with OpenAI's last one."""
  async with contextlib.aclosing(objects):  # type: ignore[type-var]
    async for each in objects:
      yield b'data: ' + dumps(each) + b'\n\n'
  yield b'data: [DONE]\n\n'

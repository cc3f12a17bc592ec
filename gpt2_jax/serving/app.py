"""The HTTP application: OpenAI's completions, features, metrics, pages."""

import contextlib
from collections.abc import Mapping, Sequence

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import Response
from starlette.exceptions import HTTPException

from gpt2_jax.model.edits import Edit
from gpt2_jax.model.pretrained_model import Pretrained
from gpt2_jax.serving import endpoints
from gpt2_jax.serving.hosts import Hosts
from gpt2_jax.serving.middleware import Guard
from gpt2_jax.serving.schemas import ApiError, Json, Limits, refusal
from gpt2_jax.serving.state import Serving


def make_app(
  models: dict[str, Pretrained],
  *,
  slots: int = 8,
  queue: int = 64,
  limits: Limits | None = None,
  api_key: str | None = None,
  roots: Mapping[str, str] | None = None,
  hosts: Sequence[str] = (),
  origins: Sequence[str] = (),
  edits: Sequence[Edit] = (),
) -> FastAPI:
  """Returns the application that serves some models by name.

  Args:
    models: each with its tokenizer, on one device. The first one is the default.
    slots: texts that a model writes at a time.
    queue: texts that may wait for a slot; beyond that, requests are refused with 429.
    limits: of requests.
    api_key: that requests must bring, but for the pages and `/healthz`.
    roots: where models came from, as a command line would name them; default: their names.
    hosts: names by which requests may ask for the server, beside those of the loopback and of the
      address that `make_server` binds; '*': any.
    origins: of other sites, whose pages may read answers (CORS); '*': of all.
    edits: of activations of all models, while they write: see `generate`.

  Raises:
    UserError: a model that can't be served.
  """
  limits = limits or Limits()
  serving = Serving(models, limits, slots=slots, queue=queue, roots=roots or {}, edits=edits)
  serving.hosts = Hosts(hosts, origins)

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
    exception_handlers={
      ApiError: api_error,
      RequestValidationError: invalid,
      HTTPException: http_error,
    },
  )
  app.state.serving = serving
  app.add_middleware(
    Guard, limits=limits, metrics=serving.metrics, hosts=serving.hosts, api_key=api_key
  )
  if origins:  # around the guard, so that its refusals can be read too
    app.add_middleware(
      CORSMiddleware,
      allow_origins=origins,
      allow_methods=['GET', 'HEAD', 'POST'],
      allow_headers=['Authorization', 'Content-Type'],
      expose_headers=['Retry-After'],
    )
  app.mount('/static', endpoints.STATIC, 'static')
  for router in endpoints.ROUTERS:
    app.include_router(router)
  return app


async def api_error(_, e: ApiError) -> Response:
  return e.response()


async def invalid(_, e: RequestValidationError) -> Response:
  return refusal([*e.errors()]).response()


async def http_error(_, e: HTTPException) -> Response:
  headers, says = dict(e.headers or {}), f'{e.detail}.'
  if e.status_code == 405:  # only what one route takes is known
    headers = {'Allow': 'GET, HEAD' if 'GET' in str(headers) else 'POST'}
    says = f'{e.detail}: this address takes {headers["Allow"]}.'
  return ApiError(e.status_code, says, headers=headers).response()

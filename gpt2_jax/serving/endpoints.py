"""What the server answers at each address: one router for each group of addresses."""

import asyncio
import contextlib
import functools
from collections.abc import AsyncIterator, Awaitable
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response, StreamingResponse
from fastapi.staticfiles import StaticFiles
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.concurrency import run_in_threadpool

from gpt2_jax.serving.attention_data import attention_data
from gpt2_jax.serving.completions import Answer, encode
from gpt2_jax.serving.engine import Engine
from gpt2_jax.serving.features_endpoint import features_data
from gpt2_jax.serving.patch_data import ablate_data, patch_data
from gpt2_jax.serving.routes import Route
from gpt2_jax.serving.schemas import (
  AblateRequest,
  ApiError,
  AttentionRequest,
  Completion,
  FeaturesRequest,
  PatchRequest,
  dumps,
)
from gpt2_jax.serving.state import Serving

SHORT = 4096  # bytes of a body
STATIC = StaticFiles(directory=Path(__file__).parent / 'static')

pages, service, models, texts, insides = (APIRouter(route_class=Route) for _ in range(5))
ROUTERS = pages, service, models, texts, insides


def serving_of(request: Request) -> Serving:
  return request.app.state.serving


@pages.get('/', include_in_schema=False)
async def playground(request: Request):
  return await STATIC.get_response('index.html', request.scope)


@pages.get('/attention', include_in_schema=False)
async def attention_page(request: Request):
  return await STATIC.get_response('attention.html', request.scope)


@pages.get('/patching', include_in_schema=False)
async def patching_page(request: Request):
  return await STATIC.get_response('patching.html', request.scope)


@pages.get('/favicon.ico', include_in_schema=False)
async def icon(request: Request):
  return await STATIC.get_response('icon.svg', request.scope)


@service.get('/healthz')
async def health(request: Request):
  """200 while requests are taken."""
  if serving_of(request).draining:
    raise ApiError(503, 'The server is being stopped.')
  return {'status': 'ok'}


@service.get('/metrics', response_class=Response)
async def metrics(request: Request):
  """Counts, in Prometheus' format."""
  content = generate_latest(serving_of(request).metrics.registry)
  return Response(content, media_type=CONTENT_TYPE_LATEST)


@models.get('/v1/models')
async def list_models(request: Request):
  """The models that are served."""
  serving = serving_of(request)
  return {'object': 'list', 'data': [_describe(serving, e) for e in serving.engines.values()]}


@models.get('/v1/models/{name:path}')
async def one_model(name: str, request: Request):
  """A model that is served."""
  serving = serving_of(request)
  return _describe(serving, serving.engine(name))


def _describe(serving: Serving, engine: Engine) -> dict[str, Any]:
  return {
    'id': engine.name,
    'object': 'model',
    'created': 0,
    'owned_by': 'gpt2_jax',
    'context_length': engine.model.config.n_positions,
    'root': serving.roots.get(engine.name, engine.name),
  }


@texts.post('/v1/completions')
async def completions(asked: Completion, request: Request):
  """Continues a text, texts, ids or lists of ids, as OpenAI's API does."""
  serving = serving_of(request)
  parts = serving.engine(asked.model), asked, serving.limits
  # another thread costs more than to tokenise a short text
  short = int(request.headers.get('content-length', SHORT + 1)) <= SHORT
  answer = Answer(*parts) if short else await run_in_threadpool(Answer, *parts)
  ticket = answer.submit(serving.limits.seconds)
  if asked.stream:
    return StreamingResponse(
      sse(answer.stream(ticket)),
      media_type='text/event-stream',
      headers={'Cache-Control': 'no-cache'},
    )
  return await unless_gone(request, answer.whole(ticket))


@insides.post('/v1/features')
async def features(asked: FeaturesRequest, request: Request):
  """Hidden states, attention weights and embeddings of texts."""
  serving = serving_of(request)
  engine = serving.engine(asked.model)

  def work():
    return features_data(engine, asked, serving.limits)

  return await unless_gone(request, serving.in_thread(work))


@insides.post('/v1/attention')
async def attention(asked: AttentionRequest, request: Request):
  """Attention weights of a text, and what each layer would say next."""
  serving = serving_of(request)
  engine = serving.engine(asked.model)

  def work():
    special = bool(asked.allow_special)
    [ids] = encode(engine, asked.input, param='input', allow_special=special)
    most = min(serving.limits.attention_tokens, engine.model.config.n_positions)
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

  return await unless_gone(request, serving.in_thread(work))


@insides.post('/v1/patch')
async def patch(asked: PatchRequest, request: Request):
  """What each activation of one text restores in another."""
  serving = serving_of(request)
  model = serving.engine(asked.model).model
  work = functools.partial(patch_data, model, asked, serving.limits)
  return await unless_gone(request, serving.in_thread(work))


@insides.post('/v1/ablate')
async def ablate(asked: AblateRequest, request: Request):
  """What comes next, and what would without some heads."""
  serving = serving_of(request)
  work = functools.partial(ablate_data, serving.engine(asked.model).model, asked)
  return await unless_gone(request, serving.in_thread(work))


async def unless_gone(request: Request, work: Awaitable[Response]) -> Response:
  """Returns the answer that `work` makes, which is cancelled if the client leaves before."""
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


async def sse(objects: AsyncIterator[dict[str, Any]]) -> AsyncIterator[bytes]:
  """Yields objects as server-sent events, with OpenAI's last one."""
  async with contextlib.aclosing(objects):  # type: ignore[type-var]
    async for each in objects:
      yield b'data: ' + dumps(each) + b'\n\n'
  yield b'data: [DONE]\n\n'

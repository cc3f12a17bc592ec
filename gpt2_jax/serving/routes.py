"""What a request's body must be, before anything else is looked at."""

import json

from fastapi import Request
from fastapi.responses import Response
from fastapi.routing import APIRoute

from gpt2_jax.core.errors import brief
from gpt2_jax.serving.schemas import ApiError


class Route(APIRoute):
  """A route whose body, if it takes one, must be JSON and say so."""

  def get_route_handler(self):
    handle = super().get_route_handler()

    async def checked(request: Request) -> Response:
      if request.method == 'POST':
        check_kind(request)
        try:
          await request.json()  # which keeps it
        except (json.JSONDecodeError, UnicodeDecodeError) as e:
          raise ApiError(400, f'The body is not JSON: {e}.') from None
        except (ValueError, RecursionError):
          raise ApiError(
            400,
            'The body is not JSON that can be read: it is nested too deeply, or a '
            'number in it has thousands of digits.',
          ) from None
      return await handle(request)

    return checked


def check_kind(request: Request) -> None:
  """Raises: ApiError: the body is not sent as JSON, or is compressed."""
  sent = request.headers.get('content-type')
  kind = (sent or '').partition(';')[0].strip().lower()
  if kind != 'application/json' and not (kind.startswith('application/') and kind.endswith('+json')):
    what = 'is missing' if sent is None else f'is {brief(sent)}'
    raise ApiError(415, f'The header Content-Type {what}: send "Content-Type: application/json".')
  coding = request.headers.get('content-encoding', 'identity')
  if coding.strip().lower() != 'identity':
    raise ApiError(415, f'The header Content-Encoding is {brief(coding)}: send the body as it is.')

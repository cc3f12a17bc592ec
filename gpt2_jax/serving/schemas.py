"""What is sent to the server, and the form of its errors: OpenAI's."""

import dataclasses
import json
from typing import Annotated, Any, Literal

from fastapi.responses import JSONResponse
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, create_model

from gpt2_jax.core.bounds import Float, Int
from gpt2_jax.core.errors import brief
from gpt2_jax.decoding.samplers import SamplingRule
from gpt2_jax.serving.slot_state import RULES

INT64 = 2**63


@dataclasses.dataclass(frozen=True)
class Limits:
  """What a server takes.

  Attributes:
    body_bytes: of a request.
    prompt_tokens: of one prompt; None: as many as the model has positions.
    new_tokens: of one text; None likewise.
    texts: of one request, prompts times best_of.
    features_tokens: of one request's texts, whose features are asked for.
    features_values: numbers in the answer to it.
    attention_tokens: of the text whose attention is asked for.
    patched_tokens: of all patches of a request: as many texts as there are patches.
    seconds: for a whole request.
    read_seconds: for a request's body to arrive.
    send_seconds: for a reader to take what it is sent.
  """

  body_bytes: int = 1 << 20
  prompt_tokens: int | None = None
  new_tokens: int | None = None
  texts: int = 128
  features_tokens: int = 8192
  features_values: int = 1 << 22
  attention_tokens: int = 256
  patched_tokens: int = 1 << 16
  seconds: float = 600
  read_seconds: float = 20
  send_seconds: float = 30


class ApiError(Exception):
  """An answer that is an error."""

  def __init__(
    self,
    status: int,
    message: str,
    *,
    param: str | None = None,
    code: str | None = None,
    headers: dict[str, str] | None = None,
  ):
    super().__init__(message)
    self.status, self.message, self.param, self.code = status, message, param, code
    self.headers = headers

  def body(self) -> dict[str, Any]:
    kind = {
      401: 'authentication_error',
      429: 'rate_limit_error',
      503: 'service_unavailable_error',
      408: 'timeout_error',
      504: 'timeout_error',
      500: 'server_error',
    }
    return {
      'error': {
        'message': self.message,
        'type': kind.get(self.status, 'invalid_request_error'),
        'param': self.param,
        'code': self.code,
      }
    }

  def response(self) -> 'Json':
    return Json(self.body(), self.status, self.headers)


def busy() -> ApiError:
  return ApiError(
    429,
    'The server is busy: too many requests wait. Try again later.',
    code='rate_limit_exceeded',
    headers={'Retry-After': '1'},
  )


def stopping() -> ApiError:
  return ApiError(503, 'The server is being stopped.', headers={'Retry-After': '10'})


def dumps(content: Any) -> bytes:
  """JSON; half of a surrogate pair, which a request may hold, becomes ?."""
  text = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(',', ':'))
  return text.encode('utf-8', 'replace')


class Json(JSONResponse):
  def render(self, content: Any) -> bytes:
    return dumps(content)


def _listed(value: Any) -> Any:
  return [value] if isinstance(value, str) else value


def _numbered(value: Any) -> Any:
  """Ids are the keys of a JSON object, and so texts."""
  if not isinstance(value, dict):
    return value
  try:
    return {int(key): bias for key, bias in value.items()}
  except ValueError:
    raise ValueError('the keys must be token ids') from None


class Body(BaseModel):
  """What all requests share: no field is dropped in silence, no text is taken for a number."""

  model_config = ConfigDict(strict=True, extra='forbid', allow_inf_nan=False)
  model: str | None = Field(None, description='Default: the first model that is served.')
  allow_special: bool | None = Field(
    False, description='Whether the text of a special token, <|endoftext|>, is the token.'
  )


class StreamOptions(BaseModel):
  """How a text is streamed."""

  model_config = ConfigDict(strict=True, extra='forbid')
  include_usage: bool | None = False
  include_obfuscation: Literal[False] | None = False


OFF = Field(None, description='Not supported: taken where it asks for nothing.')
Empty = Annotated[dict[str, str], Field(max_length=0)] | None
NoIds = Annotated[list[int], Field(max_length=0)] | None


class Neutral(BaseModel):
  """What clients of OpenAI's API and of other servers send of themselves: it asks for nothing."""

  suffix: Literal[''] | None = Field(
    None, description='Not supported: the model writes what comes after a text.'
  )
  store: Literal[False] | None = OFF
  metadata: Empty = OFF
  service_tier: Literal['auto', 'default'] | None = OFF
  prompt_cache_key: None = OFF
  prompt_cache_retention: None = OFF
  safety_identifier: str | None = Field(None, description='As user.')
  min_tokens: Annotated[int, Field(ge=0, le=0)] | None = OFF
  length_penalty: Annotated[float, Field(ge=1, le=1)] | None = OFF
  stop_token_ids: NoIds = OFF
  ignore_eos: Literal[False] | None = OFF
  use_beam_search: Literal[False] | None = OFF


def _field(rule: SamplingRule) -> Any:
  """Returns the type and the field of a rule of `SAMPLERS`."""
  kind, bounds = rule.kind, dict[str, Any]()
  if isinstance(kind, Int):  # larger ones mean the same as the largest
    bounds |= {'ge': kind.low}
  elif isinstance(kind, Float):
    bounds |= {'gt' if kind.open_low else 'ge': kind.low, 'lt' if kind.open_high else 'le': kind.high}
  return rule.type | None, Field(**bounds, default=rule.default, description=rule.help)


_fields: dict[str, Any] = {name: _field(rule) for name, rule in RULES.items()}
Rules: type[BaseModel] = create_model('Rules', **_fields)
Ids = Annotated[list[int], Field(min_length=1)]


class Completion(Body, Neutral, Rules):
  """OpenAI's `POST /v1/completions`, `allow_special`, and the rules of `SAMPLERS` by their names; for
  those that OpenAI's API has, its bounds hold.
  """

  prompt: str | Ids | Annotated[list[str] | list[Ids], Field(min_length=1)] | None = None
  max_tokens: int | None = Field(None, ge=0, description='Default: 16, or what the context leaves.')
  temperature: float | None = Field(1.0, ge=0, le=2)
  top_p: float | None = Field(1.0, ge=0, le=1)
  n: int | None = Field(1, ge=1, le=128)
  best_of: int | None = Field(None, ge=1, le=128)
  stream: bool | None = False
  stream_options: StreamOptions | None = None
  logprobs: int | None = Field(None, ge=0, le=5)
  echo: bool | None = False
  stop: Annotated[
    Annotated[list[Annotated[str, Field(min_length=1, max_length=1000)]], Field(max_length=4)] | None,
    BeforeValidator(_listed),
  ] = None
  presence_penalty: float | None = Field(0.0, ge=-2, le=2)
  frequency_penalty: float | None = Field(0.0, ge=-2, le=2)
  logit_bias: Annotated[
    dict[int, Annotated[float, Field(ge=-100, le=100)]] | None, BeforeValidator(_numbered)
  ] = None
  seed: int | None = Field(None, ge=-INT64, lt=INT64)
  user: str | None = None


class FeaturesRequest(Body):
  """The features of a text or texts."""

  input: str | Annotated[list[str], Field(min_length=1)]
  hidden_states: bool = False
  attentions: bool = False
  embedding: Literal['mean', 'last'] = 'mean'


class AttentionRequest(Body):
  """The attention weights of a text, and what each layer would say next."""

  input: str
  lens: int | None = Field(None, ge=0, le=20, description='Default: 5, or as many ids as there are.')


class PatchRequest(Body):
  """What each activation of one text restores in another."""

  clean: str
  corrupted: str
  answers: Annotated[list[str], Field(min_length=2, max_length=2, description='A token each.')]
  over: str = Field('resid_pre', description='Site of the activations: docs/interpretability.md.')
  by: list[Literal['position', 'head']] | None = Field(None, description='Axes beside the layer.')


class AblateRequest(Body):
  """What comes next without some heads."""

  input: str | Annotated[list[str], Field(min_length=1, max_length=8)]
  heads: list[Annotated[list[int], Field(min_length=2, max_length=2)]] = Field(
    [], description='[layer, head] of each.', max_length=4096
  )
  top: int = Field(8, ge=1, le=20, description='How many next tokens are told.')


def refusal(errors: list[dict[str, Any]]) -> ApiError:
  """The error for what pydantic found. Of the kinds of a union, the first complaint is as good."""
  first = errors[0]
  where = [str(part) for part in first['loc'] if part != 'body']
  param = where[0] if where else None
  if first['type'] == 'extra_forbidden':
    name, param = brief('.'.join(where)).strip("'"), brief(param or '').strip("'")
    return ApiError(
      400, f'Unrecognized request argument: {name}.', param=param, code='unknown_parameter'
    )
  if param in Neutral.model_fields or 'include_obfuscation' in where:
    what = '.'.join(where[: 1 + (param == 'stream_options')])
    why = (
      'the model writes what comes after a text, not what lies between two'
      if param == 'suffix'
      else 'leave it out, or send null'
    )
    return ApiError(
      400,
      f'{what} = {brief(first["input"])} is not supported: {why}.',
      param=param,
      code='unsupported_parameter',
    )
  says = first['msg'].removeprefix('Value error, ')
  return ApiError(400, f'{param}: {says}.' if param else f'The body: {says}.', param=param)

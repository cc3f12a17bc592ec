"""The features of texts, as a request asks for them."""

from typing import Any

from gpt2_jax.model import features
from gpt2_jax.serving.completions import encode
from gpt2_jax.serving.engine import Engine
from gpt2_jax.serving.schemas import ApiError, FeaturesRequest, Limits


def features_data(engine: Engine, asked: FeaturesRequest, limits: Limits) -> dict[str, Any]:
  """The answer to a request for features.

  Raises:
    ApiError: a text is too long, or they are too many.
  """
  c, rows = (
    engine.model.config,
    encode(engine, asked.input, param='input', allow_special=bool(asked.allow_special)),
  )
  longest, total = max(map(len, rows)), sum(map(len, rows))
  if longest > c.n_positions:
    raise ApiError(
      400,
      f"This model's maximum context length is {c.n_positions} tokens, however a text has {longest}.",
      param='input',
      code='context_length_exceeded',
    )
  values = sum(
    len(ids)
    * (
      (c.n_layer + 1) * c.n_embd * asked.hidden_states
      + c.n_layer * c.n_head * len(ids) * asked.attentions
    )
    for ids in rows
  )
  if total > limits.features_tokens or values > limits.features_values:
    raise ApiError(
      400,
      f'{total} tokens and {values} numbers are more than this server answers at a '
      f'time, {limits.features_tokens} and {limits.features_values}: send fewer texts, '
      'or ask for less.',
      param='input',
    )
  found = features.features(
    engine.model, rows, hidden_states=asked.hidden_states, attentions=asked.attentions
  )
  data = []
  for i, each in enumerate(found):
    x_TD = each.last_hidden_state
    embedding_D = x_TD.mean(0) if asked.embedding == 'mean' else x_TD[-1]
    one: dict[str, Any] = {
      'object': 'features',
      'index': i,
      'tokens': each.tokens,
      'embedding': embedding_D.tolist(),
    }
    for name in ('hidden_states', 'attentions'):
      if (array := getattr(each, name)) is not None:
        one[name] = array.tolist()
    data.append(one)
  return {
    'object': 'list',
    'model': engine.name,
    'data': data,
    'usage': {'prompt_tokens': total, 'total_tokens': total},
  }

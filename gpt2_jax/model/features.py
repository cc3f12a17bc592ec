"""What a model makes of a text beside continuing it: its features, and the labels of a classifier."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from gpt2_jax.core.errors import UserError
from gpt2_jax.model import text_batches
from gpt2_jax.model.config import GPTConfig
from gpt2_jax.model.edits import Listening
from gpt2_jax.model.gpt2 import Params, bind
from gpt2_jax.model.pretrained_model import Model, Pretrained, params_of
from gpt2_jax.parallel.sharding import mesh_of, whole_rows
from gpt2_jax.tokenizer.bpe import Tokenizer


@dataclasses.dataclass(frozen=True, repr=False)
class Features:
  """What a model makes of one text of T tokens. Arrays are float32, without padding.

  Attributes:
    tokens: the ids.
    last_hidden_state: [T, D], after the last layer norm.
    hidden_states: [L + 1, T, D]: the embeddings, then the output of each block, the last one after
      the last layer norm, as in transformers; None where not asked for.
    attentions: [L, N, T, T]: how much query t attends to key s; None where not asked for.
  """

  tokens: list[int]
  last_hidden_state: np.ndarray
  hidden_states: np.ndarray | None
  attentions: np.ndarray | None

  def __repr__(self) -> str:
    names = ('last_hidden_state', 'hidden_states', 'attentions')
    arrays = [(name, getattr(self, name)) for name in names]
    shapes = [f'{name} {list(array.shape)}' for name, array in arrays if array is not None]
    return f'Features({len(self.tokens)} tokens, {", ".join(shapes)})'


@dataclasses.dataclass(frozen=True)
class Classified:
  """A classifier's judgement of one text.

  Attributes:
    tokens: the ids.
    label: the likeliest label's name; of a classifier of tokens, one for each token.
    probabilities: name of a label -> its probability; of a classifier of tokens, one for each token.
  """

  tokens: list[int]
  label: str | list[str]
  probabilities: dict[str, float] | list[dict[str, float]]


@functools.partial(jax.jit, static_argnames=('config', 'record'))
def _features(config: GPTConfig, params: Params, tokens_BT, record: tuple[str, ...]):
  out = bind(config, params).transformer(tokens_BT, listen=Listening(record=record))
  states_LBTD = out.found.get('resid_pre')
  if states_LBTD is not None:
    states_LBTD = jnp.concatenate([states_LBTD, out.x_BTD[None]])
  return out.x_BTD, states_LBTD, out.found.get('pattern')


@functools.partial(jax.jit, static_argnames=('config',))
def _probabilities(config: GPTConfig, params: Params, tokens_BT, lengths_B):
  return jax.nn.softmax(bind(config, params)(tokens_BT, lengths_B=lengths_B), axis=-1)


def features(
  model: Model,
  texts: text_batches.Texts,
  *,
  hidden_states: bool = True,
  attentions: bool = True,
  tokenizer: Tokenizer | None = None,
  allow_special: bool = False,
) -> list[Features]:
  """The features of texts: hidden states of every layer and attention weights of every head.

  A text's features don't depend on the other texts.

  Args:
    model: a model; one from `gpt2_jax.from_pretrained` brings its tokenizer along.
    texts: a text, texts, ids, or lists of ids.
    hidden_states, attentions: whether to return them.
    tokenizer: for texts, where the model has none.
    allow_special: whether special tokens count in a text, <|endoftext|> for example.

  Returns:
    A `Features` for each text.

  Raises:
    UserError: a text is longer than the context, or an id is not in the vocabulary.
  """
  params, tokenizer = whole_rows(params_of(model)), tokenizer or Pretrained.of(model).tokenizer
  rows = text_batches.encode(texts, tokenizer, model.config, allow_special=allow_special)
  as_float32 = lambda x: np.asarray(x, np.float32)
  record = ('resid_pre',) * hidden_states + ('pattern',) * attentions
  found = []
  with mesh_of(params):
    for batch, (tokens_BT, _) in text_batches.batches(rows, model.config.n_positions):
      x_BTD, states_LBTD, weights_LBNTS = text_batches.fetch(
        _features(model.config, params, tokens_BT, record)
      )
      for b, ids in enumerate(batch):
        T = len(ids)
        found.append(
          Features(
            ids,
            as_float32(x_BTD[b, :T]),
            as_float32(states_LBTD[:, b, :T]) if hidden_states else None,
            as_float32(weights_LBNTS[:, b, :, :T, :T]) if attentions else None,
          )
        )
  return found


def classify(
  model: Model,
  texts: text_batches.Texts,
  *,
  tokenizer: Tokenizer | None = None,
  allow_special: bool = False,
) -> list[Classified]:
  """What a model with a classification head says of texts.

  Args:
    model, texts, tokenizer, allow_special: as in `features`. Only the last n_positions tokens would
      fit, so longer texts are an error.

  Raises:
    UserError: the model has no such head, or a text is longer than the context.
  """
  config = model.config
  if config.head == 'lm':
    raise UserError('this model has no classification head: it is a language model, see generate.')
  params = whole_rows(params_of(model))
  opened = Pretrained.of(model)
  named = (opened.source.keys.get('id2label') if opened.source is not None else None) or {}
  names = [named.get(str(k), named.get(k, f'LABEL_{k}')) for k in range(config.num_labels)]
  rows = text_batches.encode(
    texts, tokenizer or opened.tokenizer, config, allow_special=allow_special
  )
  found = []
  with mesh_of(params):
    for batch, arrays in text_batches.batches(rows, config.n_positions):
      probabilities = text_batches.fetch(_probabilities(config, params, *arrays))
      for ids, p in zip(batch, probabilities):
        if config.head == 'token_classification':
          p_TK = p[: len(ids)]
          found.append(
            Classified(
              ids,
              [names[k] for k in p_TK.argmax(-1)],
              [dict(zip(names, row.tolist())) for row in p_TK],
            )
          )
        else:
          found.append(Classified(ids, names[p.argmax()], dict(zip(names, p.tolist()))))
  return found

"""What the attention view shows of a text: where each head looks, and what each layer would predict.

Letters: see `gpt2_jax/model/gpt2.py`.
"""

import base64
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import entr

from gpt2_jax.core.errors import UserError
from gpt2_jax.model import text_batches
from gpt2_jax.model.config import GPTConfig
from gpt2_jax.model.features import features
from gpt2_jax.model.gpt2 import Params, bind
from gpt2_jax.model.pretrained_model import Model, Pretrained, params_of
from gpt2_jax.parallel.sharding import mesh_of, whole_rows
from gpt2_jax.tokenizer.bpe import Tokenizer

KINDS = ('previous', 'self', 'repeat', 'induction', 'first', 'broad')


def characters(attentions_LNTS: np.ndarray, ids: list[int]) -> dict[str, np.ndarray]:
  """Each head's character on a text: a number from 0 to 1 for each of `KINDS`, [L, N].

  All but the last are shares of the head's attention, means over the queries from the third token
  on (before it, the previous token and the first one are not two). A key may count for several.

  - previous: to the token before.
  - self: to the token itself.
  - repeat: to earlier occurrences of the same token (duplicate token heads, Wang et al. 2022,
    "Interpretability in the Wild", section 3.3).
  - induction: to what followed an earlier occurrence of the same token (Olsson et al. 2022,
    "In-context Learning and Induction Heads").
  - first: to the first token, where heads look that have nothing to say.
  - broad: the entropy of the attention, divided by that of an even one over as many tokens.

  A text of fewer than three tokens gives zeros.
  """
  T = len(ids)
  if T < 3:
    return {kind: np.zeros(attentions_LNTS.shape[:2]) for kind in KINDS}
  t, s = np.arange(2, T)[:, None], np.arange(T)
  same = np.equal.outer(ids[2:], ids) & (s < t)  # key s is an earlier occurrence of query t's token
  follows = np.pad(same, ((0, 0), (1, 0)))[:, :T] & (s < t)
  masks = dict(
    previous=s == t - 1, self=s == t, repeat=same, induction=follows, first=(s == 0) & (t > 0)
  )
  weights_LNTS = attentions_LNTS[:, :, 2:].astype(np.float64)
  found = {kind: np.tensordot(weights_LNTS, mask, 2) / (T - 2) for kind, mask in masks.items()}
  entropy_LNT = entr(weights_LNTS).sum(-1) / np.log(np.arange(3, T + 1))
  found['broad'] = entropy_LNT.mean(-1)
  return {kind: x_LN.clip(0, 1) for kind, x_LN in found.items()}


@functools.partial(jax.jit, static_argnames=('config', 'k'))
def _lens(config: GPTConfig, params: Params, states_LTD, k: int):
  """The k likeliest tokens after each token, read from each state: probabilities, ids, [L, T, k]."""
  model = bind(config, params)

  def read(x_TD):  # a layer at a time: logits are the largest arrays here
    p_TV = jax.nn.softmax(model.logits(x_TD[None])[0], axis=-1)
    return jax.lax.top_k(p_TV, k)

  normed_LTD = jnp.concatenate([model.ln_f(states_LTD[:-1]), states_LTD[-1:]])  # the last one is
  return jax.lax.map(read, normed_LTD)


def logit_lens(model: Model, states_LTD: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
  """What the model would predict if it ended after each layer: the state, the last layer norm, the
  logits (nostalgebraist 2020, "interpreting GPT: the logit lens").

  Args:
    states_LTD: [L + 1, T, D], `Features.hidden_states`: the last one after the last layer norm.
    k: how many tokens.

  Returns:
    Probabilities and ids of the k likeliest tokens, [L + 1, T, k], the likeliest first.
  """
  T = states_LTD.shape[1]
  room = text_batches.bucket(T, model.config.n_positions) - T
  padded_LTD = np.pad(states_LTD, ((0, 0), (0, room), (0, 0)))
  params = whole_rows(params_of(model))
  with mesh_of(params):
    x_LTD = jnp.asarray(padded_LTD, model.config.dtype)
    p_LTK, ids_LTK = text_batches.fetch(_lens(model.config, params, x_LTD, k))
  return p_LTK[:, :T], ids_LTK[:, :T]


def pack(attentions_LNTS: np.ndarray) -> str:
  """Weights in 1/65535ths as base64 of little-endian uint16: of each head row after row, and of row t
  the t + 1 that causality leaves."""
  T = attentions_LNTS.shape[-1]
  seen = attentions_LNTS[(..., *np.tril_indices(T))]
  return base64.b64encode(np.rint(seen.clip(0, 1) * 65535).astype('<u2').tobytes()).decode()


def unpack(packed: str, layers: int, heads: int, T: int) -> np.ndarray:
  """What `pack` packed, [L, N, T, T]."""
  seen = np.frombuffer(base64.b64decode(packed), '<u2').reshape(layers, heads, -1)
  weights_LNTS = np.zeros((layers, heads, T, T), np.float32)
  weights_LNTS[(..., *np.tril_indices(T))] = seen / np.float32(65535)
  return weights_LNTS


def token_text(tokenizer: Tokenizer, token: int) -> str:
  """A token alone, as a text; of a part of a character, its bytes as \\xNN."""
  content = tokenizer.token_bytes.get(token)
  return f'<{token}>' if content is None else content.decode('utf-8', 'backslashreplace')


def attention_data(
  model: Model,
  text: str,
  *,
  lens: int | None = None,
  max_tokens: int = 256,
  allow_special: bool = False,
) -> dict[str, Any]:
  """What the attention view shows of a text, as JSON can hold it.

  Args:
    model: a model with its tokenizer.
    text: what to read. An empty one is the end-of-text token alone.
    lens: how many predictions of each layer at each token; 0: none; default: 5, or what there are.
    max_tokens: the longest text. The answer grows with its square: 13 MB for 256 tokens and 144
      heads.
    allow_special: whether special tokens count in the text.

  Returns:
    tokens, ids: of the text.
    layers, heads: L and N.
    attentions: the weights, see `unpack`.
    character: for each layer and head {kind: number}, see `characters`.
    strongest: layer and head of the largest of these, first and broad aside.
    lens: for the embeddings and each layer, for each token, the likeliest next [token, probability].

  Raises:
    UserError: the text is longer, or the model can't answer that.
  """
  config, tokenizer = model.config, Pretrained.of(model).tokenizer
  if tokenizer is None:
    raise UserError('the attention view needs a tokenizer: this checkpoint brings none.')
  if lens is None:
    lens = min(5, config.vocab_size)
  if not 0 <= lens <= config.vocab_size:
    raise UserError(f"lens = {lens}: a number from 0 to the vocabulary's {config.vocab_size}.")
  if lens and config.head != 'lm':
    raise UserError('a classifier predicts no tokens: ask with lens=0.')
  [ids] = text_batches.encode(text, tokenizer, config, allow_special=allow_special)
  if len(ids) > max_tokens:
    raise UserError(
      f'the text has {len(ids)} tokens; the attention view takes {max_tokens}. Shorten it.'
    )
  (found,) = features(model, ids, hidden_states=lens > 0)
  attentions_LNTS, states_LTD = found.attentions, found.hidden_states
  assert attentions_LNTS is not None  # asked for
  kinds = characters(attentions_LNTS, ids)
  L, N = attentions_LNTS.shape[:2]
  special = np.max([kinds[kind] for kind in KINDS if kind not in ('first', 'broad')], 0)
  shown = functools.partial(token_text, tokenizer)
  predictions = []
  if states_LTD is not None:
    for p_TK, ids_TK in zip(*logit_lens(model, states_LTD, lens)):
      predictions.append(
        [
          [[shown(i), float(f'{p:.5g}')] for i, p in zip(row, ps)]
          for row, ps in zip(ids_TK.tolist(), p_TK.tolist())
        ]
      )
  return dict(
    tokens=[shown(i) for i in ids],
    ids=ids,
    layers=L,
    heads=N,
    attentions=pack(attentions_LNTS),
    character=[
      [{kind: round(float(kinds[kind][layer, head]), 4) for kind in KINDS} for head in range(N)]
      for layer in range(L)
    ],
    strongest=[int(i) for i in np.unravel_index(special.argmax(), special.shape)],
    lens=predictions,
  )

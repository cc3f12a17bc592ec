"""The activations of texts at one site of one layer, a row for each text or each token."""

from typing import Any, Literal

import numpy as np

from gpt2_jax.core.errors import UserError, brief
from gpt2_jax.model import text_batches
from gpt2_jax.model.edits import run
from gpt2_jax.model.pretrained_model import Model, Pretrained, params_of
from gpt2_jax.model.sites import SITES, site
from gpt2_jax.parallel.sharding import mesh_of, whole_rows
from gpt2_jax.tokenizer.bpe import Tokenizer

Tokens = Literal['last', 'mean', 'all']


def check_place(model: Model, name: str, layer: int | None) -> Any:
  """Which of the layers that have this site: a number from 0 on, or all, where it is None.

  Raises:
    UserError: no token has such activations, or there is no such layer.
  """
  at, L = site(name), model.config.n_layer
  if not at.layered or not at.letters.startswith('BT'):
    said = ', '.join(n for n, s in SITES.items() if s.layered and s.letters.startswith('BT'))
    raise UserError(f'{name} is no activation of a token in a layer; there is {said}.')
  if layer is None:
    return slice(None)
  if not isinstance(layer, (int, np.integer)) or not -L <= layer < L:
    raise UserError(f'layer = {brief(layer)} is not among 0 … {L - 1}.')
  return int(layer) % L


def activations(
  model: Model,
  texts: text_batches.Texts,
  *,
  site: str = 'resid_post',
  layer: int | None,
  tokens: Tokens = 'last',
  tokenizer: Tokenizer | None = None,
) -> np.ndarray:
  """What a layer has at a site for texts.

  Args:
    model: a model; one from `gpt2_jax.from_pretrained` brings its tokenizer along.
    texts: a text, texts, ids, or lists of ids. A text's rows don't depend on the others.
    site: a name of `sites.SITES` that each token has in each layer.
    layer: from 0, or negative from the end; None: all, as the first axis.
    tokens: 'last', that of each text's last token; 'mean', over its tokens; 'all', a row for each
      token of all texts.
    tokenizer: for texts, where the model has none.

  Returns:
    [rows, …the site's axes after T], float32; of all layers [L, rows, …].

  Raises:
    UserError: there is no such site or layer, or a text is longer than the context.
  """
  layers = check_place(model, site, layer)
  if tokens not in ('last', 'mean', 'all'):
    raise UserError(f'tokens = {brief(tokens)} is none of last, mean, all.')
  known = tokenizer or Pretrained.of(model).tokenizer
  rows = text_batches.encode(texts, known, model.config)
  found: list[Any] = []
  with mesh_of(whole_rows(params_of(model))):
    for batch, (tokens_BT, _) in text_batches.batches(rows, model.config.n_positions):
      _, seen = run(model, tokens_BT, record=(site,))
      values_LBT = np.asarray(text_batches.fetch(seen[site]), np.float32)
      for b, ids in enumerate(batch):
        value_LT = values_LBT[:, b, : len(ids)]
        one = {'last': value_LT[:, -1:], 'mean': value_LT.mean(1, keepdims=True), 'all': value_LT}
        found.append(one[tokens][layers])
  return np.concatenate(found, axis=int(layer is None))

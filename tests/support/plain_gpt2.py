"""GPT-2 in plain float64 NumPy, with a function at each of its sites: what interventions are held to.

Written from the paper and Hugging Face's `modeling_gpt2.py`, without the library's model.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

At = Callable[[str, int | None, np.ndarray], np.ndarray]


def gelu(x: np.ndarray) -> np.ndarray:
  """'gelu_new', of tanh."""
  return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def norm(p: Any, x: np.ndarray, epsilon: float, at: At, name: str, layer: int | None) -> np.ndarray:
  """Layer norm."""
  x = x - x.mean(-1, keepdims=True)
  scale = at(f'{name}.scale', layer, np.sqrt((x**2).mean(-1, keepdims=True) + epsilon))
  return at(f'{name}.normalized', layer, x / scale) * p['weight'] + p['bias']


def attend(p: Any, x: np.ndarray, at: At, layer: int) -> np.ndarray:
  """Attention."""
  project = lambda c: np.einsum('BTD,DNH->BTNH', x, p['c_attn']['weight'][:, c])
  q, k, v = (at(n, layer, project(c) + p['c_attn']['bias'][c]) for c, n in enumerate('qkv'))
  scores = np.einsum('BTNH,BSNH->BNTS', q, k) / np.sqrt(q.shape[-1])
  scores = np.where(np.tri(x.shape[1], dtype=bool), scores, np.finfo(np.float32).min)
  scores = at('attn_scores', layer, scores)
  e = np.exp(scores - scores.max(-1, keepdims=True))
  pattern = at('pattern', layer, e / e.sum(-1, keepdims=True))
  z = at('z', layer, np.einsum('BNTS,BSNH->BTNH', pattern, v))
  result = at('result', layer, np.einsum('BTNH,NHD->BTND', z, p['c_proj']['weight']))
  return at('attn_out', layer, result.sum(2) + p['c_proj']['bias'])


def forward(config: Any, params: Any, tokens: np.ndarray, at: At) -> np.ndarray:
  """Logits [B, T, V].

  Args:
    config: of the model; activation 'gelu_new', tied embeddings.
    params: nested dict of float64 arrays, as `init_params` makes them.
    tokens: ids, [B, T].
    at: (site, layer, value) -> the value to go on with.
  """
  c, T = config, tokens.shape[1]
  x = at('embed', None, params['wte']['weight'][tokens])
  wpe = np.broadcast_to(params['wpe']['weight'][:T], x.shape)
  x = x + at('pos_embed', None, wpe)
  for layer in range(c.n_layer):
    take = lambda tree, layer=layer: (
      {k: take(v, layer) for k, v in tree.items()} if isinstance(tree, dict) else tree[layer]
    )
    p, eps = take(params['h']), c.layer_norm_epsilon
    x = at('resid_pre', layer, x)
    x = x + attend(p['attn'], norm(p['ln_1'], x, eps, at, 'ln1', layer), at, layer)
    x = at('resid_mid', layer, x)
    h = norm(p['ln_2'], x, eps, at, 'ln2', layer)
    h = at('mlp_pre', layer, h @ p['mlp']['c_fc']['weight'] + p['mlp']['c_fc']['bias'])
    h = at('mlp_post', layer, gelu(h)) @ p['mlp']['c_proj']['weight'] + p['mlp']['c_proj']['bias']
    x = at('resid_post', layer, x + at('mlp_out', layer, h))
  x = norm(params['ln_f'], x, c.layer_norm_epsilon, at, 'ln_final', None)
  return at('logits', None, x @ params['wte']['weight'][: c.vocab_size].T)

"""What heads attend to, on random tokens that come twice; and how they compose, by their weights.

Scores over texts [BOS] r r with r drawn at random, so that no statistics of language help, as in
TransformerLens' `head_detector.py`: of each query of the second r, the mean weight on one key.

Composition (Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits") is how much of
what one head writes another reads: |W_reader W_writer| / (|W_reader| |W_writer|), Frobenius' norms,
which are those of TransformerLens' `all_composition_scores`. It wants weights that are folded and
centred (`folding.processed`).
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gpt2_jax.core.errors import UserError
from gpt2_jax.interpretation.folding import check_weights
from gpt2_jax.model.config import GPTConfig
from gpt2_jax.model.edits import run
from gpt2_jax.model.gpt2 import Params
from gpt2_jax.model.pretrained_model import Model


class HeadScores(NamedTuple):
  """Mean weights of attention, each head's between 0 and 1."""

  previous_LN: jax.Array  # on the token before
  duplicate_LN: jax.Array  # on the same token, in the first r
  induction_LN: jax.Array  # on the token after that (Olsson et al. 2022, arXiv:2209.11895)
  first_LN: jax.Array  # on the first token of the text


class Composition(NamedTuple):
  """How much of what a head (axes L, N) writes another (axes M, P) reads; 0 unless L is before M."""

  q_LNMP: jax.Array  # into its queries
  k_LNMP: jax.Array
  v_LNMP: jax.Array


def repeated_tokens(
  vocab_size: int, rows: int, length: int, *, seed: int = 0, bos: int | None = None
) -> np.ndarray:
  """Random ids r r in each row, after `bos` where there is one: [rows, 2 · length (+ 1)].

  Ids of one r differ, so that the token after a duplicate is one key.

  Raises:
    UserError: r would be longer than the vocabulary without `bos`, or empty.
  """
  ids = np.delete(np.arange(vocab_size), [] if bos is None else [bos])
  if not 1 <= length <= len(ids):
    raise UserError(f'length = {length} is not among 1 … {len(ids)}, the ids that may differ.')
  rng = np.random.default_rng(seed)
  r = np.stack([rng.choice(ids, length, replace=False) for _ in range(rows)])
  before = np.zeros((rows, 0), int) if bos is None else np.full((rows, 1), bos)
  return np.concatenate([before, r, r], 1).astype(np.int32)


def head_scores(
  model: Model, *, rows: int = 16, length: int = 32, seed: int = 0, bos: int | None = None
) -> HeadScores:
  """The scores of all heads. Arguments: see `repeated_tokens`.

  Raises:
    UserError: the texts are longer than the model's context, or as of `repeated_tokens`.
  """
  config = model.config
  start = 0 if bos is None else 1
  if length < 2:
    raise UserError(f'length = {length}: scores want an r of 2 tokens or more.')
  if start + 2 * length > config.n_positions:
    raise UserError(
      f'length = {length} makes texts of {start + 2 * length} tokens, and the model has '
      f'{config.n_positions} positions: at most {(config.n_positions - start) // 2}.'
    )
  tokens_BT = repeated_tokens(config.vocab_size, rows, length, seed=seed, bos=bos)
  _, found = run(model, tokens_BT, record=('pattern',))
  return pattern_scores(found['pattern'], length)


@functools.partial(jax.jit, static_argnums=1)
def pattern_scores(pattern_LBNTS: jax.Array, length: int) -> HeadScores:
  """The scores of recorded patterns of `repeated_tokens`, whose r has this length."""
  late = slice(-length, None)
  weight = lambda offset: jnp.diagonal(pattern_LBNTS, offset, 3, 4)[..., late].mean((1, 3))
  first = pattern_LBNTS[..., late, 0].mean((1, 3))
  return HeadScores(weight(-1), weight(-length), weight(1 - length), first)


def circuits(config: GPTConfig, params: Params) -> tuple[jax.Array, jax.Array]:
  """Each head's OV and QK circuits, low-rank maps over the residual stream: two [L, N, D, D].

  A source's x is written as x @ OV; a query's x_t and a key's x_s score x_t @ QK @ x_s, before the
  division by sqrt(H) and without biases.

  Raises:
    UserError: the model has another form than 'train', or adapters.
  """
  check_weights(config)
  w_LDCNH, out_LNHD = (params['h']['attn'][n]['weight'] for n in ('c_attn', 'c_proj'))
  einsum = functools.partial(jnp.einsum, precision='highest')
  ov = einsum('LDNH,LNHE->LNDE', w_LDCNH[:, :, 2], out_LNHD)
  return ov, einsum('LDNH,LENH->LNDE', w_LDCNH[:, :, 0], w_LDCNH[:, :, 1])


@functools.partial(jax.jit, static_argnums=0)
def composition(config: GPTConfig, params: Params) -> Composition:
  """All composition scores, of weights that are best folded and centred.

  A matrix with orthonormal columns changes no norm: of those of rank H only triangles are left, so
  that a pair of heads is a product of H by D and D by H.

  Raises:
    UserError: as of `circuits`.
  """
  check_weights(config)
  w_LDCNH, o_LNHD = (params['h']['attn'][n]['weight'] for n in ('c_attn', 'c_proj'))
  einsum = functools.partial(jnp.einsum, precision='highest')
  q, k, v = w_LDCNH.transpose(2, 0, 3, 1, 4)  # [L, N, D, H]
  triangle = lambda x_LNDH: jnp.linalg.qr(x_LNDH, mode='r')
  size = lambda x: jnp.sqrt(jnp.square(x).sum((-2, -1)))
  writes_LNHD = einsum('LNGH,LNHD->LNGD', triangle(v), o_LNHD)
  L, N, H, D = o_LNHD.shape

  def into(reads_LNDH, other_LNDH):
    """The scores of |V O · R Wᵀ|, where R reads from the stream, and W is `other_LNDH`."""
    reads_LNDG = einsum('LNDH,LNGH->LNDG', reads_LNDH, triangle(other_LNDH))
    norms = size(writes_LNHD)[:, :, None, None] * size(reads_LNDG)
    reads_DLX = reads_LNDG.transpose(2, 0, 1, 3).reshape(D, L, N * H)
    sizes = []
    for layer in range(L):  # a product for each, with the heads of later layers
      reads_DX = reads_DLX[:, layer + 1 :].reshape(D, (L - layer - 1) * N * H)
      found_YX = einsum('YD,DX->YX', writes_LNHD[layer].reshape(N * H, D), reads_DX)
      squares_NMP = jnp.square(found_YX).reshape(N, H, L - layer - 1, N, H).sum((1, 4))
      sizes.append(jnp.pad(jnp.sqrt(squares_NMP), ((0, 0), (layer + 1, 0), (0, 0))))
    return jnp.stack(sizes) / norms

  return Composition(into(q, k), into(k, q), into(v, o_LNHD.swapaxes(2, 3)))

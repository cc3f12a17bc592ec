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

  Products of D by D matrices are never made: norms of A B C D of rank H are those of H by H ones.

  Raises:
    UserError: as of `circuits`.
  """
  check_weights(config)
  w_LDCNH, o_LNHD = (params['h']['attn'][n]['weight'] for n in ('c_attn', 'c_proj'))
  q, k, v = (w_LDCNH[:, :, c] for c in range(3))
  einsum = functools.partial(jnp.einsum, precision='highest')
  gram = lambda x_LDNH: einsum('LDNG,LDNH->LNGH', x_LDNH, x_LDNH)
  out_gram = einsum('LNGD,LNHD->LNGH', o_LNHD, o_LNHD)
  norm = lambda a, b: jnp.sqrt(einsum('LNGH,LNHG->LN', a, b))
  of_ov = norm(gram(v), out_gram)  # |V O|² = tr(VᵀV · OOᵀ)

  def into(reads_LDNH, other_gram_LNGH):
    """|V O · R W| over the norms, where R reads from the stream and W has that Gram matrix."""

    def of_writer(out_HD, gram_HH):
      between = einsum('HD,LDNG->LNHG', out_HD, reads_LDNH)  # O R
      return jnp.sqrt(
        jnp.maximum(einsum('HI,LNIG,LNGK,LNHK->LN', gram_HH, between, other_gram_LNGH, between), 0)
      )

    flat = (o_LNHD.reshape(-1, *o_LNHD.shape[2:]), gram(v).reshape(-1, *out_gram.shape[2:]))
    sizes = jax.lax.map(lambda x: of_writer(*x), flat).reshape(*of_ov.shape, *of_ov.shape)
    norms = norm(gram(reads_LDNH), other_gram_LNGH)
    layers = jnp.arange(len(o_LNHD))
    before = (layers[:, None] < layers)[:, None, :, None]
    return jnp.where(before, sizes / (of_ov[:, :, None, None] * norms), 0)

  return Composition(into(q, gram(k)), into(k, gram(q)), into(v, out_gram))

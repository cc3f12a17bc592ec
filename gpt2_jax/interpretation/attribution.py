"""Direct logit attribution: what each part adds to a logit, or to a difference of two.

The residual stream before the last layer norm is a sum: the embeddings, what each head writes, what
each MLP writes. With the norm's scale held at what it is in this run the rest is linear, so that each
part has a share, and all shares add up to the logit (Elhage et al. 2021, "A Mathematical Framework
for Transformer Circuits"; TransformerLens' `ActivationCache.logit_attrs`). The mean that the norm
takes off is taken off each part.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gpt2_jax.core.errors import UserError
from gpt2_jax.model.config import GPTConfig
from gpt2_jax.model.edits import check_site, run
from gpt2_jax.model.gpt2 import Params, bind
from gpt2_jax.model.layers import pick
from gpt2_jax.model.pretrained_model import Model, params_of
from gpt2_jax.model.sites import SITES

RECORD = ('embed', 'pos_embed', 'z', 'mlp_out', 'ln_final.scale')


class Shares(NamedTuple):
  """Each part's share of a logit, of each row; together, `total`, they are the logit."""

  embed_B: jax.Array
  pos_embed_B: jax.Array
  heads_LNB: jax.Array
  attn_biases_LB: jax.Array  # of the projections that the heads share
  mlps_LB: jax.Array
  ln_final_B: jax.Array  # of the last layer norm's bias

  @property
  def total_B(self) -> jax.Array:
    """The logit, or the difference."""
    return sum(share.sum(tuple(range(share.ndim - 1))) for share in self)  # pyright: ignore


def logit_shares(
  model: Model, tokens_BT: Any, answers: Any, wrong: Any = None, *, read: Any = -1
) -> Shares:
  """Direct logit attribution.

  Args:
    model: a language model in the form 'train', without an adapter on attn.c_proj, on one device.
    tokens_BT: ids.
    answers: the token whose logit it is: an id, or one for each row.
    wrong: tokens whose logit is subtracted; None: nothing is.
    read: the position where it is predicted, or one for each row.

  Raises:
    UserError: the model has another form, or an id or a position doesn't exist.
  """
  config, params, (B, T) = model.config, params_of(model), np.shape(tokens_BT)
  check_site(SITES['result'], config)
  rows = lambda x: np.broadcast_to(np.asarray(x, np.int32), B)
  ids, reads_B = [rows(x) for x in (answers, wrong) if x is not None], rows(read)
  if any((i < 0).any() or (i >= config.vocab_size).any() for i in ids):
    raise UserError(f'an answer is no id of a vocabulary of {config.vocab_size}.')
  if (reads_B < -T).any() or (reads_B >= T).any():
    raise UserError(f'read = {read} is not among 0 … {T - 1}.')
  _, found = run(model, tokens_BT, record=RECORD)
  return _shares(config, params, found, ids, reads_B % T)


@functools.partial(jax.jit, static_argnums=0)
def _shares(config: GPTConfig, params: Params, found, ids, reads_B) -> Shares:
  model = bind(config, params)
  at_read = lambda x_BT: pick(x_BT, reads_B).astype(jnp.float32)
  table_VD = model.output_table.weight[...] / config.width_ratio
  direction_BD = table_VD[ids[0]] - (table_VD[ids[1]] if len(ids) > 1 else 0)
  ln_f, scale_B1 = model.ln_f, at_read(found['ln_final.scale'])
  # what a vector that is added to the stream adds to the logit is its product with this one
  onto_BD = direction_BD * ln_f.weight[...]
  onto_BD = (onto_BD - onto_BD.mean(-1, keepdims=True)) / scale_B1
  attn = model.h.attn.c_proj
  z_LBNH = jax.vmap(lambda z_BTNH: at_read(z_BTNH.reshape(*z_BTNH.shape[:2], -1)))(found['z'])
  z_LBNH = z_LBNH.reshape(*z_LBNH.shape[:2], *found['z'].shape[3:])
  einsum = functools.partial(jnp.einsum, precision='highest')
  return Shares(
    einsum('BD,BD->B', at_read(found['embed']), onto_BD),
    einsum('BD,BD->B', at_read(found['pos_embed']), onto_BD),
    einsum('LBNH,LNHD,BD->LNB', z_LBNH, attn.weight[...], onto_BD),
    einsum('LD,BD->LB', attn.bias[...], onto_BD),
    einsum('LBD,BD->LB', jax.vmap(at_read)(found['mlp_out']), onto_BD),
    einsum('BD,D->B', direction_BD, ln_f.bias[...]),
  )

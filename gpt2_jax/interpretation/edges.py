"""Edge attribution patching: what each edge between two parts of a model does, by one backward pass.

An edge leads from what writes into the residual stream (the embedding, a head, an MLP) to what reads
it later (a head's query, key or value, an MLP, the logits). If the clean run's output `u'` went along
it in place of the corrupted `u`, the metric would change by about (u' - u) · dmetric/d(what is read),
through that reader alone (Syed et al. 2023, arXiv:2310.10348, "EAP"; averaged over points between the
runs, Hanna et al. 2024, arXiv:2403.17806, "EAP-IG"). The derivative goes through the layer norm of
the reader. Over all readers a part's edges add up to its estimate as a node (`linear.estimate`).
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gpt2_jax.core.errors import UserError
from gpt2_jax.interpretation.linear import Metric, mean_over, pair_of, read_metric, shares_of
from gpt2_jax.model.edits import Edit, check_site, run
from gpt2_jax.model.gpt2 import Params, bind
from gpt2_jax.model.pretrained_model import Model, params_of
from gpt2_jax.model.sites import SITES

READERS = ('q', 'k', 'v', 'mlp_pre')
NORMS = ('ln1.normalized', 'ln1.scale', 'ln2.normalized', 'ln2.scale')


class Edges(NamedTuple):
  """Estimated changes of the metric. `U` are the writers: the embedding, then of each layer its
  heads and its MLP, U = 1 + L (N + 1); where a writer is not before a reader there is 0.
  """

  heads_ULCN: jax.Array  # into queries, keys and values, C = 3
  mlps_UL: jax.Array
  logits_U: jax.Array  # into the last layer norm

  def writers(self) -> list[str]:
    """The names of U: 'embed', '0.3' (a head), 'mlp 0', …"""
    _, L, _, N = self.heads_ULCN.shape
    return ['embed'] + [n for i in range(L) for n in [*(f'{i}.{j}' for j in range(N)), f'mlp {i}']]


def edges(
  model: Model, clean: Any, corrupted: Any, metric: Metric, *, read: Any = -1, steps: int = 0
) -> Edges:
  """All edges' estimates. Arguments as of `linear.estimate`.

  What each head writes is in memory at once: U · B · T · D numbers.

  Raises:
    UserError: as of `linear.estimate`; or the model has adapters, or another form than 'train'.
  """
  if model.config.form != 'train' or model.config.lora is not None:
    raise UserError(
      "edges are of a model in the form 'train', without adapters: gpt2_jax.merge_adapters."
    )
  check_site(SITES['result'], model.config)
  pair = pair_of(model, clean, corrupted, metric, read, steps)
  return _edges((model.config, steps), params_of(model), *pair)


@functools.partial(jax.jit, static_argnums=0)
def _edges(how, params: Params, clean, corrupted, reads_B, metric: Metric) -> Edges:
  config, steps = how
  model, record = bind(config, params), ('embed', 'z', 'mlp_out', *READERS, 'resid_post')
  (_, theirs), (_, ours) = (run(model, x, record=record) for x in (clean, corrupted))
  changes = {name: jnp.zeros_like(ours[name]) for name in READERS}
  changes['resid_post'] = jnp.zeros_like(ours['resid_post'][-1])

  def score(changes, share):
    embed_BTD = ours['embed'] + share * (theirs['embed'] - ours['embed'])
    edits = [Edit(name, 'add', changes[name]) for name in READERS]
    edits += [
      Edit('resid_post', 'add', changes['resid_post'], layer=-1),
      Edit('embed', value=embed_BTD),
    ]
    logits_BTV, found = run(model, corrupted, edits, NORMS)
    return read_metric(metric, logits_BTV, reads_B), found

  def read_from(share):
    slopes, found = jax.grad(score, has_aux=True)(changes, share)
    return _onto_stream(params, slopes, found)

  readers = mean_over(read_from, shares_of(steps))
  delta = {
    name: (theirs[name] - ours[name]).astype(jnp.float32) for name in ('embed', 'z', 'mlp_out')
  }
  return _along(params, delta, *readers)


def _onto_stream(params: Params, slopes, found) -> tuple[jax.Array, jax.Array, jax.Array]:
  """The metric's derivative by what each reader reads, before its layer norm.

  Returns:
    Of queries, keys and values [L, C, N, B, T, D], of MLPs [L, B, T, D], of the last norm [B, T, D].
  """
  h, einsum = params['h'], functools.partial(jnp.einsum, precision='highest')
  c_attn_LDCNH, c_fc_LDF = h['attn']['c_attn']['weight'], h['mlp']['c_fc']['weight']
  qkv_CLBTNH = jnp.stack([slopes[name] for name in 'qkv'])
  heads = einsum('CLBTNH,LDCNH,LD->LCNBTD', qkv_CLBTNH, c_attn_LDCNH, h['ln_1']['weight'])
  mlps = einsum('LBTF,LDF,LD->LBTD', slopes['mlp_pre'], c_fc_LDF, h['ln_2']['weight'])

  def through_norm(slope, name):
    x, scale = (found[f'{name}.{part}'] for part in ('normalized', 'scale'))
    x, scale = (y.reshape(len(y), *(1,) * (slope.ndim - y.ndim), *y.shape[1:]) for y in (x, scale))
    mean = lambda y: y.mean(-1, keepdims=True)
    return (slope - mean(slope) - x * mean(slope * x)) / scale

  return through_norm(heads, 'ln1'), through_norm(mlps, 'ln2'), slopes['resid_post']


def _along(params: Params, delta, heads_LCNBTD, mlps_LBTD, logits_BTD) -> Edges:
  """Products of what changes at each writer with what each reader would make of it."""
  einsum = functools.partial(jnp.einsum, precision='highest')
  out_LNHD = params['h']['attn']['c_proj']['weight']
  written = einsum('LBTNH,LNHD->LNBTD', delta['z'], out_LNHD)
  L, N = written.shape[:2]
  written = jnp.concatenate([written, delta['mlp_out'][:, None]], 1)
  u_UBTD = jnp.concatenate([delta['embed'][None], written.reshape(-1, *written.shape[2:])])
  # halves of a layer, up to it: the embedding 0, heads of layer l 2l + 1, its MLP 2l + 2
  half_U = jnp.concatenate(
    [jnp.zeros(1), (jnp.arange(L)[:, None] * 2 + 1 + (jnp.arange(N + 1) == N)).ravel()]
  )
  sees_UL = lambda halves_L: half_U[:, None] <= halves_L
  heads = einsum('UBTD,LCNBTD->ULCN', u_UBTD, heads_LCNBTD)
  mlps = einsum('UBTD,LBTD->UL', u_UBTD, mlps_LBTD)
  return Edges(
    jnp.where(sees_UL(2 * jnp.arange(L))[:, :, None, None], heads, 0),
    jnp.where(sees_UL(2 * jnp.arange(L) + 1), mlps, 0),
    einsum('UBTD,BTD->U', u_UBTD, logits_BTD),
  )

"""The loss of next tokens, without the logits of a batch in memory.

A batch's logits are by far its largest array: of 8 rows of 1,024 tokens 1.6 GB in float32, and their
gradient is as large again. Here they are made for some tokens at a time, in a scan. Their gradient is
made with them: a loss is a scalar, and what flows back into it only multiplies what is there. So no
logits are computed again for the backward pass, which finds the gradients of the hidden states and of
the table.

On a mesh each device scans its own tokens against its own part of the vocabulary, inside one
`jax.shard_map`; the table's gradient is summed over the devices once, as `fsdp.einsum`'s are.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from gpt2_jax import fsdp, matmul
from gpt2_jax.config import GPTConfig
from gpt2_jax.sharding import in_mesh, platform, reshard, spec_of, unshard


class Loss(NamedTuple):
  """Losses of targets, in nats, float32."""

  total: jax.Array  # scalar: the sum of weight · loss
  each: jax.Array  # of each target, without a gradient


def chunk_bytes() -> int:
  """The most bytes of float32 logits that a device makes at a time.

  A chunk reads the table and adds to its gradient: it has thousands of tokens, on a CPU one, for its
  products to take longer than that.
  """
  return (256 if platform() == 'cpu' else 512) * 2**20


def num_chunks(tokens: int, V: int) -> int:
  """How many chunks a device's tokens make, by its part of the vocabulary: a power of two, which as a
  rule divides them.
  """
  most = max(1, chunk_bytes() // (4 * V))
  return 1 << (-(-tokens // most) - 1).bit_length()


def cross_entropy(
  config: GPTConfig,
  x_BTD: jax.Array,
  table_VD: jax.Array,
  targets_BT: jax.Array,
  weights_BT: jax.Array,
  scale_V: jax.Array | None = None,
) -> Loss:
  """-log p of the targets under the softmax of `x · table`, divided by muP's `width_ratio`.

  Operands of products are of `x_BTD`'s dtype, sums and softmax float32.

  Args:
    config: says how many rows of the table are real, how precise products are and in what dtype
      gradients are summed over devices.
    x_BTD: hidden states after the last layer norm.
    table_VD: the output embedding, rows beyond `vocab_size` are padding.
    targets_BT: ids below `vocab_size`.
    weights_BT: of each target in the total.
    scale_V: a factor for each row of an int8 table.
  """
  rows = P(*spec_of(x_BTD)[:2])
  loss: Any = _cross_entropy(
    config, x_BTD, table_VD, scale_V, reshard(targets_BT, rows), reshard(weights_BT, rows)
  )
  return loss._replace(each=jax.lax.stop_gradient(loss.each))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _cross_entropy(config, x_BTD, table_VD, scale_V, targets_BT, weights_BT):
  each_BT, _, _ = _on_mesh(config, '', x_BTD, table_VD, scale_V, targets_BT, weights_BT)
  return Loss((weights_BT * each_BT).sum(), each_BT)


def _forward(config, x, table, *others):
  wanted = 'x' * x.perturbed + 'w' * table.perturbed  # under adapters the table isn't trained
  scale_V, targets_BT, weights_BT = (None if a is None else a.value for a in others)
  each_BT, dx_BTD, dw_VD = _on_mesh(
    config, wanted, x.value, table.value, scale_V, targets_BT, weights_BT
  )
  return Loss((weights_BT * each_BT).sum(), each_BT), (each_BT, dx_BTD, dw_VD)


def _backward(config, kept, cotangents):
  del config
  by = cotangents.total  # that of `each` is zero

  def times(gradient):
    if gradient is None:
      return None
    later = jax.typeof(gradient).sharding.spec.unreduced
    return (gradient * (reshard(by, P(reduced=later)) if later else by)).astype(gradient.dtype)

  dweights_BT, dx_BTD, dw_VD = map(times, kept)
  return dx_BTD, dw_VD, None, None, dweights_BT


_cross_entropy.defvjp(_forward, _backward, symbolic_zeros=True)


def _on_mesh(config, wanted, x_BTD, table_VD, scale_V, targets_BT, weights_BT):
  """Losses [B, T], and the total's gradients as far as they are `wanted`: 'x', 'w' or both."""
  gathered_VD = unshard(table_VD.astype(x_BTD.dtype))
  operands = (x_BTD, gathered_VD, scale_V, targets_BT, weights_BT)
  dtype = jnp.promote_types(config.reduce_dtype, x_BTD.dtype)
  if not in_mesh():
    each_BT, dx_BTD, dw_VD = _on_device(config, wanted, None, *operands)
    return each_BT, dx_BTD, None if dw_VD is None else dw_VD.astype(table_VD.dtype)
  total, w_spec, apart = fsdp.sum_of(table_VD)

  def local(*operands):
    each_BT, dx_BTD, dw_VD = _on_device(config, wanted, spec_of(table_VD)[0], *operands)
    return each_BT, dx_BTD, None if dw_VD is None else total(dw_VD.astype(dtype))

  return jax.shard_map(
    local,
    in_specs=jax.tree.map(spec_of, operands),
    out_specs=(spec_of(targets_BT), spec_of(x_BTD), w_spec),
    check_vma=apart,
  )(*operands)


def at(y_CV: jax.Array, ids_C: jax.Array) -> jax.Array:
  """`y[c, ids[c]]`, 0 for ids of other devices; on accelerators found in the pass that adds up."""
  C, V = y_CV.shape
  if platform() != 'cpu':
    return jnp.where(ids_C[:, None] == jnp.arange(V), y_CV, 0).sum(-1)
  here_C = (ids_C >= 0) & (ids_C < V)
  return jnp.where(here_C, y_CV[jnp.arange(C), jnp.where(here_C, ids_C, 0)], 0)


def _on_device(config, wanted, axis, x_BTD, table_VD, scale_V, targets_BT, weights_BT):
  """As `_on_mesh`, of a device's tokens; the table's gradient in float32, of these tokens alone.

  `axis` of the mesh splits the vocabulary, None: it is whole. `C` are the tokens of a chunk.
  """
  (B, T, D), V, dtype = x_BTD.shape, table_VD.shape[0], x_BTD.dtype
  first = V * jax.lax.axis_index(axis) if axis else 0
  ids_V = jnp.arange(V) + first
  product = lambda equation, x, y, wide: matmul.einsum(equation, x, y, None, config.precision, wide)
  whole = lambda sum_or_max, y: sum_or_max(y, axis) if axis else y

  def scaled(y_CV):
    y_CV = y_CV if scale_V is None else y_CV * scale_V
    return y_CV if config.width_ratio == 1 else y_CV / config.width_ratio

  def chunk(dw_VD, tokens):
    x_CD, targets_C, weights_C = tokens
    y_CV = scaled(product('CD,VD->CV', x_CD, table_VD, jnp.float32))
    y_CV = jnp.where(ids_V < config.vocab_size, y_CV, jnp.finfo(jnp.float32).min)
    max_C = whole(jax.lax.pmax, y_CV.max(-1))
    exp_CV = jnp.exp(y_CV - max_C[:, None])
    sum_C, target_C = whole(jax.lax.psum, (exp_CV.sum(-1), at(y_CV, targets_C - first)))
    each_C, dx_CD = jnp.log(sum_C) + max_C - target_C, None
    is_target_CV = targets_C[:, None] == ids_V
    dy_CV = (weights_C / sum_C)[:, None] * exp_CV - weights_C[:, None] * is_target_CV
    dy_CV = scaled(dy_CV).astype(dtype)
    if 'x' in wanted:
      dx_CD = product('CV,VD->CD', dy_CV, table_VD, dtype)
    if 'w' in wanted:
      dw_VD += product('CV,CD->VD', dy_CV, x_CD, jnp.float32)
    return dw_VD, (each_C, dx_CD)

  chunks = num_chunks(B * T, V)
  C = -(-B * T // chunks)

  def cut(a):  # tokens that fill the last chunk up weigh nothing
    a = jnp.pad(a.reshape(B * T, *a.shape[2:]), [(0, chunks * C - B * T), *[(0, 0)] * (a.ndim - 2)])
    return a.reshape(chunks, C, *a.shape[1:])

  join = lambda a: a.reshape(chunks * C, *a.shape[2:])[: B * T].reshape(B, T, *a.shape[2:])
  dw_VD = None
  if 'w' in wanted:
    axes = jax.sharding.get_abstract_mesh().axis_names
    dw_VD = jax.lax.pcast(jnp.zeros((V, D), jnp.float32), axes, to='varying')
  dw_VD, rows = jax.lax.scan(chunk, dw_VD, (cut(x_BTD), cut(targets_BT), cut(weights_BT)))
  each_BT, dx_BTD = jax.tree.map(join, rows)
  return each_BT, whole(jax.lax.psum, dx_BTD), dw_VD

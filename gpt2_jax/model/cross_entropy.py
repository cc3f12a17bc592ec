"""The loss of next tokens, without the logits of a batch in memory.

A batch's logits are by far its largest array: of 8 rows of 1,024 tokens 1.6 GB in float32, and their
gradient is as large again. Here they are made for some tokens at a time, in a scan. Their gradient is
made with them: a loss is a scalar, and its cotangent only multiplies that gradient. So no logits are
computed again for the backward pass, which finds the gradients of the hidden states and of the table.

For one token with the hidden state x, the target t and the weight w, and for rows v of the table:

    y_v = s_v/m · x·table_v         its logits; s: scales of an int8 table, or 1; m: muP's width ratio
    Z   = Σ_v exp(y_v)              log Z = log Σ_v exp(y_v - max y) + max y
    nll = log Z - y_t
    L   = w · (nll + Σ_k c_k·f_k)   f_k(log Z, y_t): one of `LOSS_TERMS`, and c_k its factor

`_device_loss` makes these gradients, with p_v = exp(y_v)/Z, which is the derivative of log Z by y_v:

    dL/dy_v     = w·(1 + Σ_k c_k·df_k/dlogZ)·p_v - w·(1 - Σ_k c_k·df_k/dy_t)·[v = t]
    dL/dx       = Σ_v s_v/m · dL/dy_v · table_v
    dL/dtable_v = s_v/m · dL/dy_v · x, summed over tokens
    dL/dw       = nll + Σ_k c_k·f_k

On a mesh each device scans its own tokens against its own part of the vocabulary, inside one
`jax.shard_map`; the table's gradient is summed over the devices once, as those of
`sharded_products.einsum` are.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from gpt2_jax.parallel import cpu_matmul, sharded_products
from gpt2_jax.parallel.sharding import chip, in_mesh, platform, reshard, spec_of, unshard


class Term(NamedTuple):
  """A term of a token's loss beside its nll: a function f of log Z and the target's logit."""

  value: Callable[[jax.Array, jax.Array], jax.Array]
  slopes: Callable[[jax.Array, jax.Array], tuple[Any, Any]]  # df/dlogZ and df/dy_t


LOSS_TERMS = {
  # keeps log Z near 0, so that logits don't drift (PaLM: Chowdhery et al. 2022, arXiv:2204.02311)
  'z_loss': Term(lambda log_Z, y_t: log_Z**2, lambda log_Z, y_t: (2 * log_Z, 0))
}

# Names of LOSS_TERMS, and the factors by which their values are multiplied.
Factors = tuple[tuple[str, float], ...]


class Loss(NamedTuple):
  """Losses of targets, in nats, float32."""

  total: jax.Array  # scalar: the sum of weight · (loss + terms)
  each: jax.Array  # -log p of each target, without a gradient
  terms: dict[str, jax.Array]  # the part of each of LOSS_TERMS in the total, without a gradient


@dataclasses.dataclass(frozen=True)
class CrossEntropyOptions:
  """How a cross entropy is computed."""

  vocab_size: int  # the table's rows beyond are padding
  width_ratio: float  # logits are divided by it: muP's
  precision: str | None  # of products, as `jax.lax.Precision` names it
  reduce_dtype: str  # of the table's gradient while it is summed over devices
  factors: Factors = ()


class Operands(NamedTuple):
  """The arrays of a cross entropy, or the gradients by them."""

  x_BTD: Any
  table_VD: Any
  scale_V: Any
  targets_BT: Any
  weights_BT: Any


class Wanted(NamedTuple):
  """Which gradients are computed."""

  x: bool
  table: bool


def chunk_bytes() -> int:
  """The most bytes of float32 logits that a device makes at a time.

  A chunk reads the table and adds to its gradient. It needs thousands of tokens, on a CPU one
  thousand, for its products to take longer than that: a sixteenth of an accelerator's memory.
  """
  if platform() == 'cpu':
    return 256 * 2**20
  return (8 * 2**30 if (known := chip()) is None else known.hbm) // 16


def num_chunks(tokens: int, V: int) -> int:
  """The number of chunks for a device's tokens and V rows of the table: a power of two, which usually
  divides the tokens.
  """
  most = max(1, chunk_bytes() // (4 * V))
  return 1 << (-(-tokens // most) - 1).bit_length()


def term_values(factors: Factors, log_Z: jax.Array, y_t: jax.Array) -> dict[str, jax.Array]:
  """The value of each term for each target, its factor included."""
  return {name: factor * LOSS_TERMS[name].value(log_Z, y_t) for name, factor in factors}


def weighted(weights: jax.Array, each: jax.Array, terms: dict[str, jax.Array]) -> Loss:
  """A `Loss` from the nll and the terms of each target."""
  sums = {name: (weights * value).sum() for name, value in terms.items()}
  total = functools.reduce(jnp.add, sums.values(), (weights * each).sum())
  return Loss(total, *jax.lax.stop_gradient((each, sums)))


def cross_entropy(
  options: CrossEntropyOptions,
  x_BTD: jax.Array,
  table_VD: jax.Array,
  targets_BT: jax.Array,
  weights_BT: jax.Array,
  scale_V: jax.Array | None = None,
) -> Loss:
  """-log p of the targets under the softmax of `x · table`, and the terms that are asked for.

  Operands of products are of `x_BTD`'s dtype, sums and softmax float32.

  Args:
    options: how it is computed.
    x_BTD: hidden states after the last layer norm.
    table_VD: the output embedding.
    targets_BT: ids below `vocab_size`.
    weights_BT: of each target in the total.
    scale_V: a factor for each row of an int8 table.
  """
  rows = P(*spec_of(x_BTD)[:2])
  targets_BT, weights_BT = reshard(targets_BT, rows), reshard(weights_BT, rows)
  loss: Any = _cross_entropy(options, Operands(x_BTD, table_VD, scale_V, targets_BT, weights_BT))
  return Loss(loss.total, *jax.lax.stop_gradient(loss[1:]))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _cross_entropy(options: CrossEntropyOptions, operands: Operands) -> Loss:
  each_BT, terms, _, _ = _mesh_loss(options, Wanted(x=False, table=False), operands)
  return weighted(operands.weights_BT, each_BT, terms)


def _forward(options: CrossEntropyOptions, operands: Operands):
  # under adapters the table isn't trained
  wanted = Wanted(operands.x_BTD.perturbed, operands.table_VD.perturbed)
  operands = Operands(*(None if a is None else a.value for a in operands))
  each_BT, terms, dx_BTD, dtable_VD = _mesh_loss(options, wanted, operands)
  dweights_BT = functools.reduce(jnp.add, terms.values(), each_BT)
  return weighted(operands.weights_BT, each_BT, terms), (dweights_BT, dx_BTD, dtable_VD)


def _backward(options: CrossEntropyOptions, gradients, cotangents: Loss):
  del options
  by = cotangents.total  # the only one: the rest has no gradient

  def times(gradient):
    if gradient is None:
      return None
    later = jax.typeof(gradient).sharding.spec.unreduced
    return (gradient * (reshard(by, P(reduced=later)) if later else by)).astype(gradient.dtype)

  dweights_BT, dx_BTD, dtable_VD = map(times, gradients)
  return (Operands(dx_BTD, dtable_VD, None, None, dweights_BT),)


_cross_entropy.defvjp(_forward, _backward, symbolic_zeros=True)


def _mesh_loss(options: CrossEntropyOptions, wanted: Wanted, operands: Operands):
  """nll and terms of each target, [B, T], and the total's gradients by x and table, or None."""
  table_VD, x_dtype = operands.table_VD, operands.x_BTD.dtype
  operands = operands._replace(table_VD=unshard(table_VD.astype(x_dtype)))
  if not in_mesh():
    *losses, dx_BTD, dtable_VD = _device_loss(options, wanted, None, operands)
    return *losses, dx_BTD, None if dtable_VD is None else dtable_VD.astype(table_VD.dtype)
  gradient_sum = sharded_products.GradientSum(table_VD)
  dtype = jnp.promote_types(options.reduce_dtype, x_dtype)

  def local(operands):
    *losses, dx_BTD, dtable_VD = _device_loss(options, wanted, spec_of(table_VD)[0], operands)
    if dtable_VD is not None:
      dtable_VD = gradient_sum.local(dtable_VD.astype(dtype))
    return *losses, dx_BTD, dtable_VD

  rows = spec_of(operands.targets_BT)
  return jax.shard_map(
    local,
    in_specs=(jax.tree.map(spec_of, operands),),
    out_specs=(rows, rows, spec_of(operands.x_BTD), gradient_sum.spec),
    check_vma=gradient_sum.check_vma,
  )(operands)


def _device_loss(options: CrossEntropyOptions, wanted: Wanted, axis: str | None, operands: Operands):
  """As `_mesh_loss`, for a device's tokens; the table's gradient in float32, of these tokens alone.

  `axis` of the mesh splits the vocabulary; None: it is whole. `C` are the tokens of a chunk.
  """
  x_BTD, table_VD, scale_V, targets_BT, weights_BT = operands
  (B, T, D), V, dtype = x_BTD.shape, table_VD.shape[0], x_BTD.dtype
  first = V * jax.lax.axis_index(axis) if axis else 0
  ids_V = jnp.arange(V) + first

  def product(equation, x, y, wide):
    return cpu_matmul.einsum(equation, x, y, None, options.precision, wide)

  def scaled(y_CV):
    y_CV = y_CV if scale_V is None else y_CV * scale_V
    return y_CV if options.width_ratio == 1 else y_CV / options.width_ratio

  def chunk(dtable_VD, tokens):
    x_CD, targets_C, weights_C = tokens
    y_CV = scaled(product('CD,VD->CV', x_CD, table_VD, jnp.float32))
    y_CV = jnp.where(ids_V < options.vocab_size, y_CV, jnp.finfo(jnp.float32).min)
    exp_CV, max_C, Z_C, target_C = _softmax(y_CV, targets_C, first, axis)
    log_Z_C = jnp.log(Z_C) + max_C
    each_C, dx_CD = log_Z_C - target_C, None
    by_p_C, by_target_C = _slopes(options.factors, weights_C, log_Z_C, target_C)
    is_target_CV = targets_C[:, None] == ids_V
    dy_CV = (by_p_C / Z_C)[:, None] * exp_CV - by_target_C[:, None] * is_target_CV
    dy_CV = scaled(dy_CV).astype(dtype)
    if wanted.x:
      dx_CD = product('CV,VD->CD', dy_CV, table_VD, dtype)
    if wanted.table:
      dtable_VD += product('CV,CD->VD', dy_CV, x_CD, jnp.float32)
    terms = term_values(options.factors, log_Z_C, target_C)
    return dtable_VD, (each_C, terms, dx_CD)

  chunks = num_chunks(B * T, V)
  dtable_VD = None
  if wanted.table:
    axes = jax.sharding.get_abstract_mesh().axis_names
    dtable_VD = jax.lax.pcast(jnp.zeros((V, D), jnp.float32), axes, to='varying')
  tokens = tuple(_cut(a, chunks) for a in (x_BTD, targets_BT, weights_BT))
  dtable_VD, losses = jax.lax.scan(chunk, dtable_VD, tokens)
  each_BT, terms, dx_BTD = jax.tree.map(functools.partial(_joined, B=B, T=T), losses)
  return each_BT, terms, jax.lax.psum(dx_BTD, axis) if axis else dx_BTD, dtable_VD


def _slopes(factors: Factors, weights_C, log_Z_C, target_C):
  """The factors of p_v and of [v = t] in dL/dy_v."""
  by_p_C = by_target_C = weights_C
  for name, factor in factors:
    by_log_Z, by_y_t = LOSS_TERMS[name].slopes(log_Z_C, target_C)
    by_p_C += factor * weights_C * by_log_Z
    by_target_C -= factor * weights_C * by_y_t
  return by_p_C, by_target_C


def _softmax(y_CV: jax.Array, ids_C: jax.Array, first: Any = 0, axis: str | None = None):
  """exp(logit - largest); and of each token's logits, over all devices along `axis`, the largest, the
  sum of those exp, and the logit at an id, of which `first` is the first one here.

  On GPUs in one pass over the logits: sums of parts are brought to a common largest logit as they are
  joined (Milakov & Gimelshein 2018, arXiv:1805.02867). A TPU finds the largest as it makes them.
  """
  whole_max = functools.partial(jax.lax.pmax, axis_name=axis) if axis else lambda x: x
  whole_sum = functools.partial(jax.lax.psum, axis_name=axis) if axis else lambda x: x
  if platform() != 'gpu':
    max_C = whole_max(y_CV.max(-1))
    exp_CV = jnp.exp(y_CV - max_C[:, None])
    return exp_CV, max_C, *whole_sum((exp_CV.sum(-1), _logits_at(y_CV, ids_C - first)))

  def join(a, b):
    max_C = jnp.maximum(a[0], b[0])
    a_Z, b_Z = (Z_C * jnp.exp(of_C - max_C) for of_C, Z_C, _ in (a, b))
    return max_C, a_Z + b_Z, a[2] + b[2]

  here_CV = (ids_C - first)[:, None] == jnp.arange(y_CV.shape[1])
  operands = y_CV, jnp.ones_like(y_CV), jnp.where(here_CV, y_CV, 0)
  zero = jnp.zeros((), y_CV.dtype)
  begin = jnp.finfo(y_CV.dtype).min, zero, zero
  part_C, Z_C, target_C = jax.lax.reduce(operands, begin, join, (1,))
  max_C = whole_max(part_C)
  sums = whole_sum((Z_C * jnp.exp(part_C - max_C), target_C))
  return jnp.exp(y_CV - max_C[:, None]), max_C, *sums


def _logits_at(y_CV: jax.Array, ids_C: jax.Array) -> jax.Array:
  """`y[c, ids[c]]`, 0 for ids of other devices; on accelerators found in the pass that adds up."""
  C, V = y_CV.shape
  if platform() != 'cpu':
    return jnp.where(ids_C[:, None] == jnp.arange(V), y_CV, 0).sum(-1)
  here_C = (ids_C >= 0) & (ids_C < V)
  return jnp.where(here_C, y_CV[jnp.arange(C), jnp.where(here_C, ids_C, 0)], 0)


def _cut(a: jax.Array, chunks: int) -> jax.Array:
  """[B, T, …] in chunks, [chunks, C, …]; tokens that fill the last one up weigh nothing."""
  tokens, *rest = a.shape[0] * a.shape[1], *a.shape[2:]
  C = -(-tokens // chunks)
  a = jnp.pad(a.reshape(tokens, *rest), [(0, chunks * C - tokens), *[(0, 0)] * len(rest)])
  return a.reshape(chunks, C, *rest)


def _joined(a: jax.Array, B: int, T: int) -> jax.Array:
  """Undoes `_cut`."""
  return a.reshape(-1, *a.shape[2:])[: B * T].reshape(B, T, *a.shape[2:])

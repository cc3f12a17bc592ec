"""What a researcher watches of each layer, measured beside the training step, which stays as it is.

Keys, each with an axis of layers where a parameter has one; of matrices and embeddings:

    layers/param_norm/NAME    before the update
    layers/grad_norm/NAME     before clipping
    layers/update_norm/NAME   of what is added
    layers/update_ratio/NAME  the latter by the first
    layers/largest_logit      of attention, before its softmax, in the first micro-batch
    layers/gradient_square, layers/gradient_variance, layers/noise_scale: see `noise`
"""

import dataclasses
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict

from gpt2_jax.model.config import GPTConfig
from gpt2_jax.model.cross_entropy import Factors
from gpt2_jax.model.gpt2 import bind
from gpt2_jax.model.parameters import row_of
from gpt2_jax.model.sites import SILENT, Listener
from gpt2_jax.parallel.sharding import RULES, reshard
from gpt2_jax.training.step import TrainState, drops, losses, replaced, row_keys, trained


@dataclasses.dataclass(frozen=True)
class _Largest:
  """Keeps the largest attention logit of each layer; a `sites.Listen`, and its `Listener`s."""

  found: dict[str, jax.Array] = dataclasses.field(default_factory=dict)

  def hears(self, *names: str) -> bool:
    return 'attn_scores' in names

  def layer(self, number: jax.Array | int | None) -> Listener:
    return SILENT if number is None else _Largest()

  def __call__(self, name: str, value: jax.Array) -> jax.Array:
    if name == 'attn_scores':
      self.found['largest_logit'] = value.max()
    return value


def norms(params: Any) -> dict[str, jax.Array]:
  """The norms of matrices and embeddings, [L] or of one, by a short name: 'attn.c_attn'."""
  out, leaves = {}, cast(dict[Any, jax.Array], flatten_dict(params))
  for path, x in leaves.items():
    row = row_of(path)
    if row.decays:
      axes = tuple(range(int(row.stacked), x.ndim))
      name = row.name.removeprefix('h.').removesuffix('.weight')
      out[name] = jnp.sqrt(jnp.sum(jnp.square(x), axes))
  return out


def noise(whole: jax.Array, part: jax.Array, parts: int, tokens: int) -> dict[str, jax.Array]:
  """The gradient's noise scale (McCandlish et al. 2018, arXiv:1812.06162, appendix A.1).

  Args:
    whole: the square of the norm of a batch's gradient.
    part: the mean of those of its parts, whose gradients' mean that is.
    parts: their number, 2 or more.
    tokens: of the batch.

  Returns: estimates without bias of the true gradient's square, |G|², and of the variance of one
    token's, tr Σ; and their ratio, in tokens: with batches of far fewer tokens, twice as many need
    half the steps. One step's says little: divide means over many.
  """
  square = (parts * whole - part) / (parts - 1)
  variance = (part - whole) * tokens / (parts - 1)
  return {
    'layers/gradient_square': square,
    'layers/gradient_variance': variance,
    'layers/noise_scale': variance / square,
  }


def make_measure(
  config: GPTConfig,
  tx: optax.GradientTransformation,
  *,
  seed: int,
  document_start: int | None = None,
  factors: Factors = (),
) -> Callable:
  """Returns `measure(state, batch) -> metrics`, of the step that `make_train_step` makes of them.

  Parts of a batch are its micro-batches; of a single one, its even and its odd rows.
  """

  def gradients(state: TrainState, batch):
    """The mean gradient, the mean of the squares of its parts' norms, and their number."""
    A, M = jax.tree.leaves(batch)[0].shape[:2]
    targets = batch.shape[-1] - 1 if config.head == 'lm' else 1
    halves = A == 1 and M % 2 == 0
    parts = 2 if halves else A

    def loss(part, i, micro):
      a, weights = (0, _half(i, M, targets, config.head)) if halves else (i, 1 / (M * targets))
      keys_M = row_keys(seed, state.step, a * M, M) if drops(config) else None
      model = bind(config, replaced(state.params, part))
      return losses(model, micro, keys_M, document_start, weights, factors).total

    def add(sums, i):
      micro = jax.tree.map(lambda x: x[0] if halves else x[i], batch)
      grads = jax.grad(loss)(trained(config, state.params), i, micro)
      return jax.tree.map(jnp.add, sums, (grads, optax.tree.norm(grads, squared=True))), None

    zeros = optax.tree.zeros_like(trained(config, state.params)), jnp.zeros(())
    (grads, squares), _ = jax.lax.scan(add, zeros, jnp.arange(parts))
    return jax.tree.map(lambda g: g / parts, grads), squares / parts, parts

  def measure(state: TrainState, batch) -> dict[str, Any]:
    part = trained(config, state.params)
    grads, squares, parts = gradients(state, batch)
    updates, _ = tx.update(grads, state.opt_state, part)
    found = {'param_norm': norms(part), 'grad_norm': norms(grads), 'update_norm': norms(updates)}
    found['update_ratio'] = jax.tree.map(
      lambda u, p: u / jnp.maximum(p, 1e-30), found['update_norm'], found['param_norm']
    )
    out = {f'layers/{what}/{name}': x for what, each in found.items() for name, x in each.items()}
    tokens = (batch[0, :, :-1] if config.head == 'lm' else batch['tokens'][0]).astype(jnp.int32)
    documents = None
    if document_start is not None:
      documents = jnp.cumsum(tokens == document_start, axis=1, dtype=jnp.int32)
    run = bind(config, state.params).transformer
    seen = run(tokens, documents_BT=documents, listen=_Largest()).found
    out['layers/largest_logit'] = seen['largest_logit']
    if parts > 1:
      A, M = jax.tree.leaves(batch)[0].shape[:2]
      out |= noise(optax.tree.norm(grads, squared=True), squares, parts, A * M * tokens.shape[-1])
    return out

  return measure


def _half(i: jax.Array, M: int, targets: int, head: str) -> jax.Array:
  """The weights of the mean over every other of M rows, from row `i` on."""
  rows_M = reshard(jnp.arange(M), RULES.rows_b)
  weights_M = jnp.where(rows_M % 2 == i, 2 / (M * targets), 0)
  return weights_M[:, None] if head == 'lm' else weights_M


def flat(values: dict[str, Any]) -> dict[str, float]:
  """Metrics as numbers: an axis of layers becomes the end of the key, `…/attn.c_attn/0`."""
  out = {}
  for key, value in values.items():
    if np.ndim(value):
      out |= {f'{key}/{i}': float(x) for i, x in enumerate(value)}
    else:
      out[key] = float(value)
  return out

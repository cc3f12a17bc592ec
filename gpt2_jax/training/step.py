"""The losses, one training step, one evaluation step. Pure functions of arrays."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict, unflatten_dict

from gpt2_jax.core import seeds
from gpt2_jax.model.config import GPTConfig
from gpt2_jax.model.cross_entropy import Factors, Loss, term_values, weighted
from gpt2_jax.model.gpt2 import GPT2, Params, bind, make_params
from gpt2_jax.model.parameters import map_rows
from gpt2_jax.model.sizes import trainable_paths
from gpt2_jax.parallel import sharded_products
from gpt2_jax.parallel.sharding import RULES, platform, reshard
from gpt2_jax.training import skip_spikes
from gpt2_jax.training.optimizers import schedule_free


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
  """All that changes from step to step."""

  step: jax.Array  # number of updates done
  params: Params
  opt_state: Any
  ema: Params | None  # average of the parameters, None where there is none

  def items(self) -> dict[str, Any]:
    """The items of a checkpoint, apart from the step."""
    items = {'params': self.params, 'opt_state': self.opt_state, 'ema': self.ema}
    return {name: tree for name, tree in items.items() if tree is not None}

  def restored(self, step: int, items: dict[str, Any]) -> 'TrainState':
    """The state of a step from its items; `self` is abstract, for the layout of its number."""
    return TrainState(
      jax.device_put(np.int32(step), self.step.sharding),
      items['params'],
      items['opt_state'],
      items.get('ema'),
    )


def trained(config: GPTConfig, params: Params) -> Params:
  """The part of the parameters that is trained: with adapters, them and a classifier's head."""
  paths = trainable_paths(config)
  return unflatten_dict({k: v for k, v in flatten_dict(params).items() if k in paths})


def replaced(params: Params, part: Params) -> Params:
  """`params` with the leaves of `part` in place of its own."""
  return unflatten_dict(flatten_dict(params) | flatten_dict(part))


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3), donate_argnums=4)
def init_state(
  config: GPTConfig,
  tx: optax.GradientTransformation,
  seed: int,
  ema: bool,
  given: Params | None = None,
) -> TrainState:
  """The state before the first step, in place on the mesh that is set.

  Args:
    config: of the model.
    tx: the optimizer, of the parameters that are trained.
    seed: of the initial parameters.
    ema: whether to keep a moving average.
    given: parameters in place of initial ones. They are donated.
  """
  params = replaced(make_params(config, seed), given or {})
  return TrainState(
    jnp.zeros((), jnp.int32), params, tx.init(trained(config, params)), params if ema else None
  )


def nll(
  model: GPT2,
  tokens_BT1: jax.Array,
  dropout_keys_B: jax.Array | None = None,
  document_start: int | None = None,
  weights: jax.Array | float | None = None,
  factors: Factors = (),
) -> Loss:
  """-log p of each next token, from rows of T + 1 tokens.

  Args:
    model: the model.
    tokens_BT1: ids.
    dropout_keys_B: a key for each row; None: no dropout.
    document_start: the id that begins a document; then a token sees its own document alone.
    weights: in the total, [B, T] or one for all; None: the total is the mean.
    factors: of the terms of `LOSS_TERMS` in the total.
  """
  inputs_BT, targets_BT = tokens_BT1[:, :-1], tokens_BT1[:, 1:]
  documents_BT = None
  if document_start is not None:
    documents_BT = jnp.cumsum(inputs_BT == document_start, axis=1, dtype=jnp.int32)
  x_BTD = model.transformer(inputs_BT, documents_BT=documents_BT, dropout_keys_B=dropout_keys_B).x_BTD
  return model.loss(x_BTD, targets_BT, of_each(weights, targets_BT), factors)


def of_each(weights: jax.Array | float | None, targets: jax.Array) -> jax.Array:
  """The weight of each target; of None those of a mean."""
  weights = 1 / targets.size if weights is None else weights
  return jnp.broadcast_to(jnp.asarray(weights, jnp.float32), targets.shape)


def label_logits(model: GPT2, batch: dict, dropout_keys_B: jax.Array | None = None) -> jax.Array:
  """A classifier's logits [B, K] of a batch of `data.labelled`."""
  x_BTD = model.transformer(batch['tokens'], dropout_keys_B=dropout_keys_B).x_BTD
  return model.classify(x_BTD, batch['lengths'], dropout_keys_B)


def label_nll(
  logits_BK: jax.Array,
  labels_B: jax.Array,
  weights: jax.Array | float | None = None,
  factors: Factors = (),
) -> Loss:
  """-log p of each text's label; `weights` [B] and `factors` as of `nll`."""
  is_label_BK = labels_B[:, None] == jnp.arange(logits_BK.shape[-1])
  log_Z_B = jax.nn.logsumexp(logits_BK, -1)
  label_B = jnp.where(is_label_BK, logits_BK, 0).sum(-1)
  terms = term_values(factors, log_Z_B, label_B)
  return weighted(of_each(weights, labels_B), log_Z_B - label_B, terms)


def losses(
  model: GPT2,
  batch,
  dropout_keys_B: jax.Array | None = None,
  document_start: int | None = None,
  weights: jax.Array | float | None = None,
  factors: Factors = (),
) -> Loss:
  """The losses of a batch's targets: [B, T] next tokens, or [B] labels; the rest as of `nll`."""
  if model.config.head == 'lm':
    return nll(model, batch, dropout_keys_B, document_start, weights, factors)
  return label_nll(label_logits(model, batch, dropout_keys_B), batch['labels'], weights, factors)


def row_keys(seed: int, step: jax.Array, first: jax.Array | int, rows: int) -> jax.Array:
  """A key for each of `rows` rows of the batch of `step`, from number `first` on."""
  key = jax.random.fold_in(seeds.key(seed), step)
  numbers_B = reshard(jnp.arange(rows), RULES.rows_b) + first
  return jax.vmap(jax.random.fold_in, (None, 0))(key, numbers_B)


def drops(config: GPTConfig) -> bool:
  """Whether a model is trained with dropout."""
  adapters = config.lora is not None and config.lora.dropout
  return any((config.embd_pdrop, config.attn_pdrop, config.resid_pdrop, adapters))


def summed(loss_fn: Callable, part: Params, batch, terms: list[str]):
  """The sums of `loss_fn(part, a, micro-batch a)` over the batch, of its terms and its gradients."""
  loss_and_grads = jax.value_and_grad(loss_fn, has_aux=True)
  A = jax.tree.leaves(batch)[0].shape[0]
  if A == 1:
    return loss_and_grads(part, 0, jax.tree.map(lambda x: x[0], batch))
  waits = map_rows(lambda row, _: row.kind != 'norm', part)  # layer norms are small
  deferred = sharded_products.DeferredGradients(part, waits)

  def add(sums, micro):
    return jax.tree.map(jnp.add, sums, loss_and_grads(deferred.params, *micro)), None

  zeros = (jnp.zeros(()), {name: jnp.zeros(()) for name in terms}), deferred.zeros()
  (losses, grads), _ = jax.lax.scan(add, zeros, (jnp.arange(A), batch))
  return losses, deferred.sum(grads)


def make_train_step(
  config: GPTConfig,
  tx: optax.GradientTransformation,
  schedule: optax.Schedule,
  *,
  seed: int,
  ema_decay: float,
  document_start: int | None = None,
  factors: Factors = (),
) -> Callable:
  """Returns `step(state, batch) -> state, metrics` over a batch in A micro-batches of M rows.

  A batch is tokens [A, M, T + 1], or a dict of `data.labelled`. The loss is the mean over all
  targets, and so are the gradients, however the batch is split; `factors` are those of `nll`.
  """

  def step(state: TrainState, batch):
    A, M = jax.tree.leaves(batch)[0].shape[:2]
    targets = A * M * (batch.shape[-1] - 1 if config.head == 'lm' else 1)
    part = trained(config, state.params)

    def loss_fn(part, a, micro):
      keys_M = row_keys(seed, state.step, a * M, M) if drops(config) else None
      model = bind(config, replaced(state.params, part))
      loss = losses(model, micro, keys_M, document_start, 1 / targets, factors)
      return loss.total, loss.terms

    (loss, terms), grads = summed(loss_fn, part, batch, [name for name, _ in factors])
    with jax.named_scope('optimizer'):
      updates, opt_state = tx.update(grads, state.opt_state, part)
      params: Any = replaced(state.params, optax.apply_updates(part, updates))  # pyright: ignore
      ema: Any = None
      if state.ema is not None:
        ema = optax.incremental_update(params, state.ema, 1 - ema_decay)
      if average := schedule_free.average(opt_state, trained(config, params)):
        ema = replaced(params, average)
    added = updates
    if platform() != 'cpu':  # the same, but found in the pass that adds them
      added = jax.tree.map(jnp.subtract, trained(config, params), part)
    metrics = {
      'train/loss': functools.reduce(jnp.subtract, terms.values(), loss),
      **{f'train/{name}': value for name, value in terms.items()},
      'train/grad_norm': optax.tree.norm(grads),  # before clipping
      'train/update_norm': optax.tree.norm(added),
      'train/param_norm': optax.tree.norm(params),
      'train/learning_rate': jnp.asarray(schedule(state.step), jnp.float32),
      **skip_spikes.metrics(opt_state),
    }
    return TrainState(state.step + 1, params, opt_state, ema), metrics

  return step


def make_eval_step(config: GPTConfig, document_start: int | None = None) -> Callable:
  """Returns `step(params, batch [1, R, …], weights [1, R, …]) -> sums`, weighted ones.

  The sums are those of the losses and of the weights, and for a classifier of the right labels.
  """

  def step(params: Params, batch, weights):
    model, batch = bind(config, params), jax.tree.map(lambda x: x[0], batch)
    if config.head == 'lm':
      return losses(model, batch, None, document_start, weights[0]).total, weights.sum()
    logits_RK = label_logits(model, batch)
    right_R = (logits_RK.argmax(-1) == batch['labels']) * weights[0]
    loss = label_nll(logits_RK, batch['labels'], weights[0])
    return loss.total, weights.sum(), right_R.sum()

  return step

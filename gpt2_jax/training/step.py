"""The loss, one training step, one evaluation step. Pure functions of arrays."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from gpt2_jax.config import GPTConfig
from gpt2_jax.model import GPT2, Params, bind, make_params
from gpt2_jax.sharding import RULES, reshard


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
  """All that changes from step to step."""

  step: jax.Array  # number of updates done
  params: Params
  opt_state: Any
  ema: Params | None  # moving average of the parameters, None where it is off


def init_state(config: GPTConfig, tx: optax.GradientTransformation, seed: int, ema: bool):
  """The state before the first step, in place on the mesh that is set."""
  def make():
    params = make_params(config, seed)
    return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params), params if ema else None)

  return jax.jit(make)()


def nll(model: GPT2, tokens_BT1: jax.Array, dropout_keys_B: jax.Array | None = None) -> jax.Array:
  """-log p of each next token: [B, T], float32, in nats, from rows of T + 1 tokens."""
  inputs_BT, targets_BT = tokens_BT1[:, :-1], tokens_BT1[:, 1:]
  logits_BTV = model.logits(model.transformer(inputs_BT, dropout_keys_B=dropout_keys_B).x_BTD)
  # a masked sum, since a gather along V fails where V is sharded; XLA fuses it
  is_target_BTV = targets_BT[..., None] == jnp.arange(logits_BTV.shape[-1])
  target_BT = jnp.where(is_target_BTV, logits_BTV, 0).sum(-1)
  return jax.nn.logsumexp(logits_BTV, axis=-1) - target_BT


def row_keys(seed: int, step: jax.Array, first: jax.Array | int, rows: int) -> jax.Array:
  """A key for each of `rows` rows of the batch of `step`, from number `first` on."""
  key = jax.random.fold_in(jax.random.key(seed), step)
  numbers_B = reshard(jnp.arange(rows), RULES.rows_b) + first
  return jax.vmap(jax.random.fold_in, (None, 0))(key, numbers_B)


def make_train_step(
    config: GPTConfig,
    tx: optax.GradientTransformation,
    schedule: optax.Schedule,
    *,
    seed: int,
    ema_decay: float,
) -> Callable:
  """`step(state, tokens) -> state, metrics` over tokens [A, M, T + 1] in A micro-batches.

  The loss is the mean over all A·M·T targets; so are the gradients, however they are split.
  """
  drops = any((config.embd_pdrop, config.attn_pdrop, config.resid_pdrop))

  def step(state: TrainState, tokens_AMT1: jax.Array):
    A, M, T1 = tokens_AMT1.shape

    def loss_fn(params, a, tokens_MT1):
      keys_M = row_keys(seed, state.step, a * M, M) if drops else None
      return nll(bind(config, params), tokens_MT1, keys_M).sum() / (A * M * (T1 - 1))

    def accumulate(carry, micro):
      loss_and_grads = jax.value_and_grad(loss_fn)(state.params, *micro)
      return jax.tree.map(jnp.add, carry, loss_and_grads), None

    if A == 1:
      loss, grads = jax.value_and_grad(loss_fn)(state.params, 0, tokens_AMT1[0])
    else:
      zeros = jnp.zeros(()), jax.tree.map(jnp.zeros_like, state.params)
      (loss, grads), _ = jax.lax.scan(accumulate, zeros, (jnp.arange(A), tokens_AMT1))

    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params: Any = optax.apply_updates(state.params, updates)
    ema: Any = None
    if state.ema is not None:
      ema = optax.incremental_update(params, state.ema, 1 - ema_decay)
    metrics = {
        'train/loss': loss,
        'train/grad_norm': optax.tree.norm(grads),  # before clipping
        'train/update_norm': optax.tree.norm(updates),
        'train/param_norm': optax.tree.norm(params),
        'train/learning_rate': jnp.asarray(schedule(state.step), jnp.float32),
    }
    return TrainState(state.step + 1, params, opt_state, ema), metrics

  return step


def make_eval_step(config: GPTConfig) -> Callable:
  """`step(params, tokens [1, R, T + 1], weights [1, R, T]) -> (summed nll, summed weights)`."""
  def step(params: Params, tokens_1RT1: jax.Array, weights_1RT: jax.Array):
    return (nll(bind(config, params), tokens_1RT1[0]) * weights_1RT[0]).sum(), weights_1RT.sum()

  return step

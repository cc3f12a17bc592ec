"""What docs/extending.md says suffices to add a part does."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import base
from gpt2_jax.core.bounds import Float
from gpt2_jax.core.errors import UserError
from gpt2_jax.model.cross_entropy import LOSS_TERMS, Term
from gpt2_jax.training import knobs, memory_estimate, run_plan
from gpt2_jax.training.optimizer import OPTIMIZERS, SCHEDULES, Optimizer, moments
from gpt2_jax.training.step import label_nll


def planned(**optim):
  config = base.get_config()
  config.model.update(vocab_size=97, n_positions=16, n_embd=8, n_layer=1, n_head=2)
  config.train.update(global_batch_tokens=4 * 16, steps=2)
  config.optim.warmup_steps = 0
  config.optim.update(optim)
  return run_plan.make_plan(config, devices=jax.devices()[:1])


def trained(**optim) -> tuple[run_plan.Plan, list[dict]]:
  """The plan and the metrics of two steps."""
  made, lines = planned(**optim), []
  batch = np.random.default_rng(0).integers(0, 97, (1, 4, 17)).astype(np.int32)
  with jax.set_mesh(made.mesh):
    step, state = made.compile_train_step(), made.init_state()
    for _ in range(2):
      state, values = step(state, jax.device_put(batch, made.batch_sharding))
      lines.append({key: float(value) for key, value in values.items()})
  return made, lines


def sgd(optim, schedule, width_ratio):
  del optim, width_ratio
  return optax.sgd(schedule)


def test_an_optimizer(monkeypatch):
  with pytest.raises(UserError, match="optim.name = 'sgd' must be one of adamw"):
    planned(name='sgd')
  monkeypatch.setitem(OPTIMIZERS, 'sgd', Optimizer(sgd))
  made, (first, second) = trained(name='sgd', peak_lr=0.1, clip_norm=0.0)
  assert first['train/update_norm'] == pytest.approx(0.1 * first['train/grad_norm'], rel=1e-5)
  assert second['train/loss'] < first['train/loss']
  state = lambda optim: memory_estimate.estimate_parts(made.model, made.mesh, 16, 4, optim)['state']
  # parameters, gradients, accumulated ones, and AdamW's two moments
  assert 3 * state(base.get_config().optim) == 5 * state(made.config.optim)


@pytest.mark.parametrize('name', OPTIMIZERS)
def test_an_optimizer_keeps_as_many_moments_as_are_counted(name):
  made = planned(name=name, schedule='constant')
  sizes = lambda tree: sum(x.size for x in jax.tree.leaves(tree) if x.ndim)
  state = made.abstract_state()
  kept = moments(made.config.optim, made.model) * sizes(state.params)
  assert sizes(state.opt_state) == pytest.approx(kept, rel=0.1)  # which is without padding


def test_a_schedule(monkeypatch):
  halving = lambda optim, rest, last: lambda step: optim.peak_lr * 0.5**step
  monkeypatch.setitem(SCHEDULES, 'halving', halving)
  _, lines = trained(schedule='halving', peak_lr=0.1)
  assert [line['train/learning_rate'] for line in lines] == pytest.approx([0.1, 0.05])


def test_a_loss_term(monkeypatch):
  squared = Term(lambda log_Z, y_t: (log_Z - y_t) ** 2, lambda log_Z, y_t: (0, 0))  # nll², unmoved
  monkeypatch.setitem(LOSS_TERMS, 'squared', squared)
  monkeypatch.setitem(
    knobs.SECTIONS['optim'], 'squared', Float(0, 1)
  )  # as the dict gives it at import
  _, (alone, _) = trained(squared=0.0)
  _, (first, second) = trained(squared=0.5)
  assert first['train/loss'] == pytest.approx(alone['train/loss'], rel=1e-6)
  assert first['train/squared'] == pytest.approx(0.5 * first['train/loss'] ** 2, rel=1e-3)
  assert second['train/loss'] < first['train/loss']
  assert 'train/squared' not in alone


def test_z_loss_pulls_log_z_to_zero():
  _, without = trained(peak_lr=1e-3)
  _, with_it = trained(peak_lr=1e-3, z_loss=1.0)
  assert 'train/z_loss' not in without[0]
  log_Z = np.log(97)  # the logits of a new model are small
  assert with_it[0]['train/z_loss'] == pytest.approx(log_Z**2, rel=1e-2)
  assert with_it[1]['train/z_loss'] < with_it[0]['train/z_loss']
  assert with_it[0]['train/loss'] == pytest.approx(without[0]['train/loss'], rel=1e-5)


def test_a_classifier_has_the_terms_too():
  logits_BK = jnp.asarray(np.random.default_rng(0).normal(size=(5, 3)), jnp.float32)
  labels_B = jnp.asarray([0, 2, 1, 1, 0])
  total, each_B, terms = label_nll(logits_BK, labels_B, None, (('z_loss', 0.3),))
  want = 0.3 * np.mean(np.asarray(jax.nn.logsumexp(logits_BK, -1)) ** 2)
  assert float(terms['z_loss']) == pytest.approx(want, rel=1e-6)
  assert float(total - each_B.mean()) == pytest.approx(want, rel=1e-5)

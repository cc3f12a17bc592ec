"""Schedule-free AdamW (Defazio et al. 2024, arXiv:2405.15682): an average in place of a decay.

Gradients are taken at y, between the iterate z and its average x; x is what is evaluated, sampled
from and exported, and stands where a moving average of the parameters would.
"""

from typing import Any

import jax
import optax

from gpt2_jax.core.errors import UserError
from gpt2_jax.model.config import Config
from gpt2_jax.model.gpt2 import Params
from gpt2_jax.training.optimizers import parts

State = optax.contrib.ScheduleFreeState


def schedule_free(
  optim: Config, schedule: optax.Schedule, width_ratio: float
) -> optax.GradientTransformation:
  """optax's, around AdamW without a first moment; `b1` is the share of x in y. The rate is to be a
  constant one.

  Raises:
    UserError: y would be z.
  """
  if not optim.b1:
    raise UserError('optim.b1 = 0: optim.name = schedule_free needs it between 0 and 1.')
  base = optax.chain(
    optax.scale_by_adam(0.0, optim.b2, optim.eps),
    *([] if width_ratio == 1 else [parts.scale_matrices(1 / width_ratio)]),
    parts.decay(optim, schedule),
    optax.scale_by_learning_rate(schedule),
  )
  rate: Any = lambda count: schedule(count - 1)  # optax counts from 1 here, and from 0 within
  return optax.contrib.schedule_free(base, rate, optim.b1)


def average(opt_state: Any, params: Params) -> Params | None:
  """x, of a state that has `State` within it and the parameters y; None of any other state."""
  is_state = lambda node: isinstance(node, State)
  found = [node for node in jax.tree.leaves(opt_state, is_leaf=is_state) if is_state(node)]
  return optax.contrib.schedule_free_eval_params(found[0], params) if found else None

"""The sample that a run shows at its end."""

from typing import Any

from gpt2_jax import batching, bounds
from gpt2_jax.decoding.generate import generate_tokens
from gpt2_jax.model import Params
from gpt2_jax.sharding import mesh_of, whole_rows
from gpt2_jax.tokenizer import Tokenizer
from gpt2_jax.training.plan import Plan


def _writes(plan: Plan) -> bool:
  """Whether the model can continue a text: none fits into one position with room for more."""
  return plan.model.head == 'lm' and plan.model.n_positions > 1


def check(plan: Plan, tokenizer: Tokenizer) -> None:
  """Checks before a run what would only fail at its end.

  Raises:
    UserError: the prompt does not fit the model.
  """
  if _writes(plan):
    with bounds.errors_of('log.sample_prompt'):
      batching.encode(plan.config.log.sample_prompt, tokenizer, plan.model, room=1)


def draw(plan: Plan, params: Params, tokenizer: Tokenizer) -> str | None:
  """The text that continues the prompt; None where the model is a classifier."""
  if not _writes(plan):
    return None if plan.model.head != 'lm' else ''
  log: Any = plan.config.log
  params = whole_rows(params)
  with mesh_of(params):
    result, = generate_tokens(
        plan.model, params, log.sample_prompt, tokenizer=tokenizer, seed=plan.config.train.seed,
        max_new_tokens=log.sample_tokens, temperature=log.sample_temperature, top_k=log.sample_top_k)
  return result.text

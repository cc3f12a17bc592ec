"""All checks, in the order in which their findings are said."""

from gpt2_jax.diagnosis import data_checks, recipe_checks, record_checks
from gpt2_jax.diagnosis.facts import Facts
from gpt2_jax.diagnosis.findings import Check, Finding

CHECKS: dict[str, Check] = {  # by their names, which are headings of docs/doctor.md
  'vocabulary': recipe_checks.vocabulary,
  'activation': recipe_checks.activation,
  'learning rate': recipe_checks.learning_rate,
  'warm-up': recipe_checks.warm_up,
  'decay': recipe_checks.decay,
  'batch': recipe_checks.batch,
  'optimizer state': recipe_checks.optimizer_state,
  'mesh': recipe_checks.mesh,
  'held-out split': data_checks.held_out,
  'duplicates': data_checks.duplicates,
  'epochs': data_checks.epochs,
  'tail': data_checks.tail,
  'first loss': record_checks.first_loss,
  'curve': record_checks.curve,
  'order': record_checks.order,
  'gradient': record_checks.gradient,
  'loader': record_checks.loader,
  'overfitting': record_checks.overfitting,
  'speed': record_checks.speed,
}


def examine(facts: Facts) -> list[Finding]:
  """Returns what is not as it should be; nothing, where all is."""
  return [Finding(name, said) for name, check in CHECKS.items() for said in check(facts)]


def heading(facts: Facts) -> str:
  """Says in some lines what was looked at, for a reader."""
  mesh = ' '.join(f'{axis}={size}' for axis, size in facts.mesh.items())
  done = f'{len(facts.lines):,} of {facts.steps:,.0f}' if facts.lines else f'{facts.steps:,.0f}'
  lines = [
    f'model    {facts.params:,} parameters, {facts.model.vocab_size:,} ids, {facts.model.dtype}',
    f'batch    {facts.update:,} tokens an update, {done} steps, mesh {mesh} of {facts.device}',
  ]
  if facts.no_store:
    lines.append(f'data     {facts.no_store}')
  return '\n'.join(lines)

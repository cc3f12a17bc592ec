"""A sampling rule is a row of one table: library, command and server have it from there."""

import re
import subprocess
import sys

import numpy as np
import pytest
from support.processes import ROOT, environment
from support.scores import apply, random_history, random_scores

from gpt2_jax.core.bounds import Bool, Int
from gpt2_jax.decoding.samplers import SAMPLERS, Given

NUMBERS = {name: rule for name, rule in SAMPLERS.items() if rule.kind is not None}
PAGE = (ROOT / 'docs' / 'extending.md').read_text()
CLASS, ROW = re.search(r'```text\n(@register.*?)^(\'heat\'.*?)```', PAGE, re.M | re.S).groups()
NEW_RULE = f"""
import jax, jax.numpy as jnp
from jax.typing import ArrayLike
from gpt2_jax.core.bounds import Float
from gpt2_jax.decoding.row_state import History
from gpt2_jax.decoding.pytree import register
from gpt2_jax.decoding.samplers import SAMPLERS, SamplingRule
{CLASS}
SAMPLERS |= {{{ROW}}}
"""
USE_IT = """
import gpt2_jax
from gpt2_jax.cli import inputs, main
from gpt2_jax.model.config import GPTConfig
from gpt2_jax.decoding.options import Options

config = GPTConfig(vocab_size=7, n_positions=16, n_embd=4, n_layer=1, n_head=1)
model = gpt2_jax.bind(config, gpt2_jax.init_params(config, 0))

def tokens(**options):
  options = dict(max_new_tokens=8, eos_token_id=[], temperature=0.01) | options
  return gpt2_jax.generate(model, [[1]], **options)[0].tokens

assert tokens() == tokens(heat=0.0) != tokens(heat=10.0)
made = main.parse(['sample', '--checkpoint', 'x', '--heat', '2.5'])
assert made.options == Options(heat=2.5) == inputs.changed(Options(), 'heat', ['2.5'])
for options, says in [
  (dict(heat=11), 'heat = 11 must lie in [0, 10]'),
  (dict(heat=1, do_sample=False, temperature=1.0), 'heat = 1 would do nothing'),
]:
  try:
    tokens(**options)
    raise AssertionError
  except gpt2_jax.UserError as e:
    assert says in str(e), e
"""


def test_a_new_rule_is_a_class_and_a_row():
  """As docs/extending.md has it: `generate`, the command and a session know it."""
  code = NEW_RULE + USE_IT
  subprocess.run([sys.executable, '-c', code], cwd=ROOT, env=environment(), check=True)


@pytest.mark.parametrize('name', NUMBERS)
def test_a_number_of_each_row_does_what_one_of_all_does(name):
  rule, B, V = NUMBERS[name], 4, 37
  rng = np.random.default_rng(0)
  history, scores_BV = random_history(rng, B, 16, V), random_scores(rng, B, V, forbidden=0.2)
  given = Given(V, np.int32([2]), np.int32([2, 7]))
  numbers = (
    [True] if isinstance(rule.kind, Bool) else [3, 9] if isinstance(rule.kind, Int) else [0.5, 0.9]
  )
  assert rule.number(None) == rule.off and rule.number(rule.default) == rule.off
  rows_B1 = np.array([rule.number(numbers[b % len(numbers)]) for b in range(B)])[:, None]
  have_BV = np.asarray(apply((rule.processor(rows_B1, given),), scores_BV, history))
  for b in range(B):
    want_BV = apply((rule.processor(rows_B1[b, 0], given),), scores_BV, history)
    np.testing.assert_allclose(have_BV[b], np.asarray(want_BV)[b], rtol=1e-6)

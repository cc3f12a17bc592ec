"""Which search some options ask for."""

import numpy as np

from gpt2_jax.config import GPTConfig
from gpt2_jax.decoding.beams import Beams
from gpt2_jax.decoding.contrastive import Contrastive
from gpt2_jax.decoding.loop import Sample, Search
from gpt2_jax.decoding.options import Options
from gpt2_jax.decoding.speculative import make_speculative
from gpt2_jax.decoding.values import AT_LEAST_1, FINITE, Range
from gpt2_jax.errors import UserError, brief
from gpt2_jax.model import Params

ALPHA = Range('lie in [0, 1]', lambda x: 0 <= x <= 1)
NOT_NEGATIVE = Range('be at least 0', lambda x: x >= 0)
FOR_BEAMS = ('length_penalty', 'early_stopping', 'num_beam_groups', 'diversity_penalty')


def make_search(
  config: GPTConfig, options: Options, *, ends: int, assistant: tuple[GPTConfig, Params] | None
) -> tuple[Search, int | None, int]:
  """The search, the rows that it needs for each prompt (None: one a result), and the results.

  Args:
    config: of the model.
    options: what is asked for.
    ends: how many ids end a text.
    assistant: config and parameters of a model that guesses ahead.

  Raises:
    UserError: options that don't go together.
  """
  o = options
  for name in ('max_new_tokens', 'num_return_sequences', 'num_beams', 'num_beam_groups'):
    AT_LEAST_1.check(name, getattr(o, name))
  asked = {
    'num_beams > 1': o.num_beams > 1,
    'penalty_alpha': o.penalty_alpha is not None,
    'prompt_lookup_num_tokens': o.prompt_lookup_num_tokens is not None,
    'assistant_model': assistant is not None,
  }
  searches = [name for name, given in asked.items() if given]
  if len(searches) > 1:
    raise UserError(f'{" and ".join(searches)} are different searches: ask for one of them.')
  idle = [
    f'{name} = {brief(getattr(o, name))}'
    for name in FOR_BEAMS
    if getattr(o, name) != getattr(Options, name)
  ]
  if idle and o.num_beams == 1:
    raise UserError(f'{", ".join(idle)} would do nothing without beams: num_beams > 1.')
  if o.num_beams > 1:
    return _beams(o, ends), o.num_beams, o.num_return_sequences
  if not o.do_sample and o.num_return_sequences > 1:
    raise UserError(
      f'num_return_sequences = {o.num_return_sequences} needs do_sample or '
      'num_beams > 1: greedy decoding has one result.'
    )
  if o.penalty_alpha is not None:
    return _contrastive(config, o), None, 1
  return make_speculative(config, o, assistant) or Sample(), None, o.num_return_sequences


def _beams(o: Options, ends: int) -> Beams:
  if o.num_return_sequences > o.num_beams:
    raise UserError(
      f'num_return_sequences = {o.num_return_sequences} is more than num_beams = {o.num_beams}.'
    )
  if o.context == 'slide':
    raise UserError(
      "context = 'slide' goes on from a row's last half, but beams differ there: "
      "use context = 'stop' with num_beams > 1."
    )
  if not any(o.early_stopping is known for known in (False, True)) and o.early_stopping != 'never':
    raise UserError(f"early_stopping = {brief(o.early_stopping)} must be False, True or 'never'.")
  diversity = NOT_NEGATIVE.check('diversity_penalty', o.diversity_penalty)
  if o.num_beams % o.num_beam_groups:
    raise UserError(
      f'num_beams = {o.num_beams} must be a multiple of num_beam_groups = {o.num_beam_groups}.'
    )
  if (o.num_beam_groups > 1) != (diversity > 0):
    raise UserError(
      f'num_beam_groups = {o.num_beam_groups} and diversity_penalty = '
      f'{o.diversity_penalty}: several groups need a penalty above 0, or they are all '
      'the same, and without groups the penalty does nothing.'
    )
  if o.num_beam_groups > 1 and o.do_sample:
    raise UserError(f'num_beam_groups = {o.num_beam_groups} needs do_sample=False.')
  return Beams(
    FINITE.check('length_penalty', o.length_penalty),
    diversity,
    np.bool_(o.early_stopping is True),
    np.bool_(o.early_stopping == 'never'),
    np.int32(o.num_return_sequences),
    o.num_beams,
    o.num_beam_groups,
    ends,
  )


def _contrastive(config: GPTConfig, o: Options) -> Contrastive:
  if o.do_sample or o.top_k is None:
    raise UserError(
      'penalty_alpha (contrastive search) needs do_sample=False and top_k, the number of candidates.'
    )
  k = min(int(AT_LEAST_1.check('top_k', o.top_k)), config.vocab_size)
  if k > config.n_positions:
    raise UserError(
      f'top_k = {k} candidates are more than the model reads at once: penalty_alpha '
      f'takes at most {config.n_positions} (n_positions).'
    )
  return Contrastive(ALPHA.check('penalty_alpha', o.penalty_alpha), k)

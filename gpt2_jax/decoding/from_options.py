"""From options to a search and to processors, each option checked."""

from collections.abc import Callable, Iterable, Sequence

import numpy as np

from gpt2_jax.core.bounds import AT_LEAST_1, FINITE, FLOAT32, LARGE, Float
from gpt2_jax.core.errors import UserError, brief
from gpt2_jax.decoding.automaton import Automaton
from gpt2_jax.decoding.beams import Beams
from gpt2_jax.decoding.contrastive import Contrastive
from gpt2_jax.decoding.device_loop import Sample, Search
from gpt2_jax.decoding.options import Options
from gpt2_jax.decoding.processors import Processor, id_array
from gpt2_jax.decoding.samplers import SAMPLERS, Given
from gpt2_jax.decoding.speculative import Draft, Lookup, Speculative
from gpt2_jax.model.config import GPTConfig
from gpt2_jax.model.decode_layout import for_decoding
from gpt2_jax.model.gpt2 import Params

FOR_BEAMS = ('length_penalty', 'early_stopping', 'num_beam_groups', 'diversity_penalty')


def make_processors(
  options: Options,
  *,
  V: int,
  eos: Iterable[int] = (),
  ends: Iterable[int] = (),
  guide: Automaton | None = None,
  prefix_allowed_tokens_fn: Callable[[int, np.ndarray], Sequence[int]] | None = None,
  extra: Sequence[Processor] = (),
) -> tuple[Processor, ...]:
  """Returns the processors that options ask for, in the order of `SAMPLERS`.

  Args:
    options: those of `SAMPLERS` are checked, the others aren't.
    V: size of the vocabulary.
    eos: end-of-sequence ids.
    ends: all ids that end a text, those among them.
    guide: what the text must match, the automaton of the option `regex`.
    prefix_allowed_tokens_fn: (index of the prompt, ids so far) -> ids that may follow.
    extra: the user's own, applied before the choice is narrowed.

  Raises:
    UserError: an option is out of range, or would do nothing.
  """
  o = options
  values = vars(o) | dict(
    regex=guide, prefix_allowed_tokens_fn=prefix_allowed_tokens_fn, logits_processor=extra
  )
  idle = [
    f'{name} = {brief(values[name])}'
    for name, rule in SAMPLERS.items()
    if rule.draws and not o.do_sample and values[name] != rule.default
    if name != 'top_k' or o.penalty_alpha is None  # contrastive search has one, too
  ]
  if idle:
    raise UserError(f'{", ".join(idle)} would do nothing: do_sample=False draws no tokens.')
  beams, ends_E = o.num_beams > 1, id_array(ends)
  given = Given(
    V,
    id_array(eos),
    ends_E,
    min_tokens_to_keep=max(int((ends_E < V).sum()), 1) + 1 if beams else 1,
    bos_is_forced=np.bool_(o.forced_bos_token_id is not None),
    beams=beams,
  )
  made = [
    processor
    for name, rule in SAMPLERS.items()
    for processor in rule.processors(name, values[name], given, draws=o.do_sample)
  ]
  if o.min_new_tokens > o.max_new_tokens:
    raise UserError(
      f'min_new_tokens = {o.min_new_tokens} is more than max_new_tokens = {o.max_new_tokens}.'
    )
  return tuple(made)


def make_search(
  config: GPTConfig, options: Options, *, ends: int, assistant: tuple[GPTConfig, Params] | None
) -> tuple[Search, int | None, int]:
  """Returns the search, the rows that it needs for each prompt (None: one a result), and how many
  results a prompt has.

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
  search = Sample() if not searches else _speculative(config, o, assistant)
  return search, None, o.num_return_sequences


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
  not_negative = Float(0, FLOAT32, words='be at least 0')
  diversity = not_negative.check('diversity_penalty', o.diversity_penalty)
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
    length_penalty=np.float32(FINITE.check('length_penalty', o.length_penalty)),
    diversity=np.float32(diversity),
    at_once=np.bool_(o.early_stopping is True),
    patient=np.bool_(o.early_stopping == 'never'),
    returned=np.int32(o.num_return_sequences),
    num_beams=o.num_beams,
    groups=o.num_beam_groups,
    n_eos=ends,
  )


def _contrastive(config: GPTConfig, o: Options) -> Contrastive:
  if o.do_sample or o.top_k is None:
    raise UserError(
      'penalty_alpha (contrastive search) needs do_sample=False and top_k, the number of candidates.'
    )
  k = min(AT_LEAST_1.check('top_k', o.top_k), config.vocab_size)
  if k > config.n_positions:
    raise UserError(
      f'top_k = {k} candidates are more than the model reads at once: penalty_alpha '
      f'takes at most {config.n_positions} (n_positions).'
    )
  return Contrastive(np.float32(Float(0, 1).check('penalty_alpha', o.penalty_alpha)), k)


def _speculative(
  config: GPTConfig, o: Options, assistant: tuple[GPTConfig, Params] | None
) -> Speculative:
  name = 'prompt_lookup_num_tokens' if assistant is None else 'num_assistant_tokens'
  k = AT_LEAST_1.check(name, getattr(o, name))
  if k == Options.num_assistant_tokens and assistant is not None:
    k = max(1, min(k, config.n_positions - 1))  # nobody asked for so many
  if k >= config.n_positions:
    raise UserError(f'{name} = {k} must be less than the context of {config.n_positions}.')
  if assistant is None:
    name = 'max_matching_ngram_size'
    longest = AT_LEAST_1.check(name, getattr(o, name))
    return Speculative(Lookup(np.int32(min(longest, LARGE))), k)
  draft = assistant[0]
  if draft.vocab_size != config.vocab_size:
    raise UserError(
      f'the assistant model has {draft.vocab_size} ids, the model '
      f'{config.vocab_size}: they must have the same vocabulary.'
    )
  if draft.n_positions < config.n_positions:
    raise UserError(
      f'the assistant model has a context of {draft.n_positions} (n_positions), less '
      f"than the model's {config.n_positions}: it could not read as far."
    )
  return Speculative(Draft(*for_decoding(*assistant)), k)

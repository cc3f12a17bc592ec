"""Options to processors, each option checked."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from gpt2_jax.decoding.automaton import Automaton
from gpt2_jax.decoding.options import Options
from gpt2_jax.decoding.prefix import PrefixConstrained
from gpt2_jax.decoding.processors import (
  CountPenalty,
  Custom,
  ExponentialDecay,
  ForcedBOS,
  ForcedEOS,
  Guided,
  InfNanRemove,
  LogitNormalization,
  MinLength,
  NoRepeatNGram,
  Processor,
  RepetitionPenalty,
  SequenceBias,
  SuppressAtBegin,
  SuppressTokens,
  id_array,
)
from gpt2_jax.decoding.values import ABOVE_0, AT_LEAST_0, AT_LEAST_1, FINITE, id_list
from gpt2_jax.decoding.warpers import NEVER, make_warpers
from gpt2_jax.errors import UserError, brief


def _word(name: str, value: Any, V: int) -> tuple[int, ...]:
  ids = tuple(id_list(name, value, V))
  if not ids:
    raise UserError(f'{name} has an empty list of ids.')
  return ids


def _words(value: Any, V: int) -> list[tuple[int, ...]]:
  name = 'bad_words_ids'
  if value is not None and not (
    isinstance(value, Iterable) and all(isinstance(word, Iterable) for word in value)
  ):
    raise UserError(f'{name} = {brief(value)} must be a list of lists of ids.')
  return [_word(name, word, V) for word in (() if value is None else value)]


def _biases(value: Any, V: int) -> dict[tuple[int, ...], float]:
  name, biases = 'sequence_bias', {}
  try:
    listed = value.items() if isinstance(value, Mapping) else () if value is None else value
    pairs = [(ids, bias) for ids, bias in listed]
  except (TypeError, ValueError):
    raise UserError(f'{name} = {brief(value)} must be {{ids: bias}} or [[ids, bias], …].') from None
  for ids, bias in pairs:
    ids = _word(name, ids, V)
    infinite = isinstance(bias, float) and math.isinf(bias)
    biases[ids] = bias if infinite else FINITE.check(f'{name} of {ids}', bias)
  return biases


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
  """The processors that options ask for, in the order of Hugging Face's `generate`.

  Args:
    options: those of processors are checked, the others aren't.
    V: size of the vocabulary.
    eos: end-of-sequence ids.
    ends: all ids that end a text, those among them.
    guide: what the text must match.
    prefix_allowed_tokens_fn: (index of the prompt, ids so far) -> ids that may follow.
    extra: the user's own, applied before the choice is narrowed.

  Raises:
    UserError: an option is out of range, or would do nothing.
  """
  o, eos, ends = options, [int(i) for i in eos], id_array(ends)
  number = lambda name, values: values.check(name, getattr(o, name))
  ids = lambda name: id_list(name, getattr(o, name), V)
  made: list[Processor] = []

  if biases := _biases(o.sequence_bias, V):
    made.append(SequenceBias.of(biases))
  if (repetition := number('repetition_penalty', ABOVE_0)) != 1:
    made.append(RepetitionPenalty(repetition))
  counted = [number(name, FINITE) for name in ('presence_penalty', 'frequency_penalty')]
  if any(counted):
    made.append(CountPenalty(*counted))
  if o.no_repeat_ngram_size is not None:
    made.append(NoRepeatNGram(number('no_repeat_ngram_size', AT_LEAST_1)))
  if words := {word: NEVER for word in _words(o.bad_words_ids, V) if word not in {(i,) for i in eos}}:
    made.append(SequenceBias.of(words))
  lengths = [number(name, AT_LEAST_0) for name in ('min_length', 'min_new_tokens')]
  if o.min_new_tokens > o.max_new_tokens:
    raise UserError(
      f'min_new_tokens = {o.min_new_tokens} is more than max_new_tokens = {o.max_new_tokens}.'
    )
  if any(lengths):
    made.append(MinLength(ends, *lengths))
  if prefix_allowed_tokens_fn is not None:
    made.append(PrefixConstrained.of(prefix_allowed_tokens_fn, beams=o.num_beams > 1))
  if guide is not None:
    made.append(Guided(guide, ends))
  bos, last = ids('forced_bos_token_id'), ids('forced_eos_token_id')
  if bos:
    made.append(ForcedBOS(id_array(bos)))
  if last:
    made.append(ForcedEOS(id_array(last)))
  if o.remove_invalid_values:
    made.append(InfNanRemove())
  if (decay := o.exponential_decay_length_penalty) is not None:
    name = 'exponential_decay_length_penalty'
    if not isinstance(decay, Sequence) or isinstance(decay, str) or len(decay) != 2:
      raise UserError(f'{name} = {brief(decay)} must be (start, factor).')
    if not eos:
      raise UserError(f'{name} needs an id that ends a text: eos_token_id.')
    start, factor = AT_LEAST_0.check(name + '[0]', decay[0]), ABOVE_0.check(name + '[1]', decay[1])
    made.append(ExponentialDecay(id_array(eos), start, factor))
  if never := ids('suppress_tokens'):
    made.append(SuppressTokens(id_array(never)))
  if first := ids('begin_suppress_tokens'):
    made.append(SuppressAtBegin(id_array(first), np.bool_(bool(bos))))
  made += [Custom(processor, type(processor)) for processor in extra]
  made += make_warpers(o, ends=int((ends < V).sum()))
  if o.renormalize_logits:
    made.append(LogitNormalization())
  return tuple(made)

"""The rules that favour, forbid or keep tokens: one table for library, command and server.

`SAMPLERS` has a row for each option, in the order in which they are applied, Hugging Face's. The
fields of `Options`, the flags of `gpt2-jax sample` and what the server takes follow from it: see
docs/extending.md.
"""

import dataclasses
import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from jax.typing import ArrayLike

from gpt2_jax.core.bounds import AT_LEAST_0, AT_LEAST_1, FINITE, LARGE, POSITIVE, Bool, Float, Kind
from gpt2_jax.core.errors import UserError, brief
from gpt2_jax.decoding import constraints
from gpt2_jax.decoding import processors as p
from gpt2_jax.decoding import warpers as w
from gpt2_jax.model.text_batches import id_list


@dataclasses.dataclass(frozen=True)
class Given:
  """What a rule may need beside its own option.

  A field of a processor that has the name of one of these is filled with it.
  """

  V: int  # size of the vocabulary
  eos_E: Any = ()  # end-of-sequence ids
  ends_E: Any = ()  # all ids that end a text
  min_tokens_to_keep: int = 1  # when the choice is narrowed
  bos_is_forced: ArrayLike = np.False_  # whether `forced_bos_token_id` is asked for
  beams: bool = False

  def fill(self, make: Any, *values: Any) -> p.Processor:
    """Returns the processor of a class, whose first fields are some values."""
    names = {field.name for field in dataclasses.fields(make)} & vars(self).keys()
    return make(*values, **{name: getattr(self, name) for name in names})


@dataclasses.dataclass(frozen=True)
class SamplingRule:
  """A row of `SAMPLERS`.

  Attributes:
    make: the class of the processor; a number is its first field, a flag is none.
    kind: the numbers that the option may be, or whether it is a flag; None: it is neither, and the
      same for all rows of a request, so the server has it not.
    off: the number that does nothing.
    default: of the option.
    draws: whether the rule matters only where tokens are drawn.
    of: where `kind` is None, what makes the processors of (`make`, the option's name, its value, what
      is given): none where the value asks for nothing.
    type: of the option; None: it is no field of `Options`, but an argument of its own.
    help: what the option does; default: as the docstring of `make` begins.
  """

  make: Any
  kind: Kind | None = None
  off: float = 0
  default: Any = None
  draws: bool = False
  of: Callable[[Any, str, Any, Given], list[p.Processor]] | None = None
  type: Any = None
  help: str = ''

  def __post_init__(self):
    begin = (inspect.getdoc(self.make) or '').split('\n\n')[0].replace('\n', ' ')
    object.__setattr__(self, 'help', self.help or begin)
    if self.kind is not None:  # a number that has no default may be None
      number: Any = self.off.__class__
      object.__setattr__(self, 'type', number | None if self.default is None else number)

  def number(self, value: Any) -> Any:
    """Returns a number that `kind` has checked as what is traced; None, where not set, as `off`."""
    value = self.off if value is None else value
    if isinstance(value, bool):
      return np.bool_(value)
    return np.int32(min(value, LARGE)) if isinstance(value, int) else np.float32(value)

  def processor(self, value: ArrayLike, given: Given) -> p.Processor:
    """Returns the processor for a number, of all rows, or for numbers [B, 1], one of each row."""
    return given.fill(self.make, *(() if isinstance(self.kind, Bool) else (value,)))

  def processors(self, name: str, value: Any, given: Given, *, draws: bool) -> list[p.Processor]:
    """Returns the processors that an option asks for; `draws`: whether tokens are drawn.

    Raises:
      UserError: names the option, its value and what it may be.
    """
    if self.of is not None:
      return [] if value is None else self.of(self.make, name, value, given)
    assert self.kind is not None
    if value is None and self.default is None:
      return []
    value = self.kind.check(name, value)
    idle = value == self.off or (self.draws and not draws)
    return [] if idle else [self.processor(self.number(value), given)]


def _as_it_is(make: Any, name: str, value: Any, given: Given) -> list[p.Processor]:
  return [given.fill(make, value)]


def _each(make: Any, name: str, value: Any, given: Given) -> list[p.Processor]:
  return [make(processor, type(processor)) for processor in value]


def _of_ids(make: Any, name: str, value: Any, given: Given) -> list[p.Processor]:
  ids = id_list(name, value, given.V)
  return [given.fill(make, p.id_array(ids))] if ids else []


def _word(name: str, value: Any, V: int) -> tuple[int, ...]:
  ids = tuple(id_list(name, value, V))
  if not ids:
    raise UserError(f'{name} has an empty list of ids.')
  return ids


def _bad_words(make: Any, name: str, value: Any, given: Given) -> list[p.Processor]:
  if not (isinstance(value, Iterable) and all(isinstance(word, Iterable) for word in value)):
    raise UserError(f'{name} = {brief(value)} must be a list of lists of ids.')
  words = [_word(name, word, given.V) for word in value]
  ends = {(i,) for i in np.ravel(given.eos_E).tolist()}
  never = {word: w.NEVER for word in words if word not in ends}
  return [make.of(never)] if never else []


def _sequence_bias(make: Any, name: str, value: Any, given: Given) -> list[p.Processor]:
  biases = {}
  try:
    pairs = [(ids, bias) for ids, bias in (value.items() if isinstance(value, Mapping) else value)]
  except (TypeError, ValueError):
    raise UserError(f'{name} = {brief(value)} must be {{ids: bias}} or [[ids, bias], …].') from None
  for ids, bias in pairs:
    ids = _word(name, ids, given.V)
    infinite = isinstance(bias, float) and math.isinf(bias)
    biases[ids] = bias if infinite else FINITE.check(f'{name} of {ids}', bias)
  return [make.of(biases)] if biases else []


def _exponential_decay(make: Any, name: str, value: Any, given: Given) -> list[p.Processor]:
  if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != 2:
    raise UserError(f'{name} = {brief(value)} must be (start, factor).')
  if not (np.asarray(given.eos_E) < given.V).any():
    raise UserError(f'{name} needs an id that ends a text: eos_token_id.')
  start = AT_LEAST_0.check(name + '[0]', value[0])
  factor = POSITIVE.check(name + '[1]', value[1])
  return [given.fill(make, np.int32(min(start, LARGE)), np.float32(factor))]


def _prefix_constrained(make: Any, name: str, value: Any, given: Given) -> list[p.Processor]:
  return [make.of(value, beams=given.beams)]


Ids = Sequence[int]
Biases = Mapping[Any, float] | Sequence[Any]
SHARE = Float(0, 1, open_low=True)
CUTOFF = Float(0, 1, open_low=True, open_high=True)
HEAT = dataclasses.replace(POSITIVE, words='be positive (greedy: do_sample=False)')

SAMPLERS: dict[str, SamplingRule] = {
  'sequence_bias': SamplingRule(p.SequenceBias, of=_sequence_bias, default=(), type=Biases),
  'repetition_penalty': SamplingRule(p.RepetitionPenalty, POSITIVE, 1.0, 1.0),
  'frequency_penalty': SamplingRule(p.FrequencyPenalty, FINITE, 0.0, 0.0),
  'presence_penalty': SamplingRule(p.PresencePenalty, FINITE, 0.0, 0.0),
  'no_repeat_ngram_size': SamplingRule(p.NoRepeatNGram, AT_LEAST_1, 0),
  'bad_words_ids': SamplingRule(
    p.SequenceBias,
    of=_bad_words,
    default=(),
    type=Sequence[Ids],
    help='Lists of ids that never occur.',
  ),
  'min_length': SamplingRule(p.MinLength, AT_LEAST_0, 0, 0),
  'min_new_tokens': SamplingRule(p.MinNewTokens, AT_LEAST_0, 0, 0),
  'prefix_allowed_tokens_fn': SamplingRule(constraints.PrefixConstrained, of=_prefix_constrained),
  'regex': SamplingRule(
    constraints.Guided,
    of=_as_it_is,
    type=str | None,
    help='A regular expression that the new text matches as a whole.',
  ),
  'forced_bos_token_id': SamplingRule(p.ForcedBOS, of=_of_ids, type=int | None),
  'forced_eos_token_id': SamplingRule(p.ForcedEOS, of=_of_ids, type=int | Ids | None),
  'remove_invalid_values': SamplingRule(p.InfNanRemove, Bool(), False, False),
  'exponential_decay_length_penalty': SamplingRule(
    p.ExponentialDecay, of=_exponential_decay, type=tuple[int, float] | None
  ),
  'suppress_tokens': SamplingRule(p.SuppressTokens, of=_of_ids, default=(), type=Ids),
  'begin_suppress_tokens': SamplingRule(p.SuppressAtBegin, of=_of_ids, default=(), type=Ids),
  'logits_processor': SamplingRule(p.Custom, of=_each),
  'temperature': SamplingRule(w.Temperature, HEAT, 1.0, 1.0, draws=True),
  'top_k': SamplingRule(w.TopK, AT_LEAST_1, LARGE, draws=True),
  'top_p': SamplingRule(w.TopP, SHARE, 1.0, draws=True),
  'min_p': SamplingRule(w.MinP, Float(0, 1), 0.0, draws=True),
  'typical_p': SamplingRule(w.Typical, SHARE, 1.0, draws=True),
  'epsilon_cutoff': SamplingRule(w.Epsilon, CUTOFF, 0.0, draws=True),
  'eta_cutoff': SamplingRule(w.Eta, CUTOFF, 0.0, draws=True),
  'renormalize_logits': SamplingRule(p.LogitNormalization, Bool(), False, False),
}

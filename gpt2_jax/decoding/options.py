"""The options of generation. Names and meanings are those of Hugging Face's `generate`, except
`presence_penalty`, `frequency_penalty` and `stop_token_ids` (vLLM's and OpenAI's), `regex`,
`context`, `seed`, `top_logprobs` and `allow_special`.
"""

import dataclasses
import difflib
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from typing_extensions import Doc

from gpt2_jax.core.bounds import AT_LEAST_0, POSITIVE, plain
from gpt2_jax.core.errors import UserError, brief
from gpt2_jax.decoding.samplers import SAMPLERS
from gpt2_jax.model.text_batches import id_list


@dataclasses.dataclass(frozen=True)
class _Length:
  """How much is written, how often, and when it stops."""

  max_new_tokens: int = 128
  """The most new tokens."""
  eos_token_id: int | Sequence[int] | None = None
  """Ids that end a text; default: the model's own, or the tokenizer's."""
  stop_token_ids: Sequence[int] = ()
  """More ids that end a text."""
  stop_strings: str | tuple[str, ...] = ()
  """Texts that end a text, also where they begin or end within a token."""
  max_time: float | None = None
  """Seconds after which no more is written."""
  context: Literal['stop', 'slide'] = 'stop'
  """At the end of the model's context: stop, or go on from its last half, read anew."""
  num_return_sequences: int = 1
  """Continuations of each prompt."""
  do_sample: bool = True
  """Draw from the distribution; if not, take the likeliest token."""
  seed: int = 0
  """The same prompt and seed give the same text. From 0 to 2**64 - 1."""


_Sampling: Any = dataclasses.make_dataclass(
  '_Sampling',
  [
    (name, Annotated[rule.type, Doc(rule.help)], rule.default)
    for name, rule in SAMPLERS.items()
    if rule.type is not None
  ],
  bases=(_Length,),
  frozen=True,
)


@dataclasses.dataclass(frozen=True)
class Options(_Sampling):
  """How to continue a text. An option left at its default does nothing.

  The fields between `seed` and `num_beams` are the options of `SAMPLERS`.
  """

  # searches
  num_beams: int = 1
  """Beam search with so many beams."""
  length_penalty: float = 1.0
  """Beams are ranked by log-probability / length ** length_penalty."""
  early_stopping: bool | Literal['never'] = False
  """Stop at num_beams finished beams; if not, once no better is likely; 'never': once it is sure."""
  num_beam_groups: int = 1
  """Groups of beams that are kept unlike each other."""
  diversity_penalty: float = 0.0
  """Taken from the score of a token for each earlier group that chose it at this step."""
  penalty_alpha: float | None = None
  """Contrastive search over top_k candidates: the weight of being unlike what was said."""
  prompt_lookup_num_tokens: int | None = None
  """Speculative decoding: guess so many tokens from what followed the same n-gram before."""
  max_matching_ngram_size: int = 2
  """The longest n-gram that is looked up."""
  num_assistant_tokens: int = 4
  """Speculative decoding: guesses of the assistant model at a time."""

  # what is returned
  top_logprobs: int = 0
  """Log-probabilities of so many likeliest tokens at each place."""

  # how a prompt is read
  allow_special: bool = False
  """Special tokens count in a prompt, <|endoftext|> for example; if not, they are text as any."""

  def __post_init__(self):
    for name, value in vars(self).items():  # scalars of NumPy's and JAX's
      object.__setattr__(self, name, plain(value))

  @classmethod
  def of(cls, **options: Any) -> 'Options':
    """Options by name.

    Raises:
      UserError: there is no such option; names the likeliest one meant.
    """
    known = [field.name for field in dataclasses.fields(cls)]
    for name in options:
      if name not in known:
        near = difflib.get_close_matches(name, known, 1)
        raise UserError(
          f'there is no option {brief(name)} of generation'
          + (f'; do you mean {near[0]}?' if near else '. See docs/decoding.md.')
        )
    return cls(**options)

  def check_stopping(self, V: int) -> None:
    """Checks what stops a text and what is returned of it; V is the size of the vocabulary.

    Raises:
      UserError: names the option, its value and what it may be.
    """
    AT_LEAST_0.check('top_logprobs', self.top_logprobs)
    if self.top_logprobs > V:
      raise UserError(f'top_logprobs = {self.top_logprobs}: the vocabulary has {V} ids.')
    if self.max_time is not None:
      POSITIVE.check('max_time', self.max_time)
    if not isinstance(self.allow_special, bool):
      raise UserError(f'allow_special = {brief(self.allow_special)} must be True or False.')
    if self.context not in ('stop', 'slide'):
      raise UserError(f"context = {brief(self.context)} must be 'stop' or 'slide'.")
    for name in ('eos_token_id', 'stop_token_ids'):
      id_list(name, getattr(self, name), V)

"""Text in, text out."""

import dataclasses
import functools
import time
import weakref
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gpt2_jax import batching, bounds, seeds, sharding
from gpt2_jax.config import GPTConfig
from gpt2_jax.decoding import automaton
from gpt2_jax.decoding import history as h
from gpt2_jax.decoding.assemble import make_processors
from gpt2_jax.decoding.driver import Job, Row, run
from gpt2_jax.decoding.history import Endings
from gpt2_jax.decoding.loop import Rules
from gpt2_jax.decoding.options import Options
from gpt2_jax.decoding.pieces import Pieces
from gpt2_jax.decoding.processors import Processor
from gpt2_jax.decoding.searches import make_search
from gpt2_jax.errors import UserError
from gpt2_jax.forms import for_decoding
from gpt2_jax.model import Params
from gpt2_jax.pretrained_model import Model, Pretrained, params_of
from gpt2_jax.tokenizer import Tokenizer

_stop_strings, _regex = map(functools.lru_cache(8), (automaton.stop_strings, automaton.regex))
PrefixFunction = Callable[[int, np.ndarray], Sequence[int]]
REASONS = {
  h.END_ID: 'stop',
  h.STOP_STRING: 'stop',
  h.GUIDE: 'stop',
  h.LIMIT: 'length',
  h.CONTEXT: 'context',
}


@dataclasses.dataclass(frozen=True)
class Generated:
  """One continuation.

  Attributes:
    prompt: index of its prompt.
    tokens: the new ids; an id that ended it is not among them, a stop string's are.
    text: their text up to a stop string, None without a tokenizer.
    finish_reason: 'stop' (an id or a string that ends the text came, or the regular expression is
      done), 'length' (`max_new_tokens`), 'context' (the model has no more positions) or 'time'
      (`max_time`).
    logprobs: log-probability of each new id under the model, in nats, before any processor.
    top_logprobs: id -> log-probability of the likeliest ids at each place, if asked for.
    score: of a beam, what it was ranked by.
  """

  prompt: int
  tokens: list[int]
  text: str | None
  finish_reason: str
  logprobs: list[float]
  top_logprobs: list[dict[int, float]] | None = None
  score: float | None = None


class Decoder:
  """One request: its rows, and what they have come to."""

  def __init__(
    self,
    config: GPTConfig,
    params: Params,
    prompts: batching.Texts,
    options: Options,
    *,
    tokenizer: Tokenizer | None = None,
    logits_processor: Sequence[Processor] = (),
    prefix_allowed_tokens_fn: PrefixFunction | None = None,
    assistant: tuple[GPTConfig, Params] | None = None,
  ):
    began = time.monotonic()
    options.check_stopping(config.vocab_size)
    seeds.check('seed', options.seed)
    self.config, self.options, self.tokenizer = config, options, tokenizer
    self.stop_strings = (
      [options.stop_strings] if isinstance(options.stop_strings, str) else list(options.stop_strings)
    )
    eos = options.eos_token_id
    if eos is None:
      eos = () if tokenizer is None else tokenizer.eot
    eos = np.atleast_1d(np.asarray(eos, np.int32))
    self.ends = np.concatenate([eos, np.asarray(options.stop_token_ids, np.int32)])
    stop = guide = None
    V = config.vocab_size
    if tokenizer is None and (self.stop_strings or options.regex is not None):
      raise UserError('stop_strings and regex need a tokenizer: pass tokenizer=.')
    if self.stop_strings:
      stop = _stop_strings(tuple(self.stop_strings), tokenizer, V)
    if options.regex is not None:
      guide = _regex(options.regex, tokenizer, V, frozenset(self.ends.tolist()))
    search, width, results = make_search(config, options, ends=len(self.ends), assistant=assistant)
    made = make_processors(
      options,
      V=V,
      eos=eos,
      ends=self.ends,
      guide=guide,
      extra=tuple(logits_processor),
      prefix_allowed_tokens_fn=prefix_allowed_tokens_fn,
    )
    ids = batching.encode(prompts, tokenizer, config, room=1, allow_special=options.allow_special)
    # what only an empty text matches is done
    done = guide is not None and guide.complete(jnp.zeros(1, jnp.int32))[0]
    reason = h.GUIDE if done else h.RUNNING
    self.rows = [
      Row(i, k, list(prompt), len(prompt), reason)
      for i, prompt in enumerate(ids)
      for k in range(results)
    ]
    self.job = Job(
      *for_decoding(config, params),
      search,
      Rules(made, Endings(jnp.asarray(self.ends), stop, guide)),
      seeds.key(options.seed) if options.do_sample else None,
      min(options.max_new_tokens, bounds.LARGE),
      options.top_logprobs,
      options.context == 'slide',
      None if options.max_time is None else began + options.max_time,
      width,
    )

  def run(self, steps: int | None = None) -> Iterator[None]:
    """Writes; yields after every so many steps."""
    return run(self.job, self.rows, steps)

  def results(self) -> list[Generated]:
    return [self._result(row) for row in self.rows]

  def text(self, row: Row) -> bytes:
    """What a row shows."""
    assert self.tokenizer is not None
    data = self.tokenizer.decode_bytes(self.shown(row))
    if row.reason == h.STOP_STRING:
      data = data[: automaton.cut(data, self.stop_strings)]
    return data

  def shown(self, row: Row) -> list[int]:
    """The ids that are part of the text: all but one that ended it."""
    return row.new[:-1] if row.reason == h.END_ID else row.new

  def _result(self, row: Row) -> Generated:
    tokens = self.shown(row)
    text = self.text(row).decode('utf-8', 'replace') if self.tokenizer else None
    top = row.top[: len(tokens)] if self.options.top_logprobs else None
    reason = 'time' if row.out_of_time else REASONS[row.reason]
    return Generated(row.which, tokens, text, reason, row.logprobs[: len(tokens)], top, row.score)


def generate_tokens(
  config: GPTConfig,
  params: Params,
  prompts: batching.Texts,
  *,
  tokenizer: Tokenizer | None = None,
  logits_processor: Sequence[Processor] = (),
  prefix_allowed_tokens_fn: PrefixFunction | None = None,
  assistant: tuple[GPTConfig, Params] | None = None,
  **options: Any,
) -> list[Generated]:
  """As `generate`, for a config and parameters, on the mesh that is set or on one device."""
  decoder = Decoder(
    config,
    params,
    prompts,
    Options.of(**options),
    tokenizer=tokenizer,
    assistant=assistant,
    logits_processor=logits_processor,
    prefix_allowed_tokens_fn=prefix_allowed_tokens_fn,
  )
  for _ in decoder.run():
    pass
  return decoder.results()


_prepared: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # model -> (its leaves, prepared)


def prepare(model: Model) -> tuple[GPTConfig, Params]:
  """A model's config and parameters in a form to decode with; made once for the same parameters."""
  if model.config.head != 'lm':
    raise UserError(f"this model has a head for {model.config.head}: it can't write. Use classify.")
  params, bare = params_of(model), Pretrained.of(model).model
  leaves = jax.tree.leaves(params)
  known, prepared = _prepared.get(bare, ([], None))
  if len(known) != len(leaves) or any(one is not other for one, other in zip(known, leaves)):
    params = sharding.whole_rows(params)
    with sharding.mesh_of(params):
      prepared = for_decoding(model.config, params)
    _prepared[bare] = leaves, prepared
  assert prepared is not None
  return prepared


def own_ends(model: Pretrained) -> list[int] | None:
  """The ids that end a text by the model's checkpoint; None where it names none."""
  eos = None if model.source is None else model.source.eos_token_id
  if eos is None:
    return None
  # it may name ids that its vocabulary has not
  return [i for i in np.atleast_1d(eos).tolist() if 0 <= i < model.config.vocab_size]


def _decoder(
  model: Model, prompts, tokenizer, assistant_model, inputs: dict, options: dict
) -> Decoder:
  model = Pretrained.of(model)
  if options.get('eos_token_id') is None:
    options = options | {'eos_token_id': own_ends(model)}
  prepared, assistant = prepare(model), None
  if assistant_model is not None:
    own, other = model.tokenizer, Pretrained.of(assistant_model).tokenizer
    if tokenizer is None and own and other and own.sha256 != other.sha256:
      raise UserError(
        'the assistant model has another tokenizer than the model: its guesses would '
        'be of other texts. If the ids are the same all the same, say whose both are: '
        'tokenizer= (--tokenizer).'
      )
    assistant = prepare(assistant_model)
    if len({sharding.devices_of(params) for _, params in (prepared, assistant)}) > 1:
      raise UserError(
        'the assistant model lies on other devices than the model: load both with the same mesh.'
      )
  return Decoder(
    *prepared,
    prompts,
    Options.of(**options),
    assistant=assistant,
    tokenizer=tokenizer or model.tokenizer,
    **inputs,
  )


def generate(
  model: Model,
  prompts: batching.Texts,
  *,
  tokenizer: Tokenizer | None = None,
  assistant_model: Model | None = None,
  logits_processor: Sequence[Processor] = (),
  prefix_allowed_tokens_fn: PrefixFunction | None = None,
  **options: Any,
) -> list[Generated]:
  """Continues a text, texts, or lists of ids.

  The parameters are kept a second time in the form 'decode' as long as the model lives.

  Args:
    model: a model; one from `gpt2_jax.from_pretrained` brings its tokenizer along.
    prompts: a text, texts, ids, or lists of ids. An empty text starts a new document.
    tokenizer: for texts, where the model has none.
    assistant_model: a smaller model with the same vocabulary, to guess ahead (speculative decoding).
    logits_processor: processors of your own, `Processor` says what they are.
    prefix_allowed_tokens_fn: (index of the prompt, ids so far) -> ids that may come next.
    **options: the fields of `Options`, as docs/decoding.md explains them: `max_new_tokens` (128),
      `do_sample` (True; False takes the likeliest token), `temperature`, `top_k`, `top_p`,
      `num_return_sequences`, `num_beams`, `stop_strings`, …; `seed`: the same prompt and seed
      give the same text, alone or in a batch; `allow_special`: special tokens count in a text.

  Returns:
    A list of `Generated`, `num_return_sequences` for each prompt in turn.

  Raises:
    UserError: a prompt fills the context, an id is not in the vocabulary, an option is unknown, out
      of range or does not go with another, or no token can be chosen.
  """
  decoder = _decoder(
    model,
    prompts,
    tokenizer,
    assistant_model,
    dict(logits_processor=logits_processor, prefix_allowed_tokens_fn=prefix_allowed_tokens_fn),
    options,
  )
  with sharding.mesh_of(decoder.job.params):
    for _ in decoder.run():
      pass
  return decoder.results()


def stream(
  model: Model,
  prompt: str | Sequence[int],
  *,
  tokenizer: Tokenizer | None = None,
  assistant_model: Model | None = None,
  logits_processor: Sequence[Processor] = (),
  prefix_allowed_tokens_fn: PrefixFunction | None = None,
  **options: Any,
) -> Generator[str, None, Generated]:
  """Continues one text, and yields it piece by piece as it is written.

  The pieces joined are the text of `generate`. Each is valid Unicode: a character is shown when its
  last byte has come, and nothing is shown that may turn out to be part of a stop string.

  Args: as in `generate`, for one prompt with one result.

  Returns:
    The `Generated`, as the generator's value (`result = yield from stream(…)`).

  Raises:
    UserError: as in `generate`; or there is more than one text, no tokenizer, or beam search, whose
      text is not known before its end.
  """
  decoder = _decoder(
    model,
    prompt,
    tokenizer,
    assistant_model,
    dict(logits_processor=logits_processor, prefix_allowed_tokens_fn=prefix_allowed_tokens_fn),
    options,
  )
  if len(decoder.rows) != 1 or decoder.options.num_beams > 1 or decoder.tokenizer is None:
    raise UserError(
      'stream writes one text as it is made: it takes one prompt, '
      'num_return_sequences = 1, num_beams = 1, and a tokenizer.'
    )
  return _pieces(decoder)


def _pieces(decoder: Decoder) -> Generator[str, None, Generated]:
  [row], pushed = decoder.rows, 0
  assert decoder.tokenizer is not None
  pieces = Pieces(decoder.tokenizer, decoder.stop_strings)
  steps, going = decoder.run(steps=1), True
  while going:
    with sharding.mesh_of(decoder.job.params):  # not while the caller has its turn
      going = next(steps, steps) is None
    tokens = decoder.shown(row)
    for token in tokens[pushed:]:
      pieces.push(token)
    pushed = len(tokens)
    if piece := pieces.take(final=not going):
      yield piece
  return decoder.results()[0]

"""A request for texts, and the decoder that writes them."""

import dataclasses
import functools
import html
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from gpt2_jax.core import bounds, seeds
from gpt2_jax.core.errors import UserError, brief
from gpt2_jax.decoding import automaton
from gpt2_jax.decoding import row_state as h
from gpt2_jax.decoding.device_loop import Rules
from gpt2_jax.decoding.edited import placed
from gpt2_jax.decoding.from_options import make_processors, make_search
from gpt2_jax.decoding.host_loop import Job, Row, run
from gpt2_jax.decoding.options import Options
from gpt2_jax.decoding.processors import Processor
from gpt2_jax.decoding.row_state import Endings
from gpt2_jax.model import text_batches
from gpt2_jax.model.config import GPTConfig
from gpt2_jax.model.decode_layout import for_decoding
from gpt2_jax.model.gpt2 import Params
from gpt2_jax.tokenizer.bpe import Tokenizer

_stop_strings, _regex = map(functools.lru_cache(8), (automaton.stop_strings, automaton.regex))
PrefixFunction = Callable[[int, np.ndarray], Sequence[int]]


@dataclasses.dataclass(frozen=True, repr=False)
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
    pieces: the text of each new id, with � for a part of a character; None without a tokenizer.
  """

  prompt: int
  tokens: list[int]
  text: str | None
  finish_reason: str
  logprobs: list[float]
  top_logprobs: list[dict[int, float]] | None = None
  score: float | None = None
  pieces: list[str] | None = None

  def __repr__(self) -> str:
    what = f'{len(self.tokens)} tokens' if self.text is None else brief(self.text)
    mean = f', mean logprob {np.mean(self.logprobs):.2f}' if self.logprobs else ''
    return f'Generated({what}, finish_reason={self.finish_reason!r}{mean})'

  def _repr_html_(self) -> str:
    """The text, each token the darker the likelier the model found it; its probability in a hint."""
    pieces = self.pieces or [f'{token} ' for token in self.tokens]
    shaded = ''.join(
      f'<span style="background: rgba(31, 119, 180, {0.6 * p:.2f})" title="{p:.1%}">'
      f'{html.escape(piece)}</span>'
      for piece, p in zip(pieces, np.exp(self.logprobs))
    )
    return f'<div style="white-space: pre-wrap; font-family: monospace">{shaded}</div>'


@dataclasses.dataclass(frozen=True)
class TextRequest:
  """Which texts are to be continued, by which model, and how."""

  config: GPTConfig
  params: Params  # best in the form 'decode'
  prompts: text_batches.Texts
  options: Options = Options()
  tokenizer: Tokenizer | None = None  # for texts, of prompts and of results
  logits_processor: Sequence[Processor] = ()  # the user's own
  prefix_allowed_tokens_fn: PrefixFunction | None = None
  assistant: tuple[GPTConfig, Params] | None = None  # a model that guesses ahead
  edits: Any = ()  # an `Edit`, or a tree of them

  @classmethod
  def of(cls, config: GPTConfig, params: Params, prompts: text_batches.Texts, **asked: Any):
    """Returns a request; what is `asked` by other names than its fields' are options."""
    own = {name: asked.pop(name) for name in cls.__dataclass_fields__ if name in asked}
    return cls(config, params, prompts, Options.of(**asked), **own)

  @property
  def stop_strings(self) -> list[str]:
    strings = self.options.stop_strings
    return [strings] if isinstance(strings, str) else list(strings)

  @property
  def eos(self) -> np.ndarray:
    """The end-of-sequence ids: those of the options, or the tokenizer's."""
    eos = self.options.eos_token_id
    if eos is None:
      eos = () if self.tokenizer is None else self.tokenizer.eot
    return np.atleast_1d(np.asarray(eos, np.int32))

  @property
  def ends(self) -> np.ndarray:
    """All ids that end a text."""
    return np.concatenate([self.eos, np.asarray(self.options.stop_token_ids, np.int32)])

  def check(self) -> None:
    """Checks what `make_search` and `make_processors` don't.

    Raises:
      UserError: names the option that can't be.
    """
    self.options.check_stopping(self.config.vocab_size)
    seeds.check('seed', self.options.seed)
    if self.tokenizer is None and (self.stop_strings or self.options.regex is not None):
      raise UserError('stop_strings and regex need a tokenizer: pass tokenizer=.')

  def endings(self) -> Endings:
    """Returns what ends a text: ids, stop strings, a regular expression."""
    V, regex, ends = self.config.vocab_size, self.options.regex, self.ends
    stop = guide = None
    if self.stop_strings:
      stop = _stop_strings(tuple(self.stop_strings), self.tokenizer, V)
    if regex is not None:
      guide = _regex(regex, self.tokenizer, V, frozenset(ends.tolist()))
    return Endings(jnp.asarray(ends), stop, guide)

  def rows(self, results: int, guide: automaton.Automaton | None) -> list[Row]:
    """Returns the rows that are to be written, so many for each prompt in turn."""
    ids = text_batches.encode(
      self.prompts, self.tokenizer, self.config, leave=1, allow_special=self.options.allow_special
    )
    # what only an empty text matches is done
    done = guide is not None and guide.complete(jnp.zeros(1, jnp.int32))[0]
    return [
      Row(i, k, list(prompt), len(prompt), h.GUIDE if done else h.RUNNING)
      for i, prompt in enumerate(ids)
      for k in range(results)
    ]


class Decoder:
  """A request at work: its rows, and what they have come to."""

  def __init__(self, request: TextRequest, job: Job, rows: list[Row]):
    self.request, self.job, self.rows = request, job, rows

  @classmethod
  def of(cls, request: TextRequest) -> 'Decoder':
    """Returns what is ready to write.

    Raises:
      UserError: names a prompt that can't be used, or an option that can't be.
    """
    began, options = time.monotonic(), request.options
    request.check()
    endings, ends = request.endings(), request.ends
    search, width, results = make_search(
      request.config, options, ends=len(ends), assistant=request.assistant
    )
    processors = make_processors(
      options,
      V=request.config.vocab_size,
      eos=request.eos,
      ends=ends,
      guide=endings.guide,
      extra=request.logits_processor,
      prefix_allowed_tokens_fn=request.prefix_allowed_tokens_fn,
    )
    rows = request.rows(results, endings.guide)
    config, params = for_decoding(request.config, request.params)
    longest = max(len(row.ids) for row in rows) + options.max_new_tokens
    edits = placed(request.edits, config, reach=longest - 1)  # the last one is not read
    job = Job(
      config=config,
      params=params,
      search=search,
      rules=Rules(processors, endings),
      key=seeds.key(options.seed) if options.do_sample else None,
      max_new_tokens=min(options.max_new_tokens, bounds.LARGE),
      top_logprobs=options.top_logprobs,
      slide=options.context == 'slide',
      deadline=None if options.max_time is None else began + options.max_time,
      width=width,
      edits=edits,
    )
    return cls(request, job, rows)

  def run(self, steps: int | None = None) -> Iterator[None]:
    """Writes; yields after every so many steps."""
    return run(self.job, self.rows, steps)

  def finish(self) -> list[Generated]:
    """Returns the results when all is written."""
    for _ in self.run():
      pass
    return self.results()

  def results(self) -> list[Generated]:
    """Returns what has been written so far, a result a row."""
    return [self._result(row) for row in self.rows]

  def text(self, row: Row) -> bytes:
    """Returns the text of a row up to a stop string."""
    assert self.request.tokenizer is not None
    data = self.request.tokenizer.decode_bytes(self.shown(row))
    if row.reason == h.STOP_STRING:
      data = data[: automaton.cut(data, self.request.stop_strings)]
    return data

  def shown(self, row: Row) -> list[int]:
    """Returns the ids that are part of the text: all but one that ended it."""
    return row.new[:-1] if row.reason == h.END_ID else row.new

  def _result(self, row: Row) -> Generated:
    tokens, known = self.shown(row), self.request.tokenizer
    return Generated(
      prompt=row.which,
      tokens=tokens,
      text=None if known is None else self.text(row).decode('utf-8', 'replace'),
      finish_reason='time' if row.out_of_time else h.REASONS[row.reason],
      logprobs=row.logprobs[: len(tokens)],
      top_logprobs=row.top[: len(tokens)] if self.request.options.top_logprobs else None,
      score=row.score,
      pieces=None if known is None else [known.decode([token]) for token in tokens],
    )

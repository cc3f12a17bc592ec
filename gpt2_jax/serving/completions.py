"""A request for completions to rows of the engine, and what has been written to OpenAI's objects."""

import dataclasses
import secrets
import time
from collections.abc import AsyncIterator
from typing import Any

import numpy as np

from gpt2_jax.core import seeds
from gpt2_jax.core.errors import UserError, brief
from gpt2_jax.decoding.text_stream import Pieces
from gpt2_jax.model import text_batches
from gpt2_jax.serving.engine import Engine
from gpt2_jax.serving.requests import Closing, Failed, Full, Prompt, Row, Scored, Ticket
from gpt2_jax.serving.schemas import ApiError, Completion, Json, Limits, busy, stopping
from gpt2_jax.serving.slot_state import RULES, choice_of

TOKENS = 16  # of a text whose request says nothing of it
# What OpenAI's API may set to 0, and the library to a little more. (Temperature 0 is greedy.)
LEAST = {'temperature': float(np.finfo(np.float32).tiny), 'top_p': 1e-6}


def error_of(why: Failed) -> ApiError:
  """The answer to a text that could not be written."""
  status = 504 if why.kind == 'timeout' else 500
  return ApiError(status, f'{str(why).rstrip(".")}.', code=why.kind)


def encode(
  engine: Engine, texts: Any, param: str = 'prompt', *, allow_special: bool = False
) -> list[list[int]]:
  """Ids of texts, of any length. Raises: ApiError: they can't be used."""
  # OpenAI's API has an error of its own for a context that is too long
  unbounded = dataclasses.replace(engine.model.config, n_positions=1 << 30)
  try:
    return text_batches.encode(
      texts or '', engine.model.tokenizer, unbounded, allow_special=allow_special
    )
  except UserError as e:
    raise ApiError(400, str(e), param=param) from None


class Answer:
  """One request for completions.

  Raises, when it is made:
    ApiError: names what can't be honoured.
  """

  def __init__(self, engine: Engine, asked: Completion, limits: Limits):
    self.engine, self.asked = engine, asked
    self.id, self.created = f'cmpl-{secrets.token_hex(12)}', int(time.time())
    self.n = asked.n or 1
    self.best_of = asked.best_of or self.n
    self.scored = asked.logprobs is not None
    self._check_fields()
    tokenizer = engine.model.tokenizer
    self.prompts = encode(engine, asked.prompt, allow_special=bool(asked.allow_special))
    self.note = self._special_note()
    left = engine.model.config.n_positions - max(map(len, self.prompts))
    # where nothing is left, one is asked for all the same, and refused
    self.most = max(1, min(TOKENS, left)) if asked.max_tokens is None else asked.max_tokens
    self._check_lengths(limits)
    try:
      self.rows = self._rows()
      self.echoes = [tokenizer.decode(ids) if asked.echo else '' for ids in self.prompts]
    except UserError as e:
      raise ApiError(400, str(e), param='prompt') from None

  def _special_note(self) -> str | None:
    """Returns what is to be said of special tokens in the prompts that are read as text."""
    a = self.asked
    texts = [a.prompt] if isinstance(a.prompt, str) else a.prompt or []
    notes = (
      text_batches.special_note(self.engine.model.tokenizer, text)
      for text in texts
      if isinstance(text, str) and not a.allow_special
    )
    return next(filter(None, notes), None)

  def _rows(self) -> list[Row]:
    """Returns the rows of all prompts, `best_of` of each."""
    a, tokenizer = self.asked, self.engine.model.tokenizer
    # OpenAI's seeds are signed: a negative one counts from 2**64 down
    seed = secrets.randbits(31) if a.seed is None else a.seed % seeds.LIMIT
    numbers = {name: getattr(a, name) for name in RULES}
    for name, least in LEAST.items():
      if numbers[name] is not None:
        numbers[name] = max(numbers[name], least)
    choice = choice_of(
      self.engine.model.config.vocab_size,
      numbers,
      greedy=a.temperature == 0,
      bias=a.logit_bias,
      logprobs=self.scored or self.best_of > self.n,
    )
    prompts = [Prompt(ids, self.best_of, scored=self.scored and bool(a.echo)) for ids in self.prompts]
    return [
      Row(prompt, self.most, seed, k, choice, Pieces(tokenizer, a.stop or ()), i * self.best_of + k)
      for i, prompt in enumerate(prompts)
      for k in range(self.best_of)
    ]

  def _check_fields(self) -> None:
    a, V = self.asked, self.engine.model.config.vocab_size
    if self.best_of < self.n:
      raise ApiError(400, f'best_of = {a.best_of} must be at least n = {self.n}.', param='best_of')
    if a.stream and self.best_of > self.n:
      raise ApiError(
        400, "What is the best of best_of is known at the end: it can't be streamed.", param='best_of'
      )
    if a.stream_options is not None and a.stream_options.include_usage and not a.stream:
      raise ApiError(400, 'stream_options needs stream = true.', param='stream_options')
    if bad := [token for token in a.logit_bias or () if not 0 <= token < V]:
      raise ApiError(
        400,
        f'logit_bias has token id {brief(bad[0])}, but the vocabulary has {V} ids.',
        param='logit_bias',
      )

  def _check_lengths(self, limits: Limits) -> None:
    n_positions, texts = self.engine.model.config.n_positions, len(self.prompts) * self.best_of
    if texts > limits.texts:
      raise ApiError(
        400,
        f'{len(self.prompts)} prompts times best_of = {self.best_of} are {texts} '
        f'texts; a request may ask for {limits.texts}.',
        param='prompt',
      )
    longest = max(map(len, self.prompts))
    if longest + self.most > n_positions:
      raise ApiError(
        400,
        f"This model's maximum context length is {n_positions} tokens, however you requested "
        f'{brief(longest + self.most)} tokens ({longest} in your prompt; {brief(self.most)} for '
        'the completion). Please reduce your prompt; or completion length.',
        param='prompt' if longest >= n_positions else 'max_tokens',
        code='context_length_exceeded',
      )
    if limits.prompt_tokens is not None and longest > limits.prompt_tokens:
      raise ApiError(
        400,
        f'The prompt has {longest} tokens; this server takes {limits.prompt_tokens}.',
        param='prompt',
        code='context_length_exceeded',
      )
    name = 'min_new_tokens'
    if (least := getattr(self.asked, name) or 0) > self.most:
      raise ApiError(
        400, f'{name} = {brief(least)} is more than max_tokens = {brief(self.most)}.', param=name
      )
    if limits.new_tokens is not None and self.most > limits.new_tokens:
      raise ApiError(
        400,
        f'max_tokens = {brief(self.most)}: this server writes at most {limits.new_tokens}.',
        param='max_tokens',
      )

  def submit(self, seconds: float) -> Ticket:
    """Asks the engine. Raises: ApiError: it is too busy, or being stopped."""
    try:
      return self.engine.queue.submit(self.rows, stream=bool(self.asked.stream), timeout=seconds)
    except Full:
      raise busy() from None
    except Closing:
      raise stopping() from None

  async def whole(self, ticket: Ticket) -> Json:
    """All at once. Raises: ApiError."""
    texts = [''] * len(self.rows)
    try:
      async for event in ticket.events():
        texts[event.row.index] += event.text
    except Failed as why:
      raise error_of(why) from None
    choices = []
    for i in range(len(self.prompts)):
      rows = self.rows[i * self.best_of : (i + 1) * self.best_of]
      if self.best_of > self.n:
        rows = sorted(rows, key=_likelihood, reverse=True)
      for row in rows[: self.n]:
        found = None
        if self.scored:
          tokens = Logprobs(self, row)
          found = tokens.echo() if self.asked.echo else None
          found = _joined(found, tokens.more(row.new, row.pieces.shown))
        choices.append(
          self._choice(len(choices), self.echoes[i] + texts[row.index], found, row.reason)
        )
    return Json(self._object(choices) | {'usage': self._usage()})

  async def stream(self, ticket: Ticket) -> AsyncIterator[dict[str, Any]]:
    """Piece by piece; an error is the last one."""
    usage = bool(self.asked.stream_options and self.asked.stream_options.include_usage)
    more = {'usage': None} if usage else {}
    logprobs = [Logprobs(self, row) for row in self.rows]
    begun = [False] * len(self.rows)
    try:
      async for event in ticket.events():
        i, found, echo = event.row.index, None, ''
        if self.asked.echo and not begun[i]:
          echo = self.echoes[i // self.best_of]
          found = logprobs[i].echo() if self.scored else None
        begun[i] = True
        if self.scored:
          found = _joined(
            found,
            logprobs[i].more(event.row.new[: event.tokens], event.shown, final=bool(event.reason)),
          )
        yield self._object([self._choice(i, echo + event.text, found, event.reason or None)]) | more
    except Failed as why:
      yield error_of(why).body()
      return
    if usage:
      yield self._object([]) | {'usage': self._usage()}

  def _object(self, choices: list) -> dict[str, Any]:
    """Of OpenAI's fields; the first one has a note, too, if there is something to be said."""
    note, self.note = self.note, None
    return {
      'id': self.id,
      'object': 'text_completion',
      'created': self.created,
      'model': self.engine.name,
      'choices': choices,
    } | ({'note': note} if note else {})

  def _choice(self, index: int, text: str, logprobs, reason: str | None) -> dict[str, Any]:
    return {'text': text, 'index': index, 'logprobs': logprobs, 'finish_reason': reason}

  def _usage(self) -> dict[str, int]:
    prompt, new = sum(map(len, self.prompts)), sum(len(row.new) for row in self.rows)
    return {'prompt_tokens': prompt, 'completion_tokens': new, 'total_tokens': prompt + new}


def _likelihood(row: Row) -> float:
  """Log-probability per token."""
  return sum(scored.logprob or 0.0 for scored in row.new) / max(len(row.new), 1)


def _joined(a: dict[str, list] | None, b: dict[str, list]) -> dict[str, list]:
  return b if a is None else {name: a[name] + b[name] for name in b}


class Logprobs:
  """The `logprobs` objects of one row, for the tokens of one piece after another."""

  def __init__(self, answer: Answer, row: Row):
    self.row, self.tokenizer = row, answer.engine.model.tokenizer
    self.count = answer.asked.logprobs or 0
    self.taken = self.offset = 0  # new tokens that were told of, and their bytes
    self.chars, self._text = 0, Pieces(self.tokenizer)  # of the text before the next token

  def echo(self) -> dict[str, list]:
    """Of the prompt."""
    prompt = self.row.prompt
    found = self._table(prompt.told or [Scored(prompt.ids[0], None, None)] if prompt.scored else [])
    self.chars, self._text = len(self.tokenizer.decode(prompt.ids)), Pieces(self.tokenizer)
    return found

  def more(self, new: list[Scored], shown: int, *, final: bool = True) -> dict[str, list]:
    """Of the new tokens that begin within the text's first `shown` bytes, and were not told of."""
    first, all_of_them = self.taken, final and not self.row.pieces.stopped
    while self.taken < len(new) and (self.offset < shown or all_of_them):
      self.offset += len(self.tokenizer.token_bytes[new[self.taken].token])
      self.taken += 1
    return self._table(new[first : self.taken])

  def _table(self, scored: list[Scored]) -> dict[str, list]:
    offsets = []
    for each in scored:
      offsets.append(self.chars)
      self._text.push(each.token)
      self.chars += len(self._text.take())
    return {
      'tokens': [self._name(each.token) for each in scored],
      'token_logprobs': [each.logprob for each in scored],
      'top_logprobs': [self._top(each) for each in scored],
      'text_offset': offsets,
      'token_ids': [each.token for each in scored],
    }

  def _top(self, scored: Scored) -> dict[str, float] | None:
    """The likeliest tokens, and the one that stands there."""
    if scored.top is None or scored.logprob is None:
      return None
    best = dict(list(scored.top.items())[: self.count]) | {scored.token: scored.logprob}
    return {self._name(token): logprob for token, logprob in best.items()}

  def _name(self, token: int) -> str:
    """A token's text; where its bytes are none, as OpenAI's API writes it."""
    data = self.tokenizer.token_bytes.get(token, b'')  # the model may have ids that it has not
    try:
      return data.decode()
    except UnicodeDecodeError:
      return 'bytes:' + ''.join(f'\\x{byte:02x}' for byte in data)

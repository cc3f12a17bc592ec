"""The loop on the host: makes compiled requests of rows, and writes what they found into the rows.

A text beyond the model's context is written in several windows, each a request of its own.
"""

import dataclasses
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from gpt2_jax.core.errors import UserError
from gpt2_jax.decoding import row_state as h
from gpt2_jax.decoding.automaton import Automaton, walk
from gpt2_jax.decoding.constraints import PrefixConstrained
from gpt2_jax.decoding.device_loop import Request, Rules, Search, advance, start
from gpt2_jax.decoding.row_state import History
from gpt2_jax.model import text_batches
from gpt2_jax.model.config import GPTConfig
from gpt2_jax.model.edits import Placed
from gpt2_jax.model.gpt2 import Params

STEPS = 8  # between two looks at the clock, where there is a time budget

REFUSED = {
  h.NOT_A_NUMBER: 'the logits are NaN: the weights or the dtype are at fault '
  '(remove_invalid_values goes on all the same).',
  h.NO_TOKEN: 'the options forbid every token, or leave fewer texts than num_return_sequences.',
}


@dataclasses.dataclass
class Row:
  """A text that is being continued."""

  which: int  # of the prompts
  sample: int  # of that prompt
  ids: list[int]  # the prompt's and the new ones
  prompt: int  # how many are the prompt's
  reason: int = h.RUNNING
  out_of_time: bool = False
  logprobs: list[float] = dataclasses.field(default_factory=list)  # of the new ids
  top: list[dict[int, float]] = dataclasses.field(default_factory=list)
  score: float | None = None

  @property
  def new(self) -> list[int]:
    return self.ids[self.prompt :]


@dataclasses.dataclass(frozen=True)
class Job:
  """A request without its rows: the model, and how tokens are chosen."""

  config: GPTConfig
  params: Params
  search: Search
  rules: Rules
  key: jax.Array | None
  max_new_tokens: int
  top_logprobs: int = 0
  slide: bool = False  # go on beyond the context
  deadline: float | None = None  # by time.monotonic
  width: int | None = None  # rows that the search needs for each prompt; None: one a result
  edits: tuple[Placed, ...] = ()  # of the model's activations


def group(rows: Sequence[Row], *, whole: bool) -> list[list[Row]]:
  """Returns rows in groups that share the reading of their prompt: all rows of a prompt if
  `whole`, or as many as keep all devices busy.
  """
  prompts = [[row for row in rows if row.which == which] for which in range(rows[-1].which + 1)]
  if whole:
    return prompts
  R, split = len(prompts[0]), text_batches.split()
  filled = lambda parts: -(-len(prompts) * parts // split) * split * (R // parts)
  parts = min((n for n in range(1, R + 1) if R % n == 0), key=filled)
  return [group[i::parts] for group in prompts for i in range(parts)]


def request_of(
  job: Job, groups: Sequence[Sequence[Row]], windows: Sequence[Sequence[int]]
) -> tuple[Request, int]:
  """Returns the request for groups of rows, each with the ids that the model reads first, and the
  most new tokens, rounded up.
  """
  c = job.config
  groups = [list(group) for group in groups]
  idle = lambda row: dataclasses.replace(row, reason=h.LIMIT)  # fills the devices, writes nothing
  if job.width is not None:
    groups = [[group[0]] * job.width for group in groups]
  more = -len(groups) % text_batches.split()
  groups += [[idle(row) for row in groups[0]]] * more
  prompts_AP, windows_A = text_batches.pad([*windows, *[windows[0]] * more], c.n_positions)

  rows = [row for group in groups for row in group]
  window_of = [int(n) for n, group in zip(windows_A, groups) for _ in group]
  longest = max(len(row.ids) for row in rows)
  most = max(
    min(job.max_new_tokens - len(row.new), c.n_positions - n) for row, n in zip(rows, window_of)
  )
  N = text_batches.bucket(most, c.n_positions)
  tokens_BS = np.zeros((len(rows), text_batches.bucket(longest, 1 << 30) + N), np.int32)
  for row, tokens_S in zip(rows, tokens_BS):
    tokens_S[: len(row.ids)] = row.ids
  ints = lambda values: text_batches.place(np.array(list(values), np.int32))

  def state(automaton: Automaton | None) -> jax.Array:
    return ints(0 if automaton is None else walk(automaton, 0, row.new) for row in rows)

  history = History(
    tokens_BS=text_batches.place(tokens_BS),
    lengths_B=ints(len(row.ids) for row in rows),
    prompt_B=ints(row.prompt for row in rows),
    limits_B=ints(job.max_new_tokens for _ in rows),
    context_B=ints(len(row.ids) + c.n_positions - n for row, n in zip(rows, window_of)),
    which_B=ints(row.which for row in rows),
    stop_B=state(job.rules.endings.stop),
    guide_B=state(job.rules.endings.guide),
    reason_B=ints(row.reason for row in rows),
  )
  request = Request(
    text_batches.place(prompts_AP),
    text_batches.place(windows_A),
    history,
    ints(row.sample for row in rows),
    job.key,
    job.rules,
    job.edits,
  )
  return request, N


def _update(job: Job, state: Any, groups: Sequence[Sequence[Row]], A: int) -> None:
  """Writes what a search has found into the rows.

  Raises:
    UserError: no token can be chosen.
  """
  history, record, scores_B = text_batches.fetch(job.search.results(state))
  each = len(history.lengths_B) // A
  for a, group in enumerate(groups):
    for r, row in enumerate(group, start=a * each):
      old, length = len(row.ids), int(history.lengths_B[r])
      row.ids, row.reason = history.tokens_BS[r, :length].tolist(), int(history.reason_B[r])
      if row.reason in REFUSED:
        for processor in job.rules.processors:
          if isinstance(processor, PrefixConstrained) and processor.error is not None:
            raise processor.error
        raise UserError(f'prompt {row.which}, position {length}: {REFUSED[row.reason]}')
      if job.width is not None:  # another beam may have come to the front
        row.logprobs, row.top, old = [], [], row.prompt
      row.logprobs += record.logprobs_BS[r, old:length].tolist()
      row.top += [
        dict(zip(*map(np.ndarray.tolist, best)))
        for best in zip(record.top_ids_BSK[r, old:length], record.top_logprobs_BSK[r, old:length])
      ]
      row.score = None if scores_B is None else float(scores_B[r])


def run(job: Job, rows: Sequence[Row], steps: int | None = None) -> Iterator[None]:
  """Continues rows, in place, until they have stopped. Yields after every so many steps.

  Raises:
    UserError: no token can be chosen.
  """
  c = job.config
  if job.deadline is not None:
    steps = min(steps or STEPS, STEPS)
  groups = group(rows, whole=job.width is not None)
  windows = [row.ids for row, *_ in groups]
  while groups:
    request, N = request_of(job, groups, windows)
    A, until = request.windows_A.shape[0], 1
    state, running = start(c, job.params, job.search, request, N=N, K=job.top_logprobs)
    while True:
      _update(job, state, groups, A)
      yield
      if not running:
        break
      if job.deadline is not None and time.monotonic() > job.deadline:
        for row in rows:
          row.out_of_time = row.reason in (h.RUNNING, h.CONTEXT)
        return
      until += steps or N
      state, running = advance(c, job.params, job.search, request, state, until)
    groups = [[row] for row in rows if job.slide and row.reason == h.CONTEXT]
    windows = [row.ids[-(c.n_positions // 2) :] for [row] in groups]
    for [row] in groups:
      row.reason = h.RUNNING

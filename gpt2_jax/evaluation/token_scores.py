"""Scores how likely a model finds tokens: the one place where evaluation runs a model.

    scored = score(model, [Request(context=[50256], target=[15496, 995])])

A request's result is bitwise the same whatever else is asked: its program and the rows of its batch
follow from its own lengths, the model and the devices.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gpt2_jax.core.errors import UserError
from gpt2_jax.core.progress import track
from gpt2_jax.evaluation.score_cache import Kept
from gpt2_jax.model import text_batches
from gpt2_jax.model.config import GPTConfig
from gpt2_jax.model.gpt2 import Params, bind
from gpt2_jax.model.pretrained_model import Model, params_of
from gpt2_jax.parallel import sharding

BATCH_TOKENS = {'cpu': 2048, 'gpu': 16384, 'tpu': 16384}  # on a device at a time
LOGITS = {'cpu': 2**23, 'gpu': 2**26, 'tpu': 2**26}  # floats on a device at a time
FEW = (8, 64)  # targets that a program has logits for, as most requests have no more


@dataclasses.dataclass(frozen=True)
class Request:
  """A target to be scored after a context.

  Attributes:
    context: ids before the target, at least one: the caller decides what a text begins with. Ids
      that don't fit the model's window are cut on the left.
    target: ids to score, at most n_positions.
    document_start: an id that begins a document; with it, a token sees only its own document.
  """

  context: Sequence[int] | np.ndarray
  target: Sequence[int] | np.ndarray
  document_start: int | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Scored:
  """The result of a request of n target tokens.

  Attributes:
    logprobs: [n] float32, log p of each given all before it, in nats.
    greedy: [n] bool, whether it is the likeliest one (of several, that with the lowest id).
  """

  logprobs: np.ndarray
  greedy: np.ndarray


def rolling(
  tokens: Sequence[int] | np.ndarray, *, window: int, stride: int, prefix: int | None = None
) -> list[Request]:
  """Returns requests that score each token of a long text once, in sliding windows.

  The first has as many targets as fit, each later one up to `stride`; all have as much context as
  fits. With stride = window these are lm-evaluation-harness's windows (get_rolling_token_windows).

  Args:
    tokens: of the text.
    window: positions of the model that are used.
    stride: targets of a window, at most `window`.
    prefix: an id before the text; None: the text's first token is context, and not scored.
  """
  if not 1 <= stride <= window:
    raise UserError(f'stride {stride} must be at least 1 and at most the window, {window}.')
  text = np.asarray([*([] if prefix is None else [prefix]), *tokens], np.int32)
  requests, start = [], 1
  while start < len(text):  # slices are views: a window costs no memory
    end = min(len(text), start + (window if start == 1 else stride))
    requests.append(Request(text[max(0, end - window - 1) : start], text[start:end]))
    start = end
  return requests


def check(config: GPTConfig, requests: Sequence[Request]) -> None:
  """Checks requests. Raises: UserError: names one that this model can't score."""
  if config.head != 'lm':
    raise UserError('this model has a classification head: there is no next token to score.')
  for i, request in enumerate(requests):
    if not len(request.context) or not len(request.target):
      raise UserError(
        f'request {i} has no context or no target: begin a text with the end-of-text id.'
      )
    if len(request.target) > config.n_positions:
      raise UserError(
        f"request {i} has {len(request.target)} tokens to score; the model's context "
        f'is {config.n_positions} (n_positions). Split it, as `rolling` does.'
      )
    edges = [t for ids in (request.context, request.target) for t in (np.min(ids), np.max(ids))]
    bad = next((t for t in edges if not 0 <= t < config.vocab_size), None)
    if bad is not None:
      raise UserError(
        f'request {i} holds token id {bad}, but the vocabulary has '
        f"{config.vocab_size} ids: the tokenizer is not this model's."
      )


def score(
  model: Model, requests: Sequence[Request], *, progress: str = 'scoring', kept: Kept | None = None
) -> list[Scored]:
  """Scores requests, in batches of similar lengths.

  Args:
    model: a language model, on one device or a mesh.
    requests: what to score.
    progress: the text of the progress bar.
    kept: results from before; new ones are added to it.

  Returns:
    The results, in the order of the requests.

  Raises:
    UserError: names the request that can't be scored.
  """
  check(model.config, requests)
  keys = (
    []
    if kept is None
    else [
      kept.key(
        'score',
        np.asarray(r.context)[-model.config.n_positions :],
        r.target,
        *([] if r.document_start is None else [[r.document_start]]),
      )
      for r in requests
    ]
  )
  found = {
    i: _thawed(value)
    for i, key in enumerate(keys)
    if kept is not None and (value := kept.get(key)) is not None
  }
  params = sharding.whole_rows(params_of(model))
  todo = [i for i in range(len(requests)) if i not in found]
  shown = track(progress, len(requests), 'requests', done=len(found))
  with sharding.mesh_of(params), shown as advance:
    for numbers, results in _run(model.config, params, requests, todo):
      found.update(zip(numbers, results))
      if kept is not None:
        kept.add({keys[i]: _frozen(scored) for i, scored in zip(numbers, results)})
      advance(len(numbers))
  return [found[i] for i in range(len(requests))]


def _frozen(scored: Scored) -> list[str]:
  """Returns a result as texts for JSON, exact to the last bit; `_thawed` undoes it."""
  return [scored.logprobs.astype('<f4').tobytes().hex(), np.packbits(scored.greedy).tobytes().hex()]


def _thawed(value: list[str]) -> Scored:
  logprobs = np.frombuffer(bytes.fromhex(value[0]), '<f4').astype(np.float32)
  bits = np.unpackbits(np.frombuffer(bytes.fromhex(value[1]), np.uint8), count=len(logprobs))
  return Scored(logprobs, bits.astype(bool))


def _shape(config: GPTConfig, request: Request) -> tuple[int, int, int]:
  """Returns (T, K, start) of a request's program: its positions, its targets, and the id that begins
  a document, -1 for none.
  """
  n = len(request.target)
  T = text_batches.bucket(min(len(request.context) + n - 1, config.n_positions), config.n_positions)
  start = -1 if request.document_start is None else request.document_start
  return T, next((few for few in FEW if n <= few < T), T), start


def _rows(T: int) -> int:
  """Returns the rows of a batch on the mesh that is set."""
  return max(1, BATCH_TOKENS[sharding.platform()] // T) * text_batches.split()


def _run(
  config: GPTConfig, params: Params, requests: Sequence[Request], todo: list[int]
) -> Iterator[tuple[list[int], list[Scored]]]:
  """Yields the numbers of requests and their results, a batch at a time, the longest first."""
  by_shape: dict[tuple[int, int, int], list[int]] = {}
  for i in todo:
    by_shape.setdefault(_shape(config, requests[i]), []).append(i)
  running = None  # the host collects a batch while the next one is computed
  for (T, K, start), numbers in sorted(by_shape.items(), reverse=True):
    for first in range(0, len(numbers), B := _rows(T)):
      batch = numbers[first : first + B]
      arrays = map(text_batches.place, _arrays([requests[i] for i in batch], B, T, K))
      started = batch, _score(config, params, *arrays, K=K, start=start)
      if running:
        yield _collect(requests, *running)
      running = started
  if running:
    yield _collect(requests, *running)


def _arrays(batch: list[Request], B: int, T: int, K: int) -> tuple[np.ndarray, ...]:
  """Returns inputs [B, T], the position before each row's first target [B], and targets [B, K]."""
  tokens_BT, starts_B = np.zeros((B, T), np.int32), np.zeros(B, np.int32)
  targets_BK = np.zeros((B, K), np.int32)
  for b, request in enumerate(batch):
    n = len(request.target)
    inputs = [*request.context[-T:], *request.target][-T - 1 : -1]
    tokens_BT[b, : len(inputs)] = inputs
    starts_B[b] = len(inputs) - n
    targets_BK[b, :n] = request.target
  return tokens_BT, starts_B, targets_BK


@functools.partial(jax.jit, static_argnames=('config', 'K', 'start'))
def _score(config: GPTConfig, params: Params, tokens_BT, starts_B, targets_BK, *, K: int, start: int):
  """Returns the log-probabilities of K targets a row, and whether each is the likeliest, [B, K]."""
  model = bind(config, params)
  documents_BT = None if start < 0 else jnp.cumsum(tokens_BT == start, axis=1, dtype=jnp.int32)
  x_BTD = model.transformer(tokens_BT, documents_BT=documents_BT).x_BTD
  B, T = tokens_BT.shape

  most = LOGITS[sharding.platform()] * text_batches.split() // (B * config.padded_vocab_size)
  C = max(1, min(K, most))
  n = -(-K // C)  # stretches of C targets, one after another: all logits at once would be too many

  def take(_, rows):
    x_BTD, starts_B = rows
    at_BK = jnp.minimum(starts_B[:, None] + jnp.arange(n * C), T - 1)  # behind the targets: not read
    return jnp.take_along_axis(x_BTD, at_BK[..., None], axis=1)

  def some(parts):
    x_BCD, targets_BC = parts
    logits_BCV = model.logits(x_BCD)
    ids_V = jnp.arange(logits_BCV.shape[-1])
    # masked sums, since a gather along V fails where V is sharded; XLA fuses them
    target_BC = jnp.where(targets_BC[..., None] == ids_V, logits_BCV, 0).sum(-1)
    before = (logits_BCV == target_BC[..., None]) & (ids_V < targets_BC[..., None])
    greedy_BC = (logits_BCV <= target_BC[..., None]).all(-1) & ~before.any(-1)
    logprobs_BC = target_BC - jax.nn.logsumexp(logits_BCV, axis=-1)
    return tuple(sharding.reshard(x_BC, sharding.RULES.rows_b) for x_BC in (logprobs_BC, greedy_BC))

  x_BKD = sharding.by_rows(take, (), (x_BTD, starts_B))
  targets_BK = jnp.pad(targets_BK, ((0, 0), (0, n * C - K)))
  stretches = lambda x: x.reshape(B, n, C, *x.shape[2:]).swapaxes(0, 1)
  parts = jax.lax.map(some, (stretches(x_BKD), stretches(targets_BK)))
  return jax.tree.map(lambda x_nBC: x_nBC.swapaxes(0, 1).reshape(B, n * C)[:, :K], parts)


def _collect(
  requests: Sequence[Request], numbers: list[int], arrays: Any
) -> tuple[list[int], list[Scored]]:
  logprobs_BK, greedy_BK = text_batches.fetch(arrays)
  sizes = [len(requests[i].target) for i in numbers]
  return numbers, [
    Scored(logprobs_BK[b, :n].copy(), greedy_BK[b, :n].copy()) for b, n in enumerate(sizes)
  ]

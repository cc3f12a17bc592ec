"""Runs EleutherAI's lm-evaluation-harness on our models: its `--model gpt2_jax`.

    python -m gpt2_jax.evaluation.lm_eval --model gpt2_jax --model_args pretrained=X --tasks hellaswag

Scores equal those of its own `--model hf` on the same weights (as read in version 0.4.13): contexts
are cut on the left, an empty context is the end-of-text id, a rolling text begins with that
id, and special tokens written in a text are the tokens. Needs the extra `lm-eval`.
"""

import json
from collections.abc import Sequence
from typing import Any

import jax
from lm_eval.api.model import TemplateLM  # pyright: ignore[reportMissingImports]
from lm_eval.api.registry import register_model  # pyright: ignore[reportMissingImports]
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs  # pyright: ignore[reportMissingImports]

from gpt2_jax.checkpoints.pretrained import from_pretrained
from gpt2_jax.core.errors import UserError
from gpt2_jax.core.progress import track
from gpt2_jax.decoding.generate import generate
from gpt2_jax.evaluation.token_scores import Request, Scored, rolling, score
from gpt2_jax.model import sizes
from gpt2_jax.model.pretrained_model import Model, Pretrained
from gpt2_jax.parallel import sharding
from gpt2_jax.tokenizer.bpe import load as load_tokenizer

AT_A_TIME = 4096  # requests, after which their results go to the harness's cache
DEVICE = 'cuda:0'  # the harness's default on every machine
TEXTS = 32  # written at a time, unless --batch_size is a number above 1
CHAT = 'GPT-2 has no chat template: leave --apply_chat_template out.'


@register_model('gpt2_jax')
class GPT2LM(TemplateLM):
  """A model for `lm_eval.simple_evaluate`, or by name on its command line.

  Its many arguments are those of the harness's command line, which passes them by name.

  Args:
    pretrained: a model, or what `gpt2_jax.from_pretrained` reads.
    tokenizer: where the checkpoint brings none: gpt2, byte, or a folder.
    dtype: of parameters and activations, float32 or bfloat16.
    base, ignore_extra: as for `gpt2_jax.from_pretrained`.
    max_length: positions to use; default: all that the model has.
    max_gen_toks: new tokens of a text whose task does not say how many.
    prefix_token_id: the id that stands for an empty context; default: the end-of-text id.
    seed: of sampled texts.
    data, fsdp, tensor: sizes of the mesh over all devices; default: one device.
    batch_size: texts that are written at a time; results don't depend on it. Scoring finds its own.
    max_batch_size: not used.
    device: must name the platform that jax runs on, or be 'cuda:0', the harness's default.

  Raises:
    UserError: the model can't be read, has no tokenizer, or an argument is out of range.
  """

  def __init__(
    self,
    pretrained: str | Model,
    *,
    tokenizer: str | None = None,
    dtype: str | None = None,
    base: str | None = None,
    ignore_extra: bool = False,
    max_length: int | None = None,
    max_gen_toks: int = 256,
    prefix_token_id: int | None = None,
    seed: int = 0,
    data: int = 1,
    fsdp: int = 1,
    tensor: int = 1,
    batch_size: int | str | None = None,
    max_batch_size: int | None = None,
    device: str | None = None,
  ):
    super().__init__()
    here = sharding.platform()
    if device not in (None, DEVICE) and str(device).partition(':')[0].replace('cuda', 'gpu') != here:
      raise UserError(
        f'--device {device}: jax runs on {here}. Leave --device out, or choose with '
        'the environment variable JAX_PLATFORMS.'
      )
    mesh = sharding.make_mesh(data, fsdp, tensor) if (data, fsdp, tensor) != (1, 1, 1) else None
    self.model = (
      from_pretrained(pretrained, dtype=dtype, mesh=mesh, base=base, ignore_extra=ignore_extra)
      if isinstance(pretrained, str)
      else Pretrained.of(pretrained)
    )
    self.tokenizer: Any = self.model.tokenizer if tokenizer is None else load_tokenizer(tokenizer)
    if self.tokenizer is None:
      raise UserError(f'{pretrained} brings no tokenizer: name one with tokenizer=.')
    most = self.model.config.n_positions
    if not 1 < (max_length or most) <= most:
      raise UserError(
        f"max_length={max_length} must be above 1 and at most {most}, the model's context."
      )
    self.max_length = max_length or most
    self.max_gen_toks, self.seed = max_gen_toks, seed
    self._prefix = prefix_token_id
    asked = str(batch_size)  # a number, 'auto', or the harness's own default of 1
    self.batch_size = int(asked) if asked.isdecimal() and int(asked) > 1 else TEXTS

  @property
  def eot_token_id(self) -> int:
    return self.tokenizer.eot

  @property
  def prefix_token_id(self) -> int:
    return self.eot_token_id if self._prefix is None else self._prefix

  @property
  def tokenizer_name(self) -> str:
    """Returns a name for the ids that texts become, for the harness's cache of requests."""
    return f'gpt2_jax__{self.tokenizer.sha256[:16]}'

  def get_model_info(self) -> dict[str, Any]:
    """Returns the facts that the harness writes beside the results."""
    config = self.model.config
    return {
      'model_num_parameters': sizes.num_params(config),
      'model_dtype': config.dtype,
      'model_backend': jax.default_backend(),
    }

  def chat_template(self, chat_template: bool | str = False) -> None:
    if chat_template:
      raise UserError(CHAT)

  def apply_chat_template(self, chat_history, add_generation_prompt: bool = True) -> str:
    raise UserError(CHAT)

  def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> list[int]:
    """Returns the ids of Hugging Face's tokenizer: none is added, `<|endoftext|>` is the token."""
    return self.tokenizer.encode(string, allow_special=True)

  def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
    """Returns the log-likelihoods of whole texts; each token is scored in one window."""
    return self._score(
      'loglikelihood_rolling',
      [
        (
          request.args,
          rolling(
            self.tok_encode(request.args[0]),
            window=self.max_length,
            stride=self.max_length,
            prefix=self.prefix_token_id,
          ),
        )
        for request in requests
      ],
      _total,
    )

  def _loglikelihood_tokens(self, requests, **_) -> list[tuple[float, bool]]:
    return self._score(
      'loglikelihood',
      [
        (texts, [Request(_last(context, self.max_length + 1 - len(target)), target)])
        for texts, context, target in requests
      ],
      _one,
    )

  def _score(self, name: str, asked: list[tuple[Any, list[Request]]], result) -> list:
    """Returns the results of questions, each of some requests; keeps them in the harness's cache."""
    found, waiting = [], []
    for i, question in enumerate(asked):
      waiting.append(question)
      if i + 1 == len(asked) or sum(len(requests) for _, requests in waiting) >= AT_A_TIME:
        scored = iter(
          score(
            self.model,
            [r for _, requests in waiting for r in requests],
            progress=f'{name} from {len(found)} of {len(asked)}',
          )
        )
        for args, requests in waiting:
          found.append(result([next(scored) for _ in requests]))
          self.cache_hook.add_partial(name, args, found[-1])
        waiting = []
    return found

  def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
    """Continues contexts, each up to the first of its stop strings or the end-of-text id.

    It is greedy unless the task's options, those of `gpt2_jax.generate`, ask for more. If it samples,
    a context that is asked for several times gets as many different continuations.
    """
    groups: dict[str, dict[str, list[int]]] = {}  # options -> context -> numbers of requests
    for i, request in enumerate(requests):
      context, options = request.args
      groups.setdefault(json.dumps(options, sort_keys=True), {}).setdefault(context, []).append(i)
    texts = [''] * len(requests)
    with track('generate_until', len(requests), 'texts') as advance:
      for contexts in groups.values():
        options = requests[next(iter(contexts.values()))[0]].args[1]
        for numbers, written in self._write(contexts, options):
          for i, text in zip(numbers, written):
            texts[i] = text
            self.cache_hook.add_partial('generate_until', requests[i].args, text)
          advance(len(numbers))
    return texts

  def _write(self, contexts: dict[str, list[int]], options: dict[str, Any]):
    """Yields continuations of contexts with the same options: (numbers of the requests, texts)."""
    options = dict[str, Any](normalize_gen_kwargs(options, self.max_gen_toks))
    until = handle_stop_sequences(options.pop('until'), self.tokenizer.decode([self.eot_token_id]))
    new, sampled = options.pop('max_gen_toks'), options['do_sample']
    if not sampled:
      options.pop('temperature', None)
    if not 0 < new < self.max_length:
      raise UserError(
        f'{new} new tokens (max_gen_toks) leave no room for a context in the '
        f'{self.max_length} positions of the model: ask for fewer, with --gen_kwargs '
        'or --model_args.'
      )
    by_count: dict[int, list[tuple[list[int], list[int]]]] = {}
    for context, numbers in contexts.items():
      ids = self.tok_encode(context)[new - self.max_length :] or [self.prefix_token_id]
      by_count.setdefault(len(numbers) if sampled else 1, []).append((ids, numbers))
    for count, rows in by_count.items():
      rows.sort(key=lambda row: -len(row[0]))
      for first in range(0, len(rows), self.batch_size):
        batch = rows[first : first + self.batch_size]
        results = generate(
          self.model,
          [ids for ids, _ in batch],
          tokenizer=self.tokenizer,
          max_new_tokens=new,
          num_return_sequences=count,
          stop_strings=tuple(filter(None, until)),
          **dict[str, Any](seed=self.seed) | options,
        )
        written = [result.text or '' for result in results]
        for i, (_, numbers) in enumerate(batch):
          mine = written[i * count : (i + 1) * count]
          yield numbers, mine if sampled else mine * len(numbers)


def _last(ids: Sequence[int], n: int) -> Sequence[int]:
  """Returns the last n ids; the last one where n < 1, so that scoring it is an error with a name."""
  return ids[-max(1, n) :]


def _one(scored: list[Scored]) -> tuple[float, bool]:
  return float(scored[0].logprobs.sum(dtype='float64')), bool(scored[0].greedy.all())


def _total(scored: list[Scored]) -> float:
  return float(sum(s.logprobs.sum(dtype='float64') for s in scored))

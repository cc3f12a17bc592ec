"""Text in, text out."""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np
from flax import nnx

from gpt2_jax import batching, sharding
from gpt2_jax.config import GPTConfig
from gpt2_jax.decoding.loop import decode
from gpt2_jax.decoding.processors import make_processors
from gpt2_jax.errors import UserError
from gpt2_jax.model import GPT2, Params
from gpt2_jax.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Generated:
  """One continuation.

  Attributes:
    prompt: index of its prompt.
    tokens: the new ids; an end-of-sequence id is not among them.
    text: their text, None without a tokenizer.
    finish_reason: 'stop' (the end-of-sequence id came), 'length' (`max_new_tokens`) or 'context'
      (the model has no more positions).
    logprobs: log-probability of each new id under the model, in nats.
  """

  prompt: int
  tokens: list[int]
  text: str | None
  finish_reason: str
  logprobs: list[float]


def generate_tokens(
    config: GPTConfig,
    params: Params,
    prompts: batching.Texts,
    *,
    tokenizer: Tokenizer | None = None,
    max_new_tokens: int = 128,
    do_sample: bool = True,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    num_return_sequences: int = 1,
    seed: int = 0,
    eos_token_id: int | Sequence[int] | None = None,
) -> list[Generated]:
  """As `generate`, for a config and parameters, on the mesh that is set or on one device."""
  if max_new_tokens < 1 or num_return_sequences < 1:
    raise UserError(f'max_new_tokens = {max_new_tokens} and num_return_sequences = '
                    f'{num_return_sequences} must be at least 1.')
  if not do_sample and num_return_sequences > 1:
    raise UserError('greedy decoding has one result: num_return_sequences > 1 needs do_sample.')
  rows = [(i, ids, k) for i, ids in enumerate(batching.encode(prompts, tokenizer, config, room=1))
          for k in range(num_return_sequences)]
  processors = make_processors(temperature, top_k, top_p) if do_sample else ()
  if eos_token_id is None:
    eos_token_id = tokenizer.eot if tokenizer else ()
  eos = np.atleast_1d(np.asarray(eos_token_id, np.int32))
  padded = rows + [rows[0]] * (-len(rows) % batching.split())
  prompts_BP, lengths_B = batching.pad([ids for _, ids, _ in padded], config.n_positions)
  limits_B = np.minimum(max_new_tokens, config.n_positions - lengths_B)
  samples_B = np.array([k for _, _, k in padded], np.int32)
  key = jax.random.key(seed) if do_sample else None
  out = decode(config, params, *map(batching.place, (prompts_BP, lengths_B, limits_B, samples_B)),
               key, processors, eos, N=batching.bucket(int(limits_B.max()), config.n_positions))
  tokens_BN, logprobs_BN, counts_B = batching.fetch(tuple(out))

  results = []
  for r, (i, ids, _) in enumerate(rows):
    tokens, logprobs = (x[r, :counts_B[r]].tolist() for x in (tokens_BN, logprobs_BN))
    if stopped := tokens[-1] in eos:
      tokens, logprobs = tokens[:-1], logprobs[:-1]
    full = len(ids) + len(tokens) >= config.n_positions and len(tokens) < max_new_tokens
    reason = 'stop' if stopped else 'context' if full else 'length'
    text = tokenizer.decode(tokens) if tokenizer else None
    results.append(Generated(i, tokens, text, reason, logprobs))
  return results


def generate(model: GPT2, prompts: batching.Texts, *, tokenizer: Tokenizer | None = None, **options):
  """Continues a text, texts, or lists of ids.

  Args:
    model: a model; one from `gpt2_jax.from_pretrained` brings its tokenizer along.
    prompts: a text, texts, ids, or lists of ids. An empty text starts a new document.
    tokenizer: for texts, where the model has none.
    **options: named as in Hugging Face's `generate`: `max_new_tokens` (128), `do_sample` (True;
      False takes the likeliest token), `temperature`, `top_k`, `top_p`, `num_return_sequences`,
      `eos_token_id` (one or several; default: the model's own, or the tokenizer's); and `seed`: the
      same prompt and seed give the same text, alone or in a batch.

  Returns:
    A list of `Generated`, `num_return_sequences` for each prompt in turn.

  Raises:
    UserError: a prompt fills the context, an id is not in the vocabulary, an option is out of range.
  """
  if model.config.head != 'lm':
    raise UserError(f'this model has a head for {model.config.head}: it can\'t write. Use classify.')
  params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
  tokenizer = tokenizer or model.tokenizer
  if model.source is not None:
    options = {'eos_token_id': model.source.eos_token_id} | options
  with sharding.mesh_of(params):
    return generate_tokens(model.config, params, prompts, tokenizer=tokenizer, **options)

"""Text in, text out."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from gpt2_jax import sharding
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


def _bucket(n: int, most: int, least: int = 16) -> int:
  """n rounded up to a power of two, so that few lengths are compiled; at most `most`."""
  return min(most, max(least, 1 << (n - 1).bit_length()))


def _encode(prompts: Any, tokenizer: Tokenizer | None, config: GPTConfig) -> list[list[int]]:
  if isinstance(prompts, str):
    prompts = [prompts]
  elif len(prompts) and isinstance(prompts[0], (int, np.integer)):
    prompts = [prompts]
  rows = []
  for i, prompt in enumerate(prompts):
    if isinstance(prompt, str):
      if tokenizer is None:
        raise UserError('a text needs a tokenizer: pass tokenizer=, or ids in place of texts.')
      ids = tokenizer.encode(prompt) or [tokenizer.eot]  # an empty prompt: a document begins
    else:
      ids = [int(token) for token in prompt]
      if not ids:
        raise UserError(f'prompt {i} has no ids: begin with the end-of-text id for a free text.')
    bad = next((token for token in ids if not 0 <= token < config.vocab_size), None)
    if bad is not None:
      raise UserError(f'prompt {i} holds token id {bad}, but the vocabulary has '
                      f'{config.vocab_size} ids.')
    if len(ids) >= config.n_positions:
      raise UserError(f'prompt {i} has {len(ids)} tokens; the model\'s context of '
                      f'{config.n_positions} (n_positions) has no room for more. Shorten it.')
    rows.append(ids)
  if not rows:
    raise UserError('there is no prompt.')
  return rows


def generate_tokens(
    config: GPTConfig,
    params: Params,
    prompts: str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]],
    *,
    tokenizer: Tokenizer | None = None,
    max_new_tokens: int = 128,
    do_sample: bool = True,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    num_return_sequences: int = 1,
    seed: int = 0,
    eos_token_id: int | None = None,
) -> list[Generated]:
  """As `generate`, for a config and parameters, on the mesh that is set or on one device."""
  if max_new_tokens < 1 or num_return_sequences < 1:
    raise UserError(f'max_new_tokens = {max_new_tokens} and num_return_sequences = '
                    f'{num_return_sequences} must be at least 1.')
  if not do_sample and num_return_sequences > 1:
    raise UserError('greedy decoding has one result: num_return_sequences > 1 needs do_sample.')
  rows = [(i, ids, k) for i, ids in enumerate(_encode(prompts, tokenizer, config))
          for k in range(num_return_sequences)]
  processors = make_processors(temperature, top_k, top_p) if do_sample else ()
  eos = eos_token_id if eos_token_id is not None else tokenizer.eot if tokenizer else -1

  # fill up with copies of row 0 to what the mesh can split
  mesh = jax.sharding.get_abstract_mesh()
  split = 1 if mesh.empty else mesh.shape['data'] * mesh.shape['fsdp']
  padded = rows + [rows[0]] * (-len(rows) % split)
  lengths_B = np.array([len(ids) for _, ids, _ in padded], np.int32)
  limits_B = np.minimum(max_new_tokens, config.n_positions - lengths_B)
  prompts_BP = np.zeros((len(padded), _bucket(int(lengths_B.max()), config.n_positions)), np.int32)
  for row, (_, ids, _) in zip(prompts_BP, padded):
    row[:len(ids)] = ids
  place = lambda x: jax.device_put(x, sharding.layout(sharding.P(
      sharding.BATCH, *(None for _ in x.shape[1:]))))
  samples_B = np.array([k for _, _, k in padded], np.int32)
  key = jax.random.key(seed) if do_sample else None
  out = decode(config, params, place(prompts_BP), place(lengths_B), place(limits_B),
               place(samples_B), key, processors, np.int32(eos),
               N=_bucket(int(limits_B.max()), config.n_positions))
  tokens_BN, logprobs_BN, counts_B = jax.device_get(
      jax.tree.map(lambda x: sharding.reshard(x, sharding.P()), tuple(out)))

  results = []
  for r, (i, ids, _) in enumerate(rows):
    tokens, logprobs = (x[r, :counts_B[r]].tolist() for x in (tokens_BN, logprobs_BN))
    if stopped := tokens[-1] == eos:
      tokens, logprobs = tokens[:-1], logprobs[:-1]
    full = len(ids) + len(tokens) >= config.n_positions and len(tokens) < max_new_tokens
    reason = 'stop' if stopped else 'context' if full else 'length'
    text = tokenizer.decode(tokens) if tokenizer else None
    results.append(Generated(i, tokens, text, reason, logprobs))
  return results


def generate(model: GPT2, prompts, *, tokenizer: Tokenizer | None = None, **options):
  """Continues a text, texts, or lists of ids.

  Args:
    model: a model; one from `gpt2_jax.from_pretrained` brings its tokenizer along.
    prompts: a text, texts, ids, or lists of ids. An empty text starts a new document.
    tokenizer: for texts, where the model has none.
    **options: named as in Hugging Face's `generate`: `max_new_tokens` (128), `do_sample` (True;
      False takes the likeliest token), `temperature`, `top_k`, `top_p`, `num_return_sequences`,
      `eos_token_id` (default: the tokenizer's); and `seed`: the same prompt and seed give the same
      text, alone or in a batch.

  Returns:
    A list of `Generated`, `num_return_sequences` for each prompt in turn.

  Raises:
    UserError: a prompt fills the context, an id is not in the vocabulary, an option is out of range.
  """
  params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
  tokenizer = tokenizer or getattr(model, 'tokenizer', None)
  return generate_tokens(model.config, params, prompts, tokenizer=tokenizer, **options)

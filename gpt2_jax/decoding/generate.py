"""Text in, text out."""

import weakref
from collections.abc import Generator, Sequence
from typing import Any

import jax
import numpy as np

from gpt2_jax.core.errors import UserError
from gpt2_jax.decoding.decoder import Decoder, Generated, PrefixFunction, TextRequest
from gpt2_jax.decoding.processors import Processor
from gpt2_jax.decoding.text_stream import Pieces
from gpt2_jax.model import text_batches
from gpt2_jax.model.config import GPTConfig
from gpt2_jax.model.decode_layout import for_decoding
from gpt2_jax.model.gpt2 import Params
from gpt2_jax.model.pretrained_model import Model, Pretrained, params_of
from gpt2_jax.parallel import sharding
from gpt2_jax.tokenizer.bpe import Tokenizer


def generate_tokens(
  config: GPTConfig, params: Params, prompts: text_batches.Texts, **asked: Any
) -> list[Generated]:
  """Does what `generate` does for a config and parameters, on the mesh that is set or on one device.
  `asked`: as in `TextRequest.of`.
  """
  return Decoder.of(TextRequest.of(config, params, prompts, **asked)).finish()


_prepared: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # model -> (its leaves, prepared)


def prepare(model: Model) -> tuple[GPTConfig, Params]:
  """Returns a model's config and parameters in the form 'decode', made once for the same."""
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
  """Returns the ids that end a text by the model's checkpoint; None where it names none."""
  eos = None if model.source is None else model.source.eos_token_id
  if eos is None:
    return None
  # it may name ids that its vocabulary has not
  return [i for i in np.atleast_1d(eos).tolist() if 0 <= i < model.config.vocab_size]


def _decoder(
  model: Model, prompts: text_batches.Texts, assistant_model: Model | None, **asked: Any
) -> Decoder:
  """Returns a decoder for a model; `asked` as in `TextRequest.of`."""
  model = Pretrained.of(model)
  if asked.get('eos_token_id') is None:
    asked['eos_token_id'] = own_ends(model)
  prepared = prepare(model)
  if assistant_model is not None:
    own, other = (Pretrained.of(each).tokenizer for each in (model, assistant_model))
    if asked['tokenizer'] is None and own and other and own.sha256 != other.sha256:
      raise UserError(
        'the assistant model has another tokenizer than the model: its guesses would '
        'be of other texts. If the ids are the same all the same, say whose both are: '
        'tokenizer= (--tokenizer).'
      )
    asked['assistant'] = prepare(assistant_model)
    if len({sharding.devices_of(params) for _, params in (prepared, asked['assistant'])}) > 1:
      raise UserError(
        'the assistant model lies on other devices than the model: load both with the same mesh.'
      )
  asked['tokenizer'] = asked['tokenizer'] or model.tokenizer
  return Decoder.of(TextRequest.of(*prepared, prompts, **asked))


def generate(
  model: Model,
  prompts: text_batches.Texts,
  *,
  tokenizer: Tokenizer | None = None,
  assistant_model: Model | None = None,
  logits_processor: Sequence[Processor] = (),
  prefix_allowed_tokens_fn: PrefixFunction | None = None,
  edits: Any = (),
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
    edits: a `model.edits.Edit`, or a tree of them: what is changed inside of the model while it reads
      and writes. Positions are counted from the start of each text.
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
    assistant_model,
    tokenizer=tokenizer,
    logits_processor=logits_processor,
    prefix_allowed_tokens_fn=prefix_allowed_tokens_fn,
    edits=edits,
    **options,
  )
  with sharding.mesh_of(decoder.job.params):
    return decoder.finish()


def stream(
  model: Model,
  prompt: str | Sequence[int],
  *,
  tokenizer: Tokenizer | None = None,
  assistant_model: Model | None = None,
  logits_processor: Sequence[Processor] = (),
  prefix_allowed_tokens_fn: PrefixFunction | None = None,
  edits: Any = (),
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
    assistant_model,
    tokenizer=tokenizer,
    logits_processor=logits_processor,
    prefix_allowed_tokens_fn=prefix_allowed_tokens_fn,
    edits=edits,
    **options,
  )
  request = decoder.request
  if len(decoder.rows) != 1 or request.options.num_beams > 1 or request.tokenizer is None:
    raise UserError(
      'stream writes one text as it is made: it takes one prompt, '
      'num_return_sequences = 1, num_beams = 1, and a tokenizer.'
    )
  return _pieces(decoder)


def _pieces(decoder: Decoder) -> Generator[str, None, Generated]:
  [row], pushed = decoder.rows, 0
  assert decoder.request.tokenizer is not None
  pieces = Pieces(decoder.request.tokenizer, decoder.request.stop_strings)
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

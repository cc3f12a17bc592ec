"""Protocols of whole texts: how each is cut into windows, and what its figure is divided by."""

import re

import numpy as np

from gpt2_jax.data.benchmarks import Benchmark
from gpt2_jax.data.store import Split, TokenStore
from gpt2_jax.errors import UserError
from gpt2_jax.evaluation import detokenizers, scoring
from gpt2_jax.evaluation.protocols import Protocol
from gpt2_jax.evaluation.scorer import Scorer, Value, Values, per_unit, total
from gpt2_jax.evaluation.scoring import Request
from gpt2_jax.pretrained_model import Pretrained


def count_words(text: str) -> int:
  """Units of a tokenized corpus: its words, and the end of each line, as such corpora count."""
  lines = text.removesuffix('\n').split('\n')
  return len(lines) + sum(len(line.split(' ')) - line.split(' ').count('') for line in lines)


def corpus(scorer: Scorer, protocol: Protocol, benchmark: Benchmark) -> Values:
  """A text in sliding windows; the figure is by the units of the text as it was published."""
  original = benchmark.examples[0]['text']
  text = original.decode(errors='replace') if isinstance(original, bytes) else original
  units = (
    {'words': count_words, 'characters': len, 'bytes': lambda text: len(text.encode())}[
      protocol.units
    ](text)
    if not isinstance(original, bytes)
    else len(original)
  )
  if protocol.text == 'detokenized':
    text = detokenizers.OF[protocol.benchmark].detokenize(text)
  assert protocol.stride is not None
  requests = scoring.rolling(
    scorer.encode(text),
    window=scorer.window,
    prefix=scorer.eot,
    stride=min(protocol.stride, scorer.window),
  )
  nll = total(scorer.score(requests, protocol.name))
  tokens = sum(len(r.target) for r in requests)
  return {
    metric: per_unit(metric, nll, tokens, 'tokens')
    if metric == 'token_ppl'
    else per_unit(metric, nll, units, protocol.units)
    for metric in protocol.metrics
  }


def hf_windows(tokens: np.ndarray, window: int, stride: int) -> list[Request]:
  """The windows of Hugging Face's page: from each multiple of the stride on; a window's first token
  is never scored, so that with stride = window some tokens are in no target.
  """
  requests, end = [], 0
  for begin in range(0, len(tokens), stride):
    start, end = max(end, begin + 1), min(begin + window, len(tokens))
    if start < end:
      requests.append(Request(tokens[begin:start], tokens[start:end]))
    if end == len(tokens):
      break
  return requests


def hf(scorer: Scorer, protocol: Protocol, benchmark: Benchmark) -> Values:
  """The file's lines, each with its own line end, joined by two more; a blank one is empty."""
  lines = benchmark.examples[0]['text'].removesuffix('\n').split('\n')
  text = '\n\n'.join(line + '\n' if line.strip() else '' for line in lines)
  assert protocol.stride is not None
  requests = hf_windows(scorer.encode(text), scorer.window, min(protocol.stride, scorer.window))
  nll = total(scorer.score(requests, protocol.name))
  return {'token_ppl': per_unit('token_ppl', nll, sum(len(r.target) for r in requests), 'tokens')}


def split_pages(text: str) -> list[str]:
  """The articles of WikiText, as EleutherAI's data set cuts them: before each ` = Title = `."""
  pages, lines = [], []
  for line in text.split('\n'):
    bare = line.replace('= = =', '===').replace('= =', '==').strip()
    if bare.startswith('= ') and bare.endswith(' ='):
      pages, lines = [*pages, '\n'.join(lines)], []
    lines.append(line)
  return [page for page in pages if page.strip()] + ['\n'.join(lines)]


def pages(scorer: Scorer, protocol: Protocol, benchmark: Benchmark) -> Values:
  """Each article on its own; units are those of the article before its text was changed."""
  found = split_pages(benchmark.examples[0]['text'])
  requests = [
    request
    for page in found
    for request in scoring.rolling(
      scorer.encode(detokenizers.lm_eval_wikitext(page)),
      window=scorer.window,
      stride=scorer.window,
      prefix=scorer.eot,
    )
  ]
  nll = total(scorer.score(requests, protocol.name))
  words = sum(len(re.split(r'\s+', page)) for page in found)
  size = sum(len(page.encode()) for page in found)
  return {
    metric: per_unit(metric, nll, words, 'words')
    if metric == 'word_ppl'
    else per_unit(metric, nll, size, 'bytes')
    for metric in protocol.metrics
  }


def training_rows(model: Pretrained) -> tuple[int, bool]:
  """Tokens of a row, and whether documents in it are masked from each other: of a run's checkpoint as
  the run had it; else the model's context, and no.
  """
  record = model.source.record if model.source is not None else None
  rows = (record or {}).get('rows')
  if rows is None:
    return model.config.n_positions, False
  return rows['tokens'], rows['document_mask']


def held_out(model: Pretrained, opened: TokenStore) -> Split:
  """The held-out tokens of a store.

  Raises:
    UserError: there are none, or they are not the model's.
  """
  split = opened.splits.get('val')
  if split is None or len(split) < 2:
    raise UserError(f'{opened.path} holds no held-out tokens (val): prepare it with a val_fraction.')
  if model.config.head != 'lm':
    raise UserError('this model has a classification head: a store has no labels to score it by.')
  opened.check_tokenizer(model.tokenizer, 'the model', '--tokenizer')
  opened.check_vocabulary(model.config.vocab_size)
  return split


def store(scorer: Scorer, protocol: Protocol, opened: TokenStore) -> Values:
  """The held-out tokens in rows, each token once, as training has them."""
  split = held_out(scorer.model, opened)
  T, masked = training_rows(scorer.model)
  requests = scoring.rolling(split.read(0, len(split)), window=T, stride=T)
  # training's rows begin anew: the overlap of the last one is not used
  requests = [Request(r.context[-1:], r.target, opened.eot if masked else None) for r in requests]
  nll, n = total(scorer.score(requests, protocol.name)), sum(len(r.target) for r in requests)
  return {
    'loss': Value(nll / n, None, n, 'tokens'),
    'token_ppl': per_unit('token_ppl', nll, n, 'tokens'),
  }

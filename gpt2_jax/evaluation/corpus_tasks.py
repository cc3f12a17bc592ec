"""Scores whole texts: how each is cut into windows, and which units its figure is divided by."""

import re

import numpy as np

from gpt2_jax.core.errors import UserError
from gpt2_jax.data.benchmarks import Benchmark
from gpt2_jax.data.token_store import Split, TokenStore
from gpt2_jax.evaluation import detokenizers, token_scores
from gpt2_jax.evaluation.figures import Scorer, Value, Values, per_unit, total
from gpt2_jax.evaluation.protocols import Protocol
from gpt2_jax.evaluation.token_scores import Request
from gpt2_jax.model.pretrained_model import Pretrained


def count_words(text: str) -> int:
  """Counts the units of a tokenized corpus: words and ends of lines, as such corpora count them."""
  lines = text.removesuffix('\n').split('\n')
  return len(lines) + sum(len(line.split(' ')) - line.split(' ').count('') for line in lines)


def sliding_windows(scorer: Scorer, protocol: Protocol, benchmark: Benchmark) -> Values:
  """Scores a text in sliding windows; its figure is per unit of the text as it was published."""
  original = benchmark.examples[0]['text']
  text = original.decode(errors='replace') if isinstance(original, bytes) else original
  if isinstance(original, bytes) or protocol.units == 'characters':
    units = len(original)
  else:
    units = count_words(text) if protocol.units == 'words' else len(text.encode())
  if protocol.text == 'detokenized':
    text = detokenizers.OF[protocol.benchmark].detokenize(text)
  assert protocol.stride is not None
  requests = token_scores.rolling(
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
  """Returns the windows of Hugging Face's page, which begin at each multiple of the stride.

  A window's first token is never scored, so that with stride = window some tokens are in no target.
  """
  requests, end = [], 0
  for begin in range(0, len(tokens), stride):
    start, end = max(end, begin + 1), min(begin + window, len(tokens))
    if start < end:
      requests.append(Request(tokens[begin:start], tokens[start:end]))
    if end == len(tokens):
      break
  return requests


def hf_perplexity_page(scorer: Scorer, protocol: Protocol, benchmark: Benchmark) -> Values:
  """Scores a file's lines, joined as Hugging Face's page on perplexity joins them.

  Each line has its own end and two more behind it; a blank line is empty.
  """
  lines = benchmark.examples[0]['text'].removesuffix('\n').split('\n')
  text = '\n\n'.join(line + '\n' if line.strip() else '' for line in lines)
  assert protocol.stride is not None
  requests = hf_windows(scorer.encode(text), scorer.window, min(protocol.stride, scorer.window))
  nll = total(scorer.score(requests, protocol.name))
  return {'token_ppl': per_unit('token_ppl', nll, sum(len(r.target) for r in requests), 'tokens')}


def split_pages(text: str) -> list[str]:
  """Returns the articles of WikiText, cut as EleutherAI's data set is: before each ` = Title = `."""
  pages, lines = [], []
  for line in text.split('\n'):
    bare = line.replace('= = =', '===').replace('= =', '==').strip()
    if bare.startswith('= ') and bare.endswith(' ='):
      pages, lines = [*pages, '\n'.join(lines)], []
    lines.append(line)
  return [page for page in pages if page.strip()] + ['\n'.join(lines)]


def wikitext_pages(scorer: Scorer, protocol: Protocol, benchmark: Benchmark) -> Values:
  """Scores each article on its own; units are counted before the article's text is changed."""
  found = split_pages(benchmark.examples[0]['text'])
  requests = [
    request
    for page in found
    for request in token_scores.rolling(
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
  """Returns the tokens of a training row, and whether its documents were masked from each other.

  A run's checkpoint says both; for any other model it is the context, and no.
  """
  record = model.source.record if model.source is not None else None
  rows = (record or {}).get('rows')
  if rows is None:
    return model.config.n_positions, False
  return rows['tokens'], rows['document_mask']


def held_out(model: Pretrained, opened: TokenStore) -> Split:
  """Returns the held-out tokens of a store.

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


def held_out_loss(scorer: Scorer, protocol: Protocol, opened: TokenStore) -> Values:
  """Scores the held-out tokens in rows as training has them, each token once."""
  split = held_out(scorer.model, opened)
  T, masked = training_rows(scorer.model)
  requests = token_scores.rolling(split.read(0, len(split)), window=T, stride=T)
  # training's rows begin anew: the overlap of the last one is not used
  requests = [Request(r.context[-1:], r.target, opened.eot if masked else None) for r in requests]
  nll, n = total(scorer.score(requests, protocol.name)), sum(len(r.target) for r in requests)
  return {
    'loss': Value(nll / n, None, n, 'tokens'),
    'token_ppl': per_unit('token_ppl', nll, n, 'tokens'),
  }

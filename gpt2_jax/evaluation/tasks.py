"""Protocols of examples: the ends of texts, and choices between options."""

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from gpt2_jax.data.benchmarks import Benchmark
from gpt2_jax.decoding.generate import generate
from gpt2_jax.errors import UserError
from gpt2_jax.evaluation import corpora, detokenizers, stop_words
from gpt2_jax.evaluation.protocols import Protocol
from gpt2_jax.evaluation.scorer import Scorer, Value, Values, mean, perplexity, total
from gpt2_jax.evaluation.scoring import Request, Scored
from gpt2_jax.progress import track

AHEAD = 3  # tokens that are written to find a word (eval_lambada_slow.py)
ROWS = 32  # texts that are continued at a time


def _lambada(protocol: Protocol, benchmark: Benchmark) -> list[str]:
  change = detokenizers.lambada if protocol.text == 'lambada' else str
  return [change(example['text']) for example in benchmark.examples]


def _ends(scorer: Scorer, protocol: Protocol, requests: list[Request]) -> Values:
  """How likely the ends of texts are, and how often every token of one is the likeliest."""
  scored = scorer.score(requests, protocol.name)
  return {
    'ppl': perplexity([total([s]) for s in scored]),
    'acc': mean([int(s.greedy.all()) for s in scored]),
  }


def last_token(scorer: Scorer, protocol: Protocol, benchmark: Benchmark) -> Values:
  """The last token of each text, which may be a part of its last word."""
  rows = [scorer.encode(text) for text in _lambada(protocol, benchmark)]
  return _ends(scorer, protocol, [Request(ids[:-1], ids[-1:]) for ids in rows])


def last_word(scorer: Scorer, protocol: Protocol, benchmark: Benchmark) -> Values:
  """All tokens of the last word; a word is what stands behind the last blank."""
  cut = [text.rpartition(' ') for text in _lambada(protocol, benchmark)]
  return _ends(scorer, protocol, [scorer.pair(context, ' ' + word) for context, _, word in cut])


WORD = re.compile(r'\w+|[^\w\s]')


def written_word(scorer: Scorer, protocol: Protocol, benchmark: Benchmark) -> Values:
  """The first word of what the model writes, token by token the likeliest that is no stop word.

  A word is letters and digits, or one other sign; case does not matter.
  """
  tokenizer, config = scorer.model.tokenizer, scorer.model.config
  if config.n_positions <= AHEAD:
    raise UserError(
      f'{protocol.name} writes {AHEAD} tokens after a text: a context of '
      f'{config.n_positions} (n_positions) has no room for them.'
    )
  banned = [
    i
    for i in range(min(tokenizer.vocab_size, config.vocab_size))
    if tokenizer.decode([i]).strip() in stop_words.ENGLISH
  ]
  texts = _lambada(protocol, benchmark)
  last = [WORD.findall(text)[-1] for text in texts]
  contexts = [text[: text.rindex(word)].rstrip(' ') for text, word in zip(texts, last)]
  rows = [scorer.encode(context)[AHEAD - config.n_positions :].tolist() for context in contexts]
  keys = [scorer.kept.key('written', row, banned, AHEAD) for row in rows]
  todo = [i for i, key in enumerate(keys) if scorer.kept.get(key) is None]
  with track(protocol.name, len(rows), 'texts', done=len(rows) - len(todo)) as advance:
    for first in range(0, len(todo), ROWS):
      batch = todo[first : first + ROWS]
      written = generate(
        scorer.model,
        [rows[i] for i in batch],
        do_sample=False,
        max_new_tokens=AHEAD,
        suppress_tokens=banned,
      )
      scorer.kept.add({keys[i]: each.text for i, each in zip(batch, written)})
      advance(len(batch))
  first_words = [next(iter(WORD.findall(scorer.kept.get(key))), '') for key in keys]
  return {'acc': mean([int(a.lower() == b.lower()) for a, b in zip(first_words, last)])}


def _best(scorer: Scorer, protocol: Protocol, options: list[list[Request]]) -> list[list[Scored]]:
  """The scores of each example's options."""
  flat = iter(scorer.score([r for requests in options for r in requests], protocol.name))
  return [[next(flat) for _ in requests] for requests in options]


def _right(scores: Sequence[Sequence[float]], labels: Sequence[int]) -> Value:
  return mean([int(np.argmax(row)) == label for row, label in zip(scores, labels)])


def choices(scorer: Scorer, protocol: Protocol, benchmark: Benchmark) -> Values:
  """The likeliest ending, and the likeliest for its length."""
  examples = benchmark.examples
  scored = _best(
    scorer,
    protocol,
    [[scorer.pair(e['query'], ' ' + ending) for ending in e['endings']] for e in examples],
  )
  labels = [int(e['label']) for e in examples]
  sums = [[-total([s]) for s in row] for row in scored]
  sizes = [
    [
      len(s.logprobs) if protocol.units == 'tokens' else len(ending)
      for s, ending in zip(row, e['endings'])
    ]
    for row, e in zip(scored, examples)
  ]
  normed = [[x / n if n else -np.inf for x, n in zip(*rows)] for rows in zip(sums, sizes)]
  return {'acc': _right(sums, labels), 'acc_norm': _right(normed, labels)}


def _label(answer, options: Sequence[str]) -> int:
  """The number of the right option, by number or text; '1' and '2' count from one."""
  if isinstance(answer, str):
    return options.index(answer) if answer in options else int(answer) - 1
  return int(answer)


def partial(scorer: Scorer, protocol: Protocol, benchmark: Benchmark) -> Values:
  """Which option in the place of the blank makes what follows likelier (partial evaluation)."""
  requests, labels = [], []
  for e in benchmark.examples:
    text = e['sentence'] if 'sentence' in e else e['text']
    before, blank, after = re.split(r'(_|\[[^\]]*\])', text, maxsplit=1)
    options = e['options'] if 'options' in e else [e['option1'], e['option2']]
    labels.append(_label(e['answer'], options))
    placed = [_fitted(before, blank.strip('[]'), option) for option in options]
    requests.append([scorer.pair(before + option, ' ' + after.strip()) for option in placed])
  scored = _best(scorer, protocol, requests)
  return {'acc': _right([[-total([s]) for s in row] for row in scored], labels)}


ARTICLES = frozenset('A An The She He It They My His Her Their'.split())


def _fitted(before: str, pronoun: str, option: str) -> str:
  """An option as it stands in the place of a pronoun: its case, and 's (lm-eval's wsc273)."""
  if pronoun.lower() in ('my', 'his', 'her', 'our', 'their'):
    option += "'s"
  first, _, rest = option.partition(' ')
  inside = pronoun != '_' and not before.rstrip().endswith('.')
  return f'{first.lower()} {rest}' if inside and first in ARTICLES and rest else option


def cloze(scorer: Scorer, protocol: Protocol, benchmark: Benchmark) -> Values:
  """The option that with the rest of its sentence is the likeliest: p(option) · p(rest | option)."""
  write = detokenizers.CBT.detokenize
  requests, labels = [], []
  for e in benchmark.examples:
    before, _, after = e['question'].partition('XXXXX')
    story = ' '.join([*e['context'], before]).strip()
    head = write(story)
    whole = [write(' '.join(f'{story} {option} {after}'.split())) for option in e['options']]
    cuts = [_common(head, text) for text in whole]  # an option may stand behind a quotation mark
    requests.append([_begun(scorer, text[:n], text[n:]) for text, n in zip(whole, cuts)])
    labels.append(e['options'].index(e['answer']))
  scored = _best(scorer, protocol, requests)
  return {'acc': _right([[-total([s]) for s in row] for row in scored], labels)}


def _common(a: str, b: str) -> int:
  """How many characters two texts begin with alike."""
  return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def _begun(scorer: Scorer, context: str, continuation: str) -> Request:
  """As `pair`, in a document that begins with the context."""
  request = scorer.pair(context, continuation)
  return Request(np.concatenate([[scorer.eot], request.context]), request.target)


KINDS: dict[str, Callable[[Scorer, Protocol, Any], Values]] = {
  kind.__name__: kind
  for kind in (
    corpora.corpus,
    corpora.hf,
    corpora.pages,
    corpora.store,
    last_token,
    last_word,
    written_word,
    choices,
    partial,
    cloze,
  )
}

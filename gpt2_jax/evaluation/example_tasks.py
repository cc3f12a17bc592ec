"""Scores benchmarks of examples: the last words of texts, and choices between options."""

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from gpt2_jax.core.errors import UserError
from gpt2_jax.core.progress import track
from gpt2_jax.data.benchmarks import Benchmark
from gpt2_jax.decoding.generate import generate
from gpt2_jax.evaluation import corpus_tasks, detokenizers
from gpt2_jax.evaluation.figures import Scorer, Value, Values, mean, perplexity, total
from gpt2_jax.evaluation.protocols import Protocol
from gpt2_jax.evaluation.token_scores import Request, Scored

AHEAD = 3  # tokens that are written to find a word (eval_lambada_slow.py)
ROWS = 32  # texts that are continued at a time


def _lambada(protocol: Protocol, benchmark: Benchmark) -> list[str]:
  change = detokenizers.lambada if protocol.text == 'lambada' else str
  return [change(example['text']) for example in benchmark.examples]


def _ends(scorer: Scorer, protocol: Protocol, requests: list[Request]) -> Values:
  """Scores the ends of texts: their perplexity, and how often every token of one is the likeliest."""
  scored = scorer.score(requests, protocol.name)
  return {
    'ppl': perplexity([total([s]) for s in scored]),
    'acc': mean([int(s.greedy.all()) for s in scored]),
  }


def last_token(scorer: Scorer, protocol: Protocol, benchmark: Benchmark) -> Values:
  """Scores the last token of each text, which may be a part of its last word."""
  rows = [scorer.encode(text) for text in _lambada(protocol, benchmark)]
  return _ends(scorer, protocol, [Request(ids[:-1], ids[-1:]) for ids in rows])


def last_word(scorer: Scorer, protocol: Protocol, benchmark: Benchmark) -> Values:
  """Scores all tokens of the last word, which is the text after the last blank."""
  cut = [text.rpartition(' ') for text in _lambada(protocol, benchmark)]
  return _ends(scorer, protocol, [scorer.pair(context, ' ' + word) for context, _, word in cut])


WORD = re.compile(r'\w+|[^\w\s]')
# Words too common to end a text of LAMBADA: NLTK's English list, without its contractions, as in
# cybertronai/bflm eval_lambada_slow.py. NLTK has it from the snowball stop words of PostgreSQL
# (src/backend/snowball/stopwords/english.stop), under the PostgreSQL Licence.
STOP_WORDS = frozenset(
  """
a about above after again against all am an and any are as at be because been before being below
between both but by can did do does doing don down during each few for from further had has have
having he her here hers herself him himself his how i if in into is it its itself just me more most
my myself no nor not now of off on once only or other our ours ourselves out over own s same she
should so some such t than that the their theirs them themselves then there these they this those
through to too under until up very was we were what when where which while who whom why will with
you your yours yourself yourselves
""".split()
)


def written_word(scorer: Scorer, protocol: Protocol, benchmark: Benchmark) -> Values:
  """Compares the last word with the first one that the model writes: greedily, without stop words.

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
    if tokenizer.decode([i]).strip() in STOP_WORDS
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


def _score_options(
  scorer: Scorer, protocol: Protocol, options: list[list[Request]]
) -> list[list[Scored]]:
  """Returns the scores of each example's options."""
  flat = iter(scorer.score([r for requests in options for r in requests], protocol.name))
  return [[next(flat) for _ in requests] for requests in options]


def _right(scores: Sequence[Sequence[float]], labels: Sequence[int]) -> Value:
  return mean([int(np.argmax(row)) == label for row, label in zip(scores, labels)])


def multiple_choice(scorer: Scorer, protocol: Protocol, benchmark: Benchmark) -> Values:
  """Chooses the likeliest ending, and the likeliest one for its length."""
  examples = benchmark.examples
  scored = _score_options(
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
  """Returns the index of the right option, a number or a text; '1' and '2' count from one."""
  if isinstance(answer, str):
    return options.index(answer) if answer in options else int(answer) - 1
  return int(answer)


def partial_evaluation(scorer: Scorer, protocol: Protocol, benchmark: Benchmark) -> Values:
  """Chooses the option that, in the place of the blank, makes the rest of the sentence likeliest."""
  requests, labels = [], []
  for e in benchmark.examples:
    text = e['sentence'] if 'sentence' in e else e['text']
    before, blank, after = re.split(r'(_|\[[^\]]*\])', text, maxsplit=1)
    options = e['options'] if 'options' in e else [e['option1'], e['option2']]
    labels.append(_label(e['answer'], options))
    placed = [_fitted(before, blank.strip('[]'), option) for option in options]
    requests.append([scorer.pair(before + option, ' ' + after.strip()) for option in placed])
  scored = _score_options(scorer, protocol, requests)
  return {'acc': _right([[-total([s]) for s in row] for row in scored], labels)}


ARTICLES = frozenset('A An The She He It They My His Her Their'.split())


def _fitted(before: str, pronoun: str, option: str) -> str:
  """Returns an option as written in the place of a pronoun: its case, and 's (lm-eval's wsc273)."""
  if pronoun.lower() in ('my', 'his', 'her', 'our', 'their'):
    option += "'s"
  first, _, rest = option.partition(' ')
  inside = pronoun != '_' and not before.rstrip().endswith('.')
  return f'{first.lower()} {rest}' if inside and first in ARTICLES and rest else option


def cloze(scorer: Scorer, protocol: Protocol, benchmark: Benchmark) -> Values:
  """Chooses the option that is the likeliest with its sentence: p(option) · p(rest | option)."""
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
  scored = _score_options(scorer, protocol, requests)
  return {'acc': _right([[-total([s]) for s in row] for row in scored], labels)}


def _common(a: str, b: str) -> int:
  """Counts the characters that both texts begin with."""
  return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def _begun(scorer: Scorer, context: str, continuation: str) -> Request:
  """Returns a request as `pair` makes it, in a document that begins with the context."""
  request = scorer.pair(context, continuation)
  return Request(np.concatenate([[scorer.eot], request.context]), request.target)


# Protocol.kind -> the function that scores it.
KINDS: dict[str, Callable[[Scorer, Protocol, Any], Values]] = {
  'corpus': corpus_tasks.sliding_windows,
  'hf': corpus_tasks.hf_perplexity_page,
  'pages': corpus_tasks.wikitext_pages,
  'store': corpus_tasks.held_out_loss,
  'last_token': last_token,
  'last_word': last_word,
  'written_word': written_word,
  'choices': multiple_choice,
  'partial': partial_evaluation,
  'cloze': cloze,
}

"""The protocols of evaluation, a row each, with everything that can change its figure.

A version is raised when a protocol's figure could change for the same model and data. A new task is a
row here, and a function in `tasks.KINDS` where it is scored in a new way: docs/extending.md.
docs/evaluation.md describes each in three lines.
"""

import dataclasses
from collections.abc import Iterator

from gpt2_jax.core.errors import UserError, brief

WINDOW = 1024  # positions that a protocol uses, of a model that has as many


@dataclasses.dataclass(frozen=True)
class Protocol:
  """A way to score a benchmark.

  Attributes:
    name: BENCHMARK/READING.
    kind: how it is scored, a key of `tasks.KINDS`.
    metrics: the names of its figures: *_ppl is exp(nll per unit), bits_per_* nll / (ln 2 · units).
    source: where it is from.
    text: how the text is changed before: 'raw', 'detokenized' (detokenizers.py), 'lambada'
      (straight quotes, a line of its own) or 'lm-eval'.
    prefix: whether <|endoftext|> stands before it. Where not, a corpus's first token is context.
    stride: targets of a window, of corpora; None where windows don't slide.
    units: the units that a figure is divided by.
    stop_words: whether words of `tasks.STOP_WORDS` can't be the answer.
    split: the split of the benchmark.
    version: the version of the protocol.
  """

  name: str
  kind: str
  metrics: tuple[str, ...]
  source: str
  text: str = 'raw'
  prefix: bool = False
  stride: int | None = None
  units: str = 'examples'
  stop_words: bool = False
  split: str = 'test'
  version: int = 1

  @property
  def benchmark(self) -> str:
    return self.name.partition('/')[0]


def _corpora() -> Iterator[Protocol]:
  words = ('word_ppl', 'token_ppl')
  corpora = (
    ('wikitext-2', words, 'words'),
    ('wikitext-103', words, 'words'),
    ('ptb', words, 'words'),
    ('lm1b', words, 'words'),
    ('enwik8', ('bits_per_byte', 'token_ppl'), 'bytes'),
    ('text8', ('bits_per_character', 'token_ppl'), 'characters'),
  )
  for name, metrics, units in corpora:
    for text in ('detokenized', 'raw') if units == 'words' else ('raw',):
      for stride in (32, 512, 1024):
        source = 'GPT-2 paper, 3.1; openai/gpt-2#78'
        if name.startswith('wikitext') and text == 'raw':
          source = 'Radford, as quoted in karpathy/llm.c#276 and #374'
        yield Protocol(
          f'{name}/{text}-{stride}',
          'corpus',
          metrics,
          source,
          text=text,
          prefix=True,
          stride=stride,
          units=units,
        )


LM_EVAL = 'EleutherAI/lm-evaluation-harness 4e7e0d4'
BFLM = 'cybertronai/bflm'
ACC, NORM = ('acc',), ('acc', 'acc_norm')

_ALL = (
  Protocol(
    'lambada/last-token',
    'last_token',
    ('ppl', 'acc'),
    f'{BFLM} eval_lambada.py; openai/gpt-2#131',
    text='lambada',
    units='last tokens',
  ),
  Protocol(
    'lambada/last-word',
    'last_word',
    ('ppl', 'acc'),
    'GPT-2 paper, 3.3',
    text='lambada',
    units='last words',
  ),
  Protocol(
    'lambada/last-word-stopwords',
    'written_word',
    ACC,
    f'{BFLM} eval_lambada_slow.py',
    text='lambada',
    units='last words',
    stop_words=True,
  ),
  Protocol(
    'lambada/lm-eval', 'last_word', ('ppl', 'acc'), f'{LM_EVAL}, lambada_openai', units='last words'
  ),
  *(
    Protocol(
      f'{name}/paper',
      'cloze',
      ACC,
      'GPT-2 paper, 3.2',
      text='detokenized',
      prefix=True,
      split='validation',
    )
    for name in ('cbt-cn', 'cbt-ne')
  ),
  *_corpora(),
  *(
    Protocol(
      f'wikitext-2/hf-{stride}',
      'hf',
      ('token_ppl',),
      'huggingface/transformers docs, perplexity.md',
      stride=stride,
      units='tokens',
    )
    for stride in (512, 1024)
  ),
  Protocol(
    'wikitext-2/lm-eval',
    'pages',
    ('word_ppl', 'byte_ppl', 'bits_per_byte'),
    f'{LM_EVAL}, wikitext',
    text='lm-eval',
    prefix=True,
    stride=1024,
    units='words',
  ),
  Protocol(
    'hellaswag/lm-eval',
    'choices',
    NORM,
    f'{LM_EVAL}, hellaswag',
    units='characters',
    split='validation',
  ),
  Protocol(
    'hellaswag/per-token',
    'choices',
    NORM,
    'karpathy/llm.c dev/data/hellaswag.py',
    units='tokens',
    split='validation',
  ),
  Protocol(
    'winogrande/partial',
    'partial',
    ACC,
    f'{LM_EVAL}, winogrande; Trinh and Le 2018, arXiv:1806.02847',
    split='validation',
  ),
  Protocol(
    'wsc273/partial', 'partial', ACC, f'{LM_EVAL}, wsc273; Trinh and Le 2018, arXiv:1806.02847'
  ),
)
PROTOCOLS = {protocol.name: protocol for protocol in _ALL}
# The table of the paper, in its order. It published no code: docs/evaluation.md says what is known.
PAPER = (
  'lambada/last-token',
  'cbt-cn/paper',
  'cbt-ne/paper',
  'wikitext-2/detokenized-32',
  'ptb/detokenized-32',
  'enwik8/raw-32',
  'text8/raw-32',
  'wikitext-103/detokenized-32',
  'lm1b/detokenized-32',
)


def store_protocol(folder: str) -> Protocol:
  """Returns the protocol of a token store's held-out loss, as training reports it."""
  return Protocol(
    f'store/{folder}',
    'store',
    ('loss', 'token_ppl'),
    'gpt2_jax/training/run.py',
    units='tokens',
    split='val',
  )


def parse(tasks: str) -> list[tuple[Protocol, bool]]:
  """Returns the protocols that some tasks name, each once, and whether each was named itself.

  Args:
    tasks: names, with commas between: of a protocol, of a benchmark (all of its protocols), `paper`,
      or `store:FOLDER`.

  Raises:
    UserError: a name is none of these.
  """
  found: dict[str, tuple[Protocol, bool]] = {}
  for name in filter(None, (task.strip() for task in tasks.split(','))):
    of_benchmark = [p for p in PROTOCOLS.values() if p.benchmark == name]
    if name.startswith('store:'):
      named, own = [store_protocol(name.removeprefix('store:'))], True
    elif name == 'paper':
      named, own = [PROTOCOLS[each] for each in PAPER], False
    elif name in PROTOCOLS or of_benchmark:
      named, own = of_benchmark or [PROTOCOLS[name]], True
    else:
      benchmarks = ', '.join(dict.fromkeys(p.benchmark for p in PROTOCOLS.values()))
      raise UserError(
        f'--tasks: {brief(name)} is none of paper, store:FOLDER, a benchmark '
        f'({benchmarks}) or a protocol ({", ".join(PROTOCOLS)}).'
      )
    for protocol in named:
      found[protocol.name] = protocol, own or found.get(protocol.name, (protocol, False))[1]
  if not found:
    raise UserError('--tasks names no task: paper is the table of the paper.')
  return list(found.values())

"""Figures that others published for the released weights, and what they can be compared with."""

import dataclasses

SIZES = {
  124_439_808: 'gpt2',
  354_823_168: 'gpt2-medium',
  774_030_080: 'gpt2-large',
  1_557_611_200: 'gpt2-xl',
}  # parameters -> name
NAMES = tuple(SIZES.values())


@dataclasses.dataclass(frozen=True)
class Published:
  """A row of figures.

  Attributes:
    source: who and where.
    protocol, metric: of ours that it is to be compared with.
    values: name of a size -> figure.
    same: whether it is of the same protocol; if not, `why` says what is known to be or may be other.
    why: see `same`.
  """

  source: str
  protocol: str
  metric: str
  values: dict[str, float]
  same: bool
  why: str = ''


def _sizes(*values: float | None) -> dict[str, float]:
  return {name: value for name, value in zip(NAMES, values) if value is not None}


PAPER = 'GPT-2 paper, table 3'
NO_CODE = 'window, stride and de-tokenizers were not published'
LM_EVAL, LLM_C = 'lm-eval', 'karpathy/llm.c'
BARE = 'its context has no activity label and is not cleaned'
WHICH = 'which version of its script gave it is not known'
STORE = 'it is of another corpus, unless the store holds that one'

TABLE = (
  Published(
    PAPER,
    'lambada/last-token',
    'ppl',
    _sizes(35.13, 15.60, 10.87, 8.63),
    False,
    'of which unit is not said; over whole words others find 40.06 for gpt2',
  ),
  Published(
    PAPER,
    'lambada/last-token',
    'acc',
    _sizes(0.4599, 0.5548, 0.6012, 0.6324),
    False,
    'described as of words, with a stop-word filter; the last token comes nearest',
  ),
  Published(
    'cybertronai/bflm', 'lambada/last-token', 'acc', _sizes(0.4667, None, None, None), False, WHICH
  ),
  Published('openai/gpt-2#131', 'lambada/last-token', 'acc', _sizes(0.4689, None, None, None), True),
  Published(
    'cybertronai/bflm',
    'lambada/last-word-stopwords',
    'acc',
    _sizes(0.4198, None, None, None),
    False,
    WHICH,
  ),
  Published(
    f'{LM_EVAL} #2159, #911', 'lambada/lm-eval', 'ppl', _sizes(40.0554, None, None, 10.63), True
  ),
  Published(
    f'{LM_EVAL} #2159, #911', 'lambada/lm-eval', 'acc', _sizes(0.3256, None, None, 0.5121), True
  ),
  Published(
    PAPER,
    'cbt-cn/paper',
    'acc',
    _sizes(0.8765, 0.9235, 0.9345, 0.9330),
    False,
    'its de-tokenizer and split were not published',
  ),
  Published(
    PAPER,
    'cbt-ne/paper',
    'acc',
    _sizes(0.834, 0.871, 0.880, 0.8905),
    False,
    'its de-tokenizer and split were not published',
  ),
  Published(
    PAPER, 'wikitext-2/detokenized-32', 'word_ppl', _sizes(29.41, 22.76, 19.93, 18.34), False, NO_CODE
  ),
  Published(
    PAPER, 'ptb/detokenized-32', 'word_ppl', _sizes(65.85, 47.33, 40.31, 35.76), False, NO_CODE
  ),
  Published(
    PAPER,
    'enwik8/raw-32',
    'bits_per_byte',
    _sizes(1.16, 1.01, 0.97, 0.93),
    False,
    'window and stride were not published',
  ),
  Published(
    PAPER,
    'text8/raw-32',
    'bits_per_character',
    _sizes(1.17, 1.06, 1.02, 0.98),
    False,
    'window and stride were not published',
  ),
  Published(
    PAPER,
    'wikitext-103/detokenized-32',
    'word_ppl',
    _sizes(37.50, 26.37, 22.05, 17.48),
    False,
    f'{NO_CODE}; its test text is that of WikiText-2, so that not both can be met',
  ),
  Published(
    PAPER, 'lm1b/detokenized-32', 'word_ppl', _sizes(75.20, 55.72, 44.575, 42.16), False, NO_CODE
  ),
  Published(
    'HF perplexity page', 'wikitext-2/hf-1024', 'token_ppl', _sizes(29.94, None, 19.44, None), True
  ),
  Published(
    'HF perplexity page', 'wikitext-2/hf-512', 'token_ppl', _sizes(25.2, None, 16.44, None), True
  ),
  Published(
    f'{LM_EVAL} #2159; huggingface/transformers#13761',
    'wikitext-2/lm-eval',
    'word_ppl',
    _sizes(37.37, None, None, 17.48),
    True,
  ),
  Published(
    f'{LM_EVAL} #2159', 'wikitext-2/lm-eval', 'bits_per_byte', _sizes(0.9769, None, None, None), True
  ),
  Published(LM_EVAL, 'hellaswag/lm-eval', 'acc', _sizes(0.2892, None, None, 0.4003), True),
  Published(LM_EVAL, 'hellaswag/lm-eval', 'acc_norm', _sizes(0.3114, None, None, 0.509), True),
  Published(
    f'{LLM_C} hellaswag.py',
    'hellaswag/per-token',
    'acc',
    _sizes(0.2859, None, None, 0.3842),
    False,
    BARE,
  ),
  Published(
    f'{LLM_C} hellaswag.py',
    'hellaswag/per-token',
    'acc_norm',
    _sizes(0.2955, None, None, 0.4893),
    False,
    BARE,
  ),
  Published(
    LLM_C,
    'hellaswag/per-token',
    'acc_norm',
    _sizes(0.294463, 0.375224, 0.431986, 0.488946),
    False,
    BARE,
  ),
  Published(LM_EVAL, 'winogrande/partial', 'acc', _sizes(None, None, None, 0.594), True),
  Published(
    'karpathy/nanoGPT README, OpenWebText',
    'store',
    'loss',
    _sizes(3.12, 2.84, 2.67, 2.54),
    False,
    STORE,
  ),
  Published(
    f'{LLM_C}, FineWeb', 'store', 'loss', _sizes(3.424958, 3.083089, 3.000580, 2.831273), False, STORE
  ),
)


def beside(protocol: str, metric: str) -> list[Published]:
  """What was published to be compared with a figure of ours."""
  name = 'store' if protocol.startswith('store/') else protocol
  return [row for row in TABLE if (row.protocol, row.metric) == (name, metric)]

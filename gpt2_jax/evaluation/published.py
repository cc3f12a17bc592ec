"""Figures that others published for the released weights, with the protocols of ours to compare."""

import dataclasses
from typing import Any

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


PAPER, BFLM, HF_PAGE = 'GPT-2 paper, table 3', 'cybertronai/bflm', 'HF perplexity page'
LM_EVAL, LLM_C = 'lm-eval', 'karpathy/llm.c'
# Why a figure is not of the same protocol.
UNIT = 'of which unit is not said; over whole words others find 40.06 for gpt2'
WORDS = 'described as of words, with a stop-word filter; the last token comes nearest'
SPLIT = 'its de-tokenizer and split were not published'
NO_CODE = 'window, stride and de-tokenizers were not published'
STRIDE = 'window and stride were not published'
SAME_TEXT = f'{NO_CODE}; its test text is that of WikiText-2, so that not both can be met'
BARE = 'its context has no activity label and is not cleaned'
WHICH = 'which version of its script gave it is not known'
STORE = 'it is of another corpus, unless the store holds that one'

# Source, protocol, metric, the figures of the four sizes, and why it is not the same protocol.
ROWS: tuple[tuple[Any, ...], ...] = (
  (PAPER, 'lambada/last-token', 'ppl', (35.13, 15.6, 10.87, 8.63), UNIT),
  (PAPER, 'lambada/last-token', 'acc', (0.4599, 0.5548, 0.6012, 0.6324), WORDS),
  (BFLM, 'lambada/last-token', 'acc', (0.4667, None, None, None), WHICH),
  ('openai/gpt-2#131', 'lambada/last-token', 'acc', (0.4689, None, None, None)),
  (BFLM, 'lambada/last-word-stopwords', 'acc', (0.4198, None, None, None), WHICH),
  (f'{LM_EVAL} #2159, #911', 'lambada/lm-eval', 'ppl', (40.0554, None, None, 10.63)),
  (f'{LM_EVAL} #2159, #911', 'lambada/lm-eval', 'acc', (0.3256, None, None, 0.5121)),
  (PAPER, 'cbt-cn/paper', 'acc', (0.8765, 0.9235, 0.9345, 0.933), SPLIT),
  (PAPER, 'cbt-ne/paper', 'acc', (0.834, 0.871, 0.88, 0.8905), SPLIT),
  (PAPER, 'wikitext-2/detokenized-32', 'word_ppl', (29.41, 22.76, 19.93, 18.34), NO_CODE),
  (PAPER, 'ptb/detokenized-32', 'word_ppl', (65.85, 47.33, 40.31, 35.76), NO_CODE),
  (PAPER, 'enwik8/raw-32', 'bits_per_byte', (1.16, 1.01, 0.97, 0.93), STRIDE),
  (PAPER, 'text8/raw-32', 'bits_per_character', (1.17, 1.06, 1.02, 0.98), STRIDE),
  (PAPER, 'wikitext-103/detokenized-32', 'word_ppl', (37.5, 26.37, 22.05, 17.48), SAME_TEXT),
  (PAPER, 'lm1b/detokenized-32', 'word_ppl', (75.2, 55.72, 44.575, 42.16), NO_CODE),
  (HF_PAGE, 'wikitext-2/hf-1024', 'token_ppl', (29.94, None, 19.44, None)),
  (HF_PAGE, 'wikitext-2/hf-512', 'token_ppl', (25.2, None, 16.44, None)),
  (
    f'{LM_EVAL} #2159; huggingface/transformers#13761',
    'wikitext-2/lm-eval',
    'word_ppl',
    (37.37, None, None, 17.48),
  ),
  (f'{LM_EVAL} #2159', 'wikitext-2/lm-eval', 'bits_per_byte', (0.9769, None, None, None)),
  (LM_EVAL, 'hellaswag/lm-eval', 'acc', (0.2892, None, None, 0.4003)),
  (LM_EVAL, 'hellaswag/lm-eval', 'acc_norm', (0.3114, None, None, 0.509)),
  (f'{LLM_C} hellaswag.py', 'hellaswag/per-token', 'acc', (0.2859, None, None, 0.3842), BARE),
  (f'{LLM_C} hellaswag.py', 'hellaswag/per-token', 'acc_norm', (0.2955, None, None, 0.4893), BARE),
  (LLM_C, 'hellaswag/per-token', 'acc_norm', (0.294463, 0.375224, 0.431986, 0.488946), BARE),
  (LM_EVAL, 'winogrande/partial', 'acc', (None, None, None, 0.594)),
  ('karpathy/nanoGPT README, OpenWebText', 'store', 'loss', (3.12, 2.84, 2.67, 2.54), STORE),
  (f'{LLM_C}, FineWeb', 'store', 'loss', (3.424958, 3.083089, 3.00058, 2.831273), STORE),
)


def _published(source: str, protocol: str, metric: str, figures: Any, why: str = '') -> Published:
  values = {name: figure for name, figure in zip(NAMES, figures) if figure is not None}
  return Published(source, protocol, metric, values, not why, why)


TABLE = tuple(_published(*row) for row in ROWS)


def beside(protocol: str, metric: str) -> list[Published]:
  """Returns the published rows that a figure of ours is to be compared with."""
  name = 'store' if protocol.startswith('store/') else protocol
  return [row for row in TABLE if (row.protocol, row.metric) == (name, metric)]

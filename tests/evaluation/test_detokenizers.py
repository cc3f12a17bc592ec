"""De-tokenizers are inverted on any text, and write what people write."""

import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2_jax.evaluation import detokenizers
from gpt2_jax.evaluation.detokenizers import CBT, LM1B, PTB, WIKITEXT

RULES = {'wikitext': WIKITEXT, 'ptb': PTB, 'lm1b': LM1B, 'cbt': CBT}
# what the benchmarks hold, and what comes near enough to be taken for it
GRAMMAR = st.sampled_from(
  """the did do n't n't. can not 's ' 're "s " `` '' -LRB- -RRB- ( ) [ ] { } . , ; : ! ? ... .. %
    $ # £ @-@ @,@ @.@ - -- a-b 1 N 5.5 1,000 000 <unk> = == U.S. U.S Mr. Mr J. J
    v. traders' didn't "Craig"
    “ ” – ° é 猫 don t @ ' x@-@y""".split()
)
TOKENS = st.one_of(
  GRAMMAR,
  GRAMMAR,
  st.text(st.characters(codec='utf-8', exclude_characters=' \n'), min_size=1, max_size=6),
)


@pytest.mark.parametrize('name', RULES)
@given(lines=st.lists(st.lists(TOKENS, max_size=12), max_size=4), end=st.booleans())
@settings(max_examples=100, deadline=None)
def test_tokens_come_back(name, lines, end):
  rules = RULES[name]
  pad = rules.pad
  text = '\n'.join(pad + ' '.join(line) + pad if line else pad for line in lines) + '\n' * end
  assert rules.tokenize_back(rules.detokenize(text)) == text


@pytest.mark.parametrize('name', RULES)
@given(text=st.text(st.one_of(st.sampled_from(' \n.,"\'@-=a1'), st.characters(codec='utf-8'))))
@settings(max_examples=100, deadline=None)
def test_any_text_comes_back(name, text):
  assert RULES[name].tokenize_back(RULES[name].detokenize(text)) == text


@pytest.mark.parametrize(
  'rules, tokens, written',
  [
    (
      WIKITEXT,
      ' \n = = Early life = = \n \n He had a guest @-@ starring role as " Craig " in '
      '" Teddy \'s Story " ( 2004 ) ; 1 @,@ 250 of 5 @.@ 6 % , Mr. X \'s in May . \n',
      '\n== Early life ==\n\nHe had a guest-starring role as "Craig" in "Teddy\'s Story" (2004); '
      "1,250 of 5.6%, Mr. X's in May.\n",
    ),
    (
      PTB,
      " it was n't black monday \n N stocks ' prices fell $ N or N % at <unk> 's \n",
      "it wasn't black monday\n1 stocks' prices fell $1 or 1% at <unk>'s\n",
    ),
    (LM1B, '" We didn \'t , " he said ( twice ) .\n', '"We didn\'t," he said (twice).\n'),
    (
      CBT,
      "`` Did n't you , '' said Mr. Smith -LRB- he -RRB- , `` say so ? ''",
      '"Didn\'t you," said Mr. Smith (he), "say so?"',
    ),
  ],
)
def test_people_write_so(rules, tokens, written):
  assert rules.detokenize(tokens) == written


def wikitext() -> str:
  folder = os.environ.get('GPT2_JAX_TEST_DATA')
  if not folder:
    pytest.skip('GPT2_JAX_TEST_DATA names no folder with wikitext-2/test.txt')
  return (Path(folder) / 'wikitext-2' / 'test.txt').read_text()


@pytest.mark.slow
def test_all_of_wikitext_2_comes_back_and_reads_as_text():
  text = wikitext()
  written = WIKITEXT.detokenize(text)
  assert WIKITEXT.tokenize_back(written) == text
  assert written.count('  ') < 50  # tokens that had to be kept apart, of 241,211
  for mark in (' @-@ ', ' @,@ ', ' @.@ ', ' , ', " 's"):
    assert written.count(mark) < 0.01 * text.count(mark), mark


def test_lm_evals_rules_for_wikitext():
  page = ' = Title = \n \n It \'s 5 @.@ 5 ( or " six " ) , the boys \' ; N times . \n = = A = = \n'
  assert detokenizers.lm_eval_wikitext(page) == (
    ' = Title =\n\nIt\'s 5.5 (or "six"), the boys\'; 1 times.\n== A ==\n'
  )

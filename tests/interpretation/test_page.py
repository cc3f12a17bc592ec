"""docs/interpretability.md says what is."""

import re
from pathlib import Path

import pytest

from gpt2_jax.model.sites import SITES

PAGE = (Path(__file__).parents[2] / 'docs' / 'interpretability.md').read_text()


@pytest.mark.slow
def test_the_example_runs():
  (example,) = re.findall(r'^```python\n(.*?)^```', PAGE, re.M | re.S)
  names = {}
  exec(example, names)
  assert names['by_position'].shape == (3, 7) and names['by_head'].shape == (3, 4)
  assert names['one_by_one'].shape == (3, 4, 7) and names['without'].shape == (3, 4)
  assert names['shares'].heads_LNB.shape == (3, 4, 4)
  assert names['vector'].value.shape == (32,) and len(names['steered'][0].tokens) == 5
  assert [len(text.tokens) for text in names['written']] == [5, 5]


def test_the_table_is_that_of_the_sites():
  rows = re.findall(r'^\| `(\S+)` \| (?:`(\S+)`)? ?\| (\S+) \|$', PAGE, re.M)
  assert rows == [(site.name, site.lens, site.letters) for site in SITES.values()]

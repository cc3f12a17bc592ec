"""The patching page: its numbers, and the page in a real browser on the real server."""

from urllib.parse import urlencode
from xml.etree import ElementTree

import numpy as np
import pytest

pytest.importorskip('fastapi', reason='the server needs the extra serve')
httpx = pytest.importorskip('httpx', reason='the client of these tests, of the extra test')

from support.models import byte_model  # noqa: E402
from support.serving import PAGE, audit, until  # noqa: E402

from gpt2_jax.core.errors import UserError  # noqa: E402
from gpt2_jax.interpretation.ablated_heads import next_logprobs, without_heads  # noqa: E402
from gpt2_jax.interpretation.prompt_pairs import patch_texts  # noqa: E402
from gpt2_jax.model import edits as edits_module  # noqa: E402
from gpt2_jax.model.edits import Edit, run  # noqa: E402

PAIR = dict(clean='f(<i>&x', corrupted='f(<b>&y', answers=['x', 'y'])
HASH = urlencode(dict(text=PAIR['clean'], corrupted=PAIR['corrupted'], right='x', wrong='y'))


@pytest.fixture(scope='module')
def model():
  return byte_model(**PAGE)


@pytest.fixture(scope='module')
def found(model):
  """By position and by head."""
  texts = PAIR['clean'], PAIR['corrupted'], PAIR['answers']
  return [patch_texts(model, *texts, over=over).restored for over in ('resid_pre', 'z')]


# ---- numbers ----------------------------------------------------------------


@pytest.mark.slow
def test_heads_that_are_taken_away_write_nothing(model):
  texts, heads = ['abc', 'a long one'], [(0, 1), (1, 0)]
  have = next_logprobs(model, texts, without_heads(model, heads))
  compiled = edits_module._run._cache_size()
  whole = next_logprobs(model, texts, without_heads(model, []))
  assert edits_module._run._cache_size() == compiled
  for row, text in enumerate(texts):
    ids = np.array([model.tokenizer.encode(text)])
    for have_V, edits in (
      (have[row], [Edit('z', 'zero', layer=layer, head=head) for layer, head in heads]),
      (whole[row], ()),
    ):
      logits_V = np.asarray(run(model, ids, edits)[0][0, -1], np.float64)
      want_V = logits_V - np.log(np.exp(logits_V - logits_V.max()).sum()) - logits_V.max()
      np.testing.assert_allclose(have_V, want_V, rtol=1e-4, atol=1e-4)
  with pytest.raises(UserError, match='no head'):
    without_heads(model, [(2, 0)])


def post(byte_server, route, **body):
  return httpx.post(f'{byte_server[0]}/v1/{route}', json=body, timeout=120)


@pytest.mark.slow
def test_the_server_answers_as_the_library(byte_server, found):
  for over, want in zip(('resid_pre', 'z'), found):
    told = post(byte_server, 'patch', **PAIR, over=over).json()
    np.testing.assert_allclose(told['restored'], want, rtol=1e-3, atol=1e-5)
  assert ''.join(told['clean']) == PAIR['clean'] and (told['layers'], told['heads']) == (2, 2)
  both = post(byte_server, 'patch', **PAIR, over='z', by=['head', 'position']).json()
  assert np.shape(both['restored']) == (2, 2, 7)
  told = post(byte_server, 'ablate', input='abc', heads=[[0, 1]], top=3).json()
  p = np.exp(next_logprobs(byte_server[1], ['abc'], without_heads(byte_server[1], [(0, 1)])))[0]
  best = max(told['next'][0], key=lambda row: row[2])
  assert best[2] == pytest.approx(p.max(), rel=1e-4) and 3 <= len(told['next'][0]) <= 6


@pytest.mark.slow
def test_what_cannot_be_patched_is_said_by_name(byte_server):
  for changes, param, says in [
    (dict(clean='abc'), 'clean', '3 tokens and the corrupted one 7'),
    (dict(answers=['x', 'xy']), 'answers', '2 tokens, not one'),
    (dict(answers=['x']), 'answers', ''),
    (dict(over='resid'), 'over', 'it has embed'),
    (dict(by=['head']), 'by', 'no axis'),
    (dict(by=['position', 'position']), 'by', 'twice'),
    (dict(by=['layer']), 'by', ''),
    (dict(clean='a' * 200, corrupted='b' * 200), 'clean', 'patches at a time'),
    (dict(clean='a' * 300, corrupted='b' * 300), 'clean', 'has no room'),
    (dict(nothing=1), 'nothing', 'Unrecognized'),
  ]:
    answer = post(byte_server, 'patch', **PAIR | changes)
    error = answer.json()['error']
    assert answer.status_code == 400 and error['param'] == param and says in error['message'], changes
  for changes, param in [
    (dict(heads=[[0, 2]]), 'heads'),
    (dict(heads=[[-1, 0]]), 'heads'),
    (dict(heads=[[0]]), 'heads'),
    (dict(heads=[[10**30, 0]]), 'heads'),
    (dict(input='a' * 300), 'input'),
    (dict(input=[]), 'input'),
    (dict(top=0), 'top'),
  ]:
    answer = post(byte_server, 'ablate', **dict(input='abc') | changes)
    assert answer.status_code == 400 and answer.json()['error']['param'] == param, changes


# ---- the page ---------------------------------------------------------------


def open_view(open_page, **options):
  page = open_page(f'/patching#{HASH}', **options)
  page.wait_for_selector('.nexts li', timeout=60_000)
  return page


def label(value: float) -> str:
  return f'{"−" if value < 0 else ""}{abs(100 * value):.1f} %'


@pytest.mark.slow
def test_the_maps_say_what_patches_restore(open_page, found):
  page = open_view(open_page)
  positions, heads = found
  cells = page.locator('.of-positions td')
  assert cells.count() == 14 and page.locator('.of-heads td').count() == 4
  cells.nth(7 + 3).hover()
  said = page.text_content('.of-positions .said')
  assert said == f'layer 1, position 3, i for b: {label(positions[1, 3])}'
  page.locator('.of-heads td').nth(2).hover()
  assert page.text_content('.of-heads .said') == f'layer 1, head 0: {label(heads[1, 0])}'
  names = page.locator('.of-heads td').evaluate_all('cells => cells.map(c => c.ariaLabel)')
  assert names[3] == f'layer 1, head 1: {label(heads[1, 1])}'
  page.select_option('.of-positions select', 'z')
  until(page, 'document.querySelectorAll(".of-positions td").length === 28')
  page.locator('.of-positions td').nth(8).click()
  assert page.text_content('#away') == 'without 0.1'
  assert page.locator('[aria-selected=true]').count() == 7 + 1


@pytest.mark.slow
def test_a_head_is_taken_away_by_pointer_and_by_keyboard(open_page, model):
  page = open_view(open_page)
  p = np.exp(next_logprobs(model, [PAIR['clean']], without_heads(model, [])))[0]
  shown = page.locator('.nexts section').first.locator('li span:not(.after)')
  assert float(shown.first.text_content().split()[0]) == pytest.approx(100 * p.max(), abs=0.51)
  page.locator('.of-heads td').nth(1).click()
  page.wait_for_selector('h3:has-text("and without")')
  assert page.text_content('#away') == 'without 0.1'
  page.keyboard.press('ArrowDown')
  page.keyboard.press('Enter')
  assert page.text_content('#away') == 'without 0.1, 1.1'
  want = np.exp(next_logprobs(model, [PAIR['clean']], without_heads(model, [(0, 1), (1, 1)])))[0]
  first = page.locator('.nexts section').first.locator('li').first.locator('.after')
  shown = f'{100 * want[p.argmax()]:.1f} %' if want[p.argmax()] < 0.0995 else None
  until(page, 'document.querySelector("#live").textContent.startsWith("without 0.1, 1.1")')
  assert shown is None or first.text_content() == shown
  page.keyboard.press('Enter')
  assert page.text_content('#away') == 'without 0.1'
  page.click('text=All heads back')
  assert (
    page.text_content('#away') == 'with all heads' and page.locator('.heat td:text("×")').count() == 0
  )
  until(page, '![...document.querySelectorAll("h3")].some(h => h.textContent.includes("without"))')


@pytest.mark.slow
def test_texts_are_text_and_errors_one_line(open_page):
  page = open_view(open_page)
  assert page.locator('#view i[onerror], #view b').count() == 0
  assert page.locator('.of-positions thead').text_content().count('<') == 1
  page.fill('#text', 'abc')
  page.keyboard.press('Control+Enter')
  page.wait_for_selector('#error:has-text("3 tokens")')
  assert page.locator('.of-positions td').count() == 14  # what was there stays
  page.fill('#corrupted', '<u>')
  page.keyboard.press('Control+Enter')
  until(page, 'document.querySelectorAll(".of-positions td").length === 6')
  assert page.is_hidden('#error') and 'corrupted=%3Cu%3E' in page.evaluate('location.hash')


@pytest.mark.slow
def test_an_svg_has_both_maps(open_page):
  page = open_view(open_page)
  with page.expect_download() as download:
    page.click('#save')
  root = ElementTree.fromstring(download.value.path().read_text().encode())
  texts = [node.text for node in root.iter('{http://www.w3.org/2000/svg}text')]
  assert {'i | b', 'x | y', '<', '&'} <= set(texts) and page.text_content('.summary-of') in texts
  assert len(list(root.iter('{http://www.w3.org/2000/svg}rect'))) == 1 + 2 * (14 + 4)


@pytest.mark.slow
@pytest.mark.parametrize('width, scheme', [(390, 'light'), (1280, 'light'), (1280, 'dark')])
def test_nobody_is_kept_out(open_page, scheme, width):
  page = open_view(open_page, color_scheme=scheme, viewport={'width': width, 'height': 844})
  assert audit(page) == []
  page.locator('.of-heads td').nth(2).click()
  page.wait_for_selector('h3:has-text("and without")')
  assert audit(page) == []
  assert page.evaluate('document.documentElement.scrollWidth') <= width

"""The attention view: its numbers, its figure, and its page in a real browser on the real server."""

import dataclasses
import json
import re
from urllib.parse import quote
from xml.etree import ElementTree

import jax
import numpy as np
import pytest
from support.arrays import assert_close
from support.models import byte_model
from support.serving import PAGE, audit

import gpt2_jax
from gpt2_jax.model.config import GPTConfig
from gpt2_jax.serving import attention_figure
from gpt2_jax.serving.attention_data import (
  KINDS,
  attention_data,
  characters,
  logit_lens,
  pack,
  token_text,
  unpack,
)

TEXT = 'abcab <b>&"c'
ODD = '<img src=x onerror=alert(1)>\n&\t\x01"é'


@pytest.fixture(scope='module')
def model():
  return byte_model(**PAGE)


@pytest.fixture(scope='module')
def data(model):
  return json.loads(json.dumps(attention_data(model, TEXT)))


def one_hot(*keys: int) -> np.ndarray:
  """A head whose query t looks at keys[t] alone, [1, 1, T, T]."""
  return np.eye(len(keys), dtype=np.float32)[list(keys)][None, None]


# ---- numbers ----------------------------------------------------------------


@pytest.mark.parametrize(
  'kind, keys', [('previous', [0, 0, 1, 2, 3, 4]), ('self', [0, 1, 2, 3, 4, 5]), ('first', [0] * 6)]
)
def test_a_head_of_one_character_has_that_alone(kind, keys):
  found = {name: x.item() for name, x in characters(one_hot(*keys), [5, 6, 7, 8, 9, 4]).items()}
  assert found == {name: float(name == kind) for name in KINDS}


def test_repeats_and_what_followed_them_are_told_apart():
  ids = [5, 6, 7, 5, 6, 7]  # 3, 4 and 5 are seen again: three of the four that count
  repeat = characters(one_hot(0, 1, 2, 0, 1, 2), ids)
  assert repeat['repeat'].item() == 0.75 and repeat['self'].item() == 0.25
  assert repeat['induction'].item() == 0 and repeat['first'].item() == 0.25
  follows = characters(one_hot(0, 1, 2, 1, 2, 3), ids)
  assert follows['induction'].item() == 0.75 and follows['repeat'].item() == 0


def test_even_attention_is_broad_and_all_its_shares_are_its_mean_weights():
  T = 7
  even = np.tril(np.ones((T, T))) / np.arange(1, T + 1)[:, None]
  found = characters(even[None, None], list(range(T)))
  share = np.mean(1 / np.arange(3, T + 1))
  assert found['broad'].item() == pytest.approx(1)
  for kind in ('previous', 'self', 'first'):
    assert found[kind].item() == pytest.approx(share)
  assert found['repeat'].item() == found['induction'].item() == 0


def test_two_tokens_are_too_few_for_a_character():
  found = characters(one_hot(0, 1), [3, 3])
  assert all(x.item() == 0 for x in found.values())


def test_weights_survive_packing():
  weights = np.tril(np.random.default_rng(0).random((2, 3, 5, 5)))
  back = unpack(pack(weights), 2, 3, 5)
  assert np.abs(back - weights).max() < 1 / 65535
  assert len(pack(weights)) == -(-2 * 3 * 15 * 2 // 3) * 4


def test_data_is_what_the_model_says(model, data):
  (found,) = gpt2_jax.features(model, TEXT)
  assert data['ids'] == found.tokens and ''.join(data['tokens']) == TEXT
  back = unpack(data['attentions'], data['layers'], data['heads'], len(TEXT))
  assert np.abs(back - found.attentions).max() < 1 / 65535
  kinds = characters(found.attentions, found.tokens)
  have = [[[head[kind] for kind in KINDS] for head in layer] for layer in data['character']]
  assert np.abs(have - np.stack([kinds[kind] for kind in KINDS], -1)).max() < 1e-4
  layer, head = data['strongest']
  numbers = {kind: kinds[kind] for kind in ('previous', 'self', 'repeat', 'induction')}
  assert max(x[layer, head] for x in numbers.values()) == max(x.max() for x in numbers.values())


def own(model) -> np.ndarray:
  """The model's probabilities after each token of TEXT, [T, V]."""
  tokens_BT = np.array([model.tokenizer.encode(TEXT)])
  return np.asarray(jax.jit(lambda tokens_BT: jax.nn.softmax(model(tokens_BT)[0]))(tokens_BT))


def test_the_lens_ends_in_the_models_own_predictions(model, data):
  assert len(data['lens']) == 3
  for row, p_V in zip(data['lens'][-1], own(model), strict=True):
    top = np.argsort(-p_V)[:5]
    assert [token for token, _ in row] == [token_text(model.tokenizer, i) for i in top]
    assert_close([p for _, p in row], p_V[top], 1e-4)


def test_each_layer_of_the_lens_is_layer_norm_and_logits(tiny):
  config = dataclasses.replace(tiny, tie_word_embeddings=False, layer_norm_epsilon=0.1)
  params = gpt2_jax.init_params(config, 1)
  rng = np.random.default_rng(2)
  params['ln_f'] = {name: rng.normal(1, 0.3, 32).astype(np.float32) for name in ('weight', 'bias')}
  model = gpt2_jax.bind(config, params)
  (found,) = gpt2_jax.features(model, rng.integers(0, 97, 11).tolist())
  p_LTK, ids_LTK = logit_lens(model, found.hidden_states, 97)
  table_VD = np.asarray(params['lm_head']['weight'], np.float64)[:97]
  weight, bias = params['ln_f']['weight'], params['ln_f']['bias']
  for layer, x_TD in enumerate(found.hidden_states.astype(np.float64)):
    if layer < config.n_layer:
      x_TD = x_TD - x_TD.mean(-1, keepdims=True)
      x_TD = x_TD / np.sqrt((x_TD**2).mean(-1, keepdims=True) + 0.1) * weight + bias
    logits_TV = x_TD @ table_VD.T
    p_TV = np.exp(logits_TV - logits_TV.max(-1, keepdims=True))
    p_TV /= p_TV.sum(-1, keepdims=True)
    have_TV = np.zeros_like(p_TV)
    np.put_along_axis(have_TV, ids_LTK[layer], p_LTK[layer], -1)
    assert_close(have_TV, p_TV)


def test_half_a_character_is_shown_as_its_bytes(model):
  tokens = attention_data(model, 'aé')['tokens']
  assert tokens == ['a', '\\xc3', '\\xa9']


def test_what_cannot_be_shown_is_said(model):
  with pytest.raises(gpt2_jax.UserError, match='has 9 tokens; the attention view takes 8'):
    attention_data(model, 'a' * 9, max_tokens=8)
  with pytest.raises(gpt2_jax.UserError, match='lens = 258'):
    attention_data(model, 'a', lens=258)
  with pytest.raises(gpt2_jax.UserError, match='layer 2: the model has 2'):
    attention_figure(model, 'a', layer=2)


@pytest.mark.slow
def test_a_classifier_attends_but_predicts_no_tokens(model):
  config = GPTConfig(
    vocab_size=257, n_positions=32, n_embd=32, n_layer=2, n_head=2, head='sequence_classification'
  )
  classifier = gpt2_jax.bind(config, gpt2_jax.init_params(config, 0))
  with pytest.raises(gpt2_jax.UserError, match='needs a tokenizer'):
    attention_data(classifier, 'a')
  classifier = gpt2_jax.Pretrained(classifier, model.tokenizer)
  with pytest.raises(gpt2_jax.UserError, match='ask with lens=0'):
    attention_data(classifier, 'abc')
  assert attention_data(classifier, 'abc', lens=0)['lens'] == []


# ---- the figure -------------------------------------------------------------


def svg_texts(svg: str) -> list[str]:
  root = ElementTree.fromstring(svg.encode())
  assert root.tag == '{http://www.w3.org/2000/svg}svg'
  return [node.text or '' for node in root.iter('{http://www.w3.org/2000/svg}text')]


def test_a_figure_is_a_picture_and_a_page(model, tmp_path):
  figure = attention_figure(model, ODD[-12:], layer=1)
  assert figure.heads == [2, 3] and attention_figure(model, ODD[-12:], head=1).heads == [1, 3]
  texts = svg_texts(figure.svg)
  assert {'>', '↵', '␁', '⇥', '"', '&'} <= set(texts)
  figure.save(tmp_path / 'a.svg')
  assert (tmp_path / 'a.svg').read_text() == figure.svg
  assert not re.search(r'(?:src|href|url\()=?["\']?(?:https?:)?//', figure.html)
  assert '</i>' not in attention_figure(model, 'a</i>').html.partition('const [data, heads]')[2]
  with pytest.raises(gpt2_jax.UserError, match=r'\.svg or \.html'):
    figure.save(tmp_path / 'a.png')


def test_a_heavier_weight_is_a_stronger_line(model):
  figure = attention_figure(model, 'abcd', layer=0, head=0)
  weights_TT = np.array([[1, 0, 0, 0], [0.5, 0.5, 0, 0], [0, 0, 0.25, 0.75], [0, 0, 0, 0]])
  figure.data['attentions'] = pack(np.broadcast_to(np.tril(weights_TT), (2, 2, 4, 4)))
  root = ElementTree.fromstring(figure.svg.encode())
  lines = root.findall('{http://www.w3.org/2000/svg}path')
  widths = [float(line.get('stroke-width')) for line in lines]
  assert_close(widths, [3.7, 2.2, 2.2, 1.45], 1e-3)


# ---- the page ---------------------------------------------------------------


def attend(open_page, text: str = TEXT, **options):
  page = open_page(f'/attention#text={quote(text)}', **options)
  page.wait_for_selector('.map')
  return page


def ink(page, canvas: str = '.strings .all') -> str:
  return page.eval_on_selector(canvas, 'canvas => canvas.toDataURL()')


@pytest.mark.slow
def test_choosing_heads_changes_the_picture(open_page, data):
  page = attend(open_page)
  layer, head = data['strongest']
  assert page.text_content('.summary-of').startswith(f'Layer {layer}, head {head}: ')
  cells = page.locator('.map td.kind')
  assert cells.count() == 4
  cells.nth(0).click()
  before = ink(page), ink(page, '.field-of-cells canvas')
  assert page.text_content('.summary-of').startswith('Layer 0, head 0: ')
  page.keyboard.press('ArrowDown')
  assert page.text_content('.summary-of').startswith('Layer 1, head 0: ')
  after = ink(page), ink(page, '.field-of-cells canvas')
  assert after[0] != before[0] and after[1] != before[1]
  page.keyboard.press('ArrowUp')
  assert (ink(page), ink(page, '.field-of-cells canvas')) == before
  page.check('text=Average several')
  cells.nth(3).click()
  assert page.locator('[aria-selected=true]').count() == 2
  assert page.text_content('.summary-of').startswith('2 heads, averaged: ')
  weights = unpack(data['attentions'], 2, 2, len(TEXT)).reshape(4, len(TEXT), -1)[[0, 3]].mean(0)
  page.locator('.from button').nth(5).hover()
  shown = [float(value or 0) for value in page.locator('.to button span').all_text_contents()]
  assert np.abs(shown - np.where(weights[5] < 0.005, 0, weights[5])).max() < 0.0051
  page.click('text=all')
  assert page.locator('[aria-selected=true]').count() == 4


@pytest.mark.slow
def test_a_token_is_followed_by_pointer_and_by_keyboard(open_page, data):
  page = attend(open_page)
  page.locator('.map td.kind').nth(0).click()
  weights = unpack(data['attentions'], 2, 2, len(TEXT))[0, 0]
  shown = lambda side: page.locator(f'.{side} button span').all_text_contents()
  values = lambda side: [float(value or 0) for value in shown(side)]
  near = lambda have, want: np.abs(np.array(have) - np.where(want < 0.005, 0, want)).max() < 0.0051
  assert not any(values('to'))
  page.locator('.from button').nth(7).hover()
  assert near(values('to'), weights[7]) and not any(values('from'))
  page.locator('.to button').nth(2).hover()
  assert near(values('from'), weights[:, 2]) and not any(values('to'))
  page.mouse.move(1, 1)
  assert not any(values('from'))
  page.locator('.from button').nth(4).click()  # stays
  page.mouse.move(1, 1)
  assert near(values('to'), weights[4])
  page.locator('.from button').nth(4).click()
  page.mouse.move(1, 1)
  assert not any(values('to'))
  page.keyboard.press('ArrowDown')
  assert near(values('to'), weights[5])
  strongest = f'{weights[5].max():.2f}'
  assert strongest in page.text_content('#live')
  page.keyboard.press('ArrowRight')
  assert near(values('from'), weights[:, 5])


@pytest.mark.slow
def test_the_matrix_says_its_cells(open_page, data):
  page = attend(open_page)
  page.locator('.map td.kind').nth(3).click()
  weights = unpack(data['attentions'], 2, 2, len(TEXT))[1, 1]
  page.focus('.map td[tabindex="0"]')
  page.locator('.field-of-cells').focus()
  for key in ['ArrowDown'] * 4 + ['ArrowRight'] * 3 + ['ArrowUp']:
    page.keyboard.press(key)
  assert page.text_content('.said') == f'a looks at a: {weights[3, 3]:.2f}'
  page.keyboard.press('ArrowLeft')
  assert page.text_content('.said') == f'a looks at c: {weights[3, 2]:.2f}'
  assert page.text_content('#live').strip() == page.text_content('.said')


@pytest.mark.slow
def test_the_lens_shows_what_the_model_predicts(open_page, model):
  page = attend(open_page)
  p_TV = own(model)
  last = page.locator('.lens tbody tr:nth-child(3) td')
  assert last.count() == len(TEXT)
  last.nth(6).hover()
  top = [token_text(model.tokenizer, i) for i in np.argsort(-p_TV[6])[:5]]
  shown = page.locator('.lens-card code').all_text_contents()[1:]
  assert len(shown) == 5
  for have, want in zip(shown, top):
    assert have == want or not want.strip().isprintable() or not want.strip()
  percent = page.locator('.lens-card span').first.text_content()
  assert float(percent.split()[0]) == pytest.approx(100 * p_TV[6].max(), abs=0.51)


@pytest.mark.slow
def test_an_svg_is_xml_with_the_tokens_in_it(open_page):
  page = attend(open_page, ODD)
  with page.expect_download() as download:
    page.click('#save')
  assert download.value.suggested_filename == 'attention.svg'
  texts = svg_texts(download.value.path().read_text())
  assert {'<', '>', '↵', '␁', '⇥', '"', '&', '\\xc3'} <= set(texts)
  assert page.text_content('.summary-of') in texts


@pytest.mark.slow
def test_markup_in_a_text_stays_text(open_page):
  page = attend(open_page, ODD)
  assert page.locator('#view img').count() == 0
  assert ''.join(page.locator('.from code').all_text_contents()).startswith('<img␣src=x␣onerror=')
  page.fill('#text', '<script>document.title = "gone"</script>')
  page.keyboard.press('Control+Enter')
  page.wait_for_selector('.from li:nth-child(40):last-child')
  assert page.title().startswith('Attention')
  assert 'script' in page.evaluate('decodeURIComponent(location.hash)')


@pytest.mark.slow
def test_what_the_server_refuses_is_one_line(open_page):
  page = attend(open_page)
  page.fill('#text', 'a' * 300)
  page.click('#look')
  page.wait_for_selector('#error')
  assert '300 tokens' in page.text_content('#error')
  assert page.locator('.from li').count() == len(TEXT)  # what was there stays
  page.context.set_offline(True)
  page.fill('#text', 'abc')
  page.click('#look')
  page.wait_for_selector('#error:has-text("reached")')
  page.context.set_offline(False)
  page.click('text=Try again')
  page.wait_for_selector('.from li:nth-child(3):last-child')
  assert page.is_hidden('#error')


@pytest.mark.slow
@pytest.mark.parametrize('width', [390, 1280])
@pytest.mark.parametrize('scheme', ['light', 'dark'])
def test_nobody_is_kept_out(open_page, scheme, width):
  page = attend(open_page, color_scheme=scheme, viewport={'width': width, 'height': 844})
  assert audit(page) == []
  page.locator('.from button').nth(7).click()
  page.locator('.lens td.guess').nth(3).focus()
  assert audit(page) == []
  assert page.evaluate('document.documentElement.scrollWidth') <= width


@pytest.mark.slow
def test_a_figure_works_where_nothing_can_be_loaded(browser, model, tmp_path):
  """As a notebook shows it: in a frame without an origin, and offline."""
  (tmp_path / 'cell.html').write_text(attention_figure(model, ODD, layer=0)._repr_html_())
  page = browser.new_page()
  complaints = []
  page.on('console', lambda message: complaints.append(message.text))
  page.on('pageerror', lambda error: complaints.append(str(error)))
  page.context.set_offline(True)
  page.goto((tmp_path / 'cell.html').as_uri())
  frame = page.frame_locator('iframe')
  frame.locator('.map td.kind').nth(3).click()
  assert frame.locator('.summary-of').text_content().startswith('Layer 1, head 1: ')
  frame.locator('.from button').nth(5).hover()
  assert any(frame.locator('.to button span').all_text_contents())
  assert not complaints
  page.close()

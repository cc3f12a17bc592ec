"""The playground, in a real browser, on the real server."""

import contextlib
import io
import json
import math
import subprocess

import jax
import numpy as np
import pytest
import tyro
from support.serving import ARGUMENTS, CHROMIUM, audit, until

import gpt2_jax
from gpt2_jax.cli import inputs, main

pytestmark = pytest.mark.slow
ODD = 'it\'s <b>"q"</b> \\ $HOME `x` é🙂\n\t-'
DONE = '#choices li:not(.coming)'


def text(page) -> str:
  return page.input_value('#text')


def write(page, words: str) -> None:
  page.fill('#text', words)
  page.focus('#text')


def fix_seed(page, seed: int) -> None:
  page.click('#settings-button')
  page.fill('#seed', str(seed))
  page.keyboard.press('Escape')
  page.focus('#text')


def choices(page, n: int = 3) -> list[str]:
  """What is offered, once it is whole: each as the text that it would become."""
  until(page, f'document.querySelectorAll("{DONE}").length === {n}')
  until(page, 'document.querySelector("#live").textContent.includes("1 of")')
  found = []
  for _ in range(n):
    found.append(page.text_content('.ghost'))
    page.keyboard.press('ArrowDown')
  return found


def colour(page) -> None:
  page.click('#colour')
  page.wait_for_selector('.token')
  page.focus('#text')


def test_a_text_is_continued_chosen_taken_undone_and_kept(open_page, byte_server):
  page = open_page()
  write(page, 'ab')
  fix_seed(page, 7)
  page.keyboard.press('Tab')
  offered = choices(page)
  wanted = gpt2_jax.generate(
    byte_server[1],
    'ab',
    num_return_sequences=3,
    max_new_tokens=24,
    temperature=0.8,
    top_p=0.95,
    seed=7,
  )
  assert offered == [result.text for result in wanted] and len(set(offered)) == 3
  assert text(page) == 'ab'
  page.keyboard.press('ArrowDown')
  page.keyboard.press('Enter')
  taken = text(page)
  assert taken == 'ab' + offered[1].replace('\r\n', '\n').replace('\r', '\n')
  assert page.is_hidden('#choices-box')
  page.keyboard.press('Control+z')
  assert text(page) == 'ab'
  page.keyboard.press('Control+Shift+z')
  assert text(page) == taken
  page.keyboard.type('!')
  page.wait_for_timeout(300)
  page.reload()
  assert text(page) == taken + '!'
  assert page.input_value('#seed') == '7' and page.is_checked('#fixed')


def test_tab_again_draws_others_and_stands_where_the_caret_is(open_page, byte_server):
  page = open_page()
  write(page, 'one two')
  fix_seed(page, 3)
  page.evaluate('document.querySelector("#text").setSelectionRange(3, 3)')
  page.keyboard.press('Tab')
  first = choices(page)
  page.keyboard.press('Tab')
  until(page, 'document.querySelector("#choices-foot").textContent.includes("seed 4")')
  second = choices(page)
  for seed, offered in ((3, first), (4, second)):
    wanted = gpt2_jax.generate(
      byte_server[1],
      'one',
      num_return_sequences=3,
      max_new_tokens=24,
      temperature=0.8,
      top_p=0.95,
      seed=seed,
    )
    assert offered == [result.text for result in wanted]
  shown = page.text_content('#mirror').removesuffix('\u200b')
  assert shown == 'one' + second[0] + ' two'
  page.click('#choice-2')
  assert text(page).startswith('one') and text(page).endswith(' two') and len(text(page)) > 7


def test_escape_drops_and_ends_the_request_and_lets_tab_leave(open_page):
  page = open_page()
  write(page, 'abc')
  ended, held = [], []
  page.route('**/v1/completions', lambda route: held.append(route))  # never answered
  page.on('requestfailed', lambda request: ended.append(request.url))
  page.keyboard.press('Tab')
  page.wait_for_selector('#choices-box')
  page.wait_for_timeout(100)
  assert held and not ended
  page.keyboard.press('Escape')
  page.wait_for_timeout(100)
  assert page.is_hidden('#choices-box') and text(page) == 'abc' and len(ended) == 1
  focused = lambda: page.evaluate('document.activeElement.id')
  page.keyboard.press('Escape')
  assert focused() == 'text'
  page.keyboard.press('Tab')
  assert focused() == 'continue'
  page.keyboard.press('Shift+Tab')
  assert focused() == 'text'
  page.keyboard.press('Escape')
  page.keyboard.type('d')  # and Tab is again what it was
  page.keyboard.press('Tab')
  page.wait_for_selector('#choices-box')
  assert focused() == 'text' and text(page) == 'abcd'


def test_tokens_say_what_the_model_holds_of_them(open_page, byte_server):
  page = open_page()
  write(page, 'aé<i>🙂.')
  colour(page)
  model = byte_server[1]
  ids = model.tokenizer.encode('aé<i>🙂.')
  logprobs = jax.nn.log_softmax(model(np.array([ids]))[0])
  each = [float(logprobs[i, ids[i + 1]]) for i in range(len(ids) - 1)]
  characters = [each[0] + each[1], each[2], each[3], each[4], sum(each[5:9]), each[9]]
  shown = page.eval_on_selector_all('.token', 'all => all.map(e => [e.textContent, e.className])')
  assert [name for name, _ in shown] == list('aé<i>🙂.')
  limits = (0.5, 0.1, 0.01, 0.001)
  for (_, kind), logprob in zip(shown[1:], characters):
    assert kind == f'token p{sum(math.exp(logprob) < limit for limit in limits)}'
  page.keyboard.press('End')  # the caret's token is the last one
  page.wait_for_selector('#card')
  assert page.text_content('#card-head code') == '.'
  said = [float(p.removesuffix('%')) for p in page.locator('#alternatives span').all_text_contents()]
  likeliest = sorted(np.exp(logprobs[-2]), reverse=True)[:5]
  np.testing.assert_allclose(said[:5], 100 * np.array(likeliest), rtol=0.06)


def test_an_alternative_branches_and_the_old_text_stays(open_page):
  page = open_page()
  write(page, 'abcdef')
  colour(page)
  page.evaluate('document.querySelector("#text").setSelectionRange(2, 2)')
  page.keyboard.press('Alt+ArrowDown')
  assert page.text_content('#card-head code') == 'c'
  other = page.evaluate('document.activeElement.querySelector("code").textContent')
  assert page.evaluate('document.activeElement.closest("#card") !== null')
  page.keyboard.press('Enter')
  until(page, 'document.querySelector("#text").value.length > 3')
  until(page, 'document.querySelector("#choices-box").hidden')
  branched = text(page)
  assert branched.startswith('ab') and branched[2] != 'c' and len(other) >= 1
  assert page.text_content('#branch-count') == '2'
  page.click('#branches-button')
  page.locator('.branch').nth(1).click()
  assert text(page) == 'abcdef'
  page.locator('.branch').nth(0).click()
  assert text(page) == branched
  page.wait_for_timeout(300)
  page.reload()
  assert text(page) == branched and page.text_content('#branch-count') == '2'


def test_each_tab_has_its_text(open_page):
  """A new one begins with what was written last, wherever."""
  page = open_page()
  write(page, 'the first')
  page.wait_for_timeout(300)
  other = page.context.new_page()
  other.goto('/')
  assert text(other) == 'the first'
  write(other, 'the second')
  other.wait_for_timeout(300)
  for each, words in ((page, 'the first'), (other, 'the second')):
    each.reload()
    assert text(each) == words
  third = page.context.new_page()
  third.goto('/')
  assert text(third) == 'the second'


def test_the_pointer_finds_the_token_under_it(open_page):
  page = open_page()
  write(page, 'abcdef')
  colour(page)
  box = page.locator('.token').nth(3).bounding_box()
  page.mouse.move(box['x'] + box['width'] / 2, box['y'] + box['height'] / 2)
  page.wait_for_selector('#card')
  assert page.text_content('#card-head code') == 'd'
  page.mouse.move(5, 300)
  page.wait_for_selector('#card', state='hidden')


def test_a_length_that_the_context_does_not_hold(open_page, byte_server):
  """Half the context is written."""
  _, model = byte_server
  page = open_page()
  write(page, 'abc')
  fix_seed(page, 3)
  page.click('#settings-button')
  page.fill('#temperature', '0')
  page.fill('#length', '1000')
  page.keyboard.press('Escape')
  page.focus('#text')
  page.keyboard.press('Tab')
  until(page, f'document.querySelectorAll("{DONE}").length === 1')
  half = model.config.n_positions // 2
  [want] = gpt2_jax.generate(model, 'abc', do_sample=False, max_new_tokens=half)
  assert page.text_content('.ghost') == want.text and want.finish_reason == 'length'


def test_what_is_copied_gives_the_same_texts(open_page, byte_server):
  address, model = byte_server
  page = open_page()
  page.context.grant_permissions(['clipboard-read', 'clipboard-write'], origin=address)
  write(page, ODD)
  fix_seed(page, 5)
  page.click('#settings-button')
  page.fill('#top_k', '50')
  page.fill('#length', '9')
  page.check('#newline')
  page.keyboard.press('Escape')
  page.focus('#text')
  page.keyboard.press('Tab')
  offered = choices(page)
  page.keyboard.press('ArrowUp')
  page.keyboard.press('Enter')
  written = text(page)

  def copied(what: str) -> str:
    page.evaluate('document.querySelector("#live").textContent = ""')
    page.click('#copy-button')
    page.click(f'[data-copy={what}]')
    until(page, 'document.querySelector("#live").textContent.startsWith("Copied")')
    page.keyboard.press('Escape')
    return page.evaluate('navigator.clipboard.readText()')

  assert copied('text') == written
  answer = subprocess.run(['bash', '-c', copied('curl')], capture_output=True, check=True, timeout=60)
  assert [choice['text'] for choice in json.loads(answer.stdout)['choices']] == offered

  verb = tyro.cli(
    main.Verb,
    args=bash_words(copied('cli')),
    registry=inputs.registry,
    config=(tyro.conf.OmitArgPrefixes,),
  )
  assert verb.prompt == (ODD,) and verb.checkpoint == 'bytes'
  results = gpt2_jax.generate(model, ODD, **inputs.given(verb.options))
  assert [result.text for result in results] == offered

  printed = io.StringIO()
  with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
    patch.setattr(gpt2_jax, 'from_pretrained', {'bytes': model}.__getitem__)
    exec(copied('python'), {})
  assert printed.getvalue() == offered[2] + '\n'


def bash_words(command: str) -> list[str]:
  """The arguments of `gpt2-jax`, as bash makes them."""
  done = subprocess.run(
    ['bash', '-c', f'gpt2-jax() {{ printf "%s\\0" "$@"; }}; {command}'],
    capture_output=True,
    text=True,
    check=True,
  )
  return done.stdout.split('\0')[:-1]


def test_a_phone_has_a_button_and_takes_by_touch(open_page):
  page = open_page(viewport={'width': 390, 'height': 844}, has_touch=True, is_mobile=True)
  page.locator('#text').tap()
  page.keyboard.type('hello')
  page.tap('#continue')
  until(page, f'document.querySelectorAll("{DONE}").length === 3')
  until(page, 'document.querySelector("#live").textContent.includes("1 of")')
  for name in ('#continue', '#choice-1'):
    assert page.locator(name).bounding_box()['height'] >= 44
  page.tap('#choice-1')
  assert text(page).startswith('hello') and len(text(page)) > 5
  wide = 'document.documentElement.scrollWidth - document.documentElement.clientWidth'
  assert page.evaluate(wide) == 0
  for panel in ('settings', 'copy', 'branches', 'help'):
    page.tap(f'#{panel}-button')
    box = page.locator(f'#{panel}').bounding_box()
    assert box['x'] >= 0 and box['x'] + box['width'] <= 390 and box['y'] >= 0
    assert box['y'] + box['height'] <= 844
    page.keyboard.press('Escape')


def test_text_is_text(open_page):
  """What is written, what the server sends, and what is kept: none of it becomes markup."""
  page = open_page()
  bad = '<img src=x onerror=alert(1)>\x1b[31m&amp;\u202e'
  event = {'choices': [{'index': i, 'text': bad, 'finish_reason': 'stop'} for i in range(3)]}
  tokens = {
    'tokens': [bad],
    'token_logprobs': [-1.0],
    'text_offset': [0],
    'top_logprobs': [{bad + '!': -0.5, bad: -1.0}],
  }

  def answer(route):
    asked = route.request.post_data_json
    if asked.get('echo'):
      return route.fulfill(json={'choices': [{'logprobs': tokens}]})
    route.fulfill(
      content_type='text/event-stream', body=f'data: {json.dumps(event)}\n\ndata: [DONE]\n\n'
    )

  page.route('**/v1/completions', answer)
  write(page, bad)
  page.keyboard.press('Tab')
  assert choices(page) == [bad] * 3
  page.keyboard.press('Enter')
  assert text(page) == bad + bad
  colour(page)
  page.keyboard.press('Home')
  page.wait_for_selector('#card')
  assert page.text_content('#alternatives code').startswith('<img src=x onerror=alert(1)>␛[31m')
  page.click('#branches-button')
  assert page.text_content('.branch').startswith('<img')
  assert page.locator('main img, .panel img').count() == 0
  assert page.get_attribute('#attention', 'href').startswith('/attention#text=%3Cimg')


def test_trouble_is_one_line_and_nothing_is_lost(open_page):
  page = open_page()
  write(page, 'abc')
  page.context.set_offline(True)
  page.keyboard.press('Tab')
  page.wait_for_selector('#error:has-text("be reached")')
  assert text(page) == 'abc' and page.is_hidden('#choices-box')
  page.context.set_offline(False)
  page.click('#error button:has-text("Try again")')
  choices(page)
  assert page.is_hidden('#error')
  page.keyboard.press('Escape')

  tries = []

  def busy(route):
    tries.append(route.request)
    if len(tries) > 1:
      return route.continue_()
    route.fulfill(status=429, headers={'Retry-After': '1'}, json={'error': {'message': 'busy'}})

  page.route('**/v1/completions', busy)
  page.keyboard.press('Tab')
  page.wait_for_selector('#error:has-text("again in 1 s")')
  choices(page)
  assert len(tries) == 2 and page.is_hidden('#error') and text(page) == 'abc'


def test_a_site_whose_name_is_made_to_lead_here_gets_nothing(browser, byte_server):
  """DNS rebinding, in a browser that believes it: 403 for the page, and for what its scripts ask for
  under our own name.
  """
  address, _ = byte_server
  port = address.rpartition(':')[2]
  engine = browser.browser_type
  lie = '--host-resolver-rules=MAP evil.example 127.0.0.1'
  with contextlib.closing(engine.launch(executable_path=CHROMIUM, args=[*ARGUMENTS, lie])) as fooled:
    page = fooled.new_page()
    answer = page.goto(f'http://evil.example:{port}/')
    assert answer.status == 403 and '--allow-host' in answer.text()
    ask = """async (url) => { try {
      const headers = {'Content-Type': 'application/json'};
      const answer = await fetch(url, {method: 'POST', headers, body: '{"prompt": "a"}'});
      return answer.status;
    } catch (error) { return 'kept out'; } }"""
    assert page.evaluate(ask, f'http://evil.example:{port}/v1/completions') == 403
    assert page.evaluate(ask, f'{address}/v1/completions') == 'kept out'  # CORS
    page.goto(address)
    assert page.evaluate(ask, f'{address}/v1/completions') == 200


def test_a_key_is_asked_for_once(open_page):
  page = open_page()

  def locked(route):
    if route.request.headers.get('authorization') != 'Bearer secret':
      return route.fulfill(status=401, json={'error': {'message': 'no key'}})
    route.continue_()

  page.route('**/v1/*', locked)
  page.reload()
  for key in ('wrong', 'secret'):
    page.wait_for_selector('#key-form')
    page.fill('#key', key)
    page.keyboard.press('Enter')
  until(page, 'document.querySelector("#model").value === "bytes"')
  assert page.is_hidden('#key-form') and page.is_hidden('#error')
  write(page, 'abc')
  page.keyboard.press('Tab')
  choices(page)
  assert 'secret' not in json.dumps(page.evaluate('({...localStorage})'))
  page.click('#copy-button')
  page.click('[data-copy=curl]')
  page.wait_for_selector('#copied')
  assert '"Authorization: Bearer $GPT2_JAX_API_KEY"' in page.input_value('#copied')


def test_of_a_long_text_the_end_is_read(open_page, byte_server):
  page = open_page()
  words = ' '.join(map(str, range(400)))
  write(page, words)
  fix_seed(page, 1)
  page.keyboard.press('Tab')
  offered = choices(page)
  read = int(page.text_content('#note').split()[5])
  assert 150 < read <= 256 - 24
  wanted = gpt2_jax.generate(
    byte_server[1],
    words[-read:],
    num_return_sequences=3,
    max_new_tokens=24,
    temperature=0.8,
    top_p=0.95,
    seed=1,
  )
  assert offered == [result.text for result in wanted]
  assert text(page) == words


@pytest.mark.parametrize('face', ['serif', 'sans', 'mono'])
def test_the_mirror_breaks_lines_where_the_field_does(open_page, face):
  page = open_page()
  page.evaluate(f'document.documentElement.dataset.face = "{face}"')
  rng = np.random.default_rng(0)
  letters = np.array(list('abcdefgiilmnorstTAVWy ,.    \n\t'))
  write(page, ''.join(rng.choice(letters, 2500)) + 'x' * 200 + '\n')
  height = """() => {
    const [area, mirror] = [document.querySelector('#text'), document.querySelector('#mirror')];
    area.style.height = '0';
    const found = [area.scrollHeight, mirror.scrollHeight];
    area.style.height = '';
    return found;
  }"""
  field, mirror = page.evaluate(height)
  assert field == mirror > 300
  colour(page)
  field, mirror = page.evaluate(height)
  assert field == mirror


@pytest.mark.parametrize('scheme', ['light', 'dark'])
def test_nobody_is_kept_out(open_page, scheme):
  page = open_page(color_scheme=scheme)
  assert audit(page) == []
  write(page, 'abcdef')
  page.keyboard.press('Tab')
  choices(page)
  assert audit(page) == []
  page.keyboard.press('Enter')
  colour(page)
  page.keyboard.press('End')
  page.wait_for_selector('#card')
  assert audit(page) == []
  for panel in ('settings', 'copy', 'branches', 'help'):
    page.click(f'#{panel}-button')
    assert audit(page) == [], panel
    page.keyboard.press('Escape')
  page.context.set_offline(True)
  page.click('#continue')
  page.wait_for_selector('#error')
  assert audit(page) == []


def test_the_theme_is_the_system_s_until_it_is_chosen(open_page):
  page = open_page(color_scheme='dark')
  paper = lambda: page.evaluate('getComputedStyle(document.documentElement).backgroundColor')
  dark = paper()
  page.click('#theme')
  assert paper() != dark
  page.reload()
  assert paper() != dark and page.evaluate('document.documentElement.dataset.theme') == 'light'
  page.emulate_media(color_scheme='light')
  page.click('#theme')
  assert paper() == dark

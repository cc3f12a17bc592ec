"""Makes the pictures of the served pages in docs/images.

    python docs/screenshots.py WORKDIR

needs the extras `serve` and `serve-test`, Chromium, and a run of configs/tiny.py.
"""

import sys
from pathlib import Path
from urllib.parse import quote, urlencode

from playwright.sync_api import sync_playwright

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / 'tests')]

from support.serving import ARGUMENTS, CHROMIUM, serve  # noqa: E402

import gpt2_jax  # noqa: E402

IMAGES = ROOT / 'docs' / 'images'
START = 'class Reader:\n    def __init__(self, path):\n        self.path = path\n\n    def read(self'
READ = 'import os\nimport sys\n\n\ndef main(argv):\n    return os.path.join(argv[0], argv[1])\n'
PAIR = {
  'text': 'def f(self, x):\n    self',
  'corrupted': 'def f(name, x):\n    name',
  'right': '.',
  'wrong': ' =',
}
DONE = 'document.querySelectorAll("#choices li").length === 3 && !document.querySelector(".coming")'


def playground(page, scheme: str) -> None:
  """Light: continuations to choose from; dark: tokens and the alternatives of one."""
  page.goto('/')
  page.evaluate(
    'sessionStorage.setItem("gpt2_jax.settings", JSON.stringify({face: "mono", seed: 11, '
    'fixed: true, temperature: 0.7, length: 20}))'
  )
  page.reload()
  page.fill('#text', START)
  page.focus('#text')
  page.keyboard.press('Tab')
  page.wait_for_function(DONE)
  page.keyboard.press('ArrowDown')
  if scheme == 'dark':
    page.keyboard.press('Enter')
    page.click('#colour')
    page.wait_for_selector('.token')
    page.locator('.token', has_text='path').nth(1).scroll_into_view_if_needed()
    box = page.locator('.token', has_text='path').nth(1).bounding_box()
    page.mouse.move(box['x'] + box['width'] / 2, box['y'] + box['height'] / 2)
    page.wait_for_selector('#card')
  page.screenshot(path=IMAGES / f'playground-{scheme}.png')


def attention(page, scheme: str) -> None:
  """A token that is followed."""
  page.goto(f'/attention#text={quote(READ)}')
  page.wait_for_selector('.map', timeout=120_000)  # it is compiled
  page.locator('.from button', has_text='join').first.click()
  page.evaluate('scrollTo(0, 0)')
  page.screenshot(path=IMAGES / f'attention-{scheme}.png', full_page=True)


def patching(page, scheme: str) -> None:
  """A head that is taken away."""
  page.goto(f'/patching#{urlencode(PAIR)}')
  page.wait_for_selector('.nexts li', timeout=120_000)  # it is compiled
  page.locator('.of-heads td').nth(0).click()
  page.wait_for_selector('h3:has-text("and without")')
  page.locator('.of-positions td').nth(3).hover()
  page.evaluate('scrollTo(0, 0)')
  page.screenshot(path=IMAGES / f'patching-{scheme}.png', full_page=True)


def main(workdir: str) -> None:
  models = {'tiny': gpt2_jax.from_pretrained(workdir)}
  with serve(models) as running, sync_playwright() as playwright:
    browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
    for scheme in ('light', 'dark'):
      context = browser.new_context(
        base_url=running.url, color_scheme=scheme, viewport={'width': 1280, 'height': 720}
      )
      playground(context.new_page(), scheme)
      attention(context.new_page(), scheme)
      patching(context.new_page(), scheme)
    browser.close()


if __name__ == '__main__':
  main(*sys.argv[1:])

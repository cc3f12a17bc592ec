"""The site, by Sphinx, MyST and Furo, of the same Markdown that a forge shows.

    pip install -e '.[docs]' && sphinx-build -W -b html -c docs . site

Sources are the whole tree, so that a link from a page to a file is the same here and there. What is
no page is offered for download, or, where GPT2_JAX_REPOSITORY says where the code lies
(https://github.com/OWNER/gpt2_jax), linked there.
"""

import configparser
import os
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
_setup = configparser.ConfigParser()
_setup.read(ROOT / 'setup.cfg')

project, author = 'gpt2_jax', 'the authors of gpt2_jax'
release = version = _setup['metadata']['version']
root_doc = 'docs/index'
include_patterns = [
  'docs/*.md',
  'docs/reference/*.md',
  'notebooks/*.ipynb',
  'experiments/README.md',
  'experiments/*/README.md',
  'benchmarks/*.md',
  '*.md',
]
extensions = ['myst_nb', 'sphinx_copybutton']
nb_execution_mode = 'off'  # tests/test_notebooks.py runs them
myst_heading_anchors = 4
myst_enable_extensions = ['attrs_inline']
# strikethrough is for HTML alone, which the site is; a heading may follow on one two levels above
suppress_warnings = ['myst.header', 'myst.strikethrough', 'misc.highlighting_failure']

html_theme = 'furo'
html_title = f'gpt2_jax {release}'
html_extra_path = ['site_root']  # the root leads to docs/index.html
html_copy_source = False
html_theme_options: dict[str, Any] = {'navigation_with_keys': True}
REPOSITORY = os.environ.get('GPT2_JAX_REPOSITORY', '').rstrip('/')
if REPOSITORY:
  html_theme_options |= {
    'source_repository': REPOSITORY,
    'source_branch': 'main',
    'source_directory': '',
  }


def is_page(path: Path) -> bool:
  """Whether a file is a page of the site."""
  name = path.relative_to(ROOT)
  return any(
    name.match(pattern) and len(name.parts) == pattern.count('/') + 1 for pattern in include_patterns
  )


def linked(app: Any, docname: str, source: list[str]) -> None:
  """Lets links to what is no page lead to the repository; a folder without one is no link."""
  here = (ROOT / docname).parent

  def rewritten(found: re.Match) -> str:
    text, target = found[1], found[2]
    path, _, _ = target.partition('#')
    place = Path(os.path.normpath(here / path))
    if '://' in target or target[0] in '#<' or not place.is_relative_to(ROOT) or not place.exists():
      return found[0]
    if place.is_file() and (is_page(place) or found[0][0] == '!'):
      return found[0]
    if REPOSITORY:
      kind = 'tree' if place.is_dir() else 'blob'
      return f'[{text}]({REPOSITORY}/{kind}/main/{place.relative_to(ROOT).as_posix()})'
    return text if place.is_dir() else found[0]

  parts = re.split(r'(^```.*?^```$)', source[0], flags=re.M | re.S)
  parts[::2] = [
    re.sub(r'!?\[([^][]*(?:\[[^][]*\])?[^][]*)\]\(([^()\s]+)\)', rewritten, part)
    for part in parts[::2]
  ]
  source[0] = ''.join(parts)


def reachable(app: Any, name: str, template: str, context: dict[str, Any], doctree: Any) -> None:
  """Lets a keyboard scroll what is wider than the page, and says how deep headings beside it are."""
  if 'body' in context:
    body = context['body'].replace('<pre>', '<pre tabindex="0">')
    context['body'] = body.replace(
      '<div class="table-wrapper', '<div tabindex="0" class="table-wrapper'
    )
  if tree := context.get('furo_navigation_tree'):
    context['furo_navigation_tree'] = tree.replace('role="heading"', 'role="heading" aria-level="2"')


def setup(app: Any) -> None:
  app.connect('source-read', linked)
  app.connect('html-page-context', reachable, priority=900)  # after the theme's

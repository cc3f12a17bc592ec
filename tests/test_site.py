"""The pages that are made from the code are that of the code; the site builds without a warning."""

import importlib.util
import re
import subprocess
import sys
import tomllib
from configparser import ConfigParser
from pathlib import Path

import pytest
import yaml
from support.processes import ROOT
from support.serving import audit

DOCS = ROOT / 'docs'


@pytest.fixture(scope='module')
def made():
  """The scripts docs/reference.py and docs/messages.py."""
  sys.path.insert(0, str(DOCS))
  try:
    import messages
    import reference

    yield reference, messages
  finally:
    sys.path.remove(str(DOCS))


def test_the_reference_is_that_of_the_code(made):
  """Else: python docs/reference.py."""
  reference, _ = made
  assert {p.stem for p in reference.FOLDER.glob('*.md')} == reference.PAGES.keys()
  for name, make in reference.PAGES.items():
    assert (reference.FOLDER / f'{name}.md').read_text() == make(), name


def test_every_public_name_verb_and_knob_is_in_the_reference():
  import gpt2_jax
  from gpt2_jax.cli import flags
  from gpt2_jax.configs import base
  from gpt2_jax.model.config import knobs_of

  page = lambda name: (DOCS / 'reference' / f'{name}.md').read_text()
  assert set(gpt2_jax.__all__) <= set(re.findall(r'^### (\w+)$', page('python'), re.M))
  assert {name.lower() for name in flags.FLAGS} == set(re.findall(r'^## (\w+)$', page('verbs'), re.M))
  verbs = page('verbs')
  for verb, table in flags.FLAGS.items():
    rows = verbs.split(f'## {verb.lower()}\n')[1].split('\n## ')[0]
    for flag in table:
      assert f'`--{flag.replace("_", "-")}`' in rows or f'`{flag.upper()}`' in rows, (verb, flag)
  assert set(knobs_of(base.get_config())) == set(
    re.findall(r'^\| `([\w.]+)` \|', page('knobs'), re.M)
  )


def test_every_message_has_an_entry(made):
  """Each UserError of the package: its text, or, where no program can read it, one that stands in
  `messages.ELSEWHERE`."""
  _, messages = made
  page, seen = (DOCS / 'reference' / 'messages.md').read_text(), 0
  assert {p.name for p in messages.PACKAGE.iterdir() if p.is_dir() and p.name != '__pycache__'} == {
    *messages.ROOMS,
    'configs',
  }
  for file in sorted(messages.PACKAGE.rglob('*.py')):
    name = file.relative_to(messages.PACKAGE).as_posix()
    for line, text in messages.raised(file):
      seen += 1
      if re.search(r'\w{3}', text):
        assert text.replace('`', 'ˋ') in page, (name, line)
      else:
        assert name in messages.ELSEWHERE, (name, line, 'say in docs/messages.py what it says')
    assert all(text in page for text in messages.ELSEWHERE.get(name, ()))
  assert seen > 300


def test_troubleshooting_quotes_what_is_said(made):
  """Words between … of a quoted message stand in one message of the code."""
  _, messages = made
  said = [text for file in messages.PACKAGE.rglob('*.py') for _, text in messages.raised(file)]
  said += [text for texts in messages.ELSEWHERE.values() for text in texts]
  page = (DOCS / 'troubleshooting.md').read_text()
  quotes = [
    quote for line in re.findall(r'^## (`.*)$', page, re.M) for quote in re.findall('`([^`]+)`', line)
  ]
  assert len(quotes) > 10
  for quote in quotes:
    parts = [part.strip() for part in re.split('…|nan|mesh.tensor', quote) if part.strip()]
    assert any(all(part in text for part in parts) for text in said), quote


def test_metrics_of_a_run_are_in_the_reference():
  """Every key that the code writes: train/…, eval/…, perf/…, time/…."""
  page = (DOCS / 'reference' / 'metrics.md').read_text()
  code = '\n'.join(p.read_text() for p in (ROOT / 'gpt2_jax' / 'training').rglob('*.py'))
  for key in sorted(
    set(re.findall(r"'((?:train|eval|perf)/[a-z_]+)'", code)) - {'train/skipped_in_a_row'}
  ):
    assert key in page, key


def test_promises_name_tests_that_are_there():
  page = (DOCS / 'promises.md').read_text()
  rows = [row for row in page.splitlines() if row.startswith('| ') and 'promise |' not in row]
  assert len(rows) > 10
  for row in rows:
    assert re.search(r'\]\(\.\./tests/[\w/]+\.py\)', row), row


def test_one_version_and_workflows_that_parse():
  setup = ConfigParser()
  setup.read(ROOT / 'setup.cfg')
  version = setup['metadata']['version']
  assert f'version: {version}\n' in (ROOT / 'CITATION.cff').read_text()
  assert re.search(r'^## (\S+)', (ROOT / 'CHANGELOG.md').read_text(), re.M)[1] == version
  assert 'version' in tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']['dynamic']
  for path in (ROOT / '.github').rglob('*.yml'):
    assert isinstance(yaml.safe_load(path.read_text()), dict), path
  templates = [p.read_text() for p in (ROOT / '.github' / 'ISSUE_TEMPLATE').glob('*.yml')]
  assert sum('gpt2-jax doctor --env' in text for text in templates) == 2


def test_the_readme_is_short():
  assert len((ROOT / 'README.md').read_text().splitlines()) < 200


@pytest.fixture(scope='module')
def site(tmp_path_factory) -> Path:
  """The site, built as .github/workflows/tests.yml does; a warning is an error."""
  for name in ('sphinx', 'furo', 'myst_nb', 'sphinx_copybutton'):
    if importlib.util.find_spec(name) is None:
      pytest.skip(f'no {name}: the extra docs is not installed')
  out = tmp_path_factory.mktemp('site')
  command = [sys.executable, '-m', 'sphinx', '-W', '-q', '-b', 'html', '-c', 'docs', '.', str(out)]
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  return out


@pytest.mark.slow
def test_the_site_builds_and_asks_nobody_else(site):
  pages = list(site.rglob('*.html'))
  assert len(pages) > 40 and (site / 'searchindex.js').exists()
  for page in pages:
    text = page.read_text()
    assert not re.search(r'<(?:script|img|iframe|source)[^>]*\ssrc="(?:https?:)?//', text), page
    for tag in re.findall(r'<link[^>]*>', text):
      assert not re.search(r'rel="(?:stylesheet|preload|icon)"[^>]*href="(?:https?:)?//', tag), page
    for target in re.findall(r'(?:href|src)="([^"#?]+)[^"]*"', text):
      if not re.match(r'\w+:|//', target):
        assert (page.parent / target).exists(), (page.relative_to(site), target)


@pytest.mark.slow
@pytest.mark.parametrize('name', ['docs/index', 'docs/tasks', 'docs/reference/knobs'])
def test_pages_keep_nobody_out(name, site, browser):
  """axe, in both colours, and at the width of a phone."""
  page, asked = browser.new_page(viewport={'width': 390, 'height': 844}), []
  page.on('request', lambda request: asked.append(request.url))
  page.goto((site / f'{name}.html').as_uri())
  for scheme in ('light', 'dark'):
    page.emulate_media(color_scheme=scheme)
    assert not audit(page), scheme
  assert all(url.startswith(('file:', 'data:')) for url in asked), asked
  wide = page.evaluate('document.documentElement.scrollWidth')
  assert wide <= 390, wide
  page.close()

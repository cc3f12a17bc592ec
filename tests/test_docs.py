"""What README.md and docs/ tell a reader to type is typed here, in order, in a copy of the tree."""

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tyro
from support import forked
from support.processes import BETTER, ROOT, environment

from gpt2_jax.cli import inputs, main
from gpt2_jax.cli.plan import split_overrides

PAGES = [ROOT / 'README.md', *sorted((ROOT / 'docs').glob('*.md'))]
BY_CI = ('pip install', 'pytest')  # .ci/run does these, in an environment of its own
PROGRAMS = {'python launch.py': ['launch.py'], 'python -c': ['-c'], 'gpt2-jax': ['-m', 'gpt2_jax']}


def commands(page: Path) -> list[str]:
  """The lines of a page's bash blocks, a `\\` joining two."""
  blocks = re.findall(r'^```bash\n(.*?)^```', page.read_text(), re.M | re.S)
  lines = ''.join(blocks).replace('\\\n', ' ').splitlines()
  return [line.split('  #')[0].strip() for line in lines if line.strip() and line[0] != '#']


def recipes(page: Path) -> list[str]:
  """A page's sh blocks: what wants hardware or an account, and so is only looked at."""
  return re.findall(r'^```sh\n(.*?)^```', page.read_text(), re.M | re.S)


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.name)
def test_recipes_are_well_formed(page):
  """Shell that parses, and flags and verbs that there are."""
  for recipe in recipes(page):
    subprocess.run(['bash', '-n'], input=recipe, text=True, check=True)
    text = recipe.replace('\\\n', ' ')
    for program, arguments in re.findall(r'(launch\.py|gpt2-jax) ([^\n&]*)', text):
      words = shlex.split(arguments.rstrip('\'"'))
      if program == 'launch.py' or words[0] == 'train':
        words = words[words[0] == 'train' :]
        code = 'import sys, launch; launch.parse_flags(sys.argv)'
        done = subprocess.run(
          [sys.executable, '-c', code, *words], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 0, (arguments, done.stderr)
      else:
        words = split_overrides(words)[0] if words[0] in ('plan', 'doctor') else words
        tyro.cli(main.Verb, args=words, registry=inputs.registry, config=(tyro.conf.OmitArgPrefixes,))


def test_the_two_commands_of_the_readme_are_what_ci_runs():
  first = commands(ROOT / 'README.md')
  assert 'pip install -e . && python launch.py --config=configs/tiny.py' in first
  assert "pip install -e '.[test]' && pytest" in first
  script = (ROOT / '.ci' / 'run').read_text()
  assert "pip install -e '.[test]'" in script and '\npytest\n' in script


def test_links_and_pictures_are_there():
  for page in PAGES:
    for target in re.findall(r'\]\(([^)#:]+)(?:#[^)]*)?\)', page.read_text()):
      assert (page.parent / target).exists(), (page.name, target)


@pytest.fixture(scope='module')
def architecture():
  """The script that draws the rooms."""
  spec = importlib.util.spec_from_file_location('architecture', ROOT / 'docs' / 'architecture.py')
  assert spec is not None and spec.loader is not None
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def ways_on(page: str) -> dict[str, list[str]]:
  """The ways that a page lists: 'room/file.py:function' of each file."""
  parts = re.split(r'^\*\*.*\*\*: \d+ files\.$', page, flags=re.M)[1:]
  names = ('update', 'text', 'arrays')
  return {
    way: re.findall(r'^\d+\. `(.*)`$', part, re.M) for way, part in zip(names, parts, strict=True)
  }


def test_the_picture_of_the_rooms_is_that_of_the_code(architecture):
  page = architecture.PAGE.read_text()
  listed = ways_on(page)
  assert architecture.between(page, architecture.lists(listed)) == page
  assert architecture.draw(listed) == architecture.PICTURE.read_text()
  assert len([room for row in architecture.rows() for room in row]) == 15
  for step in (step for way in listed.values() for step in way):
    file, _, function = step.partition(':')
    text = (architecture.PACKAGE / file).read_text()
    assert re.search(rf'\b(def|class) {function.split(".")[-1]}\b', text), step


@pytest.mark.slow
def test_the_ways_through_the_rooms_are_those_of_a_run():
  """In a process of its own: what is loaded and compiled already would not be entered again."""
  code = 'import json, architecture; print(json.dumps(architecture.ways()))'
  told = forked.run([sys.executable, '-c', code], 300, cwd=ROOT / 'docs', env=environment())
  assert told.returncode == 0, told.stderr
  listed = ways_on((ROOT / 'docs' / 'architecture.md').read_text())
  for way, steps in json.loads(told.stdout.splitlines()[-1]).items():
    files = [step.partition(':')[0] for step in steps]
    assert files == [step.partition(':')[0] for step in listed[way]], way


def test_python_examples_use_what_there_is():
  import gpt2_jax

  for page in PAGES:
    for name in re.findall(r'gpt2_jax\.(\w+)\(', page.read_text()):
      assert name in gpt2_jax.__all__, (page.name, name)


@pytest.mark.slow
def test_every_option_of_generation_has_an_example_that_works():
  """The table of docs/decoding.md, row by row, on a small model."""
  import gpt2_jax
  from gpt2_jax.decoding.options import Options
  from gpt2_jax.model.config import GPTConfig
  from gpt2_jax.tokenizer import bpe

  config = GPTConfig(vocab_size=257, n_positions=64, n_embd=32, n_layer=1, n_head=4)
  model = gpt2_jax.bind(config, gpt2_jax.init_params(config, 0))
  model = gpt2_jax.Pretrained(model, bpe.load('byte'))
  page = (ROOT / 'docs' / 'decoding.md').read_text()
  rows = dict(re.findall(r'^\| `(\w+)` \|.*\| `(.*)` \|$', page, re.M))
  assert rows.keys() - Options.__dataclass_fields__.keys() == {
    'assistant_model',
    'logits_processor',
    'prefix_allowed_tokens_fn',
  }
  assert rows.keys() >= Options.__dataclass_fields__.keys()
  for name, example in rows.items():
    options = eval(f'dict({example})', {'model': model})
    assert name in options, name
    results = gpt2_jax.generate(model, ['ab', 'a'], **{'max_new_tokens': 8} | options)
    assert all(result.tokens or result.finish_reason == 'stop' for result in results), name


def shortened(command: str) -> str:
  """A command as it is typed, but of a run of tens of steps, its own or its config's, fewer: that
  losses fall is found in tests/training, and what follows such a run takes any model.
  """
  if not re.search(r'(launch\.py|gpt2-jax train) .*--config', command) or '--dry_run' in command:
    return command
  if '--config.train.steps=' not in command:  # README.md's first one
    return f'{command} --config.train.steps=60'
  steps = re.compile(r'(?<=--config\.train\.steps=)\d{2,}')
  return steps.sub(lambda found: str(int(found[0]) // 5), command)


def type_in(command: str, tree: Path, usual: bool) -> None:
  """A line of bash in a tree: by a fork where it is one of our programs and plain words.

  usual: compiled as users' is; else with less, which takes less time.
  """
  env = {k: v for k, v in os.environ.items() if k != 'XLA_FLAGS'} | {'PYTHONPATH': str(tree)}
  env |= {} if usual else {'XLA_FLAGS': BETTER}
  program = next((name for name in PROGRAMS if command.startswith(name + ' ')), None)
  if program and not set('$|<>&;') & set(command):
    words = [sys.executable, *PROGRAMS[program], *shlex.split(command.removeprefix(program))]
  else:
    env['PATH'] = f'{Path(sys.executable).parent}:{env["PATH"]}'
    words = ['bash', '-c', command]
  result = forked.run(words, 1200, cwd=tree, env=env)
  assert result.returncode == 0, f'{command}\n{result.stdout}\n{result.stderr}'


def follow(page: Path, tree: Path) -> None:
  """Types what a page says, in order: commands first, then Python. README.md's are there already."""
  typed = commands(PAGES[0]) if page != PAGES[0] else []
  for command in commands(page):
    by_ci = command.startswith(BY_CI)
    if by_ci:
      command = command.partition('&& ')[2]
    if command not in ('', 'pytest', *typed):
      type_in(shortened(command), tree, by_ci)
  for block in re.findall(r'^```python\n(.*?)^```', page.read_text(), re.M | re.S):
    type_in(f'python -c {shlex.quote(block)}', tree, False)


@pytest.fixture(scope='module')
def tree(tmp_path_factory) -> Path:
  """A copy of the tree, in which README.md has been followed: other pages go on from its runs."""
  tree = tmp_path_factory.mktemp('docs') / 'gpt2_jax'
  files = subprocess.run(
    ['git', 'ls-files', '-z'], cwd=ROOT, capture_output=True, text=True, check=True
  ).stdout.split('\0')
  for name in filter(None, files):
    (tree / name).parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(ROOT / name, tree / name, follow_symlinks=False)
  follow(PAGES[0], tree)
  assert (tree / 'runs' / 'tiny' / 'loss.png').exists()
  record = (tree / 'runs' / 'tiny' / 'metrics.jsonl').read_text().splitlines()
  first, *_, last = (json.loads(line)['train/loss'] for line in record)
  assert len(record) == 60 and last < first - 1
  return tree


@pytest.mark.slow
@pytest.mark.parametrize('page', PAGES[1:], ids=lambda page: page.name)
def test_every_command_works(page, tree):
  """Those of README.md too, of which the tree comes."""
  follow(page, tree)

"""Writes docs/reference from the code: what can be called, typed, set and read.

    python docs/reference.py

Everything is read from the sources, nothing is imported but the comments of the knobs: the pages are
the same on every Python. tests/test_site.py holds them to the code.
"""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import messages
from messages import NOTE, PACKAGE, ROOT

FOLDER = ROOT / 'docs' / 'reference'
# what is public beside `gpt2_jax.NAME`: the page that uses it, and its places
ALSO = {
  'Looking inside': (
    'model/edits.py:run',
    'interpretation/patching.py',
    'interpretation/attribution.py',
  ),
  'Doctor': (
    'diagnosis/facts.py:of_config',
    'diagnosis/facts.py:of_run',
    'diagnosis/doctor.py:examine',
  ),
}
Definition = ast.FunctionDef | ast.ClassDef


def definitions(file: Path) -> dict[str, Definition]:
  """The public functions and classes of a module, by name, in their order."""
  body = ast.parse(file.read_text()).body
  return {n.name: n for n in body if isinstance(n, Definition) and not n.name.startswith('_')}


def definition(file: Path, name: str) -> Definition:
  """What a name of a module is, there or where the module has it from."""
  if name in (found := definitions(file)):
    return found[name]
  for node in ast.parse(file.read_text()).body:
    if isinstance(node, ast.ImportFrom) and name in [alias.name for alias in node.names]:
      return definition(ROOT / f'{str(node.module).replace(".", "/")}.py', name)
  raise AssertionError(f'{name} is not in {file}')


def signature(node: ast.FunctionDef, name: str) -> str:
  """How a function is called, a parameter a line where it would be long."""
  arguments = ast.unparse(node.args).removeprefix('self, ').removeprefix('self')
  returns = f' -> {ast.unparse(node.returns)}' if node.returns else ''
  line = f'{name}({arguments}){returns}'
  if len(line) <= 96:
    return line
  parts = re.split(r', (?=[*\w]+(?:[:=,]|$))', arguments)
  return f'{name}(\n  ' + ',\n  '.join(parts) + f',\n){returns}'


def text(doc: str) -> str:
  """A docstring as Markdown: its sections as lists, indented blocks as code."""
  lines, section = [], False
  for line in doc.splitlines():
    if re.fullmatch(r'(Args|Returns|Raises|Yields|Attributes):', line):
      section = True
      lines += ['', f'*{line[:-1]}*', '']
    elif one := re.fullmatch(r'(Returns|Raises|Yields): (.*)', line):
      lines += ['', f'*{one[1]}*', '', f'- {one[2]}']
      section = True
    elif section and line and not line.startswith(' '):
      section = False
      lines += ['', line]
    elif section and (item := re.fullmatch(r'  ([\w*][\w, *]*): (.*)', line)):
      lines.append(f'- `{item[1]}`: {item[2]}')
    elif section and line.startswith('  ') and lines[-1] == '':
      lines.append(f'- {line.strip()}')
    elif section:
      lines.append(f'  {line.strip()}'.rstrip())
    else:
      lines.append(line)
  return re.sub(r'\n{3,}', '\n\n', '\n'.join(lines)).strip()


def entry(name: str, node: Definition) -> str:
  """What the page says of a function, or of a class with its fields and methods."""
  doc = text(ast.get_docstring(node) or '')
  if isinstance(node, ast.FunctionDef):
    return f'### {name}\n\n```py\n{signature(node, name)}\n```\n\n{doc}\n'
  fields, methods = [], []
  for item in node.body:
    if isinstance(item, ast.AnnAssign) and not ast.unparse(item.target).startswith('_'):
      fields.append(ast.unparse(item))
    elif isinstance(item, ast.FunctionDef) and (
      item.name == '__call__' or item.name == '__init__' or not item.name.startswith('_')
    ):
      called = name if item.name == '__init__' else f'{name}.{item.name}'
      methods.append((signature(item, called), text(ast.get_docstring(item) or '')))
  parts = [f'### {name}\n', f'{doc}\n']
  if fields:
    parts.append('```py\n' + '\n'.join(fields) + '\n```\n')
  parts += [f'```py\n{line}\n```\n\n{said}\n' for line, said in methods]
  return '\n'.join(parts)


def places() -> dict[str, str]:
  """The names of `gpt2_jax/__init__.py`, and the modules that they come from."""
  for node in ast.parse((PACKAGE / '__init__.py').read_text()).body:
    if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == '_PLACES':
      return ast.literal_eval(node.value)
  raise AssertionError('gpt2_jax/__init__.py has no _PLACES')


def python() -> str:
  """The page of what can be called."""
  lines = [
    '# Python',
    NOTE,
    'For who writes Python. What `gpt2_jax` names, with the shapes and units that its docstrings '
    'give. Letters: `B` batch, `T` query positions, `S` key positions, `D` width, `N` heads, `H` '
    'head width, `F` MLP width, '
    '`V` vocabulary, `L` layers.',
    '## gpt2_jax',
  ]
  for name, place in sorted(places().items(), key=lambda item: item[0].lower()):
    file = PACKAGE / f'{place.replace(".", "/")}.py'
    lines.append(entry(name, definition(file, name)))
  for heading, names in ALSO.items():
    lines.append(f'## {heading}')
    for where in names:
      file, _, name = where.partition(':')
      module = 'gpt2_jax.' + file.removesuffix('.py').replace('/', '.')
      lines.append(f'From `{module}`:')
      found = definitions(PACKAGE / file)
      lines += [entry(n, node) for n, node in found.items() if not name or n == name]
  return '\n\n'.join(line.strip() for line in lines) + '\n'


def documented(node: ast.ClassDef) -> Iterator[tuple[str, str, str, str]]:
  """The fields of a class of flags: name, type, default, and the text below each."""
  for item, below in zip(node.body, [*node.body[1:], None]):
    if not isinstance(item, ast.AnnAssign):
      continue
    kind, said = ast.unparse(item.annotation), ''
    if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
      said = ' '.join(str(below.value.value).split())
    if 'Suppress' not in kind:
      default = ast.unparse(item.value) if item.value else ''
      yield ast.unparse(item.target), kind, default, said


def plain_type(kind: str) -> str:
  """A type as one who types it sees it."""
  node = ast.parse(kind, mode='eval').body
  return _typed(node)


def _typed(node: ast.AST) -> str:
  if isinstance(node, ast.BinOp):
    parts = [_typed(side) for side in (node.left, node.right)]
    return ' or '.join(part for part in parts if part != 'None')
  if isinstance(node, ast.Subscript):
    inside = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
    outer = ast.unparse(node.value)
    if outer == 'Literal':
      return ', '.join(_typed(x) for x in inside)
    if outer == 'tuple':
      return f'{_typed(inside[0])} …'
    return _typed(inside[0])  # Annotated, Positional
  return 'None' if ast.unparse(node) == 'None' else ast.unparse(node).strip("'")


def cell(said: str) -> str:
  return said.replace('|', '\\|')


def verbs() -> str:
  """The page of the verbs of `gpt2-jax`."""
  lines = [
    '# Verbs',
    NOTE,
    'For who types. `gpt2-jax VERB --help` says the same. `gpt2-jax train` takes the flags of '
    '`launch.py`:',
  ]
  table = ['| flag | default | what |', '|---|---|---|']
  for node in ast.walk(ast.parse((PACKAGE / 'cli' / 'train.py').read_text())):
    if isinstance(node, ast.Call) and ast.unparse(node.func).startswith(
      ('flags.DEFINE', 'config_flags.DEFINE')
    ):
      name = ast.literal_eval(node.args[0])
      said = [k.value for k in node.keywords if k.arg == 'help_string'] or [
        a
        for a in node.args[1:]
        if isinstance(a, ast.Constant) and isinstance(a.value, str) and ' ' in a.value
      ]
      default = ast.unparse(node.args[1]) if len(node.args) > 1 else ''
      table.append(f'| `--{name}` | `{default or None}` | {cell(ast.literal_eval(said[0]))} |')
  lines += [
    '## train',
    '\n'.join(table),
    'And every knob: `--config.SECTION.KEY=VALUE`, [knobs](knobs.md).',
  ]
  for file in sorted((PACKAGE / 'cli').glob('*.py')):
    for node in ast.parse(file.read_text()).body:
      names = [ast.unparse(d) for d in getattr(node, 'decorator_list', [])]
      methods = [m.name for m in getattr(node, 'body', []) if isinstance(m, ast.FunctionDef)]
      if (
        not isinstance(node, ast.ClassDef)
        or 'dataclasses.dataclass' not in names
        or 'run' not in methods
      ):
        continue
      if node.name in ('Train', 'Session'):
        continue
      lines += [f'## {node.name.lower()}', ast.get_docstring(node) or '', flag_table(node)]
  return '\n\n'.join(lines) + '\n'


def flag_table(node: ast.ClassDef) -> str:
  """The flags of a verb, as a table."""
  table = ['| flag | type | default | what |', '|---|---|---|---|']
  for name, kind, default, said in documented(node):
    flag = name.upper() if 'Positional' in kind else f'--{name.replace("_", "-")}'
    if kind == 'inputs.OpeningFlags':
      table.append(
        '| `--base`, `--ignore-extra` | | | how a checkpoint is opened: '
        '[conversion](../conversion.md) |'
      )
    elif name == 'options' and node.name == 'Convert':
      table.append('| options of a format | | | [conversion](../conversion.md) |')
    elif 'Options' in kind:
      table.append('| options of generation | | | [decoding](../decoding.md) |')
    else:
      table.append(
        f'| `{flag}` | {cell(plain_type(kind))} | `{default or "required"}` | {cell(said)} |'
      )
  return '\n'.join(table)


def knobs() -> str:
  """The page of the knobs of configs/base.py."""
  sys.path.insert(0, str(ROOT))
  from gpt2_jax.cli.config import comments
  from gpt2_jax.configs import base
  from gpt2_jax.model.config import knobs_of

  said, lines, section = comments(), [], None
  for knob, value in knobs_of(base.get_config()).items():
    here = knob.partition('.')[0] if '.' in knob else 'of the whole run'
    if here != section:
      section = here
      lines += ['', f'## {here}', '', '| knob | default | what |', '|---|---|---|']
    shown = 'derived' if value is None else str(value).replace('\n', '\\n') or "''"
    lines.append(f'| `{knob}` | `{shown}` | {cell(said.get(knob, ""))} |')
  head = (
    '# Knobs\n\n'
    f'{NOTE}\n\n'
    'For who trains. Each is set by `--config.KNOB=VALUE`; `gpt2-jax config small:fineweb` '
    'prints them as a config '
    'has them. The defaults are those of [configs/base.py](../../gpt2_jax/configs/base.py), '
    'where the comments are '
    'from; *derived* ones follow from the others, the data or the devices.\n'
  )
  return head + '\n'.join(lines) + '\n'


def metrics() -> str:
  """The page of the record, `metrics.jsonl`."""
  doc = (
    ast.get_docstring(ast.parse((PACKAGE / 'training' / 'watch' / 'metrics_file.py').read_text()))
    or ''
  )
  return f'# metrics.jsonl\n\n{NOTE}\n\nFor who reads a record.\n\n{blocks(doc)}\n'


def blocks(doc: str) -> str:
  """A docstring with its indented lines as a block of code."""
  return re.sub(
    r'(?:^    .*\n?)+',
    lambda m: '```text\n' + re.sub('(?m)^    ', '', m[0]).rstrip() + '\n```\n',
    doc,
    flags=re.M,
  )


PAGES = {
  'python': python,
  'verbs': verbs,
  'knobs': knobs,
  'metrics': metrics,
  'messages': messages.page,
}

if __name__ == '__main__':
  FOLDER.mkdir(exist_ok=True)
  for name, make in PAGES.items():
    (FOLDER / f'{name}.md').write_text(make())

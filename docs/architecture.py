"""Draws the rooms of the library, and the ways through them, from the code as it is.

    python docs/architecture.py

writes docs/images/architecture.svg and the lists of docs/architecture.md. Rows are setup.cfg's
contract, what a room is for is the first line of its `__init__.py`, and the ways are traced: each
file by the first of its functions that a small real run entered.
"""

import ast
import collections
import configparser
import contextlib
import os
import re
import sys
import tempfile
import textwrap
from collections.abc import Callable
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / 'gpt2_jax'
PAGE = ROOT / 'docs' / 'architecture.md'
PICTURE = ROOT / 'docs' / 'images' / 'architecture.svg'
COLOURS = {'update': '#2563eb', 'text': '#d97706', 'arrays': '#059669'}  # of the ways
WIDTH, LINE, GAP, TOP = 1080, 15, 10, 58


def rows() -> list[list[str]]:
  """Returns the names of the rooms, a list for each row of the contract, the highest first."""
  setup = configparser.ConfigParser()
  setup.read(ROOT / 'setup.cfg')
  lines = setup['importlinter:contract:layers']['layers'].split('\n')
  return [
    [name.strip().removeprefix('gpt2_jax.') for name in line.split('|')] for line in lines if line
  ]


def files(room: str) -> list[str]:
  """Returns the modules of a room, by their names within it."""
  folder = PACKAGE / room
  found = [p.relative_to(folder).with_suffix('') for p in folder.rglob('*.py')]
  return sorted('.'.join(p.parts) for p in found if p.name != '__init__')


def purpose(room: str) -> str:
  """Returns the first line of what a room says of itself."""
  return (ast.get_docstring(ast.parse((PACKAGE / room / '__init__.py').read_text())) or '').split(
    '\n'
  )[0]


def imports() -> collections.Counter[tuple[str, str]]:
  """Returns how many imports lead from one room to another."""
  arrows = collections.Counter()
  for path in PACKAGE.rglob('*.py'):
    here = path.relative_to(PACKAGE).parts[0]
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, ast.ImportFrom) and (node.module or '').startswith('gpt2_jax.'):
        there = node.module.split('.')[1]
        if there != here and (PACKAGE / here).is_dir():
          arrows[here, there] += 1
  return arrows


# --- The ways, traced ------------------------------------------------------------------------------


def entered(work: Callable[[], object], begin: str, end: str, *also: str) -> list[str]:
  """Returns 'room/file.py:function' of each file that `work` came to from function to function.

  The way is that of the values: `core` and `training.watch`, which check and watch, are left
  out, and what begins with one of `also`.
  """
  found: dict[str, str] = {}
  beside, on = ('core/', 'training/watch/', *also), False

  def look(frame, event, _):
    nonlocal on
    name, function = frame.f_code.co_filename, frame.f_code.co_qualname
    if not name.startswith(str(PACKAGE)):
      return
    on |= event == 'call' and function == begin
    file = Path(name).relative_to(PACKAGE).as_posix()
    seen = file in found or '/' not in file or file.startswith(beside)
    function = function.replace('.<locals>', '').split('.<')[0]
    if on and event == 'call' and not seen and not function.startswith('<'):
      found[file] = function
    on &= not (event == 'return' and frame.f_code.co_qualname == end)

  sys.setprofile(look)
  try:
    work()
  finally:
    sys.setprofile(None)
  assert found, f'nothing entered {begin}'
  return [f'{file}:{function}' for file, function in found.items()]


def ways() -> dict[str, list[str]]:
  """Returns the three ways: from tokens to an update, a prompt to its text, a run to its arrays."""
  os.environ['JAX_PLATFORMS'] = 'cpu'
  sys.path.insert(0, str(ROOT))
  import gpt2_jax
  from configs import tiny
  from gpt2_jax.training import train

  with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
    config = tiny.get_config()
    text = Path(folder, 'text.txt')
    text.write_text('To be, or not to be, that is the question.\n' * 400)
    config.update({'data': {'corpus': f'text:{text}', 'tokenizer': 'byte', 'split': 'tail'}})
    config.update({'train': {'steps': 2, 'global_batch_tokens': 256}, 'log': {'sample_tokens': 1}})
    config.update({'model': {'n_layer': 1, 'n_embd': 16, 'n_head': 2, 'n_positions': 32}})
    config.data.directory = f'{folder}/data'
    run = f'{folder}/run'
    update = entered(
      lambda: train.train(config, run),
      'TokenBatches.__init__',
      'make_train_step.<locals>.step',
      'checkpoints/',  # what the run opens meanwhile
      'tokenizer/',
    )
    arrays = entered(lambda: gpt2_jax.from_pretrained(run), 'from_pretrained', 'from_pretrained')
    model = gpt2_jax.from_pretrained(run)
    return {
      'update': update,
      'text': entered(
        lambda: gpt2_jax.generate(model, 'To be', max_new_tokens=4, seed=1), 'generate', 'generate'
      ),
      'arrays': arrays,
    }


# --- The picture -----------------------------------------------------------------------------------

STYLE = """
text { font: 11px ui-sans-serif, system-ui, sans-serif; fill: #1f2937 }
.name { font-size: 15px; font-weight: 600 } .what { fill: #6b7280 }
rect { fill: #f8fafc; stroke: #cbd5e1 } .badge { fill: #fff; font-size: 8px; font-weight: 600 }
.badge { text-anchor: middle }
@media (prefers-color-scheme: dark) {
  text { fill: #e5e7eb } .what { fill: #9ca3af } rect { fill: #111827; stroke: #374151 }
}
"""


def draw(order: dict[str, list[str]]) -> str:
  """Returns the picture: rooms in rows, their files, and on each file its place in each way."""
  places = {
    way: {step.split(':')[0]: i + 1 for i, step in enumerate(steps)} for way, steps in order.items()
  }
  parts, y = [], 36
  for x, (way, what) in zip((10, 290, 530), HEADINGS.items()):
    parts.append(f'<circle cx="{x + 7}" cy="16" r="7" fill="{COLOURS[way]}"/>')
    parts.append(f'<text x="{x + 20}" y="20">{escape(what)}: {len(order[way])} files</text>')
  for row in rows():
    row = [room for room in row if (PACKAGE / room).is_dir()]
    width = (WIDTH - GAP * (len(row) + 1)) / len(row)
    columns = max(1, int(width // 150))
    said = {room: textwrap.wrap(purpose(room), int((width - 20) / 5.6)) for room in row}
    top = TOP + (max(map(len, said.values())) - 1) * LINE
    tall = max(-(-len(files(room)) // columns) for room in row) * LINE + top
    for i, room in enumerate(row):
      x = GAP + i * (width + GAP)
      parts.append(f'<rect x="{x:.0f}" y="{y}" width="{width:.0f}" height="{tall}" rx="8"/>')
      parts.append(f'<text class="name" x="{x + 12:.0f}" y="{y + 20}">{room}</text>')
      for k, line in enumerate(said[room]):
        at = f'x="{x + 12:.0f}" y="{y + 35 + k * LINE}"'
        parts.append(f'<text class="what" {at}>{escape(line)}</text>')
      names = files(room)
      deep = -(-len(names) // columns)
      for j, name in enumerate(names):
        at_x, at_y = x + 12 + j // deep * (width - 12) / columns, y + top - 6 + j % deep * LINE
        dots = 0
        for way, numbers in places.items():
          if number := numbers.get(f'{room}/{name.replace(".", "/")}.py'):
            dot_x = at_x + 6 + dots * 15
            parts.append(f'<circle cx="{dot_x:.0f}" cy="{at_y - 4}" r="6.5" fill="{COLOURS[way]}"/>')
            parts.append(f'<text class="badge" x="{dot_x:.0f}" y="{at_y - 1}">{number}</text>')
            dots += 1
        parts.append(f'<text x="{at_x + 50:.0f}" y="{at_y}">{name}</text>')
    y += tall + GAP
  return (
    f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y}" role="img" '
    f'aria-label="The rooms of gpt2_jax and three ways through them">\n<style>{STYLE}</style>\n'
    + '\n'.join(parts)
    + '\n</svg>\n'
  )


HEADINGS = {
  'update': 'tokens to an update',
  'text': 'a prompt to its text',
  'arrays': '--checkpoint X to arrays',
}


def lists(order: dict[str, list[str]]) -> str:
  """Returns the rooms and the three ways as they stand in the page."""
  lines = ['| room | what it is for | files | imports from |', '|---|---|---|---|']
  arrows = imports()
  for room in (room for row in rows() for room in row if (PACKAGE / room).is_dir()):
    below = ', '.join(sorted(there for here, there in arrows if here == room))
    lines.append(f'| `{room}` | {purpose(room)} | {len(files(room))} | {below} |')
  for way, what in HEADINGS.items():
    lines += ['', f'**{what[0].upper()}{what[1:]}**: {len(order[way])} files.', '']
    lines += [f'{i}. `{step}`' for i, step in enumerate(order[way], 1)]
  return '\n'.join(lines)


def between(page: str, text: str) -> str:
  """Returns the page with `text` in place of what stands between its two marks."""
  mark = r'(<!-- made by docs/architecture.py -->\n).*?(<!-- end -->)'
  return re.sub(mark, lambda m: f'{m[1]}{text}\n{m[2]}', page, flags=re.S)


if __name__ == '__main__':
  traced = ways()
  PICTURE.write_text(draw(traced))
  PAGE.write_text(between(PAGE.read_text(), lists(traced)))

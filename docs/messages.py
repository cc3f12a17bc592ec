"""The page of all messages that a user can meet, collected from the code: see reference.py."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / 'gpt2_jax'
NOTE = '<!-- made by docs/reference.py -->'
# the rooms, and what one does when their messages come
ROOMS = {
  'core': 'Files, buckets, numbers and names',
  'parallel': 'Devices, meshes and several hosts',
  'tokenizer': 'Tokenizers',
  'data': 'Texts, token stores and benchmarks',
  'model': 'Models and their options',
  'checkpoints': 'Checkpoints, in any format',
  'decoding': 'Generation',
  'training': 'Training',
  'evaluation': 'Evaluation',
  'interpretation': 'Interventions',
  'planning': 'Plans',
  'diagnosis': 'Doctor',
  'serving': 'The server',
  'cli': 'The command line',
}
ERRORS = ('UserError', 'Unreachable')


# messages that are put together where no text can be read, by the file that raises them; of those
# without a text of their own, which put a name before another's message, none
ELSEWHERE = {
  'checkpoints/tensors.py': (
    '… lacks the tensors: ….',
    '… has tensors that this GPT-2 does not: ….',
    '… has tensors of a shape that its config contradicts: … instead of ….',
  ),
  'cli/config.py': (),
  'core/bounds.py': ('… = … must be …',),
  'core/patient_gcs.py': (),
  'data/far_files.py': (),
  'parallel/sharding.py': (
    '… is not divisible by mesh.… = …; mesh.… may be one of …; of … devices these meshes would '
    'work: ….',
  ),
  'training/watch/step_record.py': (
    'step …: loss …, gradient norm …. Nothing of it was saved. The documents of its batch: …. '
    'The last '
    'good checkpoint in … is that of step …. A lower optim.peak_lr, a longer optim.warmup_steps or '
    'model.dtype=float32 may help.',
  ),
}
Names = dict[str, ast.AST]  # what a module's variables are set to, where that is a text


def template(node: ast.AST, names: Names) -> str:
  """A message with … for what is filled in."""
  if isinstance(node, ast.Constant):
    return str(node.value)
  if isinstance(node, ast.JoinedStr):
    return ''.join(template(part, names) for part in node.values)
  if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
    return template(node.left, names) + template(node.right, names)
  if isinstance(node, ast.IfExp):
    return f'{template(node.body, names)} / {template(node.orelse, names)}'
  if isinstance(node, ast.FormattedValue):
    return template(node.value, names)
  if (text := names.get(ast.unparse(node))) is not None:
    return template(text, {})
  return '…'


def raised(file: Path) -> Iterator[tuple[int, str]]:
  """The messages of a module's UserErrors, each with its line in the file."""
  tree = ast.parse(file.read_text())
  names: Names = {
    ast.unparse(node.targets[0]): node.value
    for node in ast.walk(tree)
    if isinstance(node, ast.Assign)
    and (isinstance(node.value, ast.JoinedStr) or isinstance(getattr(node.value, 'value', None), str))
  }
  for node in ast.walk(tree):
    if isinstance(node, ast.Call) and node.args and ast.unparse(node.func).split('.')[-1] in ERRORS:
      text = ' '.join(template(node.args[0], names).split())
      yield node.lineno, re.sub('…{2,}', '…', text)


def page() -> str:
  """The page of all messages that a user can meet, by what is done when they come."""
  lines = [
    '# Messages',
    NOTE,
    'For who has met one. Each names the thing and the way out; here they stand beside their '
    'like, with '
    '… for what is filled in, so that a search finds them, and beside the file that says them. '
    'Those that '
    'are met most, with more words: [troubleshooting](../troubleshooting.md).',
  ]
  for room, what in ROOMS.items():
    found = []
    for file in sorted((PACKAGE / room).rglob('*.py')):
      link = f'[{file.relative_to(PACKAGE).as_posix()}](../../{file.relative_to(ROOT).as_posix()})'
      said = dict.fromkeys(text for _, text in sorted(raised(file)) if re.search(r'\w{3}', text))
      said |= dict.fromkeys(ELSEWHERE.get(file.relative_to(PACKAGE).as_posix(), ()))
      found += [f'- `{message.replace("`", "ˋ")}` ({link})' for message in said]
    if found:
      lines += [f'## {what}', '\n'.join(found)]
  return '\n\n'.join(lines) + '\n'

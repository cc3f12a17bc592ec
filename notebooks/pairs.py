"""Makes NAME.ipynb of each NAME.py here: `python notebooks/pairs.py`.

The scripts, in jupytext's percent format, are the source: their diffs read well.
Notebooks have no outputs, which would be stale with the next commit; cells are named by their
number, so that the same script gives the same bytes.
"""

import json
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
KERNEL = {'display_name': 'Python 3', 'language': 'python', 'name': 'python3'}


def sources() -> list[Path]:
  """The scripts that are notebooks, in order."""
  return sorted(path for path in FOLDER.glob('*.py') if path.name[0].isdigit())


def notebook(script: Path) -> str:
  """Returns the text of a script's notebook."""
  import jupytext

  made = jupytext.reads(script.read_text(), fmt='py:percent')
  made.metadata = {'kernelspec': KERNEL, 'language_info': {'name': 'python'}}
  for i, cell in enumerate(made.cells):
    cell['id'], cell['metadata'] = f'cell-{i}', {}
  made.nbformat, made.nbformat_minor = 4, 5
  return json.dumps(made, indent=1, ensure_ascii=False, sort_keys=True) + '\n'


if __name__ == '__main__':
  for script in sources():
    script.with_suffix('.ipynb').write_text(notebook(script))
    print(script.with_suffix('.ipynb').name, file=sys.stderr)

"""The notebooks: made of their scripts, and each runs from top to bottom in a kernel of its own."""

import importlib.util
import json

import pytest
from support.processes import BETTER, ROOT, environment

spec = importlib.util.spec_from_file_location('pairs', ROOT / 'notebooks' / 'pairs.py')
pairs = importlib.util.module_from_spec(spec)
spec.loader.exec_module(pairs)
NAMES = [path.stem for path in pairs.sources()]


@pytest.mark.parametrize('name', NAMES)
def test_a_notebook_is_its_script_without_outputs(name):
  text = (ROOT / 'notebooks' / f'{name}.ipynb').read_text()
  cells = [cell for cell in json.loads(text)['cells'] if cell['cell_type'] == 'code']
  assert cells and not any(cell['outputs'] or cell['execution_count'] for cell in cells)
  assert f'notebooks/{name}.ipynb' in (ROOT / 'README.md').read_text()
  pytest.importorskip('jupytext')
  script = ROOT / 'notebooks' / f'{name}.py'
  assert text == pairs.notebook(script), 'python notebooks/pairs.py makes it anew'


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """Where all of them run, as they do for who opens one after the other: text is prepared once."""
  return tmp_path_factory.mktemp('notebooks')


@pytest.mark.slow
@pytest.mark.filterwarnings('ignore')  # of Jupyter's own
@pytest.mark.parametrize('name', NAMES)
def test_a_notebook_runs_from_top_to_bottom(name, folder, tmp_path, monkeypatch):
  client = pytest.importorskip('nbclient')
  pytest.importorskip('ipykernel')
  import nbformat

  for key, value in environment(XLA_FLAGS=BETTER).items():
    monkeypatch.setenv(key, value)
  monkeypatch.setenv('IPYTHONDIR', str(tmp_path / 'ipython'))
  notebook = nbformat.read(ROOT / 'notebooks' / f'{name}.ipynb', 4)
  done = client.NotebookClient(
    notebook, timeout=600, kernel_name='python3', resources={'metadata': {'path': str(folder)}}
  ).execute()
  shown = json.dumps(done)
  assert 'image/png' in shown or name == '5_serve'

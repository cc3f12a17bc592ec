"""The benchmarks of speed run, and write what they say they measure. What they find is not judged."""

import json
import subprocess
import sys

import pytest
from support.processes import ROOT, environment

CIRCUMSTANCES = {'time', 'command', 'processor', 'threads', 'versions', 'commit', 'rows'}


def rows_of(tmp_path, name: str, *flags: str) -> list[dict]:
  """Runs a benchmark; its rows."""
  file = tmp_path / f'{name}.json'
  env = environment() | {'TMPDIR': str(tmp_path)}
  done = subprocess.run(
    [sys.executable, '-m', f'benchmarks.{name}', '--json', str(file), *flags],
    cwd=ROOT,
    env=env,
    capture_output=True,
    text=True,
    timeout=900,
  )
  assert done.returncode == 0, done.stdout + done.stderr
  content = json.loads(file.read_text())
  assert content.keys() >= CIRCUMSTANCES
  return content['rows']


def positive(row: dict, *keys: str) -> bool:
  values = [v for key in keys for v in (row[key] if isinstance(row[key], list) else [row[key]])]
  return bool(values) and all(value > 0 for value in values)


@pytest.mark.slow
def test_data(tmp_path):
  texts = tmp_path / 'texts'
  texts.mkdir()
  for name in 'abcdefgh':
    (texts / f'{name}.txt').write_text(f'{name} is what these lines say.\n' * 2000)
  trained, bpe, byte, load, cold = rows_of(
    tmp_path,
    'data',
    f'--corpus=text:{texts}',
    '--tokenizers',
    'bpe:300',
    'byte',
    '--shapes',
    '2x64',
    '--tokens=4096',
    '--cold=4x64',
    '--cold-bytes=67108864',
    '--repeats=1',
  )
  assert [row['what'] for row in (trained, bpe, byte, load, cold)] == [
    'train',
    'prepare',
    'prepare',
    'load',
    'cold',
  ]
  assert positive(trained, 'bytes_per_second') and positive(byte, 'bytes_per_second')
  assert positive(
    bpe,
    'bytes_per_second',
    'tiktoken_bytes_per_second',
    'of_tiktoken',
    'tokenizers_bytes_per_second',
    'of_tokenizers',
  )
  assert positive(cold, 'tokens_per_second', 'memmap_tokens_per_second', 'of_memmap')
  assert positive(load, 'tokens_per_second', 'slices_tokens_per_second', 'of_slices', 'times_need')
  assert bpe['bytes'] == 8 * 2000 * len('a is what these lines say.\n')


@pytest.mark.slow
def test_startup(tmp_path):
  rows = rows_of(tmp_path, 'startup', '--config=tiny', '--repeats=1')
  by_part = {
    part: [row for row in rows if row['what'] == part] for part in ('import', 'train', 'sample')
  }
  assert all(positive(row, 'empty', 'seconds') for row in by_part['import'])
  assert [(row['batch'], row['start']) for row in by_part['train']] == [
    ('4 x 256', 'first'),
    ('4 x 256', 'second'),
    ('its own', 'first'),
    ('its own', 'second'),
  ]
  for row in by_part['train']:
    marks = [row['seconds'][mark] for mark in ('model', 'data', 'compiled', 'dispatch')]
    assert marks == sorted(marks) and marks[0] > 0
    assert ('step' in row['seconds']) == (row['batch'] == '4 x 256')
    assert (row['seconds']['cache'] > 0) == (row['start'] == 'second')
  assert all(positive(row, 'seconds') for row in by_part['sample']) and by_part['sample']


@pytest.mark.slow
def test_checkpoint(tmp_path):
  (row,) = rows_of(tmp_path, 'checkpoint', 'tiny', '--saves=2', '--gap=1')
  assert positive(
    row,
    'step_seconds',
    'blocked_seconds',
    'blocked_steps',
    'save_seconds',
    'write_seconds',
    'check_seconds',
    'restore_seconds',
    'read_seconds',
  )
  assert row['bytes'] > 3 * 4 * row['parameters']  # parameters and two moments, in float32


@pytest.mark.slow
def test_scaling(tmp_path):
  rows = rows_of(
    tmp_path,
    'scaling',
    '--layers',
    '1',
    '3',
    '--lengths',
    '64',
    '--batches',
    '1',
    '--positions',
    '8',
    '--devices',
    '2',
    '--width=64',
    '--repeats=1',
  )
  measured = [row for row in rows if 'flatness' not in row]
  assert [row['part'] for row in measured] == [
    'depth',
    'depth',
    'length',
    'batch',
    'decode',
    'devices',
  ]
  for row in measured:
    keys = {'decode': ['step_seconds'], 'devices': ['compile_seconds']}.get(
      row['part'], ['compile_seconds', 'step_seconds']
    )
    assert positive(row, *keys)
  assert [row['part'] for row in rows if 'flatness' in row] == [
    'depth',
    'length',
    'batch',
    'decode',
  ]  # of one number of several devices there is none


@pytest.mark.slow
def test_steps(tmp_path):
  """A served step beside `generate`, in the dtypes that were once ten times apart."""
  flags = '--sizes tiny --dtypes bfloat16 int8 --slots 2 --steps 2 --repeats 1'
  half, small = rows_of(tmp_path, 'steps', *flags.split())
  assert (half['dtype'], small['dtype']) == ('bfloat16', 'int8')
  for row in (half, small):
    assert row['slots'] == 2 and positive(row, 'served_clock_s', 'served_processor_s')


@pytest.mark.slow
def test_serving(tmp_path):
  pytest.importorskip('uvicorn')
  one, many, *theirs = rows_of(
    tmp_path, 'serving', '--clients=3', '--seconds=2', '--slots=3', '--repeats=1', '--requests=12'
  )
  for row in (one, many, *theirs):
    assert row['wrong'] == 0
    assert positive(row, 'requests', 'first_p50_ms', 'first_p99_ms', 'rss_after')
  assert (one['slots'], many['slots']) == (1, 3) and positive(one, 'times')
  assert many['times'] == [1, 1, 1]
  assert [(row['server'], row['slots']) for row in theirs] in ([], [('transformers', 1)])

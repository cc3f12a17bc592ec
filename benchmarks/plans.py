"""What fits on TPUs: the training step of each size compiled for some slices, as a table.

    python -m benchmarks.plans [--only small,v5e:4x4]

No TPU is needed, only libtpu. Writes benchmarks/results/plans-tpu.json and the table of docs/tpu.md.
Run again, it goes on: what the file has of another source or other versions is dropped.
"""

import argparse
import hashlib
import json
import subprocess
import sys
from pathlib import Path

from gpt2_jax.cli.plan import load_config
from gpt2_jax.core.chips import GIB
from gpt2_jax.core.errors import UserError
from gpt2_jax.core.progress import track
from gpt2_jax.planning import compile_ahead, topology
from gpt2_jax.planning.report import ASSUMPTIONS, Report
from gpt2_jax.planning.search import source_hash

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / 'benchmarks' / 'results' / 'plans-tpu.json'
PAGE = ROOT / 'docs' / 'tpu.md'
BEGIN, END = '<!-- benchmarks/plans.py writes from here -->', '<!-- to here -->'
SIZES = ('small', 'medium', 'large', 'xl')
TOPOLOGIES = ('v5e:4x4', 'v5e:16x16', 'v5p:4x4x4', 'v6e:8x8')
RECIPE = 'fineweb'


def compile_cell(size: str, name: str) -> dict:
  """A plan, in a process of its own so that no memory stays behind; or why there is none."""
  command = [sys.executable, '-m', 'benchmarks.plans', '--cell', size, name]
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
  if done.returncode:
    raise SystemExit(f'{" ".join(command)}:\n{done.stderr}')
  return json.loads(done.stdout.splitlines()[-1])


def cell(size: str, name: str) -> dict:
  from gpt2_jax.planning.compile_ahead import plan_train

  topo = topology.get(name)
  config, called = load_config(f'configs/{size}.py:{RECIPE}')
  try:
    return {'report': json.loads(plan_train(config, topo, called).to_json())}
  except UserError as e:
    return {'error': str(e)}


def versions() -> dict[str, str]:
  """Of what makes a TPU's program."""
  return {k: v for k, v in compile_ahead.versions().items() if 'cuda' not in k}


def stamp(size: str) -> dict:
  """What a cell follows from: the source, the config, the compilers. A table is of one source."""
  text = source_hash() + load_config(f'configs/{size}.py:{RECIPE}')[0].to_json_best_effort()
  return {'source': hashlib.sha256(text.encode()).hexdigest(), 'versions': versions()}


def row(size: str, name: str, entry: dict) -> str:
  if 'report' not in entry:
    return f'| {size} | {name} | – | {entry["error"].split(";")[0]} |' + ' – |' * 6
  r = Report.from_json(json.dumps(entry['report']))
  mesh = ' x '.join(f'{axis} {size}' for axis, size in r.mesh.items() if size > 1) or '1'
  memory = f'{r.memory.total / GIB:.1f} of {r.memory.hbm / GIB:.1f}'
  batch = f'{r.numbers["micro_batches"]} x {r.numbers["micro_batch_rows"]}'
  head = f'| {size} | {name} | {mesh} | {batch} | {r.numbers["remat"]} | {memory} | '
  if not r.fits or r.times is None:
    return head + '**does not fit** | – | – | – |'
  moved = sum(t['ici'] + t['dcn'] for t in r.collectives.values()) / GIB
  return head + (
    f'{moved:.2f} | {r.times.total * 1e3:,.0f} ({r.times.bound}) | '
    f'{r.results["mfu"]:.0%} | {r.results["days"]:.2f} |'
  )


def table(cells: dict) -> str:
  lines = [
    '| size | slice | mesh | micro-batches x rows a chip | remat | HBM, GiB | a chip sends, GiB a '
    'step | step, ms | MFU | days |',
    '|---' * 10 + '|',
  ]
  for name in TOPOLOGIES:
    lines += [row(size, name, cells[f'{size} {name}']) for size in SIZES if f'{size} {name}' in cells]
  found = next(iter(cells.values()))
  shown = ', '.join(f'{name} {version}' for name, version in found['versions'].items())
  lines += [
    '',
    f'Recipe `{RECIPE}`, {shown}, commit {found["commit"]}: '
    "`python -m benchmarks.plans`. Bytes are the compiler's. Step, MFU and days are "
    'estimates: ' + '; '.join(ASSUMPTIONS) + '.',
  ]
  return '\n'.join(lines)


def write(cells: dict) -> None:
  RESULTS.write_text(json.dumps(cells, indent=1) + '\n')
  before, rest = PAGE.read_text().split(BEGIN)
  PAGE.write_text(f'{before}{BEGIN}\n{table(cells)}\n{END}{rest.split(END)[1]}')


def main() -> None:
  flags = argparse.ArgumentParser(description=(__doc__ or '').splitlines()[0])
  flags.add_argument('--only', default='', help='sizes and slices, with commas; default: all')
  flags.add_argument('--cell', nargs=2, help=argparse.SUPPRESS)
  args = flags.parse_args()
  if args.cell:
    print(json.dumps(cell(*args.cell)))
    return
  only = set(filter(None, args.only.split(',')))
  pick = lambda names: [name for name in names if name in only or not only & set(names)]
  commit = subprocess.run(
    ['git', 'rev-parse', '--short', 'HEAD'], cwd=ROOT, capture_output=True, text=True
  ).stdout.strip()
  made_by = {f'{size} {name}': stamp(size) for name in TOPOLOGIES for size in SIZES}
  cells = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
  cells = {key: cell for key, cell in cells.items() if made_by.get(key, {}).items() <= cell.items()}
  todo = [(size, name) for name in pick(TOPOLOGIES) for size in pick(SIZES)]
  with track('planning', len(todo), 'cells') as advance:
    for size, name in todo:
      key = f'{size} {name}'
      if key not in cells:
        cells[key] = compile_cell(size, name) | made_by[key] | {'commit': commit}
        write(cells)
      advance(1, key)
  write(cells)


if __name__ == '__main__':
  main()

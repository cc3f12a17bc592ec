"""Which mesh, micro-batch and remat policy: candidates compiled side by side, and ranked."""

import concurrent.futures.process
import contextlib
import dataclasses
import hashlib
import json
import math
import multiprocessing
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from gpt2_jax.core.chips import GIB
from gpt2_jax.core.errors import UserError
from gpt2_jax.core.progress import track
from gpt2_jax.data import downloads
from gpt2_jax.model.config import Config, GPTConfig
from gpt2_jax.model.remat import REMAT_POLICIES
from gpt2_jax.parallel.sharding import check_divisible, make_mesh
from gpt2_jax.planning import topology as topologies
from gpt2_jax.planning.compile_ahead import plan_train, versions
from gpt2_jax.planning.report import Report
from gpt2_jax.planning.topology import Topology
from gpt2_jax.training.memory_estimate import divisors, estimate_bytes, slowness
from gpt2_jax.training.run_model import make_model

WORKER_BYTES = 3 * GIB  # of the host's memory, for one compilation
MOST_TENSOR = 8
# Shares of the memory, by the estimate: up to SURE a candidate should fit, up to PERHAPS it may (the
# compiler knows).
SURE, PERHAPS = 0.9, 2.0
TENSOR = (
  0.1  # a step is slower by such a share with each doubling of `tensor`, whose sums are not hidden
)


@dataclasses.dataclass(frozen=True)
class Candidate:
  """A way to run the same training."""

  data: int
  fsdp: int
  tensor: int
  rows: int  # of a micro-batch, on a device
  remat: str

  def apply(self, config: Config) -> Config:
    config = config.copy_and_resolve_references()
    config.mesh.update(data=self.data, fsdp=self.fsdp, tensor=self.tensor)
    config.train.micro_batch_rows = self.rows
    config.model.remat = self.remat
    return config

  def flags(self) -> str:
    return (
      f'--config.mesh.data={self.data} --config.mesh.fsdp={self.fsdp} '
      f'--config.mesh.tensor={self.tensor} --config.train.micro_batch_rows={self.rows} '
      f'--config.model.remat={self.remat}'
    )


def meshes(config: Config, topology: Topology, model: GPTConfig, rows: int) -> Iterator[Mesh]:
  """Yields the meshes that divide the model and a batch of so many rows; tensor is at most 8.

  Tensor stays inside of a host of GPUs, tensor and fsdp inside of a slice of TPUs.
  """
  devices, near = topology.devices, len(topology.devices) // len(set(topology.slices))
  for tensor in (n for n in divisors(len(devices)) if n <= min(MOST_TENSOR, near)):
    for fsdp in divisors(len(devices) // tensor):
      data = len(devices) // tensor // fsdp
      if rows % (data * fsdp) or (devices[0].platform == 'tpu' and fsdp * tensor > near):
        continue
      with contextlib.suppress(UserError):
        mesh = make_mesh(data=data, fsdp=fsdp, tensor=tensor, devices=devices)
        check_divisible(mesh, model.divisible())
        yield mesh


def candidates(config: Config, topology: Topology) -> list[Candidate]:
  """Returns the sensible candidates, the most promising first: for each mesh and remat policy the
  largest micro-batch that should fit, and the next larger one.
  """
  alone = config.copy_and_resolve_references()
  alone.mesh.update(data=len(topology.devices), fsdp=1, tensor=1)
  _, _, model, _ = make_model(alone, topology.devices)
  T = model.n_positions if config.data.sequence_length is None else config.data.sequence_length
  G, hbm = config.train.global_batch_tokens // T, topology.chip.hbm
  found = []
  for mesh in meshes(config, topology, model, G):
    data, fsdp, tensor = (mesh.shape[name] for name in ('data', 'fsdp', 'tensor'))
    for remat in REMAT_POLICIES:
      need = {
        rows: estimate_bytes(
          dataclasses.replace(model, remat=remat), mesh, T, rows * data * fsdp, config.optim
        )
        / hbm
        for rows in divisors(G // (data * fsdp))
      }
      fitting = [rows for rows in need if need[rows] <= SURE]
      beyond = [rows for rows in need if SURE < need[rows] <= PERHAPS]
      for rows in [*fitting[-1:], *beyond[:1]]:
        score = (
          slowness(dataclasses.replace(model, remat=remat), mesh, T, rows)
          + TENSOR * math.log2(tensor)
          + max(0.0, need[rows] - SURE)
        )
        found.append((score, Candidate(data, fsdp, tensor, rows, remat)))
  return [candidate for _, candidate in sorted(found, key=lambda pair: (pair[0], str(pair[1])))]


def source_hash() -> str:
  """Returns a hash of the package's Python files: another source may make another program."""
  package = Path(__file__).resolve().parent.parent
  total = hashlib.sha256()
  for path in sorted(package.rglob('*.py')):
    total.update(str(path.relative_to(package)).encode() + b'\0' + path.read_bytes())
  return total.hexdigest()


def cache_folder() -> Path:
  return downloads.cache().with_name('plans')


def cache_key(config: Config, topology: str, tokens: int | None) -> str:
  parts = [json.loads(config.to_json_best_effort()), topology, tokens, versions(), source_hash()]
  return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def plan_cached(
  config: Config,
  topology: Topology | str,
  name: str,
  *,
  tokens: int | None = None,
  dump: Path | None = None,
) -> Report:
  """Returns the report of `plan_train`, kept from before for the same config, topology, versions and
  source.
  """
  full = topology if isinstance(topology, str) else topology.name
  path = cache_folder() / f'{cache_key(config, full, tokens)}.json'
  if dump is None and path.exists():
    return Report.from_json(path.read_text())
  if isinstance(topology, str):
    topology = topologies.get(topology)
  made = plan_train(config, topology, name, tokens=tokens, dump=dump)
  made.save(path)
  return made


def workers_at_once(asked: int | None = None) -> int:
  """Returns how many compilations at a time the cores and the free memory allow."""
  if asked is not None:
    return max(1, asked)
  free = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_AVPHYS_PAGES')
  cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
  return max(1, min(cores, free // WORKER_BYTES))


def _work(
  config: Config, topology: str, name: str, tokens: int | None, dump: Path | None
) -> Report | str:
  """Runs in a process of its own; returns the report, or why there is none."""
  topologies.prepare_environment()
  try:
    return plan_cached(config, topology, name, tokens=tokens, dump=dump)
  except (UserError, jax.errors.JaxRuntimeError) as e:
    return (str(e) or repr(e)).splitlines()[0]


def search(
  config: Config,
  topology: Topology,
  name: str,
  *,
  limit: int,
  workers: int | None = None,
  tokens: int | None = None,
  dump: Path | None = None,
) -> Iterator[tuple[Candidate, Report]]:
  """Compiles the `limit` most promising candidates, in several processes, and yields their reports.

  Raises:
    UserError: there is no candidate.
  """
  found = candidates(config, topology)
  if not found:
    raise UserError(
      f'no mesh of {len(topology.devices)} devices divides the model and the batch of '
      f'{config.train.global_batch_tokens:,} tokens: make train.global_batch_tokens '
      'larger, or the topology smaller.'
    )
  chosen, at_once = found[:limit], workers_at_once(workers)
  print(f'{len(chosen)} of {len(found)} candidates, {at_once} at a time', file=sys.stderr)
  pool = concurrent.futures.ProcessPoolExecutor(
    at_once, multiprocessing.get_context('spawn'), max_tasks_per_child=4
  )
  with pool, track('planning', len(chosen), 'plans') as advance:
    waiting: dict[Any, Candidate] = {}
    for i, candidate in enumerate(chosen):
      file = None if dump is None else dump / f'{i:02d}.hlo.txt'
      future = pool.submit(
        _work, candidate.apply(config), topology.name, f'{name} {candidate.flags()}', tokens, file
      )
      waiting[future] = candidate
    for future in concurrent.futures.as_completed(waiting):
      try:
        made = future.result()
      except concurrent.futures.process.BrokenProcessPool as e:
        raise UserError(
          'a compilation was killed, for want of memory perhaps: try fewer at a time '
          f'(--workers {max(1, at_once // 2)}). What was finished is kept.'
        ) from e
      advance(1)
      if isinstance(made, str):
        print(f'{waiting[future].flags()}: {made}', file=sys.stderr)
      else:
        yield waiting[future], made


def ranked(results: list[tuple[Candidate, Report]]) -> list[tuple[Candidate, Report]]:
  """Sorts results by tokens a second, those that don't fit last."""

  def key(pair: tuple[Candidate, Report]):
    candidate, r = pair
    return not r.fits, -r.results.get('tokens_per_second', 0.0), str(candidate)

  return sorted(results, key=key)


def table(results: list[tuple[Candidate, Report]]) -> str:
  """Returns the results for a reader, a line each, the best one first."""
  lines = ['  data  fsdp tensor  rows remat   fits     GiB  step ms   tokens/s    MFU  bound']
  for c, r in ranked(results):
    line = (
      f'{c.data:6d}{c.fsdp:6d}{c.tensor:7d}{c.rows:6d} {c.remat:6s}'
      f'{"yes" if r.fits else "NO":>6s}{r.memory.total / GIB:8.2f}'
    )
    if r.times:
      line += (
        f'{r.times.total * 1e3:9.1f}{r.results["tokens_per_second"]:11,.0f}'
        f'{r.results["mfu"]:7.1%}  {r.times.bound}'
      )
    lines.append(line)
  return '\n'.join(lines)

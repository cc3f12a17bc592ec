"""The result of a plan, as a dataclass, text and JSON; and the estimate of a step's time."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

from gpt2_jax.core.chips import COMPUTE, GIB, HBM, LINKS, Chip
from gpt2_jax.core.files import save_text
from gpt2_jax.planning import bill
from gpt2_jax.planning.program_cost import Cost, Use

LAUNCH = 2e-6  # seconds from a small kernel of a GPU to the next
ASSUMPTIONS = (
  'uncalibrated: no run on this hardware stands behind the times',
  f'the longest of six: FLOPs at {COMPUTE:.0%} of the bfloat16 peak, main memory at {HBM:.0%}, '
  f'ICI (or NVLink) and DCN at {LINKS:.0%} of their bandwidth, on a TPU the cycles that its compiler '
  f"counts and its kernels' FLOPs, on a GPU {LAUNCH * 1e6:.0f} us a kernel; the others are hidden "
  'behind it, and to it is added what crosses ICI with no product beside it',
  'FLOPs: the larger of the formula and the compiled products, of attention the causal half too',
  "main memory: operands and results of all fusions, as the program's text has them, on a TPU with "
  'its tiles filled up: heads of 64 take 128',
  'simple: the longest of FLOPs, main memory without padding, ICI and DCN, as plans were made before',
)


@dataclasses.dataclass(frozen=True)
class Memory:
  """Bytes of one device."""

  arguments: int  # state and batch, or weights, cache and request
  temporaries: int
  code: int
  total: int
  hbm: int  # that the device has

  @property
  def fits(self) -> bool:
    return self.total <= self.hbm


@dataclasses.dataclass(frozen=True)
class Times:
  """Seconds that a step would take if only one thing took time."""

  compute: float
  hbm: float
  ici: float
  dcn: float
  padded_hbm: float = 0  # with tiles filled up
  cycles: float = 0  # that a TPU's compiler counts, and its kernels
  launches: float = 0  # of a GPU's kernels
  exposed: float = 0  # part of ici: of what no product is beside

  def _parts(self) -> dict[str, float]:
    """The seconds of which the longest counts, by their name for a reader."""
    return dict(
      compute=self.compute,
      hbm=max(self.hbm, self.padded_hbm),
      ici=self.ici - self.exposed,
      dcn=self.dcn,
      cycles=self.cycles,
      launches=self.launches,
    )

  @property
  def total(self) -> float:
    return max(self._parts().values()) + self.exposed

  @property
  def simple(self) -> float:
    """As plans were made before: memory without padding, links hidden."""
    return max(self.compute, self.hbm, self.ici, self.dcn)

  @property
  def bound(self) -> str:
    parts = self._parts()
    return max(parts, key=lambda name: parts[name])

  def text(self) -> str:
    ms = {name: f'{1e3 * seconds:,.2f}' for name, seconds in vars(self).items()}
    return (
      f'{1e3 * self.total:,.2f} ms (uncalibrated; bound by {self.bound}): compute {ms["compute"]}, '
      f'HBM {ms["hbm"]} ({ms["padded_hbm"]} with tiles filled up), ICI {ms["ici"]} ({ms["exposed"]} '
      f'exposed), DCN {ms["dcn"]}, cycles {ms["cycles"]}, launches {ms["launches"]} ms; simple: '
      f'{1e3 * self.simple:,.2f} ms'
    )


def times(chip: Chip, flops: float, cost: Cost) -> Times:
  """Returns the estimate that ASSUMPTIONS describes; `flops` are the formula's, of one device."""
  traffic = cost.collectives.values()
  link = LINKS * chip.ici
  cycles = cost.cycles / chip.clock + cost.kernel_flops / (COMPUTE * chip.flops) if chip.clock else 0
  return Times(
    max(flops, cost.flops) / (COMPUTE * chip.flops),
    cost.hbm_bytes / (HBM * chip.hbm_bandwidth),
    sum(t.ici for t in traffic) / link,
    sum(t.dcn for t in traffic) / (LINKS * chip.dcn),
    cost.padded_bytes / (HBM * chip.hbm_bandwidth),
    cycles,
    0 if chip.clock else LAUNCH * cost.launches,
    sum(t.exposed for t in traffic) / link,
  )


@dataclasses.dataclass(frozen=True)
class Report:
  """A plan for a topology. Bytes, FLOPs and seconds are those of one device in one step, or token."""

  mode: str  # train, decode, prefill
  config: str  # the config's name with its recipe and overrides
  topology: str
  device_kind: str
  devices: int
  chips: int
  mesh: dict[str, int]
  model: str
  batch: str
  numbers: dict[str, Any]  # of the model and the batch, by name
  memory: Memory
  fits: bool
  refused: str | None  # what the compiler said where it gave up; nothing below is known then
  collectives: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
  kernels: dict[str, int] = dataclasses.field(default_factory=dict)
  flops: float = 0  # by the formula
  flops_compiled: float = 0
  hbm_bytes: float = 0
  cycles: float = 0  # the TPU compiler's estimates summed, to compare programs with
  places: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)  # see `bill`
  ideal: dict[str, float] = dataclasses.field(default_factory=dict)  # train: bytes by place
  times: Times | None = None
  results: dict[str, float] = dataclasses.field(default_factory=dict)  # tokens_per_second, mfu, …
  notes: tuple[str, ...] = ()
  calibrated: bool = False
  versions: dict[str, str] = dataclasses.field(default_factory=dict)
  compile_seconds: float = 0

  def to_json(self) -> str:
    fields: dict[str, Any] = dataclasses.asdict(self) | {'assumptions': ASSUMPTIONS}
    if self.times:
      made = {name: getattr(self.times, name) for name in ('total', 'simple', 'bound')}
      fields['times'] |= made
    return json.dumps(fields, indent=1)

  @classmethod
  def from_json(cls, text: str) -> 'Report':
    fields = json.loads(text)
    del fields['assumptions']
    times = fields['times'] and Times(*(fields['times'][f.name] for f in dataclasses.fields(Times)))
    return cls(
      **fields
      | {'memory': Memory(**fields['memory']), 'times': times, 'notes': tuple(fields['notes'])}
    )

  def save(self, path: str | Path) -> None:
    save_text(path, self.to_json() + '\n', 'the plan')

  def bill(self) -> str:
    """Returns the bytes, FLOPs, kernels and cycles by place in the model, for a reader."""
    return bill.table({name: Use(**used) for name, used in self.places.items()}, self.ideal)

  def text(self) -> str:
    """Returns the report as lines for a reader."""
    m, mesh = self.memory, ' '.join(f'{name}={size}' for name, size in self.mesh.items())
    lines = [
      f'plan       {self.mode}: {self.config}',
      f'topology   {self.topology}: {self.devices} x {self.device_kind}, {self.chips} chips',
      f'mesh       {mesh}',
      f'model      {self.model}',
      f'batch      {self.batch}',
      f'fits       {"yes" if self.fits else "NO"}: {m.total / GIB:,.2f} of {m.hbm / GIB:,.2f} GiB '
      'of a device',
      f'memory     arguments {m.arguments / GIB:,.2f}, temporaries {m.temporaries / GIB:,.2f}, '
      f'generated code {m.code / GIB:,.3f} GiB',
    ]
    if self.refused:
      lines.append(f'           {self.refused}')
    for kind, t in self.collectives.items():
      lines.append(
        f'moved      {kind}: {t["count"]:,} of {size(t["bytes"])} in all; a device sends '
        f'{size(t["ici"])} over ICI, {size(t["dcn"])} over DCN'
      )
    kernels = [
      f'{count:,} {name}'
      for name, count in self.kernels.items()
      if name.startswith(('tpu_custom_call', '__cudnn'))
    ]
    if kernels:
      lines.append(f'kernels    {", ".join(kernels)}')
    if self.times:
      t = self.times
      lines += [
        f'FLOPs      {self.flops:,.0f} by the formula, {self.flops_compiled:,.0f} in compiled '
        f'products; {size(self.hbm_bytes)} of main memory traffic',
        f'time       {t.text()}',
      ]
      if self.cycles:
        lines.append(
          f'cycles     {self.cycles:,.0f} by the compiler (without collectives and '
          'kernels; to compare programs with)'
        )
    shown = lambda value: f'{value:,.4g}' if value < 1000 else f'{value:,.0f}'
    lines += [f'{name.replace("_", " ")}: {shown(value)}' for name, value in self.results.items()]
    lines += [f'note       {note}' for note in self.notes]
    if self.times:
      lines += [f'assumed    {line}' for line in ASSUMPTIONS]
    return '\n'.join(lines)


def size(count: float) -> str:
  """Returns a number of bytes as a text for a reader."""
  for unit in ('B', 'KiB', 'MiB', 'GiB'):
    if count < 1024 or unit == 'GiB':
      return f'{count:,.4g} {unit}' if count < 1000 else f'{count:,.0f} {unit}'
    count /= 1024
  raise AssertionError


def refused_bytes(message: str) -> int:
  """Returns the bytes that a compiler's refusal names, as '(21.41G)'; 0 where it names none."""
  found = re.search(r'\(([\d.]+)([KMGT])\) exceeds', message)
  return int(float(found[1]) * 1024 ** ('KMGT'.index(found[2]) + 1)) if found else 0

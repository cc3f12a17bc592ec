"""The verb `gpt2-jax doctor`."""

import dataclasses
import sys
from pathlib import Path
from typing import Annotated

import tyro

from gpt2_jax.core.errors import UserError
from gpt2_jax.core.files import read_json


@dataclasses.dataclass
class Doctor:
  """Says what is not as it should be in a run or a config. Exit status 1 where it finds something.

  Overrides of a config are written as for launch.py: --config.optim.peak_lr=1e-3.
  """

  run_or_config: Annotated[str | None, tyro.conf.Positional] = None
  """The folder of a run, or a config: tiny, small:fineweb, mine.py."""
  env: bool = False
  """Print versions, machine and devices, for the report of a fault."""
  plan: Annotated[Path | None, tyro.conf.arg(metavar='FILE')] = None
  """What `gpt2-jax plan --json FILE` wrote, to compare the run's speed with."""
  overrides: Annotated[tuple[str, ...], tyro.conf.Suppress] = ()

  def run(self) -> None:
    if self.env:
      from gpt2_jax.diagnosis import environment

      print(environment.describe())
    if self.run_or_config is None:
      if self.env:
        return
      raise UserError('doctor looks at a run or a config: name its folder, or tiny, small:fineweb, …')
    from gpt2_jax.cli.plan import load_config
    from gpt2_jax.diagnosis import doctor, facts

    known = facts.of_target(
      self.run_or_config, self.overrides, lambda name, given: load_config(name, given, '')[0]
    )
    if self.plan is not None:
      shape = {'results': {'tokens_per_second': (int, float)}}
      rate = read_json(self.plan, shape)['results']['tokens_per_second']
      known = dataclasses.replace(known, plan=float(rate))
    print(doctor.heading(known))
    found = doctor.examine(known)
    for finding in found:
      print(finding)
    print(f'{len(doctor.CHECKS)} checks, {len(found) or "no"} finding{"s" * (len(found) != 1)}')
    if found:
      sys.exit(1)

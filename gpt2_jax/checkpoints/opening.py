"""How a checkpoint is to be opened: what a user may say beside its place, in every door alike."""

import dataclasses
import functools
import sys


@dataclasses.dataclass(frozen=True)
class Opening:
  """How a checkpoint is opened."""

  base: str | None = None
  """The model that adapters belong to, in place of the one that their adapter_config.json names."""
  ignore_extra: bool = False
  """Take the language model alone from a file with more in it, and list what is left out."""
  step: int | str | None = None
  """Which checkpoint of a run: a step, 'latest' or 'best', as behind the @ of runs/x@1200."""


PLAIN = Opening()


@functools.cache
def say_once(text: str) -> None:
  """Tells the user something that is no error, on standard error; the same text once a process."""
  print(text, file=sys.stderr, flush=True)

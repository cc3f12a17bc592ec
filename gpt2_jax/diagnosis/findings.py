"""What a check says."""

import dataclasses
from collections.abc import Callable, Iterator

from gpt2_jax.diagnosis.facts import Facts

Check = Callable[[Facts], Iterator[str]]  # yields what is wrong, a sentence each

PAGE = 'docs/doctor.md'


@dataclasses.dataclass(frozen=True)
class Finding:
  """Something that is not as it should be."""

  check: str  # its name, and the heading of the page that explains it
  said: str

  def __str__(self) -> str:
    return f'{self.check}: {self.said} [{PAGE}#{self.anchor}]'

  @property
  def anchor(self) -> str:
    return self.check.replace(' ', '-')

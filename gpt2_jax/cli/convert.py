"""The verb `gpt2-jax convert`."""

import dataclasses
from typing import Annotated, Any, Literal

import tyro

from gpt2_jax.checkpoints import format_table
from gpt2_jax.cli import inputs
from gpt2_jax.core import bounds

Written = tyro.extras.literal_type_from_choices(format_table.written())
# One dataclass of the options of all formats.
FormatOptions = dataclasses.make_dataclass(
  'FormatOptions',
  [
    (name, Annotated[option.type, tyro.conf.arg(help=option.help)], option.absent)
    for name, option in format_table.options().items()
  ],
  frozen=True,
)


@dataclasses.dataclass
class Convert:
  """Turns a checkpoint of any format into another. What is lost: docs/conversion.md."""

  source: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar='SRC')]
  """Workdir of a run or a step of it (DIR, DIR@1200, DIR@best), hub name, or a folder or file of
  another format."""
  target: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar='DST')]
  """A new folder, or a new file where the format is one file."""
  to: Written  # pyright: ignore[reportInvalidTypeForm]
  """The format to write."""
  dtype: Literal['float32', 'bfloat16', 'float16'] | None = None
  """Of the tensors; default: as in the source."""
  options: Annotated[Any, tyro.conf.arg(name='format')] = FormatOptions()
  opening: inputs.OpeningFlags = inputs.OpeningFlags()

  def run(self) -> None:
    from gpt2_jax.checkpoints import pretrained

    known = format_table.options()
    bounds.check_flags({name: option.kind for name, option in known.items()}, self.options)
    given = {name: value for name, value in vars(self.options).items() if value}
    source = pretrained.open_source(self.source, self.opening)
    pretrained.write(source, self.target, self.to, dtype=self.dtype, **given)
    print(f'{self.target}: {self.to}, {self.dtype or source.dtype}, from {source.where}')

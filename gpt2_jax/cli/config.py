"""The verb `gpt2-jax config`."""

import dataclasses
import re

import tyro

from gpt2_jax import configs
from gpt2_jax.core.errors import UserError
from gpt2_jax.model.config import knobs_of


@dataclasses.dataclass
class Config:
  """Prints every knob of a config with its value and what it does, as `train` takes it."""

  name: tyro.conf.Positional[str]
  """tiny, small, medium, large, xl, finetune, or one with a recipe: small:fineweb."""

  def run(self) -> None:
    try:
      config = configs.load(self.name)
    except ValueError as e:
      raise UserError(f'{e}.') from e
    said = comments()
    for knob, value in knobs_of(config).items():
      value = value if isinstance(value, str) and value.isprintable() else repr(value)
      print(f'{f"--config.{knob}={value}":52s} # {said.get(knob, "")}'.rstrip(' #'))


def comments() -> dict[str, str]:
  """What configs/base.py says of each knob: behind it and in the comments that go on below, or above
  knobs that are in no section.
  """
  found, section, last, above = {}, '', '', ''
  for line in (configs.FOLDER / 'base.py').read_text().splitlines():
    code, _, said = line.partition('  # ' if '  # ' in line.lstrip() else '# ')
    if begun := re.fullmatch(r'  config\.(\w+) = ConfigDict\(', line):
      section, last = f'{begun[1]}.', ''
    elif knob := re.match(r'  config\.(\w+) =|      (\w+)=', code):
      last = knob[1] or section + knob[2]
      found[last], above = said or above, ''
    elif not code.strip() and said and line.startswith('      ') and last:
      found[last] += f' {said}'
    else:
      above = f'{above} {said}'.strip() if not code.strip() and said else ''
      last = ''
  return {knob: said for knob, said in found.items() if said}

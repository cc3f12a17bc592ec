"""The verb `gpt2-jax steer`."""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro

from gpt2_jax.cli import inputs
from gpt2_jax.core.errors import UserError


@dataclasses.dataclass
class Steer:
  """Makes a steering vector of two sets of texts, for sample --steer (docs/interpretability.md)."""

  checkpoint: str
  """Workdir of a run or a step of it (DIR, DIR@1200, DIR@best), Hugging Face folder, hub name, or
  another checkpoint (docs/conversion.md)."""
  toward: Annotated[str, tyro.conf.arg(metavar='FILE')]
  """Texts that have what is wanted: lines that are not blank, of a .jsonl file their "prompt"."""
  away: Annotated[str, tyro.conf.arg(metavar='FILE')]
  """Texts that have it not."""
  layer: int
  """From 0, or negative from the end."""
  output: Annotated[Path, tyro.conf.arg(metavar='FILE')]
  """Of safetensors: the vector, its site and its layer."""
  site: str = 'resid_post'
  """Where in the layer, by the table of docs/interpretability.md."""
  tokens: Literal['last', 'mean', 'all'] = 'last'
  """Each text's last token, the mean over each text, or all tokens alike."""
  tokenizer: str | None = None
  """Where the checkpoint brings none: gpt2, byte, or a folder."""
  opening: inputs.OpeningFlags = inputs.OpeningFlags()

  def run(self) -> None:
    toward, away = (inputs.read_prompts(path) for path in (self.toward, self.away))
    if not self.output.parent.is_dir():
      raise UserError(f'--output {self.output}: there is no folder {self.output.parent}.')
    import numpy as np

    from gpt2_jax.checkpoints import pretrained
    from gpt2_jax.interpretation.steering import steering_vector

    model = pretrained.open_model(self.checkpoint, self.tokenizer, self.opening)
    vector = steering_vector(
      model, toward, away, site=self.site, layer=self.layer, tokens=self.tokens
    )
    vector.save(self.output)
    print(
      f'{self.output}: {len(toward)} texts less {len(away)}, {vector.site} of layer {vector.layer}, '
      f'length {np.linalg.norm(vector.value):.3g}'
    )

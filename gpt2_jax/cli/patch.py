"""The verb `gpt2-jax patch`."""

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Literal

import tyro

from gpt2_jax.cli import inputs
from gpt2_jax.core.errors import UserError, saving

MOST = 8  # places that are printed


@dataclasses.dataclass
class Patch:
  """Says which activations of one text restore its answer in another (docs/interpretability.md)."""

  checkpoint: str
  """Workdir of a run or a step of it (DIR, DIR@1200, DIR@best), Hugging Face folder, hub name, or
  another checkpoint (docs/conversion.md)."""
  clean: str
  """The text that the activations are from."""
  corrupted: str
  """The text that they are put into, of as many tokens."""
  answers: tuple[str, str]
  """What comes after the clean text, and after the corrupted one: a token each, often with a blank
  before it."""
  over: str = 'resid_pre'
  """Site of the activations, by the table of docs/interpretability.md."""
  by: tuple[Literal['position', 'head', 'neuron'], ...] = ()
  """Axes beside the layer; default: head where the site has heads, else position."""
  png: Annotated[Path | None, tyro.conf.arg(metavar='FILE')] = None
  """Draw a heat map here."""
  json: Annotated[Path | None, tyro.conf.arg(metavar='FILE')] = None
  """Write everything here."""
  tokenizer: str | None = None
  """Where the checkpoint brings none: gpt2, byte, or a folder."""
  opening: inputs.OpeningFlags = inputs.OpeningFlags()

  def run(self) -> None:
    from gpt2_jax.interpretation.patching import check_over

    check_over(self.over)
    for name, path in (('--png', self.png), ('--json', self.json)):
      if path is not None and not path.parent.is_dir():
        raise UserError(f'{name} {path}: there is no folder {path.parent}.')
    typed = lambda text: inputs.typed(text, f'the text {text[:40]!r}')
    clean, corrupted = typed(self.clean), typed(self.corrupted)
    from gpt2_jax.checkpoints import pretrained
    from gpt2_jax.core.files import write_whole
    from gpt2_jax.interpretation.prompt_pairs import patch_texts

    model = pretrained.open_model(self.checkpoint, self.tokenizer, self.opening)
    found = patch_texts(model, clean, corrupted, self.answers, over=self.over, by=self.by or None)
    self._show(found)
    if self.json is not None:
      fields = dataclasses.asdict(found) | {
        'checkpoint': self.checkpoint,
        'differences': found.differences.tolist(),
        'restored': found.restored.tolist(),
      }
      with saving('the results', self.json):
        write_whole(self.json, json.dumps(fields, indent=2, ensure_ascii=False) + '\n')
    if self.png is not None:
      with saving('the heat map', self.png):
        found.figure().savefig(self.png, format='png', dpi=150)

  def _show(self, found) -> None:
    """Prints the places that matter most."""
    import numpy as np

    from gpt2_jax.interpretation.pictures import shown

    right, wrong = map(shown, found.answers)
    print(
      f'{right} over {wrong}: {found.clean_difference:+.3f} after the clean text, '
      f'{found.corrupted_difference:+.3f} after the corrupted one (logits)'
    )
    restored = found.restored
    for flat in np.argsort(-np.abs(restored), axis=None)[:MOST]:
      place = np.unravel_index(flat, restored.shape)
      words = [f'{name} {i}' for name, i in zip(('layer', *found.by), place)]
      if 'position' in found.by:
        words.append(shown(found.corrupted[place[1 + found.by.index('position')]]))
      print(f'  {found.over} {" ".join(words)}: {restored[place]:+.1%} restored')

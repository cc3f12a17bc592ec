"""Steering vectors: a direction from two sets of texts, added while a text is written.

    vector = steering_vector(model, ['I love', …], ['I hate', …], layer=6)
    gpt2_jax.generate(model, 'The film', edits=vector.edits(4.0))

The difference of means of activations (Marks & Tegmark 2023, arXiv:2310.06824; Rimsky et al. 2023,
arXiv:2312.06681, "Contrastive Activation Addition"; of a pair of texts, Turner et al. 2023,
arXiv:2308.10248).
"""

import dataclasses
import json
import os
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from gpt2_jax.core.bounds import FINITE
from gpt2_jax.core.errors import UserError, saving
from gpt2_jax.core.files import local, parse_json, unreadable, whole_number, write_whole
from gpt2_jax.interpretation.activations import Tokens, activations, check_place
from gpt2_jax.model import text_batches
from gpt2_jax.model.edits import Edit
from gpt2_jax.model.pretrained_model import Model
from gpt2_jax.model.sites import site as site_of
from gpt2_jax.tokenizer.bpe import Tokenizer

KIND = 'gpt2_jax steering vector'
ABOUT = {'kind': str, 'site': str, 'layer': whole_number, 'tokens': str}


@dataclasses.dataclass(frozen=True)
class SteeringVector:
  """A direction at a site of a layer.

  Attributes:
    value: float32, its axes are those of the site after T.
    site: a name of `sites.SITES`.
    layer: from 0.
    tokens: of which tokens it is the mean: see `activations`.
  """

  value: np.ndarray
  site: str
  layer: int
  tokens: str = 'last'

  def edits(self, scale: float = 1.0) -> list[Edit]:
    """What adds `scale` times the vector to every token. At scale 0 there is nothing to do, and the
    program is the one without."""
    scale = FINITE.check('scale', scale)
    return [Edit(self.site, 'add', np.float32(scale) * self.value, layer=self.layer)] * bool(scale)

  def save(self, path: str | os.PathLike) -> None:
    """Writes a file of safetensors: the vector, and where it belongs."""
    about = dataclasses.asdict(self) | {'kind': KIND}
    del about['value']
    with saving('the steering vector', path):
      write_whole(local(path), save({'vector': self.value}, {'gpt2_jax': json.dumps(about)}))


def load(path: str | os.PathLike) -> SteeringVector:
  """The vector of a file that `SteeringVector.save` wrote.

  Raises:
    UserError: it is none, or can't be read.
  """
  try:
    with safe_open(local(path), 'np') as file:
      about = parse_json((file.metadata() or {}).get('gpt2_jax', ''), ABOUT)
      value = file.get_tensor('vector')
  except (SafetensorError, OSError, ValueError) as e:
    raise unreadable(path, e) from e
  have, wanted = (value.ndim, value.dtype), (len(site_of(about['site']).letters) - 2, np.float32)
  if about['kind'] != KIND or have != wanted or not np.isfinite(value).all():
    raise unreadable(path, 'it holds no steering vector')
  return SteeringVector(value, about['site'], about['layer'], about['tokens'])


def steering_vector(
  model: Model,
  toward: text_batches.Texts,
  away: text_batches.Texts,
  *,
  site: str = 'resid_post',
  layer: int,
  tokens: Tokens = 'last',
  tokenizer: Tokenizer | None = None,
) -> SteeringVector:
  """The mean activation of some texts, less that of others.

  Args:
    model, site, layer, tokens, tokenizer: as of `activations`; of `tokens`, 'all' counts each token
      once and 'mean' each text.
    toward, away: texts, or lists of ids.

  Raises:
    UserError: as of `activations`.
  """
  layer = check_place(model, site, layer)
  how: Any = dict(site=site, layer=layer, tokens=tokens, tokenizer=tokenizer)
  means = [activations(model, texts, **how).mean(0, dtype=np.float64) for texts in (toward, away)]
  value = (means[0] - means[1]).astype(np.float32)
  if not value.any():
    raise UserError(
      f'the texts have the same {site} in layer {layer}: there is no direction between them.'
    )
  return SteeringVector(value, site, layer, tokens)


def steering(spec: str) -> list[Edit]:
  """The edits that FILE[:SCALE] asks for, as the command line has it; scale 1 where none is named.

  Raises:
    UserError: there is no such file, it holds no vector, or the scale is no finite number.
  """
  path, _, scale = spec.rpartition(':')
  if not path or local(spec).exists():
    path, scale = spec, '1'
  try:
    number = float(scale)
  except ValueError:
    path, number = spec, 1.0  # a colon of the file's own name
  if not local(path).exists():
    raise UserError(f'--steer {spec}: there is no file {path}; FILE or FILE:SCALE is wanted.')
  return load(path).edits(number)

"""The formats of checkpoints, a row each: what opens and writes them, and how they are told apart.

The choices, flags and messages of `gpt2-jax convert` and `from_pretrained` come from here. A new
format is a module and a row: docs/extending.md.
"""

import dataclasses
import importlib
from collections.abc import Mapping
from typing import Any, Literal

from gpt2_jax.core.bounds import Bool, Int, Kind, Optional
from gpt2_jax.core.buckets import AnyPath


@dataclasses.dataclass(frozen=True)
class Option:
  """A keyword of a format's `write`, and a flag of `gpt2-jax convert`: its type, limits and help."""

  type: Any
  kind: Kind
  help: str

  @property
  def absent(self) -> Any:
    """The flag's value where it is not given."""
    return False if self.type is bool else None


@dataclasses.dataclass(frozen=True)
class Format:
  """A format.

  Attributes:
    path: its module, which is imported when it is first needed. Where the format is read, it has
      `recognises(path)` and `open_source(path, opening)`; where it is written,
      `write(source, target, **options)`.
    known_by: the files that it is recognised by, for messages; '' where it is not read.
    writes: what a target is; None where the format is not written.
    options: keywords of `write`, each left out where it is not given.
    keeps_adapters: whether adapters stay apart from the weights when it is written.
  """

  path: str
  known_by: str = ''
  writes: Literal['folder', 'file'] | None = None
  options: Mapping[str, Option] = dataclasses.field(default_factory=dict)
  keeps_adapters: bool = False

  @property
  def module(self) -> Any:
    return importlib.import_module(self.path)


SHARD = Option(int | None, Optional(Int(1, 2**63 - 1)), 'hf: bytes of a weights file; default 5 GB.')
APPROXIMATE = Option(
  bool,
  Bool(),
  'nanogpt: allow a model with the tanh GELU, which nanoGPT computes with the exact one.',
)
# In the order in which a checkpoint is compared with them.
FORMATS = {
  'workdir': Format(
    'gpt2_jax.checkpoints.workdir', 'checkpoints/ of a run (name the workdir, DIR or DIR@STEP)'
  ),
  'peft': Format(
    'gpt2_jax.checkpoints.formats.peft',
    'adapter_config.json with adapter_model.safetensors or .bin',
    'folder',
    keeps_adapters=True,
  ),
  'hf': Format(
    'gpt2_jax.checkpoints.formats.huggingface',
    'config.json with model.safetensors or pytorch_model.bin',
    'folder',
    {'max_shard_size': SHARD},
  ),
  'flax': Format(
    'gpt2_jax.checkpoints.formats.flax_msgpack', 'config.json with flax_model.msgpack', 'folder'
  ),
  'openai': Format('gpt2_jax.checkpoints.formats.openai', 'hparams.json with model.ckpt.*', 'folder'),
  'nanogpt': Format(
    'gpt2_jax.checkpoints.formats.nanogpt', 'ckpt.pt of nanoGPT', 'file', {'approximate': APPROXIMATE}
  ),
  'llmc': Format('gpt2_jax.checkpoints.formats.llmc', 'a model file of llm.c', 'file'),
  'gguf': Format('gpt2_jax.checkpoints.formats.gguf', writes='file'),
  'stablehlo': Format('gpt2_jax.checkpoints.formats.stablehlo', writes='folder'),
}


def recognise(path: AnyPath) -> str | None:
  """Returns the name of the format of a file or folder; None where it is none that is read."""
  formats = ((name, each) for name, each in FORMATS.items() if each.known_by)
  return next((name for name, each in formats if each.module.recognises(path)), None)


def written() -> list[str]:
  """Returns the names of the formats that are written."""
  return sorted(name for name, each in FORMATS.items() if each.writes)


def options() -> dict[str, Option]:
  """Returns the options of all formats, by name."""
  return {name: option for each in FORMATS.values() for name, option in each.options.items()}

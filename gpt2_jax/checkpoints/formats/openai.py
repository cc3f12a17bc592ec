"""The folders that OpenAI released GPT-2 in, both ways, without TensorFlow.

`hparams.json`, a TensorFlow checkpoint (`tensor_bundle.py`) that the file `checkpoint` names, and the
vocabulary as `encoder.json` and `vocab.bpe` (openai/gpt-2 `src/model.py`, `src/encoder.py`). So do
tools that fine-tune the release save their models; what an optimizer left there is not read.

The release has a file `model.ckpt.meta`, TensorFlow 1's graph. It is neither read nor written: only
`import_meta_graph` needs it, which OpenAI's code doesn't call.
"""

import json
import re
import tempfile
import warnings
from pathlib import Path

import numpy as np

from gpt2_jax.checkpoints import foreign
from gpt2_jax.checkpoints.formats import tensor_bundle
from gpt2_jax.checkpoints.opening import PLAIN, Opening
from gpt2_jax.checkpoints.tensors import (
  Source,
  Tensor,
  check_plain,
  check_tensors,
  common_dtype,
  shapes,
)
from gpt2_jax.core import bounds
from gpt2_jax.core.errors import UserError
from gpt2_jax.core.files import unreadable
from gpt2_jax.model.config import MODEL, GPTConfig
from gpt2_jax.tokenizer import bpe

PREFIX = 'model.ckpt'
HPARAMS = {
  'n_vocab': 'vocab_size',
  'n_ctx': 'n_positions',
  'n_embd': 'n_embd',
  'n_head': 'n_head',
  'n_layer': 'n_layer',
}
VOCABULARY = ('encoder.json', 'vocab.bpe')
# What TensorFlow's optimizers add to a variable's name.
SLOTS = re.compile(r'/(Adam|Adam_1|Momentum|Adagrad|Adafactor|RMSProp|RMSProp_1)$')


def recognises(path: Path) -> bool:
  try:
    return (path / 'hparams.json').is_file() and any(path.glob('*.index'))
  except OSError:
    return False


def open_source(path: Path, opening: Opening = PLAIN) -> Source:
  """Opens a folder of OpenAI's.

  Its model has no dropout, as the released code has none.

  Raises:
    UserError: names the file, and what about it can't be read or honoured.
  """
  config = read_hparams(path / 'hparams.json')
  prefix = find_prefix(path)
  tensors = {
    name: tensor
    for name, tensor in tensor_bundle.read(prefix).items()
    if name.startswith('model/') and not SLOTS.search(name)
  }
  # before `shapes`, which would make as many names as a broken hparams.json asks for
  layers = {name.split('/')[1] for name in tensors if re.match(r'model/h\d+/', name)}
  have = [tensors[name].shape if name in tensors else () for name in ('model/wte', 'model/wpe')]
  want = [(config.vocab_size, config.n_embd), (config.n_positions, config.n_embd)]
  if len(layers) != config.n_layer or have != want:
    raise UserError(
      f'{path / "hparams.json"} contradicts {prefix.name}: it says {config.n_layer} layers and '
      f'embeddings of {list(want[0])} and {list(want[1])}, but {len(layers)} layers and embeddings '
      f'of {list(have[0])} and {list(have[1])} are there. Use the hparams.json of this model.'
    )
  ours = {variable(name): name for name in shapes(config)}
  found = {}
  for name, tensor in tensors.items():
    kernel = ours.get(name, '').endswith('weight') and name.endswith('/w')
    if kernel and tensor.shape[:1] != (1,):
      raise UserError(
        f"{prefix}: {name} is of shape {list(tensor.shape)}, but OpenAI's are "
        '[1, in, out]: it is no checkpoint of their code.'
      )
    shape = tensor.shape[1:] if kernel else tensor.shape
    found[ours.get(name, name)] = Tensor(
      shape, tensor.dtype, lambda tensor=tensor, shape=shape: tensor.read().reshape(shape)
    )
  found = foreign.narrowed(foreign.without_extra(config, found, prefix, opening), prefix)
  check_tensors(config, {name: tensor.shape for name, tensor in found.items()}, prefix)
  return Source(
    config,
    lambda name: found[name].read(),
    common_dtype(found.values(), prefix),
    str(path),
    tokenizer=load_tokenizer(path, config),
  )


def read_hparams(path: Path) -> GPTConfig:
  """Returns the configuration that an `hparams.json` describes."""
  try:
    hparams = json.loads(path.read_text(encoding='utf-8'))
  except (OSError, ValueError, RecursionError) as e:
    raise unreadable(path, e) from e
  if not isinstance(hparams, dict) or not hparams.keys() >= HPARAMS.keys():
    raise unreadable(path, f'it must hold {", ".join(HPARAMS)}')
  hparams = {k: v for k, v in hparams.items() if k in HPARAMS or not foreign.is_off(v)}
  if unknown := sorted(hparams.keys() - HPARAMS.keys()):
    raise UserError(
      f"{path} has keys that this GPT-2 can't honour: {', '.join(unknown)}. Remove "
      "them if they don't matter."
    )
  table = {theirs: MODEL[ours] for theirs, ours in HPARAMS.items()}
  hparams = bounds.check_all(table, hparams, f'{path}: ')
  with bounds.errors_of(path):
    return GPTConfig(
      **{ours: hparams[theirs] for theirs, ours in HPARAMS.items()},
      embd_pdrop=0.0,
      attn_pdrop=0.0,
      resid_pdrop=0.0,
    )


def find_prefix(path: Path) -> Path:
  """Returns the checkpoint that the file `checkpoint` names, if it is there; else `model.ckpt`."""
  state = path / 'checkpoint'
  try:
    text = state.read_text(encoding='utf-8') if state.is_file() else ''
  except (OSError, ValueError) as e:
    raise unreadable(state, e) from e
  found = re.search(r'^model_checkpoint_path:\s*"([^"\n]*)"', text, re.MULTILINE)
  name = found[1] if found else PREFIX
  plain = re.split(r'[/\\]', name)[-1]  # a folder that was moved names its old place
  safe = re.fullmatch(r'\w[\w.+=-]*', plain) is not None
  prefix = path / (plain if safe and plain == name else PREFIX)
  if safe and (path / f'{plain}.index').is_file():
    prefix = path / plain
  if not prefix.with_name(f'{prefix.name}.index').is_file():
    raise UserError(
      f'{path} lacks {prefix.name}.index: fetch it, or name the checkpoint that is '
      f'there, NAME.index, in {state.name}: model_checkpoint_path: "NAME".'
    )
  return prefix


def load_tokenizer(path: Path, config: GPTConfig) -> bpe.Tokenizer | None:
  """Returns the tokenizer of a folder; else GPT-2's if the vocabulary has its size, or None."""
  specs = [path] if any((path / name).is_file() for name in VOCABULARY) else []
  for spec in [*specs, 'gpt2'] if config.vocab_size == 50257 else specs:
    try:
      return bpe.load(spec)
    except UserError as e:
      warnings.warn(f'the model is used without this tokenizer: {e}', stacklevel=2)
  return None


def variable(name: str) -> str:
  """Returns OpenAI's name of a tensor: `h.3.attn.c_attn.weight` -> `model/h3/attn/c_attn/w`."""
  *module, kind = name.split('.')
  norm = module[-1].startswith('ln_')
  leaf = {'weight': '/g' if norm else '/w', 'bias': '/b'}[kind]
  if module[-1] in ('wte', 'wpe'):
    leaf = ''
  return 'model/' + re.sub(r'^h/', 'h', '/'.join(module)) + leaf


def write(source: Source, target: Path) -> None:
  """Writes a folder that OpenAI's code loads, bit for bit: `checkpoint`, `model.ckpt.*` and so on.

  Rates of dropout, `source.keys`, `source.generation` and `source.record` have no place there.

  Args:
    source: the model, in float32.
    target: the folder, not there yet.

  Raises:
    UserError: it is not in float32, or has what the format can't express.
  """
  check_plain(source.config, "OpenAI's format")
  if source.dtype != 'float32':
    raise UserError(
      f"OpenAI's format is float32, but {source.where} is {source.dtype}: say --dtype float32."
    )
  target.mkdir()
  tensors = {}
  for name, shape in shapes(source.config).items():
    if variable(name).endswith('/w'):
      shape = 1, *shape

    def read(name: str = name, shape: tuple[int, ...] = shape) -> np.ndarray:
      return source.tensor(name).reshape(shape)

    tensors[variable(name)] = Tensor(shape, 'float32', read)
  tensor_bundle.write(target / PREFIX, tensors)
  (target / 'checkpoint').write_text(
    f'model_checkpoint_path: "{PREFIX}"\nall_model_checkpoint_paths: "{PREFIX}"\n'
  )
  (target / 'hparams.json').write_text(
    json.dumps({theirs: getattr(source.config, ours) for theirs, ours in HPARAMS.items()})
  )
  if source.tokenizer is not None:
    with tempfile.TemporaryDirectory() as scratch:
      source.tokenizer.save(scratch)
      vocab, merges = (Path(scratch, name).read_bytes() for name in ('vocab.json', 'merges.txt'))
    (target / 'encoder.json').write_text(json.dumps(json.loads(vocab)))  # in ASCII, as theirs is
    (target / 'vocab.bpe').write_bytes(merges)

"""nanoGPT's `ckpt.pt` (github.com/karpathy/nanoGPT, `model.py`, `train.py`), both ways.

It differs from GPT-2 in that weights are torch's Linear, [out, in], and that biases may be absent: we
read them as zeros, which is the same function, and leave them out where all are zeros.

nanoGPT computes the exact GELU since its pull request 274, the tanh form before. The file does not
tell: we take it for exact. For an older checkpoint, replace `activation_function` by 'gelu_new'.

Read and dropped: the optimizer's state. Not written: that, so `train.py` can't resume; a tokenizer;
initializer_range.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gpt2_jax.checkpoints import foreign
from gpt2_jax.checkpoints.formats import torch_files, torch_writing
from gpt2_jax.checkpoints.opening import PLAIN, Opening
from gpt2_jax.checkpoints.tensors import (
  CONV1D,
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
from gpt2_jax.model.activations import TANH_GELU
from gpt2_jax.model.config import MODEL, RATE, GPTConfig
from gpt2_jax.tokenizer import bpe

FILE = 'ckpt.pt'
SIZES = {
  'n_layer': 'n_layer',
  'n_head': 'n_head',
  'n_embd': 'n_embd',
  'block_size': 'n_positions',
  'vocab_size': 'vocab_size',
}  # theirs -> ours
ARGS: bounds.Table = {theirs: MODEL[ours] for theirs, ours in SIZES.items()} | {
  'dropout': RATE,
  'bias': bounds.Bool(),
}
EXACT_GELU = ('gelu', 'gelu_python')


def recognises(path: Path) -> bool:
  """Whether this is a file with nanoGPT's keys, or a folder with a `ckpt.pt`."""
  file = path / FILE if path.is_dir() else path
  if not torch_files.is_torch_file(file):
    return False
  if file.name == FILE:
    return True
  try:
    value = torch_files.read(file)
  except UserError:
    return False
  return isinstance(value, dict) and {'model', 'model_args'} <= value.keys()


def open_source(path: Path, opening: Opening = PLAIN) -> Source:
  """Opens a checkpoint of nanoGPT's `train.py`, with or without `torch.compile` or DDP.

  Raises:
    UserError: names the file, and what about it can't be read or honoured.
  """
  file = path / FILE if path.is_dir() else path
  value = torch_files.read(file)
  model, args = (
    value.get(key) if isinstance(value, dict) else None for key in ('model', 'model_args')
  )
  if not isinstance(model, dict) or not isinstance(args, dict):
    raise unreadable(file, "it has no model and model_args, as nanoGPT's checkpoints have")
  tensors = _tensors(file, model)
  config, has_bias = _config(file, args, tensors)
  head, wte = tensors.pop('lm_head.weight', None), tensors['wte.weight']
  if head and head != wte and head.read().tobytes() != wte.read().tobytes():
    raise UserError(
      f'{file}: lm_head.weight differs from wte.weight, which nanoGPT ties. It is of '
      'a changed nanoGPT, or broken.'
    )
  tensors = foreign.narrowed(foreign.without_extra(config, tensors, file, opening), file)
  dtype = common_dtype(tensors.values(), file)
  if not has_bias:
    for name, shape in shapes(config).items():
      if name.endswith('bias'):
        if name in tensors:
          raise UserError(f'{file} has {name}, which its model_args (bias = False) contradict.')
        tensors[name] = Tensor(shape, dtype, lambda shape=shape: np.zeros(shape, dtype))
  check_tensors(config, {name: tensor.shape for name, tensor in tensors.items()}, file)
  return Source(
    config,
    lambda name: tensors[name].read(),
    dtype,
    str(file),
    tokenizer=released_tokenizer(config.vocab_size),
    record=_record(value),
  )


def _tensors(file: Path, model: dict) -> dict[str, Tensor]:
  """Returns the state dict under Hugging Face's names and in their shapes."""
  tensors = {}
  for key, tensor in model.items():
    if not isinstance(tensor, Tensor):
      raise unreadable(file, f'its model holds something else than tensors: {str(key)[:50]}')
  state = {str(key): tensor for key, tensor in model.items()}
  for key, name in foreign.plain_names(state, file).items():
    tensor = state[key]
    if name.endswith(CONV1D) and len(tensor.shape) == 2:
      read = lambda read=tensor.read: read().T
      tensor = Tensor(tensor.shape[::-1], tensor.dtype, read)
    tensors[name] = tensor
  return tensors


def _config(file: Path, args: dict, tensors: Mapping[str, Tensor]) -> tuple[GPTConfig, bool]:
  """Returns the model's config, and whether it has biases. Sizes are first checked by the file's."""
  if unknown := sorted(
    str(key)[:50]
    for key in args.keys() - SIZES - {'bias', 'dropout'}
    if not foreign.is_off(args[key])
  ):
    raise UserError(
      f'{file}: its model_args have keys that nanoGPT has not: {unknown}. It is of a '
      'changed nanoGPT, whose numbers this GPT-2 would not give.'
    )
  args = {key: value for key, value in args.items() if key in ARGS}
  args = bounds.check_all(
    ARGS, dict.fromkeys(SIZES) | {'dropout': 0.0, 'bias': True} | args, f'{file}: model_args.'
  )
  dropout, has_bias = args['dropout'], args['bias']
  for name, rows in (('wte.weight', args['vocab_size']), ('wpe.weight', args['block_size'])):
    want, have = (rows, args['n_embd']), tensors[name].shape if name in tensors else None
    if have != want:
      raise UserError(f'{file}: {name} is {have or "missing"}, but by model_args it is {want}.')
  if args['n_layer'] > len(tensors):
    raise UserError(f'{file} lacks tensors: it has {len(tensors)}, but n_layer = {args["n_layer"]}.')
  sizes = {ours: args[theirs] for theirs, ours in SIZES.items()}
  rates: Any = dict.fromkeys(('embd_pdrop', 'attn_pdrop', 'resid_pdrop'), dropout)
  with bounds.errors_of(file):
    return GPTConfig(**sizes, **rates, activation_function='gelu'), has_bias


def _record(value: dict) -> dict[str, Any]:
  """Returns the facts about its run that the file has, plain values only."""
  loss = value.get('best_val_loss')
  if isinstance(loss, Tensor) and math.prod(loss.shape) == 1:
    loss = float(loss.read().reshape(()))
  config = value.get('config')
  config = config if isinstance(config, dict) else {}
  plain = (str, int, float, bool, type(None))
  record = {'iter_num': value.get('iter_num'), 'best_val_loss': loss}
  return {key: x for key, x in record.items() if type(x) in (int, float)} | {
    'config': {str(key): x for key, x in config.items() if type(x) in plain}
  }


def released_tokenizer(vocab_size: int) -> bpe.Tokenizer | None:
  """Returns GPT-2's tokenizer where the vocabulary has its size, padded or not."""
  try:
    return bpe.load('gpt2') if vocab_size in (50257, 50304) else None
  except UserError:
    return None


def write(source: Source, target: Path, *, approximate: bool = False) -> None:
  """Writes a `ckpt.pt` that nanoGPT's `sample.py` reads. It has no optimizer's state to resume from.

  Args:
    source: the model.
    target: the file, not there yet.
    approximate: also writes a model with the tanh form of GELU, GPT-2's own, which nanoGPT will
      compute with the exact one, as it does with the weights that its `from_pretrained` loads.

  Raises:
    UserError: nanoGPT can't express the model.
  """
  c = source.config
  check_plain(c, 'nanoGPT', activations=(*EXACT_GELU, *TANH_GELU))
  if c.activation_function in TANH_GELU:
    if not approximate:
      raise UserError(
        f"nanoGPT computes the exact GELU, but this model's is the tanh form of it "
        f'({c.activation_function}): the numbers would differ slightly. Give --approximate if '
        "that will do: nanoGPT does the same with GPT-2's own weights."
      )
  if not c.embd_pdrop == c.attn_pdrop == c.resid_pdrop:
    raise UserError(
      f'nanoGPT has one dropout rate, this model three: embd_pdrop = {c.embd_pdrop}, '
      f'attn_pdrop = {c.attn_pdrop}, resid_pdrop = {c.resid_pdrop}. Make them equal.'
    )
  names = shapes(c)
  has_bias = any(
    source.tensor(name).tobytes().strip(b'\0') for name in names if name.endswith('bias')
  )
  model = {}
  for name, shape in names.items():
    read = lambda name=name: source.tensor(name)
    if name.endswith(CONV1D):
      read, shape = (lambda name=name: source.tensor(name).T), shape[::-1]
    if has_bias or not name.endswith('bias'):
      model[f'transformer.{name}'] = Tensor(shape, source.dtype, read)
  model['lm_head.weight'] = model['transformer.wte.weight']
  record = source.record or {}
  torch_writing.write(
    target,
    {
      'model': model,
      'optimizer': {'state': {}, 'param_groups': []},
      'model_args': {theirs: getattr(c, ours) for theirs, ours in SIZES.items()}
      | {'bias': has_bias, 'dropout': float(c.resid_pdrop)},
      'iter_num': int(record.get('iter_num', 0)),
      'best_val_loss': float(record.get('best_val_loss', 1e9)),
      'config': {},
    },
  )

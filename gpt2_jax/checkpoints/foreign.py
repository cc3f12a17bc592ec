"""What files from elsewhere have around a GPT-2: prefixes, other heads, wider numbers, empty keys."""

import os
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from gpt2_jax.checkpoints.opening import Opening, say_once
from gpt2_jax.checkpoints.tensors import Tensor, shapes
from gpt2_jax.core.errors import UserError
from gpt2_jax.model.config import GPTConfig

# Parts of a tensor's name that only say how its module was wrapped when it was saved: by DDP,
# torch.compile, FSDP, activation checkpointing, Lightning's Fabric, PEFT.
WRAPPERS = (
  'module',
  '_orig_mod',
  '_fsdp_wrapped_module',
  '_checkpoint_wrapped_module',
  '_forward_module',
  'base_layer',
)
# Buffers of causal masks, which older files have.
MASK = re.compile(r'h\.\d+\.(attn|crossattention)\.(bias|masked_bias)')
# Parts of the language model itself, by Hugging Face's names or OpenAI's; what else stands below them
# changes what it computes, but for adapters, which were trained beside it.
INSIDE = re.compile(r'h\.|model/h\d+/|(model/)?(wte|wpe|ln_f|lm_head)[./]')
ADAPTERS = re.compile(r'adapter|lora_|loha_|lokr_|hada_|ia3_|prefix_|prompt_')
HEADS = {
  'sequence_classification': ('score.weight',),
  'token_classification': ('classifier.weight', 'classifier.bias'),
}


def is_off(value: Any) -> bool:
  """Whether a config's value says that something is not there: None, False, or nothing but these."""
  if isinstance(value, (dict, list)):
    return all(map(is_off, value.values() if isinstance(value, dict) else value))
  return value is None or value is False


def plain_names(names: Iterable[str], where: str | os.PathLike) -> dict[str, str]:
  """Returns {a file's name of a tensor: Hugging Face's, without prefixes}, masks left out.

  The prefix is what stands before `wte.weight`, whatever it is; heads may have it without its last
  `transformer.`. What does not have it is no part of the model and keeps its name, in brackets.

  Raises:
    UserError: two models are in the file, or two tensors would have one name.
  """
  bare = {name: '.'.join(part for part in name.split('.') if part not in WRAPPERS) for name in names}
  roots = sorted(
    {
      name.removesuffix('wte.weight')
      for name in bare.values()
      if re.fullmatch(r'(.*\.)?wte\.weight', name)
    }
  )
  if len(roots) > 1:
    both = ' and '.join(f'{root}wte.weight' for root in roots[:2])
    raise UserError(f'{where} holds more than one model ({both}): save the one that is meant alone.')
  root = roots[0] if roots else 'transformer.'
  outer = root.removesuffix('transformer.')
  found: dict[str, str] = {}
  for full, name in bare.items():
    inner = (
      name.removeprefix(root)
      if name.startswith(root)
      else name.removeprefix(outer)
      if name.startswith(outer)
      else f'[{name}]'
    )
    inner = {'lm_head.decoder.weight': 'lm_head.weight'}.get(inner, inner)
    if not MASK.fullmatch(inner):
      found[full] = inner
  if len(set(found.values())) < len(found):
    twice = next(name for name in found.values() if list(found.values()).count(name) > 1)
    same = [full for full, name in found.items() if name == twice]
    raise UserError(
      f'{where} has {twice} twice, as {same[0]} and as {same[1]}: save one model alone.'
    )
  return found


def head_of(tensors: Mapping[str, Tensor]) -> tuple[str, int] | None:
  """Returns the classification head among a file's tensors and its number of labels.

  None where there is none that Hugging Face's GPT-2 has.
  """
  for head, names in HEADS.items():
    module = names[0].partition('.')[0] + '.'
    if sorted(name for name in tensors if name.startswith(module)) == sorted(names) and (
      len(tensors[names[0]].shape) == 2
    ):
      return head, tensors[names[0]].shape[0]
  return None


def without_extra(
  config: GPTConfig, tensors: dict[str, Tensor], where: str | os.PathLike, opening: Opening
) -> dict[str, Tensor]:
  """Returns the tensors that a GPT-2 of this config has; says which others are left out.

  Args:
    config: of the model.
    tensors: by Hugging Face's names.
    where: the file.
    opening: whether they may be left out.

  Raises:
    UserError: there are such tensors, and they may not.
  """
  if config.n_layer > len(tensors):  # nonsense, which `check_tensors` names
    return tensors
  wanted = shapes(config)
  extra = [name for name in tensors if name not in wanted]
  inside = [name for name in extra if INSIDE.match(name) and not ADAPTERS.search(name)]
  if inside or (extra and not opening.ignore_extra):
    way_out = (
      'They belong to the language model itself, which without them would compute something '
      'else: its config.json is of another model, or it is no plain GPT-2.'
      if inside
      else 'If the language model alone will do, --ignore-extra (in Python ignore_extra=True, in '
      'a config init_ignore_extra) leaves them out.'
    )
    raise UserError(
      f'{where} has tensors that this GPT-2 does not: {_grouped(inside or extra, 5)}. {way_out}'
    )
  if extra:
    say_once(f'{where}: left out, as they are no part of the language model: {_grouped(extra)}')
  return {name: tensor for name, tensor in tensors.items() if name in wanted}


def _grouped(names: Iterable[str], most: int = 100) -> str:
  """Returns names in a line.

  Of names that differ in a number alone, such as a layer's, it has the first and counts the others.
  """
  groups: dict[str, list[str]] = {}
  for name in names:
    groups.setdefault(re.sub(r'\.\d+\.', '.#.', name), []).append(name.strip('[]'))
  said = [
    group[0][:200] + (f' (and {len(group) - 1} more like it)' if len(group) > 1 else '')
    for group in groups.values()
  ]
  return ', '.join(said[:most]) + (f', … and {len(said) - most} more' if len(said) > most else '')


def narrowed(tensors: Mapping[str, Tensor], where: str | os.PathLike) -> dict[str, Tensor]:
  """Returns the same with tensors of float64 read as float32; says where that rounds them."""
  return {
    name: Tensor(tensor.shape, 'float32', _rounding(tensor.read, where))
    if tensor.dtype == 'float64'
    else tensor
    for name, tensor in tensors.items()
  }


def _rounding(read: Callable[[], np.ndarray], where: str | os.PathLike) -> Callable[[], np.ndarray]:
  def narrow() -> np.ndarray:
    wide = read()
    with np.errstate(over='ignore', invalid='ignore'):
      tensor = wide.astype(np.float32)
    if not np.array_equal(tensor, wide, equal_nan=True):
      say_once(f'{where}: its numbers are float64; they are rounded to float32.')
    return tensor

  return narrow

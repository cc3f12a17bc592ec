"""What a PEFT adapter_config.json says: which modules have adapters, of what rank and scale.

The rules are those of PEFT 0.21 (`peft/tuners/tuners_utils.py`, `tuners/lora/model.py`).
"""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gpt2_jax.checkpoints.foreign import is_off
from gpt2_jax.core.errors import UserError, brief
from gpt2_jax.model.config import LoRA

USED = tuple(
  """
  peft_type r lora_alpha target_modules exclude_modules lora_dropout use_rslora
  base_model_name_or_path revision modules_to_save layers_to_transform layers_pattern rank_pattern
  alpha_pattern ensure_weight_tying init_lora_weights
  """.split()
)
NEUTRAL = tuple(
  """
  auto_mapping inference_mode peft_version task_type fan_in_fan_out corda_config eva_config
  loftq_config megatron_core qalora_group_size runtime_config
  """.split()
)
# Ways to begin that leave the base as it is. The others (pissa, olora, loftq, …) take from it what
# the adapters begin with.
INITS = (True, False, None, 'gaussian', 'eva', 'orthogonal')
OTHER_MODULES = ('wte', 'wpe', 'lm_head', 'score', 'classifier')
MAX_PATTERN = 2000  # characters of a regular expression


@dataclasses.dataclass(frozen=True)
class Adapted:
  """The modules that have adapters.

  Attributes:
    ranks: of each, by its name: `h.0.attn.c_attn`.
    scales: what A·B is multiplied by.
    lora: of our model, of which each layer has the same modules and ranks.
  """

  ranks: Mapping[str, int]
  scales: Mapping[str, float]
  lora: LoRA

  @property
  def uniform(self) -> bool:
    """Whether all of them have one rank and one scale."""
    return len(set(self.ranks.values())) == len(set(self.scales.values())) == 1


def check(where: Path, keys: Mapping[str, Any]) -> None:
  """Raises a `UserError` that names the keys that can't be honoured."""
  if keys.get('peft_type') != 'LORA':
    raise UserError(f'{where}: peft_type is {brief(keys.get("peft_type"))}; LORA can be read.')
  unknown = {
    k: v
    for k, v in keys.items()
    if k not in USED and k not in NEUTRAL and not is_off(v) and (k, v) != ('bias', 'none')
  }
  if not any(
    keys.get('init_lora_weights') is value or keys.get('init_lora_weights') == value
    for value in INITS
  ):
    unknown['init_lora_weights'] = keys['init_lora_weights']
  if unknown:
    said = ', '.join(f'{brief(k)}: {brief(v)}' for k, v in list(unknown.items())[:8])
    raise UserError(f"{where} has keys that can't be honoured: {{{said}}}.")
  texts = lambda value: isinstance(value, list) and all(isinstance(item, str) for item in value)
  whole = lambda value: type(value) is int
  number = lambda value: type(value) in (int, float)
  kinds = {
    'r': whole,
    'lora_alpha': number,
    'lora_dropout': number,
    'target_modules': lambda v: isinstance(v, str) or texts(v),
    'exclude_modules': lambda v: isinstance(v, str) or texts(v),
    'modules_to_save': texts,
    'layers_pattern': lambda v: isinstance(v, str) or texts(v),
    'layers_to_transform': lambda v: whole(v) or (isinstance(v, list) and all(map(whole, v))),
    'rank_pattern': lambda v: isinstance(v, dict) and all(map(whole, v.values())),
    'alpha_pattern': lambda v: isinstance(v, dict) and all(map(number, v.values())),
  }
  for key, fits in kinds.items():
    value = keys.get(key)
    if not fits(value) and not (value is None and key not in ('r', 'lora_alpha', 'target_modules')):
      raise UserError(f'{where}: {key} = {brief(value)} is of the wrong type.')


def adapted(where: Path, keys: Mapping[str, Any], n_layer: int, root: str) -> Adapted:
  """Returns the modules that have adapters.

  Args:
    where: the file.
    keys: its content, checked.
    n_layer: of the model.
    root: what stands before `h.0` in the names of modules: 'transformer.', or nothing.

  Raises:
    UserError: other modules than the blocks' products have adapters, or none has.
  """
  try:
    for module in OTHER_MODULES:
      full = module if module in OTHER_MODULES[2:] else root + module
      if _is_target(keys, full):
        raise UserError(
          f'{where}: target_modules: {module!r} is none of {", ".join(LoRA.modules)}: '
          'only these can have adapters here.'
        )
    names = [f'h.{i}.{module}' for i in range(n_layer) for module in LoRA.modules]
    names = [name for name in names if _is_target(keys, root + name)]
    of = lambda key, default, name: _by_pattern(keys.get(key) or {}, root + name, default)
    ranks = {name: of('rank_pattern', keys['r'], name) for name in names}
    alphas = {name: of('alpha_pattern', keys['lora_alpha'], name) for name in names}
  except (re.error, RecursionError, OverflowError) as e:
    raise UserError(f'{where} has a pattern that is no regular expression: {e}.') from e
  if not names:
    raise UserError(
      f'{where}: target_modules = {brief(keys["target_modules"])} with '
      f'layers_to_transform = {brief(keys.get("layers_to_transform"))} names no module '
      f'of this GPT-2; they are {root}h.0.{", ".join(LoRA.modules)}.'
    )
  if wrong := [name for name in names if ranks[name] < 1]:
    raise UserError(f'{where}: r = {brief(ranks[wrong[0]])} of {wrong[0]} must be at least 1.')
  power = 0.5 if keys.get('use_rslora') else 1.0
  try:
    scales = {name: alphas[name] / ranks[name] ** power for name in names}
    r = max(ranks.values())
    first = max(scales.values(), key=abs)
    same = len(set(alphas.values())) == 1 and len(set(ranks.values())) == 1
    alpha = alphas[names[0]] * r ** (1 - power) if same else first * r
  except OverflowError as e:
    raise UserError(f'{where}: r or lora_alpha is out of bounds: {e}.') from e
  kinds = {name.split('.', 2)[2] for name in names}
  lora = LoRA(r, alpha, _short(keys['target_modules'], kinds), keys.get('lora_dropout') or 0.0)
  return Adapted(ranks, scales, lora)


def _is_target(keys: Mapping[str, Any], name: str) -> bool:
  """Whether a module, by its full name, has adapters: PEFT's `check_target_module_exists`."""
  listed = lambda value: name in value or any(name.endswith(f'.{item}') for item in value)
  if excluded := keys.get('exclude_modules'):
    if _fullmatch(excluded, name) if isinstance(excluded, str) else listed(excluded):
      return False
  if any(f'.{module}.' in f'.{name}.' for module in keys.get('modules_to_save') or ()):
    return False
  targets, layers = keys['target_modules'], keys.get('layers_to_transform')
  if isinstance(targets, str):
    if targets.lower() == 'all-linear':
      return name.endswith(LoRA.modules)
    return _fullmatch(targets, name)
  if name in targets:
    return True
  if not listed(targets) or layers is None or layers == []:
    return listed(targets)
  patterns = keys.get('layers_pattern')
  patterns = [patterns] if isinstance(patterns, str) else patterns
  wanted = [rf'(?:^|.*?\.){pattern}\.(\d+)\.' for pattern in patterns or ()]
  found = next(
    (match for pattern in wanted or [r'.*?\.[^.]*\.(\d+)\.'] if (match := re.match(pattern, name))),
    None,
  )
  return found is not None and int(found[found.lastindex or 1]) in (
    [layers] if isinstance(layers, int) else layers
  )


def _fullmatch(pattern: str, name: str) -> bool:
  if len(pattern) > MAX_PATTERN:
    raise re.error(f'it has {len(pattern):,} characters')
  return re.fullmatch(pattern, name) is not None


def _by_pattern(patterns: Mapping[str, Any], name: str, default: Any) -> Any:
  """Returns the value of the first pattern that the end of a name matches."""
  for pattern, value in patterns.items():
    if _fullmatch(rf'(.*\.)?({pattern})', name):
      return value
  return default


def _short(targets: str | list[str], kinds: set[str]) -> tuple[str, ...]:
  """Returns the targets as the file has them, where they name just these kinds of modules."""
  named = sorted(targets) if isinstance(targets, list) else []
  found = {
    kind for kind in LoRA.modules for name in named if kind == name or kind.endswith('.' + name)
  }
  every = all(any(kind == name or kind.endswith('.' + name) for kind in kinds) for name in named)
  return tuple(named) if found == kinds and every else tuple(sorted(kinds))

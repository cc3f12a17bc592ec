"""The verb `gpt2-jax plan`."""

import dataclasses
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from gpt2_jax import configs
from gpt2_jax.core.bounds import shortened
from gpt2_jax.core.errors import UserError
from gpt2_jax.core.files import local, save_text
from gpt2_jax.model.config import wrong_knob

RECIPE = 'fineweb'  # of a config that is named without one


@dataclasses.dataclass
class Plan:
  """Compiles a run for hardware that is not there, and says what it would need.

  Overrides of the config are written as for launch.py: --config.mesh.data=4.
  """

  config: str
  """As for train: xl:RECIPE, or a file. Without a recipe: fineweb, where the config has it."""
  topology: str
  """v5e:16x16, 4*v5e:8x8 (slices), v4, v5p, v6e, v7x; h100:8, h100:2x8 (hosts x GPUs), a100, h200."""
  mode: Literal['train', 'decode', 'prefill'] = 'train'
  """A training step, one more token of each text, or the reading of prompts."""
  slices: int | None = None
  """TPU: this many slices of the topology."""
  tokens: int | None = None
  """train: tokens to train on; default: the config's steps x batch."""
  batch: int | None = None
  """decode, prefill: texts at a time on all devices; default: one for each part of the batch."""
  prompt: int | None = None
  """decode, prefill: tokens of a prompt; default: 128, or half the context."""
  new: int | None = None
  """decode, prefill: new tokens there is room for; default: 128, or what the context leaves."""
  search: bool = False
  """train: compile the sensible meshes, micro-batches and remat policies, and rank them."""
  search_limit: int = 24
  """How many at most, the most promising first."""
  workers: int | None = None
  """Compilations at a time; default: by cores and free memory (3 GB each)."""
  bill: bool = False
  """train: bytes, FLOPs, kernels and compiler cycles by place in the model, beside an ideal."""
  json: Annotated[Path | None, tyro.conf.arg(metavar='FILE')] = None
  """Write the plan here too; with --search, a list of plans."""
  dump: Annotated[Path | None, tyro.conf.arg(metavar='DIR')] = None
  """Keep the compiled program (HLO text) in this folder."""
  overrides: Annotated[tuple[str, ...], tyro.conf.Suppress] = ()

  def run(self) -> None:
    from gpt2_jax.planning import topology

    topo = topology.get(self.topology, self.slices)  # before jax wakes a backend
    if self.search and self.mode != 'train':
      raise UserError('--search is for --mode train.')
    config, name = load_config(self.config, self.overrides)
    file = None if self.dump is None else self.dump / f'{self.mode}.hlo.txt'
    if self.search:
      return self._search(config, topo, name)
    if self.mode == 'train':
      from gpt2_jax.planning.compile_ahead import plan_train

      made = plan_train(config, topo, name, tokens=self.tokens, dump=file)
    else:
      from gpt2_jax.planning.plan_decode import AskedTexts, plan_decode

      texts = AskedTexts(self.batch, self.prompt, self.new)
      made = plan_decode(config, topo, name, self.mode, texts, dump=file)
    print(made.text())
    if self.bill:
      print(made.bill())
    if self.json is not None:
      made.save(self.json)

  def _search(self, config: Any, topo: Any, name: str) -> None:
    """Searches, and prints the table and the best plan."""
    from gpt2_jax.planning import search

    found = search.search(
      config,
      topo,
      name,
      limit=self.search_limit,
      workers=self.workers,
      tokens=self.tokens,
      dump=self.dump,
    )
    best = search.ranked(list(found))
    if not best:
      raise UserError('none of the candidates could be compiled: see above.')
    print(search.table(best), '\n\nThe times are estimates, uncalibrated: see below.\n')
    candidate, made = best[0]
    print(f'best       {candidate.flags()}' if made.fits else 'none of them fits; the nearest:')
    print(made.text())
    if self.json is not None:
      text = '[' + ',\n'.join(made.to_json() for _, made in best) + ']\n'
      save_text(self.json, text, 'the plans')


def split_overrides(argv: list[str]) -> tuple[list[str], tuple[str, ...]]:
  """Splits a command line: returns what is no override of the config, and the overrides, which are
  written `--config.KEY=VALUE` or `--config.KEY VALUE`.
  """
  rest, overrides = [], []
  words = iter(argv)
  for word in words:
    if word.startswith('--config.'):
      overrides.append(word if '=' in word else f'{word}={next(words, "")}')
    else:
      rest.append(word)
  return rest, tuple(overrides)


def load_config(path: str, overrides: tuple[str, ...] = (), usual: str = RECIPE) -> tuple[Any, str]:
  """Returns a config file's config with overrides, and a name for it.

  Args:
    path: of the config, or its name, with a recipe or none.
    overrides: `--config.SECTION.KEY=VALUE`.
    usual: the recipe where none is named and the config has this one; '': the config's own.

  Raises:
    UserError: the file can't be loaded, or an override names no knob.
  """
  local(path, '--config')
  path = configs.path_of(path)
  file, _, recipe = path.partition(':')
  if not Path(file).is_file():
    raise UserError(f'--config {path}: there is no file {file}.')
  folder = Path(file).absolute().parent
  if folder != configs.FOLDER and str(folder.parent) not in sys.path:
    sys.path.insert(0, str(folder.parent))  # configs import each other, as from launch.py
  tries = [path] if recipe or not usual else [f'{path}:{usual}', path]
  for i, name in enumerate(tries):
    try:
      shown = name.replace(f'{configs.FOLDER}/', 'configs/')
      return _load(name, overrides), ' '.join([shown, *overrides])
    except Exception as e:  # of many kinds, some with a traceback as their text
      last = shortened((str(e) or repr(e)).strip().splitlines()[-1].strip())
      if i + 1 == len(tries) or 'recipe' not in last:
        if isinstance(e, (KeyError, AttributeError)):
          last = (overrides and wrong_knob(_load(name, ()), overrides)) or last
        raise UserError(f'--config: {last} (the knobs: configs/base.py)') from e
  raise AssertionError


def _load(name: str, overrides: tuple[str, ...]) -> Any:
  from absl import flags
  from ml_collections import config_flags

  values, argv = flags.FlagValues(), ['plan', f'--config={name}', *overrides]
  holder = config_flags.DEFINE_config_file('config', flag_values=values, sys_argv=argv)
  values(argv)
  config = holder.value
  _ = config.model  # a file that can't be loaded is an error only now
  return config

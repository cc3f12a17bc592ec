"""What is known of a run before, while and after it runs; the checks look at nothing else."""

import contextlib
import copy
import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax

from gpt2_jax import configs
from gpt2_jax.checkpoints import orbax_store, saved_steps
from gpt2_jax.checkpoints.workdir import record_of
from gpt2_jax.core.buckets import AnyPath, is_bucket, place
from gpt2_jax.core.errors import UserError
from gpt2_jax.core.files import read_json
from gpt2_jax.data import token_store
from gpt2_jax.data.token_store import TokenStore
from gpt2_jax.diagnosis import twice
from gpt2_jax.model.config import Config, GPTConfig
from gpt2_jax.model.sizes import num_params
from gpt2_jax.tokenizer import bpe
from gpt2_jax.training import run_plan
from gpt2_jax.training.reproduce import as_config
from gpt2_jax.training.run_data import store_of
from gpt2_jax.training.run_model import spec_of
from gpt2_jax.training.watch import metrics_file, run_record


@dataclasses.dataclass(frozen=True)
class Facts:
  """A run, as its config and its folder show it. Nothing is trained or prepared for it."""

  config: Config
  model: GPTConfig
  T: int  # tokens a row
  G: int  # rows of a batch
  A: int  # micro-batches
  mesh: dict[str, int]
  device: str  # its kind, as JAX says it
  limit: int | None  # bytes of a device that a run plans with; None: it isn't known
  state: dict[str, str]  # of each array of the optimizer's state: 'float32[128, 128]'
  tokenizer: str  # its spec
  store: TokenStore | None = None  # None: it isn't here, is far, or holds no tokens
  no_store: str = ''  # why there is none
  lines: tuple[dict, ...] = ()  # of the record; none, where nothing ran yet
  finished: bool = False
  plan: float | None = None  # tokens a second that `gpt2-jax plan` promised

  @property
  def begins(self) -> bool:
    """Whether the parameters were drawn at random, and not loaded."""
    return self.config.init_from is None

  @property
  def update(self) -> int:
    """Tokens of an update."""
    return self.G * self.T

  @property
  def params(self) -> int:
    return num_params(self.model)

  @property
  def steps(self) -> float:
    """Updates of the whole run, as its config says it."""
    train = self.config.train
    if train.tokens is not None:
      return train.tokens / self.update
    if train.epochs is not None and self.store is not None:
      return train.epochs * len(self.store.splits['train']) / self.update
    return train.steps

  @property
  def vocabulary(self) -> int | None:
    """Ids of the tokenizer that made the data; None where it isn't known yet."""
    if self.store is not None:
      return self.store.manifest['tokenizer']['vocab_size']
    size = bpe.trained_size(self.tokenizer)
    if size is None:
      with contextlib.suppress(UserError):
        size = bpe.vocab_size(self.tokenizer)
    return size

  @functools.cached_property
  def shares(self) -> tuple[float, float]:
    """Shares of tokens in documents that are there twice, see `twice.shares`."""
    return twice.shares(self.store) if self.store is not None else (0.0, 0.0)

  def column(self, key: str) -> list[tuple[int, float]]:
    """The steps of the record that have a key, with its finite values."""
    return [(line['step'], line[key]) for line in self.lines if line.get(key) is not None]


def of_config(config: Config, devices: Any = None) -> Facts:
  """Returns what is known of a run that has not begun, on these devices (default: all that are here).

  Raises:
    UserError: the config contradicts itself, or does not fit the devices.
  """
  plan = run_plan.make_plan(config, devices)
  state = jax.eval_shape(plan.init_state).opt_state
  store, why = _store(config, plan.tokenizer)
  kind = plan.mesh.devices.flat[0]
  return Facts(
    config,
    plan.model,
    plan.T,
    plan.G,
    plan.A,
    dict(plan.mesh.shape),
    kind.device_kind,
    _limit(kind),
    orbax_store.shapes(state),
    plan.tokenizer,
    store,
    why,
  )


def _limit(device: Any) -> int | None:
  with contextlib.suppress(UserError):
    return run_plan.memory_estimate.memory_limit(device)
  return None


def of_run(workdir: AnyPath) -> Facts:
  """Returns what the folder of a run tells, here or in a bucket.

  Raises:
    UserError: it is no run's, or its record can't be read.
  """
  at = record_of(workdir)
  if not (at / 'config.json').exists():
    raise UserError(
      f'{workdir} has no config.json: name the --workdir of a run, or a config (tiny, small:fineweb).'
    )
  config, starts = as_config(read_json(at / 'config.json')), run_record.starts(at)
  if not starts:
    raise UserError(f'{workdir} has no {run_record.ENV} yet: the run has not begun.')
  start = starts[-1]
  model, state = _saved(workdir, config)
  tokenizer = str(at / 'tokenizer')
  spec = config.data.tokenizer or 'gpt2'
  if config.data.tokenizer is None and config.init_from is not None:
    spec = spec_of(config, bpe.load(tokenizer))
  store, why = _store(config, spec)
  if store is not None and store.sha256 != start['data']['sha256']:
    store, why = None, f'{store.path} is not the data that this run had'
  kind = start['devices'].partition(' x ')[2]
  here = [device for device in jax.devices() if device.device_kind == kind]
  return Facts(
    config,
    model,
    start.get('row_tokens') or model.n_positions,
    start.get('rows') or config.train.global_batch_tokens // model.n_positions,
    start['micro_batches'],
    start['mesh'],
    kind,
    _limit(here[0]) if here else _data_sheet(kind),
    state,
    tokenizer,
    store,
    why,
    tuple(metrics_file.read(at)),
    run_record.finished(at),
  )


def _data_sheet(kind: str) -> int | None:
  chip = run_plan.memory_estimate.chip_of(kind)
  return None if chip is None else int(0.9 * chip.hbm)


def _saved(workdir: AnyPath, config: Config) -> tuple[GPTConfig, dict[str, str]]:
  """The model and the optimizer's state of a run: as it saved them, else as its config says."""
  if saved_steps.is_workdir(workdir) and saved_steps.kept_steps(workdir):
    meta = saved_steps.read_meta(workdir)
    head = 'opt_state.'
    tree = {k.removeprefix(head): v for k, v in meta['tree'].items() if k.startswith(head)}
    return GPTConfig(**meta['model']), tree
  config = copy.deepcopy(config)  # for one device, whatever those of the run were
  config.mesh.update(data=None, fsdp=-1, seq=1, tensor=1)
  config.train.micro_batch_rows = None
  plan = run_plan.make_plan(config, jax.devices()[:1])
  return plan.model, orbax_store.shapes(jax.eval_shape(plan.init_state).opt_state)


def _store(config: Config, tokenizer: str) -> tuple[TokenStore | None, str]:
  """The prepared data of a config, if it is here; else why it isn't looked at."""
  if config.model.head != 'lm':
    return None, 'labelled texts are not compared'
  corpus = config.data.corpus
  foreign = corpus.startswith('bin:')
  folder = place(corpus.removeprefix('bin:')) if foreign else store_of(config.data, tokenizer)[1]
  if is_bucket(folder):
    return None, f'{folder} is far: documents are compared where the store lies on a disk'
  if not (foreign or token_store.is_store(folder)):
    return None, f'{folder} is not here: documents were not compared'
  return token_store.open_store(folder), ''


def of_target(target: str, overrides: tuple[str, ...], load: Any) -> Facts:
  """Returns the facts of a run's folder, or of a config by its name or file.

  Args:
    target: what a user named.
    overrides: `--config.SECTION.KEY=VALUE`, of a config.
    load: a function of a config's name and overrides, which returns it.
  """
  there = target.partition(':')[0] not in configs.NAMES and not target.partition(':')[0].endswith(
    '.py'
  )
  if not there:
    return of_config(load(target, overrides))
  if overrides:
    raise UserError(f'{target} is a run, which has its config: leave {overrides[0]} out.')
  folder = place(target)
  if not folder.is_dir():
    raise UserError(
      f'{target} is neither the folder of a run nor a config: {", ".join(configs.NAMES)}, or a '
      '.py file.'
    )
  if not is_bucket(folder):
    folder = Path(folder)
  return of_run(folder)

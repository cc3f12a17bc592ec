"""Rows of batches, and which steps are saved: what a config says of them, checked."""

from jax.sharding import Mesh

from gpt2_jax.core.errors import UserError
from gpt2_jax.model.config import Config, GPTConfig
from gpt2_jax.parallel import sharding


def batch_rows(config: Config, model: GPTConfig, mesh: Mesh) -> tuple[int, int]:
  """Returns T, the tokens of a row, and G, the rows of a global batch."""
  T = model.n_positions if config.data.sequence_length is None else config.data.sequence_length
  if not 1 <= T <= model.n_positions:
    raise UserError(
      f"data.sequence_length = {T} is longer than the model's context "
      f'(model.n_positions = {model.n_positions}): shorten it or enlarge the model.'
    )
  G, remainder = divmod(config.train.global_batch_tokens, T)
  if remainder or not G:
    raise UserError(
      f'train.global_batch_tokens = {config.train.global_batch_tokens} is no multiple '
      f'of the row length {T}; the nearest is {max(1, G) * T}.'
    )
  sharding.check_divisible(mesh, {'data.sequence_length': (T, 'seq')})
  return T, G


def check_checkpoints(config: Config) -> None:
  """Raises a UserError if a step is to be kept, or offered, that is not saved."""
  keep, every, patience = config.checkpoint, config.evaluate.every, config.evaluate.patience
  if keep.keep_every % keep.every:
    raise UserError(
      f'checkpoint.keep_every = {keep.keep_every} must be 0 or a multiple of '
      f'checkpoint.every = {keep.every}: only what is saved can be kept.'
    )
  if (patience or keep.keep_best) and every % keep.every:
    cause = (
      f'evaluate.patience = {patience} offers'
      if patience
      else f'checkpoint.keep_best = {keep.keep_best} keeps'
    )
    raise UserError(
      f'{cause} the best evaluated step, so each must be saved: make evaluate.every = '
      f'{every} a multiple of checkpoint.every = {keep.every}.'
    )


def eval_rows(config: Config, mesh: Mesh, micro_batch: int) -> int:
  """Returns the rows of an evaluation batch; as a rule those of a micro-batch."""
  split, rows = mesh.shape['data'] * mesh.shape['fsdp'], config.evaluate.batch_rows
  if rows is None:
    return max(split, micro_batch)
  if rows % split:
    raise UserError(
      f'evaluate.batch_rows = {rows} must be a multiple of mesh.data·mesh.fsdp = {split}.'
    )
  return rows

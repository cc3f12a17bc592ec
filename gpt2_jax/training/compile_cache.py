"""How programs are compiled: with which options, and kept between starts beside the runs."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import jax

from gpt2_jax.core import buckets
from gpt2_jax.core.errors import UserError, brief
from gpt2_jax.core.files import parse_json

FOLDER = '.jax_cache'
HIT, MISS = '/jax/compilation_cache/cache_hits', '/jax/compilation_cache/cache_misses'


def keep_compiled(workdir: str | os.PathLike) -> str:
  """Keeps what takes over a second to compile in `.jax_cache` beside the workdir.

  Where JAX_COMPILATION_CACHE_DIR is set, or the cache is set in another way, JAX does so by itself
  and this does nothing. To be called before anything is compiled.

  Returns: a line for the user where the folder can't be used, else ''.
  """
  if jax.config.jax_compilation_cache_dir:  # pyright: ignore[reportAttributeAccessIssue]
    return ''
  place = buckets.place(workdir)
  if not isinstance(place, Path):  # JAX reads and writes there by the same libraries
    jax.config.update('jax_compilation_cache_dir', str(place.parent / FOLDER))
    return ''
  folder = place.resolve().parent / FOLDER
  try:
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK | os.X_OK):
      raise PermissionError(f'{folder} is not writable')
  except OSError as e:
    return f'compiled programs are not kept: {e}. JAX_COMPILATION_CACHE_DIR may name another folder.'
  jax.config.update('jax_compilation_cache_dir', str(folder))
  return ''


def options(text: str) -> dict[str, bool | int | float | str]:
  """Parses XLA's options, as in 'xla_gpu_enable_triton_gemm=false xla_gpu_autotune_level=2'.

  Raises:
    UserError: it is not of this form.
  """
  found = {}
  for pair in text.split():
    name, _, value = pair.removeprefix('--').partition('=')
    if not name.startswith('xla_') or not value:
      raise UserError(f'train.compiler_options: {brief(pair)} is not xla_NAME=VALUE.')
    try:
      found[name] = parse_json(value.lower())
    except ValueError:
      found[name] = value
  return found


@contextlib.contextmanager
def known_options(options: dict) -> Iterator[None]:
  """Names the option that the compiler does not know, in a UserError."""
  try:
    yield
  except jax.errors.JaxRuntimeError as e:
    if not any(name in str(e) for name in options):
      raise
    raise UserError(f'train.compiler_options: {str(e).splitlines()[0]}') from e


@contextlib.contextmanager
def from_cache() -> Iterator[list[bool]]:
  """Yields a list, to be read afterwards: whether each program compiled inside was in the cache."""
  found: list[bool] = []

  def listen(event: str, **_) -> None:
    if event in (HIT, MISS):
      found.append(event == HIT)

  jax.monitoring.register_event_listener(listen)
  try:
    yield found
  finally:
    jax.monitoring.unregister_event_listener(listen)

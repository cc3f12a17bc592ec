"""Models of the Hugging Face hub, fetched by `huggingface_hub` into its cache.

Its environment variables count: HF_ENDPOINT, HF_HUB_OFFLINE, HF_HOME, HF_TOKEN.
"""

import os
import re
from pathlib import Path

import huggingface_hub
from huggingface_hub import constants, errors

from gpt2_jax.checkpoints.formats import flax_msgpack, huggingface, peft
from gpt2_jax.core.errors import UserError
from gpt2_jax.core.files import read_json
from gpt2_jax.core.verified import Verified

WEIGHTS = (*huggingface.WEIGHTS, flax_msgpack.FILE)
MAX_NAME = 300  # characters; the hub allows 96 and a revision


def is_name(source: str) -> bool:
  """Whether a text may be the name of a model: `gpt2`, `someone/name`, `someone/name@revision`."""
  return (
    len(source) <= MAX_NAME
    and '..' not in source
    and re.fullmatch(r'([\w\-.]+/)?[\w\-.]+(@[\w\-./]+)?', source) is not None
  )


def fetch(source: str) -> Path:
  """Returns the folder of a model, `NAME` or `NAME@REVISION` (a branch, tag or commit), once fetched.

  Fetches config.json, the first kind of weights that there is or adapters, and the tokenizer's files.

  Raises:
    UserError: names the file that could not be had, and what to set.
  """
  name, _, revision = source.partition('@')

  def get(file: str) -> Path | None:
    """Returns the file's path; None where the model has no such file."""
    try:
      return _checked(Path(huggingface_hub.hf_hub_download(name, file, revision=revision or None)))
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as e:
      if constants.HF_HUB_OFFLINE and _is_complete(name, revision):
        return None
      why = 'HF_HUB_OFFLINE is set' if constants.HF_HUB_OFFLINE else f'{constants.ENDPOINT}: {e}'
      raise UserError(
        f"{file} of {name!r} is not in the cache ({constants.HF_HUB_CACHE}) and can't be fetched "
        f'({why}). Go online, unset HF_HUB_OFFLINE, point HF_ENDPOINT to a mirror or HF_HOME to '
        'a cache that has it, or give the path of a folder.'
      ) from e
    except errors.EntryNotFoundError:
      return None
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as e:
      raise UserError(
        f'{source!r} is neither a path nor a model at {constants.ENDPOINT}: check the name (and '
        'revision, behind an @); a private or gated one needs HF_TOKEN.'
      ) from e
    except (errors.HfHubHTTPError, errors.HFValidationError, OSError) as e:
      raise UserError(f"{file} of {name!r} can't be fetched from {constants.ENDPOINT}: {e}") from e

  config, weights = get('config.json'), WEIGHTS
  found = next((path for file in WEIGHTS if (path := get(file))), None) if config else None
  if found is None and (adapter := get(peft.CONFIG)):
    config, weights = adapter, (peft.FILE, peft.BIN)
    found = next((path for file in weights if (path := get(file))), None)
  if config is None:
    raise UserError(
      f'{source!r} has no config.json at {constants.ENDPOINT}: it is no GPT-2 in '
      "Hugging Face's format."
    )
  if found is None:
    raise UserError(f'{source!r} has none of {", ".join(weights)}.')
  if found.name.endswith('.index.json'):
    for shard in sorted(set(read_json(found).get('weight_map', {}).values())):
      if not re.fullmatch(r'[\w\-][\w\-.]*', str(shard)):
        raise UserError(f'{source!r}: {found.name} names a file outside of its folder: {shard!r}.')
      if get(shard) is None:
        raise UserError(f'{source!r}: {found.name} names {shard}, which is not there.')
  for file in (*huggingface.TOKENIZER, 'generation_config.json'):
    get(file)
  return config.parent


def _checked(path: Path) -> Path:
  """Returns a file of the cache, compared with the SHA-256 that a large file's blob is named by.

  The hub's own library compares its size alone.
  """
  blob = path.resolve()
  if re.fullmatch('[0-9a-f]{64}', blob.name) and not Verified(blob.parent, beside=False).check(
    [blob.name], blob.name
  ):
    raise UserError(
      f'{path} has other content than the hub says (SHA-256): it was damaged on the '
      f'way or since. Remove {blob}, and it is fetched again.'
    )
  return path


def _is_complete(name: str, revision: str) -> bool:
  """Whether the cache has config and weights, so that what else it lacks doesn't exist."""

  def cached(file: str) -> bool:
    found = huggingface_hub.try_to_load_from_cache(name, file, revision=revision or None)
    return isinstance(found, (str, os.PathLike))

  return (cached('config.json') and any(map(cached, WEIGHTS))) or (
    cached(peft.CONFIG) and any(map(cached, (peft.FILE, peft.BIN)))
  )

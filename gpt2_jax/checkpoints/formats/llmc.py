"""llm.c's model files (github.com/karpathy/llm.c, `train_gpt2.py`, `write_model`), both ways.

256 int32: magic, version, n_positions, V, L, n_head, D, padded V, zeros. Then the tensors, each
stacked over the layers, matrices as [out, in], in float32 (version 3) or bfloat16 (version 5). llm.c
never looks at the rows that pad the vocabulary; we drop them, and write zeros.

Not kept, since llm.c has none: dropout rates (read as 0), tokenizer, special tokens, record.
"""

import math
from pathlib import Path

import numpy as np

from gpt2_jax.checkpoints.formats.nanogpt import released_tokenizer
from gpt2_jax.checkpoints.opening import PLAIN, Opening
from gpt2_jax.checkpoints.tensors import CONV1D, Source, check_plain, shapes
from gpt2_jax.core import bounds
from gpt2_jax.core.errors import UserError
from gpt2_jax.core.files import unreadable
from gpt2_jax.model.config import GPTConfig

MAGIC = 20240326
HEADER = 1024  # bytes
VERSIONS = {3: 'float32', 5: 'bfloat16'}
PADDED_TO = 128
ORDER = tuple(
  """
  wte.weight wpe.weight h.ln_1.weight h.ln_1.bias h.attn.c_attn.weight h.attn.c_attn.bias
  h.attn.c_proj.weight h.attn.c_proj.bias h.ln_2.weight h.ln_2.bias h.mlp.c_fc.weight
  h.mlp.c_fc.bias h.mlp.c_proj.weight h.mlp.c_proj.bias ln_f.weight ln_f.bias
  """.split()
)


def recognises(path: Path) -> bool:
  """Whether a file starts with the magic number."""
  try:
    with open(path, 'rb') as file:
      return file.read(4) == MAGIC.to_bytes(4, 'little')
  except OSError:
    return False


def _names(n_layer: int) -> list[str]:
  """Returns the names of the tensors in the file's order."""
  return [
    name.replace('h.', f'h.{i}.', 1)
    for name in ORDER
    for i in (range(n_layer) if name.startswith('h.') else [0])
  ]


def open_source(path: Path, _: Opening = PLAIN) -> Source:
  """Opens a model file of llm.c's Python or C code.

  Raises:
    UserError: names the file, and what about it is wrong.
  """
  try:
    size = path.stat().st_size
    header = np.fromfile(path, '<i4', 256)
  except OSError as e:
    raise unreadable(path, e) from e
  if len(header) < 256 or header[0] != MAGIC:
    raise unreadable(path, "it has no header of llm.c's model files")
  version, n_positions, V, L, n_head, D, padded = header[1:8].tolist()
  if version not in VERSIONS:
    raise UserError(
      f"{path} is of version {version} of llm.c's format; {sorted(VERSIONS)} can be "
      'read. Write it again with a newer llm.c (train_gpt2.py --write_tensors 1).'
    )
  if min(n_positions, V, L, n_head, D) < 1 or padded < V:
    raise unreadable(path, f'its header has sizes that make no sense: {header[2:8].tolist()}')
  dtype = np.dtype(VERSIONS[version])
  # Python's integers: nothing is allocated before the size is known to be right.
  numel = (padded + n_positions) * D + L * (12 * D * D + 13 * D) + 2 * D
  if size != HEADER + numel * dtype.itemsize:
    raise unreadable(
      path,
      f'it has {size:,} bytes instead of the '
      f'{HEADER + numel * dtype.itemsize:,} of a model of its sizes',
    )
  with bounds.errors_of(path):
    config = GPTConfig(
      vocab_size=V,
      n_positions=n_positions,
      n_embd=D,
      n_layer=L,
      n_head=n_head,
      embd_pdrop=0.0,
      attn_pdrop=0.0,
      resid_pdrop=0.0,
    )
  want, starts, start = shapes(config), {}, HEADER
  for name in _names(L):
    starts[name] = start
    start += dtype.itemsize * (padded * D if name == 'wte.weight' else math.prod(want[name]))

  def read(name: str) -> np.ndarray:
    shape = want[name][::-1] if name.endswith(CONV1D) else want[name]
    count = math.prod(shape) * dtype.itemsize
    try:
      data = np.fromfile(path, np.uint8, count, offset=starts[name])
    except OSError as e:
      raise unreadable(path, e) from e
    if len(data) < count:
      raise unreadable(path, 'it ends within a tensor')
    value = data.view(dtype).reshape(shape)
    return value.T if name.endswith(CONV1D) else value

  return Source(config, read, VERSIONS[version], str(path), tokenizer=released_tokenizer(V))


def write(source: Source, target: Path) -> None:
  """Writes a model file that llm.c loads, in float32 or bfloat16.

  Args:
    source: the model.
    target: the file, not there yet.

  Raises:
    UserError: llm.c can't express the model or its dtype.
  """
  c = source.config
  check_plain(c, 'llm.c')
  versions = {dtype: version for version, dtype in VERSIONS.items()}
  if source.dtype not in versions:
    raise UserError(
      f"llm.c's files have no {source.dtype}: give --dtype float32 (nothing is lost) "
      'or --dtype bfloat16.'
    )
  padded = -(-c.vocab_size // PADDED_TO) * PADDED_TO
  header = np.zeros(256, '<i4')
  header[:8] = (
    MAGIC,
    versions[source.dtype],
    c.n_positions,
    c.vocab_size,
    c.n_layer,
    c.n_head,
    c.n_embd,
    padded,
  )
  with open(target, 'wb') as file:
    file.write(header.tobytes())
    for name in _names(c.n_layer):
      tensor = source.tensor(name)
      file.write((tensor.T if name.endswith(CONV1D) else tensor).tobytes())
      if name == 'wte.weight':
        file.write(bytes((padded - c.vocab_size) * c.n_embd * tensor.dtype.itemsize))

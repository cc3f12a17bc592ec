"""GGUF, the single file that llama.cpp and what is built on it read: export only.

The file is laid out as llama.cpp's own `convert_hf_to_gguf.py` lays out a GPT-2: architecture `gpt2`,
its tensor names, matrices as [out, in], the position table and everything one-dimensional in float32.
What cannot be computed there is refused. Format: ggml's `docs/gguf.md`; names come from the package
gguf (`pip install gguf`).
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from gpt2_jax.checkpoints.tensors import CONV1D, Source, check_plain, shapes
from gpt2_jax.core.errors import UserError

# dtype -> (ggml's type, llama.cpp's name of such a file)
TYPES = {
  'float32': ('F32', 'ALL_F32'),
  'float16': ('F16', 'MOSTLY_F16'),
  'bfloat16': ('BF16', 'MOSTLY_BF16'),
}


def write(source: Source, target: Path) -> None:
  """Writes a .gguf file. One tensor is in memory at a time.

  Matrices keep `source.dtype`, bit by bit. Not kept: dropout rates, how it was initialised and
  trained, and whether an added token takes along the white space around it.

  Raises:
    UserError: the package gguf is missing; llama.cpp's GPT-2 can't compute this model, or would not
      have a tokenizer for it; a tensor holds NaN.
  """
  gguf = _package()
  check_plain(
    source.config,
    "llama.cpp's GPT-2",
    kept=('tie_word_embeddings', 'n_inner', 'layer_norm_epsilon', 'reorder_and_upcast_attn'),
  )
  wide = source.astype('float32')  # from the file's own dtype, not by way of source.dtype
  names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT2, source.config.n_layer)
  matrix_type, file_type = TYPES[source.dtype]

  writer = gguf.GGUFWriter(None, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.GPT2])
  _add_model(writer, source, target.stem, gguf.LlamaFileType[file_type], gguf)
  _add_tokenizer(writer, source, gguf)
  order: list[tuple[str, bool]] = []
  for name, shape in shapes(source.config).items():
    full = name if name.startswith('lm_head') else f'transformer.{name}'
    is_matrix = len(shape) > 1 and name != 'wpe.weight'
    kind = gguf.GGMLQuantizationType[matrix_type if is_matrix else 'F32']
    writer.add_tensor_info(
      names.get_name(full, try_suffixes=('.weight', '.bias')),
      shape[::-1] if name.endswith(CONV1D) else shape,
      np.dtype(np.float32),
      int(np.prod(shape)) * gguf.GGML_QUANT_SIZES[kind][1],
      raw_dtype=kind,
    )
    order.append((name, is_matrix))
  try:
    writer.write_header_to_file(target)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
  finally:
    writer.close()

  # Not by the package: where the disk is full, it doesn't say so.
  with open(target, 'ab') as file:
    pad = lambda: file.write(bytes(-file.tell() % writer.data_alignment))
    pad()
    for name, is_matrix in order:
      tensor = (source if is_matrix else wide).tensor(name)
      tensor = np.ascontiguousarray(tensor.T if name.endswith(CONV1D) else tensor)
      file.write(tensor.view(np.uint8).data)
      pad()


def _package() -> Any:
  try:
    import gguf
  except ImportError as e:
    raise UserError(f'GGUF files need the package gguf ({e}): pip install gguf.') from e
  return gguf


def _add_model(writer, source: Source, name: str, file_type, gguf) -> None:
  c = source.config
  writer.add_type(gguf.GGUFType.MODEL)
  writer.add_name(name)
  writer.add_block_count(c.n_layer)
  writer.add_context_length(c.n_positions)
  writer.add_embedding_length(c.n_embd)
  writer.add_feed_forward_length(c.F)
  writer.add_head_count(c.n_head)
  writer.add_layer_norm_eps(c.layer_norm_epsilon)
  writer.add_file_type(file_type)
  writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _add_tokenizer(writer, source: Source, gguf) -> None:
  """Adds the vocabulary, filled up to the model's V rows."""
  tokenizer, V = source.tokenizer, source.config.vocab_size
  if tokenizer is None:
    raise UserError(
      f'{source.where} has no tokenizer, and llama.cpp loads no model without one: put '
      'its vocab.json and merges.txt beside it.'
    )
  if tokenizer.vocab_size > V:
    raise UserError(
      f'{source.where}: the tokenizer has {tokenizer.vocab_size:,} ids, but the model '
      f"only {V:,} (vocab_size): it is another model's tokenizer."
    )
  with tempfile.TemporaryDirectory() as folder:
    tokenizer.save(folder)
    config, content = (
      json.loads((Path(folder) / name).read_text(encoding='utf-8'))
      for name in ('tokenizer_config.json', 'tokenizer.json')
    )
  if content['pre_tokenizer']['add_prefix_space']:
    raise UserError(
      f'{source.where}: the tokenizer puts a space before a text (add_prefix_space), '
      'which llama.cpp does not for a GPT-2: export to another format.'
    )
  ids, merges = content['model']['vocab'], content['model']['merges']
  names = {i: name for name, i in ids.items()}
  special = {token['id']: token['special'] for token in content['added_tokens']}
  kinds = gguf.TokenType

  def kind(i: int):
    if i in special:
      return kinds.CONTROL if special[i] else kinds.USER_DEFINED
    return kinds.NORMAL if i in names else kinds.UNUSED

  writer.add_tokenizer_model('gpt2')
  writer.add_tokenizer_pre('gpt-2')
  writer.add_token_list([names.get(i, f'[PAD{i}]') for i in range(V)])
  writer.add_token_types([kind(i) for i in range(V)])
  # llama.cpp demands a list, which may not be empty in the package: '' is a merge that never happens
  writer.add_token_merges([' '.join(pair) for pair in merges] or [''])
  for role in ('bos', 'eos', 'unk', 'sep', 'pad', 'mask'):
    if f'{role}_token' in config:
      getattr(writer, f'add_{role}_token_id')(ids[config[f'{role}_token']])
  writer.add_add_bos_token(False)

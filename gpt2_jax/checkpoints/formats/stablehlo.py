"""StableHLO programs that need no code of ours to run: export only.

A folder, for anything that has JAX (or another runtime of StableHLO):

    prefill.bin        (params, tokens [b, t], lengths [b])  -> logits [b, V], k, v [L, b, S, N, H]
    decode_step.bin    (params, token [b], positions [b], k, v)  -> logits [b, V], k, v
    model.safetensors  `params`: a flat dict; the programs hold no weights
    manifest.json      the model's config; names, shapes and dtypes of all inputs and outputs
    tokenizer/         Hugging Face's files
    README.md          how to use it: `USAGE` below, a program of 25 lines

`b` and `t` may be any size, t up to S = n_positions. Logits are float32, of each row's last token.
Prompts are padded on the right. A row's new token goes to the cache slot of its own position, over
the padding, and sees no slot beyond it. So each row computes what it would alone, up to S tokens.

One program serves CPUs, CUDA GPUs and TPUs. JAX promises to load it in versions up to six months
newer (its documentation of `jax.export`, "Compatibility guarantees").
"""

import contextlib
import dataclasses
import functools
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import export

from gpt2_jax.checkpoints.formats import safetensors_files
from gpt2_jax.checkpoints.tensors import Source, Tensor
from gpt2_jax.core.errors import UserError
from gpt2_jax.model.config import GPTConfig
from gpt2_jax.model.gpt2 import bind, make_params
from gpt2_jax.model.kv_cache import StackedCache, empty_cache
from gpt2_jax.model.layers import pick

PLATFORMS = ('cpu', 'cuda', 'tpu')
INPUTS = {'prefill': ('tokens', 'lengths'), 'decode_step': ('token', 'positions', 'k', 'v')}

USAGE = """\
import jax
import jax.export
import numpy as np
from safetensors.numpy import load_file

def load(name):
  with open(f'{name}.bin', 'rb') as file:
    return jax.jit(jax.export.deserialize(bytearray(file.read())).call)

prefill, decode_step = load('prefill'), load('decode_step')
params = jax.device_put(load_file('model.safetensors'))

prompts = [[1, 2, 3], [4]]  # ids
lengths = np.array([len(prompt) for prompt in prompts], np.int32)
tokens = np.zeros((len(prompts), lengths.max()), np.int32)
for row, prompt in zip(tokens, prompts):
  row[:len(prompt)] = prompt  # padded on the right, with anything

logits, k, v = prefill(params, tokens, lengths)
new = [logits.argmax(-1)]  # greedy
for i in range(3):
  logits, k, v = decode_step(params, new[-1], lengths + i, k, v)
  new.append(logits.argmax(-1))
print(np.stack(new, 1))
"""


def write(source: Source, target: Path) -> None:
  """Writes the folder. Parameters keep `source.dtype`, activations and cache are of `config.dtype`.

  Holds one parameter, of all layers, at a time. The record of the run is not kept.

  Raises:
    UserError: the package flatbuffers is missing; the model has a classification head; a tensor
      holds NaN.
  """
  if source.config.head != 'lm':
    raise UserError(
      f'{source.where} has the head {source.config.head!r}: a StableHLO export '
      "generates text, for which the head must be 'lm'."
    )
  config = dataclasses.replace(source.config, vocab_multiple=1, lora=None)
  no_mesh = jax.sharding.Mesh(np.empty((), object), ())
  with jax.set_mesh(no_mesh), _without_paths():  # the same programs wherever they are written
    params = _shapes(config, source.dtype)
    programs = _programs(config, params)
    contents = {f'{name}.bin': _serialized(program) for name, program in programs.items()}

  target.mkdir()
  for name, content in contents.items():
    (target / name).write_bytes(content)
  safetensors_files.write(
    target / 'model.safetensors',
    {
      name: Tensor(x.shape, source.dtype, functools.partial(_parameter, source, name, x.shape))
      for name, x in params.items()
    },
  )
  if source.tokenizer is not None:
    source.tokenizer.save(target / 'tokenizer')
  manifest = {
    'config': dataclasses.asdict(config),
    'tokenizer': None if source.tokenizer is None else 'tokenizer',
    'jax_version': jax.__version__,
    'platforms': PLATFORMS,
    'parameters': {
      'file': 'model.safetensors',
      'arrays': {name: _described(x) for name, x in params.items()},
    },
    'programs': {name: _signature(name, program, len(params)) for name, program in programs.items()},
  }
  (target / 'manifest.json').write_text(json.dumps(manifest, indent=2) + '\n')
  (target / 'README.md').write_text(_readme(config))


def _signature(name: str, program: export.Exported, n_params: int) -> dict[str, Any]:
  """Returns a program's entry in the manifest: its file, inputs and outputs."""
  named = zip(INPUTS[name], program.in_avals[n_params:], strict=True)
  outputs = zip(('logits', 'k', 'v'), program.out_avals, strict=True)
  return {
    'file': f'{name}.bin',
    'calling_convention_version': program.calling_convention_version,
    'inputs': ['parameters', *({'name': label, **_described(x)} for label, x in named)],
    'outputs': [{'name': label, **_described(x)} for label, x in outputs],
  }


def _shapes(config: GPTConfig, dtype: str) -> dict[str, jax.ShapeDtypeStruct]:
  """Returns the shapes of our parameters, by their paths with dots."""
  shapes: Mapping[str, Any] = flatten_dict(
    jax.eval_shape(functools.partial(make_params, config, 0)), sep='.'
  )
  return {name: jax.ShapeDtypeStruct(x.shape, dtype) for name, x in sorted(shapes.items())}


def _parameter(source: Source, name: str, shape: tuple[int, ...]) -> np.ndarray:
  """Reads one of our parameters: the source's tensors, with layers stacked and merged axes apart."""
  if not name.startswith('h.'):
    return source.tensor(name)
  layers = [source.tensor(f'h.{i}.{name.removeprefix("h.")}') for i in range(shape[0])]
  return np.stack(layers).reshape(shape)


def _programs(
  config: GPTConfig, params: dict[str, jax.ShapeDtypeStruct]
) -> dict[str, export.Exported]:
  V, S = config.vocab_size, config.n_positions

  def prefill(params, tokens_BT, lengths_B):
    model = bind(config, unflatten_dict(params, sep='.'))
    cache = empty_cache(config, tokens_BT.shape[0], S, config.dtype)  # for every platform
    x_BTD, cache, *_ = model.transformer(tokens_BT, cache=cache)
    logits_B1V = model.logits(pick(x_BTD, lengths_B - 1)[:, None])
    return logits_B1V[:, 0, :V], cache.k_LBNSH, cache.v_LBNSH

  def decode_step(params, token_B, positions_B, k_LBNSH, v_LBNSH):
    model = bind(config, unflatten_dict(params, sep='.'))
    x_BTD, cache, *_ = model.transformer(
      token_B[:, None], cache=StackedCache(k_LBNSH, v_LBNSH), slot=positions_B
    )
    return model.logits(x_BTD)[:, 0, :V], cache.k_LBNSH, cache.v_LBNSH

  ints = lambda *shape: jax.ShapeDtypeStruct(shape, 'int32')
  exported: Callable[..., Any] = lambda f: export.export(jax.jit(f), platforms=PLATFORMS)

  b, t = export.symbolic_shape('b, t', constraints=[f't <= {S}'])
  first = exported(prefill)(params, ints(b, t), ints(b))
  (b,) = export.symbolic_shape('b')  # anew: a constraint on t can't be checked where there is no t
  cache = jax.ShapeDtypeStruct((config.n_layer, b, config.n_head, S, config.H), config.dtype)
  step = exported(decode_step)(params, ints(b), ints(b), cache, cache)
  return {'prefill': first, 'decode_step': step}


@contextlib.contextmanager
def _without_paths() -> Iterator[None]:
  """Keeps the names of files and lines out of a program."""
  name = 'jax_traceback_in_locations_limit'
  limit = getattr(jax.config, name)
  jax.config.update(name, 0)
  try:
    yield
  finally:
    jax.config.update(name, limit)


def _serialized(program: export.Exported) -> bytearray:
  try:
    return program.serialize()
  except ImportError as e:
    raise UserError(
      f'StableHLO files need the package flatbuffers: pip install flatbuffers ({e}).'
    ) from e


def _described(x) -> dict[str, Any]:
  """Returns shape and dtype; a symbolic size is its letter."""
  return {'shape': [n if isinstance(n, int) else str(n) for n in x.shape], 'dtype': str(x.dtype)}


def _readme(config: GPTConfig) -> str:
  return f"""\
# GPT-2 as StableHLO

Two programs in the format of `jax.export`, for {', '.join(PLATFORMS)}, and their weights. They need
`pip install jax flatbuffers safetensors`; `manifest.json` lists all inputs and outputs.

- `prefill(params, tokens [b, t], lengths [b])` reads prompts that are padded on the right: b and t
  are free, t and all lengths from 1 to {config.n_positions}.
- `decode_step(params, token [b], positions [b], k, v)` reads one more token for each row, at its
  position: how many tokens the row has had before, at most {config.n_positions - 1}.

Both return `logits [b, {config.vocab_size}]` for each row's next token, and the cache `k`, `v`.
A token or position beyond the tables gives NaN. In this folder, generate text with:

```python
{USAGE}```
"""

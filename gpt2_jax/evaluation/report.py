"""What an evaluation found, as a table and as JSON: each figure with all that it follows from."""

import dataclasses
import importlib.metadata
import platform
import time
from typing import Any

import jax

from gpt2_jax.evaluation import published
from gpt2_jax.evaluation.figures import Scorer, Values
from gpt2_jax.evaluation.protocols import Protocol
from gpt2_jax.model.pretrained_model import Pretrained, params_of
from gpt2_jax.model.sizes import num_params
from gpt2_jax.parallel import sharding

VERSION = 1  # of the JSON


def about(model: Pretrained, checkpoint: str, fingerprint: str) -> dict[str, Any]:
  """Returns the facts about a model and the hardware that it is on."""
  params = params_of(model)
  n = num_params(dataclasses.replace(model.config, form='train', lora=None))
  dtypes = {str(leaf.dtype) for leaf in jax.tree.leaves(params)}
  with sharding.mesh_of(params):
    backend = sharding.platform()
  devices = sorted(sharding.devices_of(params), key=lambda device: device.id)
  packages = ('gpt2_jax', 'jax', 'jaxlib', 'flax', 'numpy')
  return {
    'version': VERSION,
    'checkpoint': checkpoint,
    'sha256': fingerprint,
    'parameters': n,
    'tokenizer': None if model.tokenizer is None else model.tokenizer.sha256,
    'size': published.SIZES.get(n),
    'dtype': model.config.dtype,
    'parameters_dtype': ' '.join(sorted(dtypes)),
    'form': model.config.form,
    'backend': backend,
    'devices': f'{len(devices)} x {devices[0].device_kind}',
    'python': platform.python_version(),
    'packages': {name: importlib.metadata.version(name) for name in packages},
    'time': time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime()),
  }


def entry(protocol: Protocol, scorer: Scorer, data: dict[str, Any], values: Values) -> dict[str, Any]:
  """Returns a protocol's result; `data` has the split, sha256 and source of its benchmark."""
  said = dataclasses.asdict(protocol)
  stride = protocol.stride and min(protocol.stride, scorer.window)
  window = data['rows']['tokens'] if protocol.kind == 'store' else scorer.window
  metrics = {name: dataclasses.asdict(values[name]) for name in protocol.metrics}
  for name, metric in metrics.items():
    metric['published'] = [dataclasses.asdict(row) for row in published.beside(protocol.name, name)]
  return {
    'protocol': said | {'benchmark': protocol.benchmark, 'window': window, 'stride': stride},
    'data': data,
    'metrics': metrics,
  }


def heading(said: dict[str, Any]) -> str:
  """Returns the lines above the table."""
  size = said['size'] or 'of no released size: what was published is shown for orientation'
  return (
    f'{said["checkpoint"]}: {said["parameters"]:,} parameters ({size}), {said["dtype"]}, '
    f'{said["backend"]} ({said["devices"]}), gpt2_jax {said["packages"]["gpt2_jax"]}'
  )


def rows(result: dict[str, Any], size: str | None) -> str:
  """Returns a protocol's lines of the table: our figures, and those of others below each."""
  protocol, data = result['protocol'], result['data']
  lines = [
    f'{protocol["name"]} version {protocol["version"]}: {data["split"]} of {data["source"]}, '
    f'sha256 {data["sha256"][:16]}'
  ]
  if protocol['stride']:
    lines[0] += f', window {protocol["window"]}, stride {protocol["stride"]}'
  if 'rows' in data:
    rows = data['rows']
    alone = ', each document alone' if rows['document_mask'] else ''
    lines[0] += f', rows of {rows["tokens"]:,} tokens{alone}'
  if data['limit']:
    lines[0] += f', the first {data["limit"]} examples only'
  for name, metric in result['metrics'].items():
    error = '' if metric['stderr'] is None else f' ± {metric["stderr"]:.2g}'
    lines.append(f'  {name:20s}{number(metric["value"])}{error}  ({metric["n"]:,} {metric["unit"]})')
    beside = [_beside(row, size) for row in metric['published']]
    lines += [f'    {line}' for line in beside if line]
  return '\n'.join(lines)


def number(value: float) -> str:
  return f'{value:.4f}' if abs(value) < 10 else f'{value:.2f}'


def _beside(row: dict[str, Any], size: str | None) -> str:
  """Returns a published row: the figure of this size, or all figures where ours has no such size."""
  values = (
    row['values']
    if size is None
    else {name: value for name, value in row['values'].items() if name == size}
  )
  if not values:
    return ''
  shown = ', '.join(f'{name} {number(value)}' for name, value in values.items())
  kind = 'same protocol' if row['same'] else f'not the same protocol: {row["why"]}'
  return f'{row["source"]}: {shown} ({kind})'

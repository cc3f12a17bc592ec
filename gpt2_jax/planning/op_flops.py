"""FLOPs of single instructions: matrix products, and libraries' kernels."""

import json
import re

import numpy as np

from gpt2_jax.planning.hlo_text import Array, Instruction

# Attention kernels, by the beginning of their name or target: how many products of T x S they make.
ATTENTION = {
  'splash_mha_fwd': 2,
  'splash_mha_dkv': 5,  # with dq, as it is asked for
  '__cudnn$fmha': 2,
  '__cudnn$fmhaSoftmaxBackward': 5,
}


def of_product(i: Instruction, operands: list[tuple[Array, ...]]) -> float:
  """Returns the FLOPs of a dot, or of the convolution that the TPU compiler makes of one."""
  out = i.arrays[0].dims
  if i.op == 'dot':
    left = operands[0][0].dims
    axes = re.search(r'lhs_contracting_dims=\{([\d,]*)\}', i.attributes)
    summed = [left[int(n)] for n in axes[1].split(',') if n] if axes else []
    return 2 * float(np.prod(out, dtype=float)) * float(np.prod(summed, dtype=float))
  labels = re.search(r'dim_labels=(\w+)_(\w+)->(\w+)', i.attributes)
  assert labels is not None
  (left, right), (a, w, y) = (o[0].dims for o in operands[:2]), labels.groups()
  groups = int(i.attribute('feature_group_count') or 1)
  total = 2.0 * out[y.index('b')] * out[y.index('f')] * left[a.index('f')] / groups
  total /= int(i.attribute('batch_group_count') or 1)
  window = dict(
    re.findall(r'(\w+)=([\dx_\-]+)', (re.search(r'window=\{([^}]*)\}', i.attributes) or ['', ''])[1])
  )
  axes = [label for label in w if label.isdigit()]
  setting = lambda name, at: int(window[name].split('x')[at]) if name in window else 1
  for label in axes:
    n, size, outs = int(label), left[a.index(label)], out[y.index(label)]
    low = int(window['pad'].split('x')[n].split('_')[0]) if 'pad' in window else 0
    dilated = setting('lhs_dilate', n)
    at = (
      np.arange(outs)[:, None] * setting('stride', n)
      - low
      + np.arange(right[w.index(label)]) * setting('rhs_dilate', n)
    )
    total *= int(((at >= 0) & (at <= (size - 1) * dilated) & (at % dilated == 0)).sum())
  return total


def of_library(i: Instruction, target: str, operands: list[tuple[Array, ...]]) -> float:
  """Returns the FLOPs of a cuBLAS call or an attention kernel (the causal half too), 0 for others."""
  names = [name for name in ATTENTION if i.name.startswith(name) or target.startswith(name)]
  heads = [arrays[0].dims for arrays in operands if len(arrays[0].dims) == 4]
  if names and len(heads) > 1:  # q and k, each with batch, heads, positions and width in some order
    products = ATTENTION[max(names, key=len)]
    return products * 2 * float(np.prod(heads[0], dtype=float)) * max(heads[1][1:])
  found = re.search(r'"lhs_contracting_dimensions":(\[[^\]]*\])', i.attributes)
  if not found or not ('gemm' in target or 'matmul' in target):
    return 0
  summed = np.prod([operands[0][0].dims[int(n)] for n in json.loads(found[1])])
  return 2 * float(np.prod(i.arrays[0].dims, dtype=float)) * float(summed)

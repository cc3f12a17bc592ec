"""The device's attention kernel beside XLA's attention: the same numbers, and milliseconds of both.

    python -m benchmarks.kernels

For a GPU (cuDNN) or a TPU (Splash): values and gradients of one layer's attention in bfloat16, whole
rows and masked documents, against XLA's in float32. Exit status 1 where the kernel is further from
that than three times XLA's own bfloat16 is.
"""

import argparse
import json
import statistics
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from gpt2_jax.model.attention import attention, causal_mask
from gpt2_jax.model.attention_kernels import OWN, Kernel


def xla(q_BTNH, k_BTNH, v_BTNH, documents_BT):
  T = q_BTNH.shape[1]
  mask_BTS = causal_mask(T, T)
  if documents_BT is not None:
    mask_BTS = mask_BTS & (documents_BT[:, :, None] == documents_BT[:, None])
  return attention(
    q_BTNH,
    k_BTNH,
    v_BTNH,
    mask_BTS,
    scale=q_BTNH.shape[-1] ** -0.5,
    precision='highest' if q_BTNH.dtype == jnp.float32 else None,
  )


def measure(f, arguments, repeats: int) -> tuple[tuple, float]:
  """Values and gradients, and the median milliseconds of a call."""
  cotangent = jax.random.normal(jax.random.key(9), arguments[0].shape)

  @jax.jit
  def run(*qkv):
    out, pull = jax.vjp(f, *qkv)
    return out, *pull(cotangent.astype(out.dtype))

  result, times = jax.block_until_ready(run(*arguments)), []
  for _ in range(repeats):
    began = time.perf_counter()
    jax.block_until_ready(run(*arguments))
    times.append(1e3 * (time.perf_counter() - began))
  return result, statistics.median(times)


def compare(own: str, B: int, T: int, N: int, H: int, documents: bool, repeats: int) -> dict:
  """A row of the table."""
  keys = jax.random.split(jax.random.key(0), 4)
  wide = [jax.random.normal(key, (B, T, N, H)) for key in keys[:3]]
  ids = jnp.cumsum(jax.random.bernoulli(keys[3], 0.01, (B, T)), 1) if documents else None
  narrow = [x.astype(jnp.bfloat16) for x in wide]
  plain = lambda q, k, v: xla(q, k, v, ids)
  want, _ = measure(plain, [x.astype(jnp.float32) for x in narrow], 1)
  theirs, xla_ms = measure(plain, narrow, repeats)
  ours, ms = measure(lambda q, k, v: Kernel(own, ids)(q, k, v, H**-0.5), narrow, repeats)
  error = lambda got: max(
    float(np.abs(np.asarray(a, np.float32) - b).max() / np.abs(b).max()) for a, b in zip(got, want)
  )
  return {
    'B': B,
    'T': T,
    'N': N,
    'H': H,
    'documents': documents,
    'kernel': own,
    'error': error(ours),
    'xla_error': error(theirs),
    'ms': ms,
    'xla_ms': xla_ms,
  }


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--repeats', type=int, default=20)
  parser.add_argument('--json')
  asked = parser.parse_args()
  own = OWN.get(jax.default_backend())
  if own in (None, 'blocks'):
    print(f'a {jax.default_backend()} has no attention kernel: nothing to measure')
    return 0
  rows = []
  for shape in (
    (8, 1024, 12, 64, False),
    (8, 1024, 12, 64, True),
    (4, 1024, 25, 64, False),
    (2, 4096, 12, 64, False),
  ):
    rows.append(row := compare(own, *shape, asked.repeats))
    print(
      '{kernel} {B}x{T} {N} heads, documents {documents}: {ms:.2f} ms, xla {xla_ms:.2f}; '
      'error {error:.1e}, xla {xla_error:.1e}'.format(**row)
    )
  if asked.json:
    with open(asked.json, 'w') as file:
      json.dump(
        {'device': jax.devices()[0].device_kind, 'jax': jax.__version__, 'rows': rows}, file, indent=1
      )
  return int(any(row['error'] > 3 * row['xla_error'] for row in rows))


if __name__ == '__main__':
  sys.exit(main())

"""Products in a platform's own order are einsums, whatever the order of their axes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.arrays import assert_close

from gpt2_jax.parallel import cpu_matmul

SIZES = dict(B=2, T=5, D=16, F=24, C=3, N=4, H=8, V=40, S=7)

EQUATIONS = [
  'BTD,DCNH->CBTNH',
  'CBTNH,DCNH->BTD',
  'BTD,CBTNH->DCNH',  # c_attn, and its gradients
  'BTNH,NHD->BTD',
  'BTD,NHD->BTNH',
  'BTNH,BTD->NHD',
  'BTD,VD->BTV',
  'TV,VD->TD',
  'TV,TD->VD',
  'BNTH,BNSH->BNTS',
  'BNTS,BNSH->BNTH',
  'BNTS,BNTH->BNSH',  # attention
  'BTD,FD->BTF',  # a weight that lies as it is decoded with
]


def operands(equation: str, dtype):
  rng = np.random.default_rng(0)
  return [
    jnp.asarray(rng.normal(size=[SIZES[a] for a in axes]), dtype)
    for axes in cpu_matmul.parse_einsum(equation)[:2]
  ]


@pytest.mark.parametrize('equation', EQUATIONS)
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_row_major_is_einsum(equation, dtype):
  """bfloat16 too, to float32's rounding: its products are exact there, and so added up."""
  x, y = operands(equation, dtype)
  want = np.einsum(equation, *(np.asarray(a, np.float64) for a in (x, y)))
  assert_close(jax.jit(lambda x, y: cpu_matmul.row_major(equation, x, y))(x, y), want, 1e-6)
  rounded = jax.jit(lambda x, y: cpu_matmul.einsum(equation, x, y, None, None, dtype))(x, y)
  assert rounded.dtype == dtype
  assert_close(rounded, want, 1e-6 if dtype == 'float32' else 2**-8)


@pytest.mark.parametrize('equation', EQUATIONS)
def test_row_major_differentiates_as_einsum(equation):
  def gradients(f):
    x, y = operands(equation, 'float32')
    return jax.jit(jax.grad(lambda x, y: jnp.sin(f(equation, x, y)).sum(), (0, 1)))(x, y)

  for have, want in zip(gradients(cpu_matmul.row_major), gradients(jnp.einsum), strict=True):
    assert_close(have, want)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_what_is_kept_is_the_same_and_has_its_derivatives(dtype):
  x = jnp.asarray([1.5, -2.0, 0.0, jnp.inf], dtype)
  np.testing.assert_array_equal(cpu_matmul.kept(x), x)
  cube = lambda x: (cpu_matmul.kept(x * x) * x).sum().astype(jnp.float32)
  second = jax.grad(lambda x: jax.grad(cube)(x).sum().astype(jnp.float32))
  np.testing.assert_array_equal(jax.grad(cube)(x[:3]), 3 * x[:3] ** 2)
  np.testing.assert_array_equal(second(x[:3]), 6 * x[:3])

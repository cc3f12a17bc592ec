"""The forms of a training step that other platforms want give the same numbers here."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.arrays import assert_close, mesh_of
from support.models import tiny_gpt2

from gpt2_jax.model import cross_entropy
from gpt2_jax.model.gpt2 import bind, init_params
from gpt2_jax.parallel import sharded_products
from gpt2_jax.training.step import nll

CONFIG = tiny_gpt2(n_embd=16, n_head=2, n_inner=32, vocab_size=100, vocab_multiple=4)


@pytest.fixture
def as_a_gpu(monkeypatch):
  """Whether the platform is asked for the form of products and of the loss, it is a GPU."""

  def patch():
    for module in (sharded_products, cross_entropy):
      monkeypatch.setattr(module, 'platform', lambda: 'gpu')

  return patch


def rare(value):
  """A parameter for the slow tests."""
  return pytest.param(value, marks=pytest.mark.slow)


def loss_and_gradients(config, sizes):
  """Of 8 rows of 32 tokens."""
  with mesh_of(*sizes):
    params = init_params(config, 0)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, config.vocab_size, (8, 33)))
    loss = jax.jit(jax.value_and_grad(lambda p: nll(bind(config, p), tokens).total))
    return jax.device_get(loss(params)), loss.lower(params).as_text()


@pytest.mark.parametrize('sizes', [(1,), rare((2,)), rare((1, 2)), (1, 2, 2)])
def test_a_gpus_products_and_loss(sizes, as_a_gpu):
  (want, wanted), plain = loss_and_gradients(CONFIG, sizes)
  as_a_gpu()
  (have, made), text = loss_and_gradients(CONFIG, sizes)
  assert abs(have - want) < 1e-6
  jax.tree.map(assert_close, made, wanted)
  # a product for each of q, k and v; the sums of the softmax in one pass; dy written once
  products = lambda text: len(re.findall('dot_general', text))
  assert products(text) > products(plain)
  assert 'optimization_barrier' in text and 'optimization_barrier' not in plain


@pytest.mark.parametrize('remat', [rare('none'), 'dots', rare('full')])
def test_layers_written_out_are_a_loops(remat):
  config = dataclasses.replace(CONFIG, remat=remat)
  (want, wanted), loop = loss_and_gradients(config, (2,))
  (have, made), text = loss_and_gradients(dataclasses.replace(config, scan_layers=False), (2,))
  assert abs(have - want) < 1e-6
  jax.tree.map(assert_close, made, wanted)
  assert text.count('stablehlo.while') < loop.count('stablehlo.while')


def test_what_is_computed_again_is_not_merged_with_what_was_computed():
  def products(remat):
    config = dataclasses.replace(CONFIG, remat=remat, scan_layers=False)
    params = init_params(config, 0)
    tokens = jnp.zeros((8, 33), jnp.int32)
    loss = jax.jit(jax.grad(lambda p: nll(bind(config, p), tokens).total))
    return len(re.findall(r' dot\(', loss.lower(params).compile().as_text()))

  assert (
    products('full') >= products('none') + 4 * CONFIG.n_layer - 1
  )  # the last projection isn't read


@pytest.mark.parametrize('V,largest', [(1, 3.0), (7, 3.0), (300, 3.0), (300, 300.0)])
def test_sums_of_a_softmax_in_one_pass(V, largest, monkeypatch):
  rng = np.random.default_rng(0)
  logits = rng.normal(size=(5, V)).astype(np.float32) * largest
  ids = rng.integers(0, V, 5)
  monkeypatch.setattr(cross_entropy, 'platform', lambda: 'gpu')
  each, most, total, at = jax.jit(cross_entropy._softmax)(jnp.asarray(logits), jnp.asarray(ids))
  wide = logits.astype(np.float64)
  np.testing.assert_allclose(each, np.exp(wide - wide.max(1, keepdims=True)), rtol=1e-6, atol=1e-30)
  np.testing.assert_array_equal(most, logits.max(1))
  np.testing.assert_allclose(total, np.exp(wide - wide.max(1, keepdims=True)).sum(1), rtol=1e-6)
  np.testing.assert_array_equal(at, logits[range(5), ids])

"""What must hold for any GPT-2, whatever its weights."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from support.arrays import assert_close, mesh_of

from gpt2_jax.core.errors import UserError
from gpt2_jax.model.attention import Mask, causal_mask
from gpt2_jax.model.config import GPTConfig
from gpt2_jax.model.edits import Listening
from gpt2_jax.model.gpt2 import bind, init_params
from gpt2_jax.model.kv_cache import empty_cache
from gpt2_jax.model.layers import dropout, fold_in
from gpt2_jax.model.remat import REMAT_POLICIES
from gpt2_jax.model.sizes import flops_per_token, num_params
from gpt2_jax.training.step import nll, row_keys

SIZES = {
  'small': (dict(), 124_439_808),
  'medium': (dict(n_layer=24, n_embd=1024, n_head=16), 354_823_168),
  'large': (dict(n_layer=36, n_embd=1280, n_head=20), 774_030_080),
  'xl': (dict(n_layer=48, n_embd=1600, n_head=25), 1_557_611_200),
}


def tokens(config: GPTConfig, B: int, T: int, seed: int = 0) -> jax.Array:
  return jnp.asarray(np.random.default_rng(seed).integers(0, config.vocab_size, (B, T)), jnp.int32)


def forward(config: GPTConfig):
  return jax.jit(lambda params, x: bind(config, params)(x))


@pytest.mark.parametrize('size', SIZES)
def test_parameter_counts_are_the_released_ones(size):
  fields, count = SIZES[size]
  assert num_params(GPTConfig(**fields)) == count


def test_flops_per_token_of_124m():
  # by hand: 6·(124,439,808 - 1024·768) + 12·12·768·1024
  assert flops_per_token(GPTConfig(), 1024) == 6 * 123_653_376 + 113_246_208


def test_no_position_sees_a_later_one(tiny):
  """The gradient of the logits at t with respect to the embedding at s is zero for s > t only."""
  params = init_params(tiny, 0)
  T = 9

  def logits(wpe_TD):
    changed = params | {'wpe': {'weight': params['wpe']['weight'].at[:T].set(wpe_TD)}}
    return bind(tiny, changed)(tokens(tiny, 1, T))[0].sum(-1)

  gradient_TSD = jax.jit(jax.jacobian(logits))(params['wpe']['weight'][:T])
  influence_TS = np.abs(gradient_TSD).max(-1)
  assert (influence_TS[np.triu_indices(T, 1)] == 0).all()
  assert (influence_TS[np.tril_indices(T)] > 1e-6).all()


def test_scan_equals_the_blocks_one_by_one(tiny):
  tiny = dataclasses.replace(tiny, scale_attn_by_inverse_layer_idx=True)
  params, x = init_params(tiny, 0), tokens(tiny, 2, 11)

  @jax.jit
  def one_by_one(params):
    model = bind(tiny, params)
    block, layers = nnx.split(model.h)
    h_BTD = model.wte.weight[...][x] + model.wpe.weight[...][:11]
    states = [h_BTD]
    for i in range(tiny.n_layer):
      layer = nnx.merge(block, jax.tree.map(lambda leaf: leaf[i], layers))
      h_BTD, _ = layer(h_BTD, jnp.asarray(i), Mask(causal_mask(11, 11)))
      states.append(h_BTD)
    return states[:-1] + [model.ln_f(states[-1])]

  states = one_by_one(params)
  listen = Listening(record=('resid_pre',))
  out = jax.jit(lambda p: bind(tiny, p).transformer(x, listen=listen))(params)
  assert_close(out.x_BTD, states[-1])
  assert_close(out.found['resid_pre'], jnp.stack(states[:-1]))


@pytest.mark.parametrize('policy', sorted(set(REMAT_POLICIES) - {'none'}))
def test_remat_changes_no_gradient(tiny, policy):
  params, x = init_params(tiny, 0), tokens(tiny, 2, 9)
  loss = lambda config: lambda p: nll(bind(config, p), x).total
  plain = jax.jit(jax.grad(loss(tiny)))
  remat = jax.jit(jax.grad(loss(dataclasses.replace(tiny, remat=policy))))
  count = lambda f: f.lower(params).as_text().count('dot_general')
  assert count(remat) > count(plain), 'nothing is computed again'
  for want, have in zip(jax.tree.leaves(plain(params)), jax.tree.leaves(remat(params))):
    assert_close(have, want)


@pytest.mark.parametrize('vocab_size,dtype', [(1000, 'float32'), (257, 'bfloat16')])
def test_a_fresh_model_knows_nothing(vocab_size, dtype):
  config = GPTConfig(
    vocab_size=vocab_size, n_positions=64, n_embd=64, n_layer=2, n_head=4, dtype=dtype
  )
  loss = jax.jit(lambda p: nll(bind(config, p), tokens(config, 8, 64)).total)(init_params(config, 0))
  assert abs(loss - math.log(vocab_size)) < 0.05


@pytest.mark.parametrize(
  'scheme,wpe,proj', [('hf', 0.02, 0.02 / math.sqrt(2 * 6)), ('openai_release', 0.01, 0.02)]
)
def test_initial_deviations(scheme, wpe, proj):
  config = GPTConfig(
    vocab_size=500, n_positions=256, n_embd=64, n_layer=6, n_head=2, init_scheme=scheme
  )
  p = init_params(config, 0)
  deviations = {
    'wte': (p['wte']['weight'][:500], 0.02),
    'wpe': (p['wpe']['weight'], wpe),
    'c_attn': (p['h']['attn']['c_attn']['weight'], 0.02),
    'attn.c_proj': (p['h']['attn']['c_proj']['weight'], proj),
    'c_fc': (p['h']['mlp']['c_fc']['weight'], 0.02),
    'mlp.c_proj': (p['h']['mlp']['c_proj']['weight'], proj),
  }
  for name, (weight, std) in deviations.items():
    assert float(weight.std()) == pytest.approx(std, rel=0.03), name
    assert abs(float(weight.mean())) < std / 20, name
  layers = p['h']['mlp']['c_fc']['weight']
  assert not np.allclose(layers[0], layers[1]), 'layers start from different weights'
  assert not p['wte']['weight'][500:].any()


def test_padding_of_the_vocabulary_is_not_seen(tiny):
  padded = dataclasses.replace(tiny, vocab_multiple=64)
  params, more = init_params(tiny, 0), init_params(padded, 0)
  x = tokens(tiny, 2, 9)
  logits, logits_padded = forward(tiny)(params, x), forward(padded)(more, x)
  assert logits.shape == logits_padded.shape == (2, 9, 97)
  assert_close(logits, logits_padded)
  mean = lambda config: jax.jit(jax.value_and_grad(lambda p: nll(bind(config, p), x).total))
  loss, gradients = mean(padded)(more)
  assert_close(loss, mean(tiny)(params)[0])
  gradient = gradients['wte']['weight']
  assert gradient[:97].any() and not gradient[97:].any()


def test_cached_equals_uncached(tiny):
  params, x = init_params(tiny, 0), tokens(tiny, 2, 12)

  @jax.jit
  def cached(params):
    model, cache, got = bind(tiny, params), empty_cache(tiny, 2, 16), []
    for start, stop in ((0, 5), (5, 6), (6, 12)):
      out = model.transformer(x[:, start:stop], cache=cache, slot=start)
      cache = out.cache
      got.append(model.logits(out.x_BTD)[..., :97])
    return jnp.concatenate(got, 1)

  assert_close(cached(params), forward(tiny)(params, x))


def test_attentions_are_causal_distributions(tiny):
  listen = Listening(record=('pattern',))
  found = jax.jit(lambda p: bind(tiny, p).transformer(tokens(tiny, 2, 7), listen=listen).found)
  weights_LBNTS = np.asarray(found(init_params(tiny, 0))['pattern'])
  assert weights_LBNTS.shape == (3, 2, 4, 7, 7)
  np.testing.assert_allclose(weights_LBNTS.sum(-1), 1, rtol=1e-5)
  assert (np.triu(weights_LBNTS, 1) == 0).all()


def test_what_is_not_asked_for_is_not_computed(tiny):
  params, x = init_params(tiny, 0), tokens(tiny, 2, 9)
  hlo = lambda **k: jax.jit(lambda p: bind(tiny, p).transformer(x, **k).x_BTD).lower(params).as_text()
  stacked = 'tensor<3x2x4x9x9xf32>'  # the weights of all layers
  assert (
    stacked not in hlo()
    and stacked
    in jax.jit(lambda p: bind(tiny, p).transformer(x, listen=Listening(record=('pattern',))))
    .lower(params)
    .as_text()
  )


def test_dropout_keeps_the_mean_and_the_share():
  x = jnp.ones((64, 50, 40))
  keys = jax.random.split(jax.random.key(0), 64)
  y = np.asarray(dropout(x, 0.2, keys))
  share = (y == 0).mean()
  assert abs(share - 0.2) < 4 * math.sqrt(0.2 * 0.8 / y.size)
  np.testing.assert_allclose(y[y != 0], 1.25, rtol=1e-6)
  assert not np.array_equal(y[0], y[1]), 'rows have masks of their own'


def test_dropout_masks_are_the_rows_own(tiny):
  """A row's result with dropout doesn't depend on its batch; each of the three rates matters."""
  x = tokens(tiny, 8, 9)
  params, step = init_params(tiny, 0), jnp.asarray(5)
  seen = []
  for rates in ((0.3, 0, 0), (0, 0.3, 0), (0, 0, 0.3)):
    config = dataclasses.replace(
      tiny, **dict(zip(('embd_pdrop', 'attn_pdrop', 'resid_pdrop'), rates))
    )
    f = jax.jit(
      lambda x, step, first: (
        bind(config, params).transformer(x, dropout_keys_B=row_keys(0, step, first, len(x))).x_BTD
      )
    )
    whole = f(x, step, 0)
    assert_close(f(x[4:], step, 4), whole[4:])
    assert np.abs(whole - f(x, step + 1, 0)).max() > 0.1, 'another step, other masks'
    seen.append(whole)
  assert all(np.abs(a - b).max() > 0.1 for a, b in zip(seen, seen[1:]))


def test_dropout_layers_have_different_masks():
  keys = jax.random.split(jax.random.key(0), 2)
  drawn = [dropout(jnp.ones((2, 100)), 0.5, fold_in(keys, layer)) for layer in range(3)]
  assert not np.array_equal(drawn[0], drawn[1]) and not np.array_equal(drawn[1], drawn[2])


def test_bfloat16_stays_near_float32(tiny):
  params, x = init_params(tiny, 0), tokens(tiny, 4, 16)
  want = forward(tiny)(params, x)
  half = dataclasses.replace(tiny, dtype='bfloat16')
  have = forward(half)(params, x)
  inside = jax.eval_shape(lambda p: bind(half, p).transformer(x), params)
  assert have.dtype == jnp.float32 and inside.x_BTD.dtype == jnp.bfloat16
  assert np.abs(have - want).max() / np.abs(want).max() < 0.05


def test_a_model_works_on_a_mesh_and_without(tiny):
  x = tokens(tiny, 8, 9)
  want = forward(tiny)(init_params(tiny, 0), x)
  with mesh_of(2, 2, 2):
    have = forward(tiny)(init_params(tiny, 0), jax.device_put(x, jax.P(('data', 'fsdp'))))
  assert_close(have, want)


@pytest.mark.parametrize(
  'fields,says',
  [
    (dict(n_head=5), 'n_embd = 768 must be a multiple of n_head = 5'),
    (dict(activation_function='gelo'), "'gelo' must be one of"),
    (dict(attn_pdrop=1.0), r'attn_pdrop = 1.0 must lie in \[0, 1\)'),
    (dict(remat='some'), "'some' must be one of"),
    (dict(n_layer=0), 'n_layer = 0 must be a whole number from 1 to 65,536'),
  ],
)
def test_impossible_configs_are_refused(fields, says):
  with pytest.raises(UserError, match=says):
    GPTConfig(**fields)


def test_a_text_beyond_the_context_is_refused(tiny):
  with pytest.raises(UserError, match='33 tokens are more than .*n_positions = 32'):
    forward(tiny)(init_params(tiny, 0), tokens(tiny, 1, 33))


def test_an_id_beyond_the_table_is_loud(tiny):
  assert np.isnan(forward(tiny)(init_params(tiny, 0), jnp.array([[5, 104]]))[0, 1]).all()

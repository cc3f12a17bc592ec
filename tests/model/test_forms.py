"""The forms that parameters are decoded in compute what the form 'train' does."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from support.arrays import assert_close, mesh_of

import gpt2_jax
from gpt2_jax.core.errors import UserError
from gpt2_jax.model.config import LoRA
from gpt2_jax.model.decode_layout import for_decoding
from gpt2_jax.model.edits import Listening
from gpt2_jax.model.gpt2 import bind, init_params
from gpt2_jax.parallel.sharding import P

X = np.random.default_rng(0).integers(0, 97, (4, 9)).astype(np.int32)


def features(config, params):
  out = jax.jit(
    lambda params, x: (
      bind(config, params)(x),
      bind(config, params).transformer(x, listen=Listening(record=('resid_pre', 'pattern'))),
    )
  )(params, X)
  return out[0], out[1].found['resid_pre'], out[1].found['pattern']


@pytest.mark.parametrize(
  'knobs',
  [
    {},
    dict(tie_word_embeddings=False, n_head=1, scale_attn_by_inverse_layer_idx=True),
    dict(lora=LoRA(2, 4.0, ('c_attn', 'attn.c_proj', 'mlp.c_proj'))),
  ],
  ids=['plain', 'odd', 'lora'],
)
def test_decode_is_train_but_for_rounding(tiny, knobs):
  config = dataclasses.replace(tiny, **knobs)
  params = init_params(config, 0)
  if config.lora:  # B begins as zero
    params = jax.tree.map(lambda x: np.asarray(x) + 0.05, params)
  for have, want in zip(features(*for_decoding(config, params)), features(config, params)):
    assert_close(have, want)


def test_a_mesh_keeps_its_layout(tiny):
  want = np.asarray(bind(*for_decoding(tiny, init_params(tiny, 0)))(jnp.asarray(X)))
  with mesh_of(2, 2, 2):
    config, params = for_decoding(tiny, init_params(tiny, 0))
    weight = params['h'][1]['mlp']['c_fc']['weight']
    assert weight.shape == (80, 32) and weight.sharding.spec == P('tensor', 'fsdp')
    assert_close(jax.jit(lambda params: bind(config, params)(X))(params), want)


def test_int8_steps_are_the_nearest(tiny):
  params = init_params(tiny, 0)
  model = bind(tiny, params)
  small = gpt2_jax.quantize(model)
  weight = np.asarray(params['h']['attn']['c_attn']['weight'])[1]  # DCNH
  linear = small.h[1].attn.c_attn
  assert linear.weight[...].dtype == jnp.int8
  rebuilt = np.asarray(linear.weight[...]) * np.asarray(linear.scale[...])[..., None]  # CNHD
  rebuilt = np.moveaxis(rebuilt, -1, 0)
  step = np.abs(weight).max(0) / 127
  assert (np.abs(rebuilt - weight) <= step * 0.5001).all()
  table, rows = np.asarray(params['wte']['weight']), small.wte
  rebuilt = np.asarray(rows.weight[...]) * np.asarray(rows.scale[...])[:, None]
  assert (np.abs(rebuilt - table) <= np.abs(table).max(1, keepdims=True) / 127 * 0.5001).all()
  assert_close(jax.jit(small)(X), jax.jit(model)(X), 0.05)
  parts = lambda m: sum(x.nbytes for x in jax.tree.leaves(nnx.state(m)))
  assert parts(small) < 0.4 * parts(model)  # of a model this small, biases and scales are a share


@pytest.mark.slow
def test_int8_generates_and_has_features(tiny):
  model = bind(tiny, init_params(tiny, 0))
  small = gpt2_jax.quantize(model)
  result = gpt2_jax.generate(small, [1, 2, 3], do_sample=False, max_new_tokens=5)[0]
  sequence = [1, 2, 3, *result.tokens]
  logits = np.asarray(small(jnp.asarray([sequence])))[0]
  assert result.tokens == logits[2:-1].argmax(-1).tolist()
  state = gpt2_jax.features(small, sequence)[0].last_hidden_state
  assert_close(state, gpt2_jax.features(model, sequence)[0].last_hidden_state, 0.1)


def test_int8_is_the_end_of_the_line(tiny, tmp_path):
  small = gpt2_jax.quantize(bind(tiny, init_params(tiny, 0)))
  with pytest.raises(UserError, match='int8'):
    gpt2_jax.quantize(small)
  with pytest.raises(UserError, match="can't be saved"):
    gpt2_jax.save_pretrained(small, tmp_path / 'out')
  assert not (tmp_path / 'out').exists()

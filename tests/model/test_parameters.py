"""The table of parameters is the model's, and what follows from it."""

import dataclasses

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from support.arrays import mesh_of

import gpt2_jax
from gpt2_jax.model.config import LoRA
from gpt2_jax.model.decode_layout import for_decoding
from gpt2_jax.model.gpt2 import bind, init_params, make_params
from gpt2_jax.model.parameters import map_rows, row_of
from gpt2_jax.model.pretrained_model import params_of
from gpt2_jax.model.sizes import num_params
from gpt2_jax.parallel.sharding import P
from gpt2_jax.training.optimizers.parts import decay_mask, scale_matrices

KNOBS = [
  dict(tie_word_embeddings=False),
  dict(lora=LoRA(2, 4.0, ('c_attn', 'c_proj', 'c_fc'))),
  dict(head='sequence_classification'),
  dict(head='token_classification'),
]


@pytest.mark.parametrize('knobs', KNOBS, ids=['untied', 'lora', 'texts', 'tokens'])
def test_each_parameter_has_its_row_and_lies_as_it_says(tiny, knobs):
  config = dataclasses.replace(tiny, **knobs)
  with mesh_of(2, 2, 2):
    made = flatten_dict(jax.eval_shape(lambda: make_params(config, 0)))
  rows = {row.path: row for row in config.parameters()}
  assert made.keys() == rows.keys()
  for path, x in made.items():
    layout = (None,) * rows[path].stacked + tuple(rows[path].layout)
    assert x.shape == rows[path].whole(config.sizes) and x.sharding.spec == P(*layout), path


def test_a_parameter_without_a_row_is_an_error(tiny):
  """Whatever its name: one that begins otherwise than `ln_` would decay in silence."""
  params = init_params(tiny, 0)
  params['h']['attn']['q_norm'] = {'weight': np.ones((tiny.n_layer, tiny.H), np.float32)}
  for ask in (decay_mask, lambda params: scale_matrices(0.5).update(params, None)):
    with pytest.raises(LookupError, match=r'h\.attn\.q_norm\.weight has no row'):
      ask(params)
  with pytest.raises(LookupError, match='has no row'):
    row_of(('h', 3, 'attn', 'c_attn', 'gain'))


def test_every_parameter_of_the_other_forms_has_a_row(tiny):
  names = set()
  for config, params in (for_decoding(tiny, init_params(tiny, 0)), for_decoding(*_int8(tiny))):
    map_rows(lambda row, _: names.add(row.name), params)
    assert names == {row.name for row in config.parameters()}


def _int8(config):
  model = gpt2_jax.quantize(bind(config, init_params(config, 0)))
  return model.config, params_of(model)


def test_a_loaded_model_is_shown_in_a_few_lines(tmp_path, tiny):
  gpt2_jax.save_pretrained(bind(tiny, init_params(tiny, 0)), tmp_path / 'a')
  model = gpt2_jax.from_pretrained(tmp_path / 'a')
  assert f'{num_params(tiny):,} parameters' in repr(model) and len(repr(model)) < 600

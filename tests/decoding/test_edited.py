"""A text written under edits is that of whole runs with the same edits."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.arrays import mesh_of
from support.models import tiny_gpt2

from gpt2_jax.core.errors import UserError
from gpt2_jax.decoding import device_loop
from gpt2_jax.decoding.edited import placed
from gpt2_jax.decoding.generate import generate, generate_tokens, stream
from gpt2_jax.model.edits import Edit, run
from gpt2_jax.model.gpt2 import GPT2, bind, init_params

CONFIG = tiny_gpt2()
PROMPTS = [[1, 2, 3], [5, 6, 7, 8, 9, 10, 11], [96]]
GREEDY = dict(do_sample=False, max_new_tokens=9)
DRAWN = dict(temperature=0.9, top_k=40, seed=3, max_new_tokens=9)
VECTOR = np.random.default_rng(0).normal(size=32).astype(np.float32)
HEADS = np.random.default_rng(1).normal(size=(4, 8)).astype(np.float32)
EDITS = {
  'steer': Edit('resid_post', 'add', VECTOR, layer=1),
  'at': [
    Edit('v', value=HEADS, layer=2, position=2),
    Edit('mlp_post', 'zero', position=slice(5, 11)),
  ],
  'several': [
    Edit('z', 'zero', layer=1, head=2),
    Edit('k', 'scale', 0.0, layer=0, head=1),
    Edit('embed', 'scale', 0.5, position=[1, 4, 8]),
  ],
}


@pytest.fixture(scope='module')
def params():
  return init_params(CONFIG, 0)


def ids(results):
  return [result.tokens for result in results]


def check(params, edits, results, prompts=PROMPTS):
  """Each token is the likeliest of whole runs with these edits, and has their log-probability."""
  model = bind(CONFIG, params)
  for prompt, result in zip(prompts, results, strict=True):
    sequence = prompt + result.tokens
    padded = jnp.asarray([sequence + [0] * (24 - len(sequence))])  # of one shape, and seen by nobody
    logits_BTV, _ = run(model, padded, edits)
    logprobs_TV = np.asarray(jax.nn.log_softmax(logits_BTV[0]))
    want_TV = logprobs_TV[len(prompt) - 1 : len(sequence) - 1]
    assert result.tokens == want_TV.argmax(-1).tolist()
    chosen = want_TV[range(len(result.tokens)), result.tokens]
    np.testing.assert_allclose(result.logprobs, chosen, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('name', ['steer', 'at', pytest.param('several', marks=pytest.mark.slow)])
def test_each_token_is_that_of_whole_runs(params, name):
  results = generate_tokens(CONFIG, params, PROMPTS, edits=EDITS[name], **GREEDY)
  check(params, EDITS[name], results)
  assert ids(results) != ids(generate_tokens(CONFIG, params, PROMPTS, **GREEDY))


@pytest.mark.slow
@settings(max_examples=5, deadline=None)
@given(
  st.sampled_from(['resid_pre', 'q', 'k', 'z', 'attn_out', 'mlp_pre', 'pos_embed', 'ln1.scale']),
  st.sampled_from(['scale', 'add']),
  st.lists(st.integers(0, 9), min_size=1, max_size=4) | st.none(),
  st.integers(0, 2),
)
def test_any_site_and_positions(site, how, position, layer):
  layer = None if site == 'pos_embed' else layer
  edit = Edit(site, how, 1.7, layer=layer, position=position)
  params = init_params(CONFIG, 0)
  check(params, edit, generate_tokens(CONFIG, params, PROMPTS, edits=edit, **GREEDY))


def test_without_edits_the_programs_are_as_they_were(params, monkeypatch):
  """Those of a model that can't be listened to."""
  asked = {}

  def note(name):
    f = getattr(device_loop, name)

    def call(config, params, *args, **static):
      abstract = lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x))
      asked[name] = config, jax.tree.map(abstract, (params, *args)), static
      return f(config, params, *args, **static)

    monkeypatch.setattr(f'gpt2_jax.decoding.host_loop.{name}', call)

  def texts():
    found = {}
    for name, (config, args, static) in asked.items():
      traced_anew = functools.partial(getattr(device_loop, name).__wrapped__, config, **static)
      found[name] = jax.jit(traced_anew).lower(*args).as_text()
    return found

  for name in ('start', 'advance'):
    note(name)
  generate_tokens(CONFIG, params, PROMPTS, **GREEDY)
  have, transformer = texts(), GPT2.transformer
  deaf = lambda self, *args, listen=None, **how: transformer(self, *args, **how)
  monkeypatch.setattr(GPT2, 'transformer', deaf)
  assert len(have) == 2 and have == texts()


def test_another_place_or_value_compiles_nothing(params):
  text = lambda value, **where: generate_tokens(
    CONFIG, params, PROMPTS, edits=Edit('resid_post', 'add', value, **where), **DRAWN
  )
  text(VECTOR, layer=0)
  before = device_loop.start._cache_size(), device_loop.advance._cache_size()
  text(-3 * VECTOR, layer=2, position=slice(2, None))
  text(VECTOR, position=[0, 4])
  assert (device_loop.start._cache_size(), device_loop.advance._cache_size()) == before


@pytest.mark.slow
def test_a_steered_text_depends_on_its_prompt_and_seed_alone(params):
  how = dict(edits=EDITS['at'], **DRAWN)
  together = ids(generate_tokens(CONFIG, params, PROMPTS, **how))
  assert together == ids(generate_tokens(CONFIG, params, PROMPTS[::-1], **how))[::-1]
  with mesh_of(2, 2, 2):
    assert ids(generate_tokens(CONFIG, init_params(CONFIG, 0), PROMPTS, **how)) == together
  bare = bind(CONFIG, params)
  assert ids(generate(bare, PROMPTS, **how)) == together
  with pytest.raises(UserError, match='stream writes one text'):
    stream(bare, PROMPTS[0], **how)  # ids alone: there is no tokenizer, but edits are taken


@pytest.mark.parametrize(
  'search',
  [
    pytest.param(dict(num_beams=3), marks=pytest.mark.slow),
    pytest.param(dict(penalty_alpha=0.6, top_k=1), marks=pytest.mark.slow),
    pytest.param(dict(prompt_lookup_num_tokens=3), marks=pytest.mark.slow),
    pytest.param('assistant', marks=pytest.mark.slow),
  ],
)
def test_every_search_is_of_the_edited_model(params, search):
  if search == 'assistant':  # of another number of layers: edits are not its
    small = dataclasses.replace(CONFIG, n_layer=1)
    search = dict(assistant=(small, init_params(small, 1)))
  results = generate_tokens(CONFIG, params, PROMPTS, edits=EDITS['steer'], **search, **GREEDY)
  if 'num_beams' not in search:
    return check(params, EDITS['steer'], results)
  alone = generate_tokens(CONFIG, params, PROMPTS[:1], edits=EDITS['steer'], **search, **GREEDY)
  assert ids(alone) == ids(results)[:1]
  logits_BTV, _ = run(bind(CONFIG, params), [PROMPTS[0] + alone[0].tokens], EDITS['steer'])
  logprobs = np.asarray(jax.nn.log_softmax(logits_BTV[0]))[range(2, 11), alone[0].tokens]
  np.testing.assert_allclose(alone[0].logprobs, logprobs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
  'edit, says',
  [
    (Edit('z', 'zero', row=0), 'Generate them apart'),
    (Edit('pattern', 'zero', key=0), 'slots of a cache'),
    (Edit('resid_pst', 'zero'), 'near it: resid_post'),
    (Edit('z', 'mean'), 'give the value'),
    (Edit('logits', 'zero'), 'logits_processor'),
    (Edit('z', 'zero', position=-1), 'count from 0'),
    (Edit('z', 'zero', position=slice(-3, None)), 'count from 0'),
    (Edit('z', 'zero', position=15), 'beyond the 15 positions'),
    (Edit('z', 'zero', position=32), 'z: position = 32 is not among 0 … 31'),
    (Edit('z', 'zero', layer=3), 'z: layer = 3'),
    (Edit('result', 'zero', head=1), "in the form 'train'"),
    (Edit('resid_post', 'add', np.zeros((4, 32))), 'of sizes'),
    ('steer', 'no Edit'),
  ],
)
def test_what_cannot_be_edited_is_an_error(params, edit, says):
  with pytest.raises(UserError, match=says):
    generate_tokens(CONFIG, params, PROMPTS, edits=edit, **GREEDY)
  assert placed((), CONFIG, 4) == ()

"""Folded and centred weights are the same model, and TransformerLens'."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict
from support.arrays import assert_close
from support.models import noisy_params, tiny_gpt2

from gpt2_jax.core.errors import UserError
from gpt2_jax.interpretation import folding
from gpt2_jax.model.edits import run
from gpt2_jax.model.gpt2 import bind, init_params
from gpt2_jax.model.sites import SITES

GOLDEN = Path(__file__).parent.parent / 'golden'
X = np.random.default_rng(0).integers(0, 97, (3, 7))
STEPS = (folding.fold_layer_norms, folding.center_writing_weights, folding.center_unembedding)


@pytest.mark.parametrize('tied', [True, pytest.param(False, marks=pytest.mark.slow)])
def test_no_step_changes_a_log_probability(tied):
  config = dataclasses.replace(tiny_gpt2(), tie_word_embeddings=tied)
  params = noisy_params(config, 0.3)
  plain = lambda config, params: run(bind(config, params), X)[0]
  want = jax.nn.log_softmax(plain(config, params))
  kept = jax.tree.map(np.asarray, params)
  for step in (*STEPS, folding.processed):
    have = jax.nn.log_softmax(plain(*step(config, params)))
    assert_close(have, want)
    jax.tree.map(np.testing.assert_array_equal, params, kept)  # what was given is as it was
  after, folded = folding.processed(config, params)
  assert not after.tie_word_embeddings
  for norm in (folded['h']['ln_1'], folded['h']['ln_2']):
    assert (norm['weight'] == 1).all() and (norm['bias'] == 0).all()
  written = (
    folded['wte'],
    folded['wpe'],
    folded['h']['attn']['c_proj'],
    folded['h']['mlp']['c_proj'],
  )
  for x in jax.tree.leaves(written):
    np.testing.assert_allclose(x.mean(-1), 0, atol=1e-6)
  np.testing.assert_allclose(plain(after, folded).mean(-1), 0, atol=1e-4)


def test_every_site_is_transformer_lens_after_its_processing():
  with np.load(GOLDEN / 'transformer_lens.npz') as f:
    params = {n.removeprefix('params/'): x for n, x in f.items() if n.startswith('params/')}
    tokens = f['tokens']
  with np.load(GOLDEN / 'transformer_lens_processed.npz') as f:
    want = dict(f)
  sizes = dict(vocab_size=31, n_positions=8, n_embd=15, n_layer=2, n_head=3, n_inner=29)
  config = tiny_gpt2(**sizes, vocab_multiple=1)
  params = jax.tree.map(jnp.asarray, unflatten_dict(params, sep='.'))
  config, params = folding.processed(config, params)
  names = [name for name, site in SITES.items() if site.lens]
  logits, found = run(bind(config, params), tokens, record=names)
  assert_close(logits, want['logits'])
  for name in names:
    site, have, layers = SITES[name], np.asarray(found[name]), range(config.n_layer)
    theirs = [want[site.lens.format(layer=i)] for i in layers] if site.layered else want[site.lens]
    if name == 'attn_scores':  # both have the lowest number where nothing is seen
      have, theirs = np.tril(have), np.tril(theirs)
    assert_close(have, theirs)


def test_what_can_not_be_folded_is_an_error():
  config = tiny_gpt2()
  params = init_params(config, 0)
  params['ln_f']['weight'] = params['ln_f']['weight'].at[3].set(0)
  with pytest.raises(UserError, match='ln_f.weight holds a 0'):
    folding.fold_layer_norms(config, params)
  with pytest.raises(UserError, match="form 'train'"):
    folding.processed(dataclasses.replace(config, form='decode'), params)

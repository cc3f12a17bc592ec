"""GPT-2, whole: its parameters and its forward pass.

Paper: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners". Numerics and names
are those of Hugging Face's `GPT2LMHeadModel`.

Letters, here and everywhere in the package: `B` batch, `T` query positions, `S` key or cache
positions, `D` width, `N` heads, `H` head width, `F` MLP width, `V` vocabulary, `L` layers, `C` = 3
for query, key and value. An array that crosses a function carries them as a suffix: `x_BTD`.

A `GPT2` is used functionally: `params = init_params(config, seed)` is a plain nested dict, and
`bind(config, params)` the model over it, inside or outside of `jax.jit`. The L blocks are one block
whose parameters have a leading axis L, run by `jax.lax.scan`.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from gpt2_jax.core import seeds
from gpt2_jax.core.errors import UserError
from gpt2_jax.model.activations import ACTIVATIONS
from gpt2_jax.model.attention import Mask, causal_mask
from gpt2_jax.model.attention_kernels import Kernel, choose
from gpt2_jax.model.by_form import embedding, linear, make_blocks, run_blocks
from gpt2_jax.model.config import GPTConfig
from gpt2_jax.model.cross_entropy import CrossEntropyOptions, Factors, Loss, cross_entropy
from gpt2_jax.model.layers import Classifier, Embed, LayerNorm, dropout, fold_in, pick
from gpt2_jax.model.layers import DropoutSite as Site
from gpt2_jax.model.layers import OuterSite as Outer
from gpt2_jax.model.sites import NOBODY, SILENT, Listen, Listener
from gpt2_jax.parallel.sharding import RULES, activation, layout, reshard, unshard

Params = dict[str, Any]  # nested; leaves are arrays


class Output(NamedTuple):
  """What `GPT2.transformer` returns."""

  x_BTD: jax.Array  # after the last layer norm
  cache: Any  # as it came, None or a `kv_cache.Cache`
  found: dict[str, jax.Array]  # what was kept at the sites; of those in blocks with an axis L


def stds(config: GPTConfig) -> tuple[float, float]:
  """The initial deviation of a block's matrices: of all, and of those into the residual stream."""
  std = config.initializer_range / config.width_ratio**0.5
  return std, std if config.init_scheme == 'openai_release' else std / (2 * config.n_layer) ** 0.5


class Attention(nnx.Module):
  """Multi-head causal self-attention."""

  def __init__(self, config: GPTConfig, *, rngs: nnx.Rngs):
    self.config, (std, proj_std) = config, stds(config)
    self.c_attn = linear(config, 'h.attn.c_attn', 'BTD,DCNH->CBTNH', std, rngs=rngs)
    self.c_proj = linear(config, 'h.attn.c_proj', 'BTNH,NHD->BTD', proj_std, rngs=rngs)

  def __call__(self, x_BTD, layer, see, cache, slot, keys_B, at):
    c = self.config
    q_BTNH, k_BSNH, v_BSNH = (
      at(name, x[0]) for name, x in zip('qkv', jnp.split(self.c_attn(x_BTD, keys_B), 3))
    )
    k_BSNH, v_BSNH = (reshard(x, RULES.act_bsnh) for x in (k_BSNH, v_BSNH))
    if cache is not None:
      cache, k_BSNH, v_BSNH = cache.update(layer, slot, k_BSNH, v_BSNH)
    scale = c.score_scale
    if c.scale_attn_by_inverse_layer_idx:
      scale = scale / jnp.asarray(layer + 1, jnp.float32)
    z_BTNH = see.attend(
      q_BTNH,
      k_BSNH,
      v_BSNH,
      scale=scale,
      upcast=c.reorder_and_upcast_attn,
      drop=lambda weights_BNTS: dropout(weights_BNTS, c.attn_pdrop, fold_in(keys_B, Site.ATTENTION)),
      precision=c.precision,
      at=at,
    )
    out_BTD = self._out(at('z', z_BTNH), keys_B, at)
    return dropout(out_BTD, c.resid_pdrop, fold_in(keys_B, Site.ATTN_OUT)), cache

  def _out(self, z_BTNH, keys_B, at) -> jax.Array:
    """What the heads write together, or where someone listens, one by one."""
    if not at.hears('result'):
      return self.c_proj(z_BTNH, keys_B)
    weight_NHD, bias_D = self.c_proj.weight[...], self.c_proj.bias[...]
    result_BTND = jnp.einsum(
      'BTNH,NHD->BTND',
      z_BTNH,
      unshard(weight_NHD.astype(z_BTNH.dtype)),
      precision=self.config.precision,
      out_sharding=layout(activation('BTND')),
    )
    return (at('result', result_BTND).sum(2) + unshard(bias_D)).astype(z_BTNH.dtype)


class MLP(nnx.Module):
  """Two linear layers around the activation function."""

  def __init__(self, config: GPTConfig, *, rngs: nnx.Rngs):
    self.config, (std, proj_std) = config, stds(config)
    self.c_fc = linear(config, 'h.mlp.c_fc', 'BTD,DF->BTF', std, rngs=rngs)
    self.c_proj = linear(config, 'h.mlp.c_proj', 'BTF,FD->BTD', proj_std, rngs=rngs)

  def __call__(self, x_BTD, keys_B, at):
    c = self.config
    h_BTF = at('mlp_pre', self.c_fc(x_BTD, keys_B))
    with jax.named_scope('activation'):
      h_BTF = ACTIVATIONS[c.activation_function](h_BTF.astype(jnp.float32)).astype(h_BTF.dtype)
    out_BTD = self.c_proj(at('mlp_post', h_BTF), keys_B)
    return dropout(out_BTD, c.resid_pdrop, fold_in(keys_B, Site.MLP_OUT))


class Block(nnx.Module):
  """Attention and MLP, each on a layer norm of the residual stream and added back to it."""

  def __init__(self, config: GPTConfig, *, rngs: nnx.Rngs):
    self.ln_1, self.ln_2 = LayerNorm(config, 'h.ln_1'), LayerNorm(config, 'h.ln_2')
    self.attn = Attention(config, rngs=rngs)
    self.mlp = MLP(config, rngs=rngs)

  def __call__(
    self, x_BTD, layer, see, cache=None, slot: Any = 0, keys_B=None, at: Listener = SILENT
  ):
    """`see` says which keys a query sees: a `Mask` or a `Kernel`; `at` is asked at each site."""
    x_BTD = at('resid_pre', x_BTD)
    with jax.named_scope('attn'):
      out_BTD, cache = self.attn(self.ln_1(x_BTD, at, 'ln1'), layer, see, cache, slot, keys_B, at)
      x_BTD = at('resid_mid', x_BTD + at('attn_out', out_BTD))
    with jax.named_scope('mlp'):
      out_BTD = self.mlp(self.ln_2(x_BTD, at, 'ln2'), keys_B, at)
      x_BTD = at('resid_post', x_BTD + at('mlp_out', out_BTD))
    return x_BTD, cache


class GPT2(nnx.Module):
  """GPT-2 with its head, of language modelling or of classification. `model(tokens_BT)` gives logits.

  Initialisation: N(0, `initializer_range`), biases 0, layer norms 1 and 0. Scheme 'hf' (also nanoGPT
  and llm.c) divides the two projections into the residual stream by sqrt(2·n_layer), as the paper
  describes; 'openai_release' does as the released code: no such division, and half the deviation
  for wpe (openai/gpt-2 `src/model.py`).
  """

  def __init__(self, config: GPTConfig, *, rngs: nnx.Rngs):
    c, std = config, config.initializer_range
    self.config = config
    self.wte = embedding(c, 'wte', std, rngs=rngs)
    wpe_std = std / 2 if c.init_scheme == 'openai_release' else std
    self.wpe = embedding(c, 'wpe', wpe_std, rngs=rngs)
    self.h = make_blocks(lambda rngs: Block(c, rngs=rngs), c, rngs)
    self.ln_f = LayerNorm(c, 'ln_f')
    if c.head == 'sequence_classification':
      self.score = Classifier(c, 'score', rngs=rngs)
    elif c.head == 'token_classification':
      self.classifier = Classifier(c, 'classifier', rngs=rngs)
    elif not c.tie_word_embeddings:
      self.lm_head = embedding(c, 'lm_head', std, rngs=rngs)

  def __call__(
    self, tokens_BT: jax.Array, *, lengths_B: jax.Array | None = None, **options
  ) -> jax.Array:
    """Logits in float32: [B, T, V] over the true vocabulary, or those of `classify`.

    Options: see `transformer`.
    """
    x_BTD = self.transformer(tokens_BT, **options).x_BTD
    if self.config.head != 'lm':
      return self.classify(x_BTD, lengths_B)
    return reshard(self.logits(x_BTD), RULES.act_btd)[..., : self.config.vocab_size]

  def transformer(
    self,
    tokens_BT: jax.Array,
    *,
    positions_BT: jax.Array | None = None,
    mask_BTS: jax.Array | Mask | None = None,
    documents_BT: jax.Array | None = None,
    cache: Any = None,
    slot: jax.Array | int = 0,
    dropout_keys_B: jax.Array | None = None,
    listen: Listen = NOBODY,
  ) -> Output:
    """The model up to the last layer norm. Every argument but the tokens is an option of one use.

    Args:
      tokens_BT: ids below `vocab_size`; an id beyond the table gives NaN.
      positions_BT: positions, default `slot` + t.
      mask_BTS: true where query t sees key s, default causal; or a `Mask` of another kind.
      documents_BT: a number for each token, the same within a document: a query sees its own
        document alone. Not beside `mask_BTS` or `cache`.
      cache: a `kv_cache.Cache`, where keys and values are kept; T of them are written from `slot`
        on, and S is the cache's length. Without one, S = T.
      slot: where in the cache the first token goes, for all rows or [B].
      dropout_keys_B: a key for each row; None: no dropout.
      listen: who is asked at the sites: see `edits.Listening`.

    Raises:
      UserError: more tokens than `n_positions`.
    """
    c, keys_B = self.config, dropout_keys_B
    if mask_BTS is not None:
      see = mask_BTS if isinstance(mask_BTS, Mask) else Mask(mask_BTS)
    elif cache is not None:
      see = Mask(causal_mask(tokens_BT.shape[1], cache.positions, slot))
    else:
      see = self._causal(tokens_BT.shape[1], documents_BT, slot, keys_B is not None, listen)

    def run(block, x_BTD, layer, cache):
      at = listen.layer(layer)
      x_BTD, cache = block(x_BTD, layer, see, cache, slot, fold_in(keys_B, layer), at)
      return x_BTD, cache, at.found

    at = listen.layer(None)
    with jax.named_scope('embed'):
      x_BTD = self._embedded(tokens_BT, positions_BT, slot, keys_B, at)
    x_BTD, cache, found = run_blocks(run, self.h, c, x_BTD, cache)
    x_BTD = self.ln_f(x_BTD, at, 'ln_final')
    return Output(x_BTD, cache, at.found | found)

  def _embedded(self, tokens_BT, positions_BT, slot, keys_B, at) -> jax.Array:
    """What the first block reads; arguments as of `transformer`."""
    c, (B, T) = self.config, tokens_BT.shape
    if T > c.n_positions:
      raise UserError(
        f'{T} tokens are more than the model has positions (n_positions = '
        f'{c.n_positions}): shorten the text.'
      )
    if positions_BT is None:
      positions_BT = jnp.reshape(slot, (-1, 1)) + jnp.arange(T)
    x_BTD = at('embed', self.wte.rows(tokens_BT, B))
    x_BTD = x_BTD + at('pos_embed', self.wpe.rows(positions_BT, B))
    return dropout(x_BTD, c.embd_pdrop, fold_in(keys_B, c.n_layer + Outer.EMBEDDINGS))

  def _causal(self, T: int, documents_BT, slot, drops: bool, listen: Listen) -> Mask | Kernel:
    """What a row of T tokens sees of itself: by a kernel, unless the weights are asked for."""
    shown = listen.hears('attn_scores', 'pattern')
    name = 'xla' if shown else choose(self.config, T, drops=drops)[0]
    if name != 'xla':
      return Kernel(name, documents_BT)
    see = causal_mask(T, T, slot)
    if documents_BT is not None:
      see = see & (documents_BT[:, :, None] == reshard(documents_BT, RULES.rows_b)[:, None])
    return Mask(see)

  def logits(self, x_BTD: jax.Array) -> jax.Array:
    """Float32 logits over the padded vocabulary; those of padding are the lowest float32."""
    c = self.config
    with jax.named_scope('logits'):
      logits_BTV = self.output_table.logits(x_BTD)
      if c.width_ratio != 1:
        logits_BTV = logits_BTV / c.width_ratio
      real_V = jnp.arange(c.padded_vocab_size) < c.vocab_size
      return jnp.where(real_V, logits_BTV, jnp.finfo(jnp.float32).min)

  def loss(
    self, x_BTD: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array, factors: Factors = ()
  ) -> Loss:
    """`cross_entropy` of next tokens, and terms by their factors, without all logits in memory."""
    c, table = self.config, self.output_table
    options = CrossEntropyOptions(c.vocab_size, c.width_ratio, c.precision, c.reduce_dtype, factors)
    with jax.named_scope('loss'):
      return cross_entropy(options, x_BTD, table.weight[...], targets_BT, weights_BT, table.scale_V)

  @property
  def output_table(self) -> Embed:
    """The vectors that logits are products with."""
    return self.wte if self.config.tie_word_embeddings else self.lm_head

  def classify(
    self,
    x_BTD: jax.Array,
    lengths_B: jax.Array | None = None,
    dropout_keys_B: jax.Array | None = None,
  ) -> jax.Array:
    """Float32 logits of a classification head over K labels: [B, T, K] of tokens, [B, K] of texts.

    A text is judged by its last token, at `lengths_B` - 1; default T - 1.
    """
    c = self.config
    if c.head == 'token_classification':
      keys_B = fold_in(dropout_keys_B, c.n_layer + Outer.CLASSIFIER)
      return self.classifier(dropout(x_BTD, c.classifier_dropout, keys_B))
    x_BD = x_BTD[:, -1] if lengths_B is None else pick(x_BTD, lengths_B - 1)
    return self.score(x_BD[:, None])[:, 0]


@functools.cache
def _graphdef(config: GPTConfig):
  return nnx.graphdef(nnx.eval_shape(lambda: GPT2(config, rngs=nnx.Rngs(0))))


def bind(config: GPTConfig, params: Params) -> GPT2:
  """The model over these parameters. Costs nothing under `jax.jit`."""
  return nnx.merge(_graphdef(config), params)


def make_params(config: GPTConfig, seed: int) -> Params:
  """Initial parameters, as a nested dict. To be traced: see `init_params`."""
  return nnx.to_pure_dict(nnx.state(GPT2(config, rngs=nnx.Rngs(seeds.key(seed))), nnx.Param))


def init_params(config: GPTConfig, seed: int) -> Params:
  """Initial parameters, in place on the mesh that is set. They don't depend on the mesh."""
  return jax.jit(make_params, static_argnums=(0, 1))(config, seed)

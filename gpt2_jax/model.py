"""GPT-2, whole: its parameters, forward pass and counts.

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

from gpt2_jax import seeds
from gpt2_jax.attention import attention, causal_mask
from gpt2_jax.config import ACTIVATIONS, REMAT_POLICIES, GPTConfig
from gpt2_jax.errors import UserError
from gpt2_jax.kernels import Kernel, choose
from gpt2_jax.layers import Classifier, Embed, LayerNorm, Linear, dropout, fold_in, pick, room
from gpt2_jax.loss import CrossEntropyOptions, Factors, Loss, cross_entropy
from gpt2_jax.sharding import RULES, reshard

Params = dict[str, Any]  # nested; leaves are arrays


class Output(NamedTuple):
  """What `GPT2.transformer` returns."""

  x_BTD: jax.Array  # after the last layer norm
  cache: Any  # as it came, None or a `Cache`
  hidden_states: jax.Array | None  # [L+1, B, T, D]: embeddings, then each block; last after ln_f
  attentions: jax.Array | None  # [L, B, N, T, S]


def hidden_std(config: GPTConfig) -> float:
  """The initial deviation of matrices within blocks, before what the scheme does to projections."""
  return config.initializer_range / config.width_ratio**0.5


class Attention(nnx.Module):
  """Multi-head causal self-attention."""

  def __init__(self, config: GPTConfig, proj_std: float, *, rngs: nnx.Rngs):
    c, r = config, RULES
    self.config = config
    self.c_attn = Linear(
      'BTD,DCNH->CBTNH',
      (c.n_embd, 3, c.n_head, c.H),
      r.c_attn_dcnh,
      (3, c.n_head, c.H),
      r.c_attn_cnh,
      r.act_cbtnh,
      hidden_std(c),
      rngs=rngs,
      config=c,
      name='attn.c_attn',
    )
    self.c_proj = Linear(
      'BTNH,NHD->BTD',
      (c.n_head, c.H, c.n_embd),
      r.attn_proj_nhd,
      (c.n_embd,),
      r.proj_d,
      r.act_btd,
      proj_std,
      rngs=rngs,
      config=c,
      name='attn.c_proj',
    )

  def __call__(self, x_BTD, layer, see, cache, slot, keys_B):
    c = self.config
    q_BTNH, *keys_and_values = (x[0] for x in jnp.split(self.c_attn(x_BTD, fold_in(keys_B, 3)), 3))
    k_BSNH, v_BSNH = (reshard(x, RULES.act_bsnh) for x in keys_and_values)
    if cache is not None:
      cache, k_BSNH, v_BSNH = cache.update(layer, slot, k_BSNH, v_BSNH)
    scale = c.score_scale
    if c.scale_attn_by_inverse_layer_idx:
      scale = scale / jnp.asarray(layer + 1, jnp.float32)
    weights_BNTS = None
    if isinstance(see, Kernel):
      out_BTNH = see(q_BTNH, k_BSNH, v_BSNH, scale)
    else:
      out_BTNH, weights_BNTS = attention(
        q_BTNH,
        k_BSNH,
        v_BSNH,
        see,
        scale=scale,
        upcast=c.reorder_and_upcast_attn,
        drop=lambda weights_BNTS: dropout(weights_BNTS, c.attn_pdrop, fold_in(keys_B, 0)),
        precision=c.precision,
      )
    out_BTD = self.c_proj(out_BTNH, fold_in(keys_B, 4))
    return dropout(out_BTD, c.resid_pdrop, fold_in(keys_B, 1)), weights_BNTS, cache


class MLP(nnx.Module):
  """Two linear layers around the activation function."""

  def __init__(self, config: GPTConfig, proj_std: float, *, rngs: nnx.Rngs):
    c, r = config, RULES
    self.config = config
    self.c_fc = Linear(
      'BTD,DF->BTF',
      (c.n_embd, c.F),
      r.c_fc_df,
      (c.F,),
      r.c_fc_f,
      r.act_btf,
      hidden_std(c),
      rngs=rngs,
      config=c,
      name='mlp.c_fc',
    )
    self.c_proj = Linear(
      'BTF,FD->BTD',
      (c.F, c.n_embd),
      r.mlp_proj_fd,
      (c.n_embd,),
      r.proj_d,
      r.act_btd,
      proj_std,
      rngs=rngs,
      config=c,
      name='mlp.c_proj',
    )

  def __call__(self, x_BTD, keys_B):
    c = self.config
    h_BTF = self.c_fc(x_BTD, fold_in(keys_B, 5))
    h_BTF = ACTIVATIONS[c.activation_function](h_BTF.astype(jnp.float32)).astype(h_BTF.dtype)
    out_BTD = self.c_proj(h_BTF, fold_in(keys_B, 6))
    return dropout(out_BTD, c.resid_pdrop, fold_in(keys_B, 2))


class Block(nnx.Module):
  """Attention and MLP, each on a layer norm of the residual stream and added back to it."""

  def __init__(self, config: GPTConfig, *, rngs: nnx.Rngs):
    std = hidden_std(config)
    proj_std = std if config.init_scheme == 'openai_release' else std / (2 * config.n_layer) ** 0.5
    self.ln_1, self.ln_2 = (LayerNorm(config.n_embd, config.layer_norm_epsilon) for _ in range(2))
    self.attn = Attention(config, proj_std, rngs=rngs)
    self.mlp = MLP(config, proj_std, rngs=rngs)

  def __call__(self, x_BTD, layer, see, cache=None, slot: jax.Array | int = 0, keys_B=None):
    """`see` says which keys a query sees: a mask [B, T, S], or a `Kernel` that knows."""
    with jax.named_scope('attn'):
      out_BTD, weights_BNTS, cache = self.attn(self.ln_1(x_BTD), layer, see, cache, slot, keys_B)
      x_BTD = x_BTD + out_BTD
    with jax.named_scope('mlp'):
      x_BTD = x_BTD + self.mlp(self.ln_2(x_BTD), keys_B)
    return x_BTD, weights_BNTS, cache


class GPT2(nnx.Module):
  """GPT-2 with its head, of language modelling or of classification. `model(tokens_BT)` gives logits.

  Initialisation: N(0, `initializer_range`), biases 0, layer norms 1 and 0. Scheme 'hf' (also nanoGPT
  and llm.c) divides the two projections into the residual stream by sqrt(2·n_layer), as the paper
  describes; 'openai_release' does as the released code: no such division, and half the deviation
  for wpe (openai/gpt-2 `src/model.py`).
  """

  def __init__(self, config: GPTConfig, *, rngs: nnx.Rngs):
    c, r, std = config, RULES, config.initializer_range
    V = c.padded_vocab_size
    self.config = config
    self.tokenizer: Any = None  # from_pretrained sets these two
    self.source: Any = None
    table: Any = dict(config=c, rows=c.vocab_size, rngs=rngs, int8=c.form == 'int8')
    self.wte = Embed((V, c.n_embd), std, r.wte_vd, **table)
    wpe_std = std / 2 if c.init_scheme == 'openai_release' else std
    self.wpe = Embed((c.n_positions, c.n_embd), wpe_std, r.wpe_td, c, rows=c.n_positions, rngs=rngs)
    self.h: Any  # blocks
    if c.form == 'train':
      self.h = nnx.vmap(
        lambda rngs: Block(config, rngs=rngs),
        in_axes=0,
        out_axes=0,
        transform_metadata={nnx.PARTITION_NAME: None},
      )(rngs.split(c.n_layer))
    else:
      self.h = nnx.List([Block(config, rngs=rngs) for _ in range(c.n_layer)])
    self.ln_f = LayerNorm(c.n_embd, c.layer_norm_epsilon)
    if c.head == 'sequence_classification':
      self.score = Classifier(c, bias=False, rngs=rngs)
    elif c.head == 'token_classification':
      self.classifier = Classifier(c, bias=True, rngs=rngs)
    elif not c.tie_word_embeddings:
      self.lm_head = Embed((V, c.n_embd), std, r.lm_head_vd, **table)

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
    mask_BTS: jax.Array | None = None,
    documents_BT: jax.Array | None = None,
    cache: Any = None,
    slot: jax.Array | int = 0,
    dropout_keys_B: jax.Array | None = None,
    hidden_states: bool = False,
    attentions: bool = False,
  ) -> Output:
    """The model up to the last layer norm.

    Args:
      tokens_BT: ids below `vocab_size`; an id beyond the table gives NaN.
      positions_BT: positions, default `slot` + t.
      mask_BTS: true where query t sees key s, default causal.
      documents_BT: a number for each token, the same within a document: a query sees its own
        document alone. Not beside `mask_BTS` or `cache`.
      cache: a `Cache`, where keys and values are kept; T of them are written from `slot` on, and S
        is the cache's length. Without one, S = T.
      slot: where in the cache the first token goes, for all rows or [B].
      dropout_keys_B: a key for each row; None: no dropout.
      hidden_states, attentions: whether to return them.

    Raises:
      UserError: more tokens than `n_positions`.
    """
    c, (B, T) = self.config, tokens_BT.shape
    if T > c.n_positions:
      raise UserError(
        f'{T} tokens are more than the model has positions (n_positions = '
        f'{c.n_positions}): shorten the text.'
      )
    if positions_BT is None:
      positions_BT = jnp.reshape(slot, (-1, 1)) + jnp.arange(T)
    keys_B, see = dropout_keys_B, mask_BTS
    if mask_BTS is None and cache is None and not attentions:
      name, _ = choose(c, T, drops=keys_B is not None)
      see = None if name == 'xla' else Kernel(name, documents_BT)
    if see is None:
      see = causal_mask(T, T if cache is None else room(cache), slot)
      if documents_BT is not None:
        see = see & (documents_BT[:, :, None] == reshard(documents_BT, RULES.rows_b)[:, None])

    x_BTD = self.wte.rows(tokens_BT, B) + self.wpe.rows(positions_BT, B)
    x_BTD = dropout(x_BTD, c.embd_pdrop, fold_in(keys_B, c.n_layer))

    def run(block, x_BTD, number, cache):
      """A block; its output, its cache, and what was asked for."""
      y_BTD, weights_BNTS, cache = block(x_BTD, number, see, cache, slot, fold_in(keys_B, number))
      return y_BTD, cache, (x_BTD if hidden_states else None, weights_BNTS if attentions else None)

    if c.form == 'train':
      block, layers = nnx.split(self.h)

      def body(carry, layer):
        *carry, kept = run(nnx.merge(block, layer[0]), carry[0], layer[1], carry[1])
        return tuple(carry), kept

      body = jax.checkpoint(body, policy=REMAT_POLICIES[c.remat], prevent_cse=False)
      (x_BTD, cache), kept = jax.lax.scan(body, (x_BTD, cache), (layers, jnp.arange(c.n_layer)))
    else:  # one after another, each with its own weights and cache: nothing is sliced or copied
      caches: list[Any] = [None] * c.n_layer if cache is None else [*cache]
      kept = []
      for number, block in enumerate(self.h):
        x_BTD, caches[number], features = run(block, x_BTD, number, caches[number])
        kept.append(features)
      cache = None if cache is None else tuple(caches)
      kept = jax.tree.map(lambda *layers: jnp.stack(layers), *kept)
    inputs_LBTD, weights_LBNTS = kept
    x_BTD = self.ln_f(x_BTD)
    states = None if inputs_LBTD is None else jnp.concatenate([inputs_LBTD, x_BTD[None]])
    return Output(x_BTD, cache, states, weights_LBNTS)

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
    scale_V = None if table.scale is None else table.scale[...]
    with jax.named_scope('loss'):
      return cross_entropy(options, x_BTD, table.weight[...], targets_BT, weights_BT, scale_V)

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
      keys_B = fold_in(dropout_keys_B, c.n_layer + 1)
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

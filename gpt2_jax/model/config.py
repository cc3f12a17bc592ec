"""The configuration of a GPT-2, and what its names stand for."""

import dataclasses
import math
from collections.abc import Iterable
from typing import Any, ClassVar

from gpt2_jax.core import bounds
from gpt2_jax.core.bounds import Bool, Choice, DType, Float, Int, Optional
from gpt2_jax.core.errors import UserError, brief, near
from gpt2_jax.model.activations import ACTIVATIONS
from gpt2_jax.model.parameters import ADAPTABLE, TABLE, Row
from gpt2_jax.model.remat import REMAT_POLICIES

Config = Any  # a run's ml_collections.ConfigDict (configs/base.py), or a section of it: untyped


# How attention is computed: by XLA, by a kernel that never holds T x T weights, of cuDNN (GPU) or
# Splash (TPU), or a block of queries at a time (CPU). 'auto': the device's own, where it can do what
# is asked (`attention_kernels.py`).
ATTENTIONS = ('auto', 'xla', 'cudnn', 'splash', 'blocks')


HEADS = ('lm', 'sequence_classification', 'token_classification')

# How parameters lie. 'train': the blocks' stacked, one array for all layers, weights [in, out],
# float32. 'decode': a block after another, weights [out, in], in `dtype`. 'int8': so, with weights in
# steps of 1/127 of the largest in their output channel. See `decode_layout.py`.
FORMS = ('train', 'decode', 'int8')

DTYPES = ('float32', 'bfloat16')  # of activations, of gradients on their way
MOST_BYTES = 2**50  # of float32 parameters: no machine holds more
RATE = Float(0, 1, open_high=True)  # of dropout

# What the fields of a `LoRA` and of a `GPTConfig` may be. No axis is longer than LARGE, and no tensor
# larger than MOST_BYTES, which is looked at when all of them are known.
LORA: bounds.Table = dict(
  r=Int(1, 2**16), alpha=Float(-1e6, 1e6), dropout=RATE, target_modules=bounds.Tuple(bounds.Text(100))
)
MODEL: bounds.Table = dict(
  vocab_size=Int(1),
  n_positions=Int(1),
  n_embd=Int(1),
  n_layer=Int(1, 2**16),
  n_head=Int(1),
  n_inner=Optional(Int(1)),
  activation_function=Choice(ACTIVATIONS),
  embd_pdrop=RATE,
  attn_pdrop=RATE,
  resid_pdrop=RATE,
  layer_norm_epsilon=Float(0, 1),
  initializer_range=Float(0, 1e3),
  scale_attn_weights=Bool(),
  scale_attn_by_inverse_layer_idx=Bool(),
  reorder_and_upcast_attn=Bool(),
  tie_word_embeddings=Bool(),
  init_scheme=Choice(('hf', 'openai_release')),
  parametrization=Choice(('standard', 'mup')),
  mup_base_width=Optional(Int(1)),
  mup_base_head_width=Optional(Int(1)),
  vocab_multiple=Int(1),
  dtype=DType(DTYPES),
  remat=Choice(REMAT_POLICIES),
  scan_layers=Bool(),
  attention=Choice(ATTENTIONS),
  reduce_dtype=DType(DTYPES),
  head=Choice(HEADS),
  num_labels=Int(1),
  classifier_dropout=RATE,
  form=Choice(FORMS),
)


def set_checked(made: Any, table: bounds.Table, prefix: str) -> None:
  """Checks the fields of a frozen dataclass, and sets them to plain Python's values."""
  for name, kind in table.items():
    object.__setattr__(made, name, kind.check(prefix + name, getattr(made, name)))


@dataclasses.dataclass(frozen=True)
class LoRA:
  """Low-rank adapters beside frozen weights (Hu et al. 2021, arXiv:2106.09685). Names are PEFT's."""

  r: int  # rank; a weight W becomes W + alpha/r · A·B
  alpha: float
  target_modules: tuple[str, ...] = ('c_attn',)  # ends of names: 'c_proj', or 'mlp.c_proj' alone
  dropout: float = 0.0  # of the adapters' input
  modules: ClassVar[tuple[str, ...]] = ADAPTABLE

  def __post_init__(self):
    set_checked(self, LORA, 'lora.')
    for target in self.target_modules:
      if not any(self._matches(module, target) for module in self.modules):
        ends = dict.fromkeys(module.rpartition('.')[2] for module in self.modules)
        raise UserError(
          f'lora.target_modules: {target!r} is none of {", ".join(ends)}, or '
          f'{", ".join(self.modules)}.'
        )
    if not self.target_modules:
      raise UserError('lora.target_modules is empty: nothing would be trained.')

  @staticmethod
  def _matches(module: str, target: str) -> bool:
    return module == target or module.endswith('.' + target)

  def adapts(self, module: str) -> bool:
    """Whether a module, such as 'attn.c_attn', has an adapter."""
    return any(self._matches(module, target) for target in self.target_modules)


@dataclasses.dataclass(frozen=True, repr=False)
class GPTConfig:
  """Sizes and options of a GPT-2. Names and defaults are those of Hugging Face's `GPT2Config`,
  down to the empty line; below it are ours.
  """

  vocab_size: int = 50257
  n_positions: int = 1024
  n_embd: int = 768
  n_layer: int = 12
  n_head: int = 12
  n_inner: int | None = None  # MLP width; None: 4·n_embd
  activation_function: str = 'gelu_new'
  embd_pdrop: float = 0.1
  attn_pdrop: float = 0.1
  resid_pdrop: float = 0.1
  layer_norm_epsilon: float = 1e-5
  initializer_range: float = 0.02
  scale_attn_weights: bool = True  # by 1/sqrt(head width)
  scale_attn_by_inverse_layer_idx: bool = False  # and by 1/(layer + 1)
  reorder_and_upcast_attn: bool = False  # scores from float32 operands
  tie_word_embeddings: bool = True

  init_scheme: str = 'hf'  # 'hf' | 'openai_release', see `GPT2`
  parametrization: str = 'standard'  # or 'mup', see `width_ratio`
  mup_base_width: int | None = None  # n_embd of the model that the hyperparameters were found for
  mup_base_head_width: int | None = None  # and its width of a head; None: this model's
  vocab_multiple: int = 128  # the vocabulary is padded inside to a multiple of this
  dtype: str = 'float32'  # of activations: 'float32' | 'bfloat16'; parameters are float32
  remat: str = 'none'  # a name of REMAT_POLICIES
  scan_layers: bool = True  # the layers are a loop, not written out: see `by_form`
  attention: str = 'auto'  # a name of ATTENTIONS
  reduce_dtype: str = 'float32'  # of gradients while they are summed over devices, or 'bfloat16'
  head: str = 'lm'  # a name of HEADS
  num_labels: int = 2  # of a classification head
  classifier_dropout: float = 0.1  # before the head of token classification
  lora: LoRA | None = None
  form: str = 'train'  # of the parameters, a name of FORMS

  def __post_init__(self):
    if self.lora is not None and not isinstance(self.lora, LoRA):  # as a checkpoint's JSON has it
      try:
        object.__setattr__(self, 'lora', LoRA(**self.lora))
      except TypeError:
        raise UserError(f'model.lora = {brief(self.lora)} must have {", ".join(LORA)}.') from None
    set_checked(self, MODEL, 'model.')
    if self.n_embd % self.n_head:
      raise UserError(f'model.n_embd = {self.n_embd} must be a multiple of n_head = {self.n_head}.')
    sizes = self.sizes
    size = sum(math.prod(row.whole(sizes)) for row in self.parameters())
    if 4 * size > MOST_BYTES:
      raise UserError(
        f'a model of these sizes has {size:,} parameters, and no machine holds '
        'them: make model.n_embd, n_layer, n_inner, n_positions or vocab_size smaller.'
      )
    self._check_mup()

  def __repr__(self) -> str:
    """Only what is not the default, which is GPT-2's."""
    own = [f for f in dataclasses.fields(self) if getattr(self, f.name) != f.default]
    return f'GPTConfig({", ".join(f"{f.name}={getattr(self, f.name)!r}" for f in own)})'

  @property
  def sizes(self) -> dict[str, int]:
    """The size of each axis of parameters, by its letter; V with the padding of the vocabulary."""
    return dict(
      L=self.n_layer,
      V=self.padded_vocab_size,
      T=self.n_positions,
      D=self.n_embd,
      C=3,
      N=self.n_head,
      H=self.H,
      F=self.F,
      K=self.num_labels,
      R=self.lora.r if self.lora else 0,
    )

  def parameters(self) -> list[Row]:
    """The rows of the table of parameters that a model of this config has."""

    def has(row: Row) -> bool:
      if row.kind == 'scale' and self.form != 'int8':
        return False
      if row.kind == 'adapter':
        return self.adapter(row.module.removeprefix('h.')) is not None
      if row.module == 'lm_head' and self.tie_word_embeddings:
        return False
      return row.head in ('', self.head)

    return [row for row in TABLE if has(row)]

  def _check_mup(self):
    """Raises a `UserError` where the parametrization lacks something or can't be had."""
    given = {name: getattr(self, name) for name in ('mup_base_width', 'mup_base_head_width')}
    if self.parametrization == 'standard':
      if wrong := [name for name, value in given.items() if value is not None]:
        raise UserError(f'model.{wrong[0]} is of model.parametrization = mup, and this is standard.')
      return
    if self.mup_base_width is None:
      raise UserError(
        'model.parametrization = mup needs model.mup_base_width: n_embd of the model '
        'that the learning rate was found for.'
      )
    if self.mup_base_head_width is None and self.mup_base_width % self.H:
      raise UserError(
        f'heads of width {self.H} (n_embd / n_head) are not those of a model of width '
        f'{self.mup_base_width}: set model.mup_base_head_width to the width that its '
        'heads have.'
      )
    if self.lora is not None or not self.scale_attn_weights:
      raise UserError(
        'model.parametrization = mup goes neither with adapters (lora.r; convert the '
        'model to hf first) nor with scale_attn_weights = False.'
      )

  @property
  def width_ratio(self) -> float:
    """How much wider than its base a model of maximal-update parametrization is; 1 of a standard one.

    By it (m) and Adam the rules are, as in table 8 of Yang et al. 2022 (Tensor Programs V,
    arXiv:2203.03466), which leaves input and output embeddings tied:

    - matrices within blocks: initial variance 1/m times, learning rate 1/m times;
    - embeddings, biases and layer norms: as they are;
    - logits: multiplied by 1/m;
    - attention scores: see `score_scale`.

    `n_inner` is taken to grow as n_embd does. At m = 1 all is as in a standard model.
    """
    return 1.0 if self.mup_base_width is None else self.n_embd / self.mup_base_width

  @property
  def score_scale(self) -> float:
    """Factor of the attention scores.

    1/sqrt(H); of a 'mup' model sqrt(base H)/H. So it falls as 1/H where heads grow wider with the
    model, since queries and keys become correlated; where they become more and H stays, nothing
    changes.
    """
    if not self.scale_attn_weights:
      return 1.0
    base = self.mup_base_head_width
    return self.H**-0.5 if base in (None, self.H) else base**0.5 / self.H

  def adapter(self, module: str) -> LoRA | None:
    """The adapter of a module, such as 'attn.c_attn'; None where it has none."""
    return self.lora if self.lora and self.lora.adapts(module) else None

  @property
  def H(self) -> int:
    """Head width."""
    return self.n_embd // self.n_head

  @property
  def F(self) -> int:
    """MLP width."""
    return self.n_inner if self.n_inner is not None else 4 * self.n_embd

  @property
  def padded_vocab_size(self) -> int:
    """Rows of the embedding: `vocab_size` rounded up. The rows added are never seen outside."""
    return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple

  @property
  def precision(self) -> str | None:
    """float32 means float32: not TF32 on a GPU, not bfloat16 passes on a TPU."""
    return 'highest' if self.dtype == 'float32' else None

  def divisible(self) -> dict[str, tuple[int, str]]:
    """Name -> (size, the mesh axis that must divide it), for `sharding.check_divisible`."""
    return {
      'model.n_head': (self.n_head, 'tensor'),
      'model.n_inner': (self.F, 'tensor'),
      'the padded vocabulary (model.vocab_multiple)': (self.padded_vocab_size, 'tensor'),
      'model.n_embd': (self.n_embd, 'fsdp'),
    }


def knobs_of(config: Config) -> dict[str, Any]:
  """The values of all knobs of a run's config, by their full names: 'train.steps'."""
  found = {}
  for name, value in config.items():
    inner = value.items() if hasattr(value, 'keys') else [('', value)]
    found |= {f'{name}.{key}'.rstrip('.'): each for key, each in inner}
  return found


def wrong_knob(config: Config, words: Iterable[str]) -> str | None:
  """What is wrong with the first `--config.KEY[=VALUE]` of a command line whose key is no knob."""
  known = [*knobs_of(config)]
  for word in words:
    name = word.removeprefix('--config.').partition('=')[0]
    if word.startswith('--config.') and name not in (*known, *config):
      return f'there is no knob {brief(name)}{near(name, known)}'
  return None

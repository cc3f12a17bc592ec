"""Processors that narrow the choice when tokens are drawn: Hugging Face's "logits warpers".

Each keeps the scores of some tokens and sets those of the others to -inf; the likeliest
`min_tokens_to_keep` are always kept (beam search must not be left with ends alone). Tokens that tie
with the last one kept are kept as well. Nothing is sorted: on a CPU, XLA takes 10 ms to sort
GPT-2's vocabulary, `threshold` 0.4.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from gpt2_jax.decoding.pytree import register
from gpt2_jax.decoding.row_state import History

NEVER = float('-inf')  # the score of a token that can't be drawn
LANES = 256  # partial sums of a row: faster than one, and rounded less


def log_probs(scores_BV: jax.Array) -> jax.Array:
  """Returns the log-softmax. A score of +inf, of a bias, takes all probability; all may be -inf."""
  log_BV = jax.nn.log_softmax(jnp.minimum(scores_BV, jnp.finfo(scores_BV.dtype).max), axis=-1)
  return jnp.where(scores_BV == NEVER, NEVER, log_BV)


def threshold(x_BV: jax.Array, weight_BV: jax.Array, target: ArrayLike) -> jax.Array:
  """Returns the least x such that the weights of all x up to it reach the target, [B, 1].

  Exact but for the rounding of sums: a bisection over the 32 bits of a float, read as an integer
  of the same order.

  Args:
    x_BV: float32, infinities allowed.
    weight_BV: what each counts for, 0 or more.
    target: above 0. What is not reached at all gives +inf.
  """
  B, V = x_BV.shape
  to_bits = lambda x: jax.lax.bitcast_convert_type(x, jnp.uint32)
  sign = jnp.uint32(1 << 31)
  order = lambda bits: jnp.where(bits < sign, bits | sign, ~bits)  # float's order to integer's
  padding = ((0, 0), (0, -V % LANES))
  order_BV = order(to_bits(jnp.where(x_BV == 0, 0, x_BV)))  # -0 is 0
  order_BXL = jnp.pad(order_BV, padding).reshape(B, -1, LANES)
  weight_BXL = jnp.pad(weight_BV, padding).reshape(B, -1, LANES)

  def halve(i, low_B1):
    step = sign >> i.astype(jnp.uint32)
    within_BXL = order_BXL <= (low_B1 + (step - 1))[..., None]
    sum_B1 = jnp.where(within_BXL, weight_BXL, 0).sum(1).sum(-1, keepdims=True)
    return jnp.where(sum_B1 < target, low_B1 + step, low_B1)

  low_B1 = jax.lax.fori_loop(0, 32, halve, jnp.zeros_like(order_BV[:, :1]))
  low_B1 = jnp.minimum(low_B1, order(to_bits(jnp.float32(jnp.inf))))
  bits_B1 = jnp.where(low_B1 >= sign, low_B1 ^ sign, ~low_B1)
  return jax.lax.bitcast_convert_type(bits_B1, jnp.float32)


def _nth_largest(x_BV: jax.Array, n: ArrayLike) -> jax.Array:
  """Returns the n-th largest of each row, or its least where it has fewer, [B, 1]."""
  V = x_BV.shape[-1]
  # in float32, which counts exactly up to 2^24
  return threshold(x_BV, jnp.ones_like(x_BV), V + 1 - jnp.minimum(n, V))


@dataclasses.dataclass(frozen=True)
class _Warper:
  """The part that rules with a least number of tokens share."""

  min_tokens_to_keep: int = dataclasses.field(default=1, kw_only=True, metadata=dict(static=True))

  def least(self, x_BV: jax.Array) -> jax.Array:
    """Returns the least of the largest values that are kept, [B, 1]."""
    n = self.min_tokens_to_keep
    return x_BV.max(-1, keepdims=True) if n == 1 else _nth_largest(x_BV, n)

  def drop(self, scores_BV: jax.Array, dropped_BV: jax.Array) -> jax.Array:
    dropped_BV &= scores_BV < self.least(scores_BV)
    return jnp.where(dropped_BV, NEVER, scores_BV)  # NaN is neither: it stays and is found


@register
class Temperature:
  """Divides the logits: below 1 the likely tokens become likelier (Ackley et al. 1985).

  Where the largest would be infinite, the distances to it are divided.
  """

  temperature: ArrayLike

  def __call__(self, scores_BV: jax.Array, history: History) -> jax.Array:
    most_B1 = scores_BV.max(-1, keepdims=True)
    beyond_B1 = jnp.isfinite(most_B1) & jnp.isinf(most_B1 / self.temperature)
    return (scores_BV - jnp.where(beyond_B1, most_B1, 0)) / self.temperature


@register
class TopK(_Warper):
  """Keeps the k likeliest tokens only (Fan et al. 2018, arXiv:1805.04833)."""

  k: ArrayLike

  def __call__(self, scores_BV: jax.Array, history: History) -> jax.Array:
    least_B1 = _nth_largest(scores_BV, jnp.maximum(self.k, self.min_tokens_to_keep))
    return jnp.where(scores_BV < least_B1, NEVER, scores_BV)


@register
class TopP(_Warper):
  """Keeps the fewest tokens whose probability reaches p (Holtzman et al. 2019, arXiv:1904.09751).

  The token that crosses p is kept, as in Hugging Face's; OpenAI's released code drops it
  (openai/gpt-2#187). Of tokens that tie for the last place Hugging Face's keeps some.
  """

  p: ArrayLike

  def __call__(self, scores_BV: jax.Array, history: History) -> jax.Array:
    # dropped are those that, with all less likely ones, have at most 1 - p: small sums round less
    more = jnp.nextafter(jnp.float32(1) - self.p, jnp.float32(2))
    least_B1 = threshold(scores_BV, jnp.exp(log_probs(scores_BV)), more)
    return self.drop(scores_BV, scores_BV < least_B1)


@register
class MinP(_Warper):
  """Keeps tokens at least min_p times as likely as the likeliest (Nguyen et al. 2024,
  arXiv:2407.01082).
  """

  p: ArrayLike

  def __call__(self, scores_BV: jax.Array, history: History) -> jax.Array:
    probs_BV = jnp.exp(log_probs(scores_BV))
    return self.drop(scores_BV, probs_BV < self.p * probs_BV.max(-1, keepdims=True))


@register
class Typical(_Warper):
  """Keeps the tokens whose surprise is nearest to the expected one, until their probability reaches p
  (locally typical sampling, Meister et al. 2022, arXiv:2202.00666).

  `min_tokens_to_keep` counts the most typical tokens here, not the likeliest.
  """

  p: ArrayLike

  def __call__(self, scores_BV: jax.Array, history: History) -> jax.Array:
    log_BV = log_probs(scores_BV)
    away_BV = jnp.abs(-log_BV - entropy(log_BV))
    most_B1 = jnp.maximum(threshold(away_BV, jnp.exp(log_BV), self.p), -self.least(-away_BV))
    return jnp.where(away_BV > most_B1, NEVER, scores_BV)


@register
class Epsilon(_Warper):
  """Keeps tokens of at least this probability (Hewitt et al. 2022, arXiv:2210.15191)."""

  epsilon: ArrayLike

  def __call__(self, scores_BV: jax.Array, history: History) -> jax.Array:
    return self.drop(scores_BV, jnp.exp(log_probs(scores_BV)) < self.epsilon)


@register
class Eta(_Warper):
  """Keeps tokens of at least this probability ε, or √ε·exp(-entropy) where that is less
  (arXiv:2210.15191).
  """

  epsilon: ArrayLike

  def __call__(self, scores_BV: jax.Array, history: History) -> jax.Array:
    log_BV = log_probs(scores_BV)
    least_B1 = jnp.minimum(self.epsilon, jnp.sqrt(self.epsilon) * jnp.exp(-entropy(log_BV)))
    return self.drop(scores_BV, jnp.exp(log_BV) < least_B1)


def entropy(log_BV: jax.Array) -> jax.Array:
  """Returns the entropy of log-probabilities in nats, [B, 1]; one of -inf has none."""
  return -jnp.where(log_BV > NEVER, jnp.exp(log_BV) * log_BV, 0).sum(-1, keepdims=True)

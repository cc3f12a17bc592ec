"""Each processor does to each row what a few lines of Python over its ids and scores do."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.arrays import mesh_of
from support.scores import EOS, INF, STOP, apply, make_history, random_history, random_scores

from gpt2_jax.core.errors import UserError
from gpt2_jax.decoding import row_state as h
from gpt2_jax.decoding.automaton import DEAD, Automaton
from gpt2_jax.decoding.constraints import Guided, PrefixConstrained
from gpt2_jax.decoding.from_options import make_processors
from gpt2_jax.decoding.options import Options
from gpt2_jax.decoding.processors import (
  InfNanRemove,
  LogitNormalization,
  MinLength,
  NoRepeatNGram,
  SequenceBias,
)
from gpt2_jax.decoding.warpers import TopK, TopP, Typical, threshold
from gpt2_jax.model import text_batches
from gpt2_jax.parallel.sharding import BATCH, P

SHAPES = [(4, 16, 37), (2, 8, 13)]  # B, S, V


def softmax(x_V):
  e_V = np.exp(x_V - x_V.max())
  return e_V / e_V.sum()


def nats(p_V):
  return -sum(p * math.log(p) for p in p_V if p > 0)


# What a processor does to the scores x of one row, with ids, of which the first `prompt` are the
# prompt's, and n new ones of at most `limit`; o are the options.


def sequence_bias(x, ids, o, **_):
  for word, bias in o.sequence_bias.items():
    if ids[len(ids) - len(word) + 1 :] == list(word[:-1]) and len(ids) >= len(word) - 1:
      x[word[-1]] += bias


def repetition_penalty(x, ids, o, **_):
  for i in set(ids):
    x[i] = x[i] * o.repetition_penalty if x[i] < 0 else x[i] / o.repetition_penalty


def count_penalty(x, ids, o, prompt, **_):
  for i in ids[prompt:]:
    x[i] -= o.frequency_penalty
  for i in set(ids[prompt:]):
    x[i] -= o.presence_penalty


def no_repeat_ngram(x, ids, o, **_):
  n = o.no_repeat_ngram_size
  said = {tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)}
  for v in range(len(x)):
    if len(ids) >= n - 1 and tuple((ids + [v])[-n:]) in said:
      x[v] = -INF


def bad_words(x, ids, o, **_):
  for word in o.bad_words_ids:
    if word != [EOS] and (ids + [word[-1]])[-len(word) :] == word:
      x[word[-1]] = -INF


def min_length(x, ids, o, n, **_):
  if len(ids) < o.min_length or n < o.min_new_tokens:
    x[[EOS, STOP]] = -INF


def forced_bos(x, ids, o, **_):
  if len(ids) == 1:
    x[:] = -INF
    x[o.forced_bos_token_id] = 0


def forced_eos(x, ids, o, n, limit, **_):
  if n == limit - 1:
    x[:] = -INF
    x[list(o.forced_eos_token_id)] = 0


def exponential_decay(x, o, n, **_):
  start, factor = o.exponential_decay_length_penalty
  if n > start and np.isfinite(x[EOS]):
    x[EOS] += abs(x[EOS]) * (factor ** (n - start) - 1)


def suppress(x, o, n, prompt, **_):
  x[list(o.suppress_tokens)] = -INF
  if n == (1 if prompt == 1 and o.forced_bos_token_id is not None else 0):
    x[list(o.begin_suppress_tokens)] = -INF


def temperature(x, o, **_):
  x /= o.temperature


def top_k(x, o, **_):
  x[x < np.sort(x)[-min(o.top_k, len(x))]] = -INF


def top_p(x, o, **_):
  left, p = 1.0, softmax(x)
  for v in np.argsort(x):  # the least likely go while what is left reaches top_p
    if left - p[v] < o.top_p:
      break
    x[v], left = -INF, left - p[v]


def min_p(x, o, **_):
  p = softmax(x)
  x[p < o.min_p * p.max()] = -INF


def typical_p(x, o, **_):
  p = softmax(x)
  with np.errstate(divide='ignore'):
    away = abs(-np.log(p) - nats(p))
  mass = 0.0
  for v in np.argsort(away):
    if mass >= o.typical_p:
      x[v] = -INF
    mass += p[v]


def epsilon_cutoff(x, o, **_):
  p = softmax(x)
  x[(p < o.epsilon_cutoff) & (x < x.max())] = -INF


def eta_cutoff(x, o, **_):
  p, e = softmax(x), o.eta_cutoff
  x[(p < min(e, math.sqrt(e) * math.exp(-nats(p)))) & (x < x.max())] = -INF


def renormalize(x, **_):
  x -= x.max() + np.log(np.exp(x - x.max()).sum())


share, id_ = st.floats(0.01, 0.99), st.integers(0, 12)
ids_ = st.lists(id_, min_size=1, max_size=4)
words_ = st.lists(st.integers(0, 4), min_size=1, max_size=4)
near0 = st.floats(-2, 2)
CASES = {
  sequence_bias: dict(
    sequence_bias=st.dictionaries(words_.map(tuple), near0 | st.just(-INF), min_size=1, max_size=4)
  ),
  repetition_penalty: dict(repetition_penalty=st.floats(0.5, 2)),
  count_penalty: dict(presence_penalty=near0, frequency_penalty=near0),
  no_repeat_ngram: dict(no_repeat_ngram_size=st.integers(1, 6) | st.just(10**12)),
  bad_words: dict(bad_words_ids=st.lists(words_, min_size=1, max_size=4)),
  min_length: dict(min_length=st.integers(0, 20), min_new_tokens=st.integers(0, 9)),
  forced_bos: dict(forced_bos_token_id=id_),
  forced_eos: dict(forced_eos_token_id=ids_),
  exponential_decay: dict(
    exponential_decay_length_penalty=st.tuples(st.integers(0, 6), st.floats(0.5, 2))
  ),
  suppress: dict(suppress_tokens=ids_, begin_suppress_tokens=ids_),
  temperature: dict(temperature=st.floats(0.1, 3)),
  top_k: dict(top_k=st.integers(1, 50) | st.just(10**12)),
  top_p: dict(top_p=share),
  min_p: dict(min_p=share),
  typical_p: dict(typical_p=share),
  epsilon_cutoff: dict(epsilon_cutoff=share),
  eta_cutoff: dict(eta_cutoff=share),
  renormalize: dict(renormalize_logits=st.just(True)),
}


@pytest.mark.parametrize('truth', CASES, ids=lambda truth: truth.__name__)
@settings(deadline=None, max_examples=25, derandomize=True)
@given(data=st.data())
def test_a_processor_does_what_it_says(truth, data):
  options = Options(**{name: data.draw(values) for name, values in CASES[truth].items()})
  rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
  B, S, V = data.draw(st.sampled_from(SHAPES))
  history, scores_BV = random_history(rng, B, S, V), random_scores(rng, B, V)
  made = make_processors(options, V=V, eos=[EOS], ends=[EOS, STOP])
  have_BV = np.asarray(apply(made, scores_BV, history))
  for b in range(B):
    n = int(history.lengths_B[b])
    prompt, limit = int(history.prompt_B[b]), int(history.limits_B[b])
    want_V = np.float64(scores_BV[b])
    truth(
      want_V,
      ids=history.tokens_BS[b, :n].tolist(),
      o=options,
      prompt=prompt,
      n=n - prompt,
      limit=limit,
    )
    np.testing.assert_allclose(have_BV[b], want_V, rtol=2e-5, atol=2e-5)


def test_the_first_token_may_be_forced_before_those_suppressed_at_the_beginning():
  options = Options(forced_bos_token_id=3, begin_suppress_tokens=[5])
  history = make_history([[1, 3, 0, 0]] * 4, [1, 2, 2, 3], [1, 1, 2, 1])
  have = np.asarray(apply(make_processors(options, V=13), np.ones((4, 13), np.float32), history))
  assert np.isfinite(have[0]).tolist() == [v == 3 for v in range(13)]
  assert np.isfinite(have[1:, 5]).tolist() == [False, False, True]


def free(*processors):
  """Processors that look at no history."""
  return lambda logits_BV: np.asarray(apply(processors, jnp.asarray(logits_BV), None))


def test_top_p_keeps_the_crossing_token():
  logits_BV = jnp.log(jnp.array([[0.1, 0.5, 0.15, 0.25]]))
  kept = lambda p: np.isfinite(free(TopP(p))(logits_BV))[0].tolist()
  assert kept(0.4) == [False, True, False, False]
  assert kept(0.6) == [False, True, False, True]  # 0.25 crosses
  assert kept(0.8) == [False, True, True, True]
  assert kept(0.95) == [True, True, True, True]
  assert kept(1e-6) == [False, True, False, False]  # the likeliest always stays
  assert kept(0.5) == [False, True, False, False]  # reached, not crossed


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 60), st.floats(0.01, 0.99), st.integers(0, 1000))
def test_processors_keep_what_they_say(k, p, seed):
  logits_BV = jnp.asarray(np.random.default_rng(seed).normal(size=(2, 50)) * 2, jnp.float32)
  probs_BV = np.asarray(jax.nn.softmax(logits_BV))
  kept = np.isfinite(free(TopK(k))(logits_BV))
  assert (kept.sum(-1) == min(k, 50)).all()
  assert (np.where(kept, probs_BV, 1).min(-1) >= np.where(kept, 0, probs_BV).max(-1)).all()
  kept = np.isfinite(free(TopP(p))(logits_BV))
  mass = np.where(kept, probs_BV, 0).sum(-1)
  least = np.where(kept, probs_BV, 1).min(-1)
  assert (mass >= p - 1e-5).all() and (mass - least < p + 1e-5).all()


@settings(max_examples=25, deadline=None)
@given(
  st.lists(
    st.tuples(st.floats(width=32, allow_nan=False, allow_subnormal=False), st.integers(0, 5)),
    min_size=9,
    max_size=9,
  ),
  st.integers(1, 50),
)
def test_the_threshold_is_the_least_that_reaches_the_target(items, target):
  x, weight = (np.array(column) for column in zip(*items))
  have = np.asarray(jax.jit(threshold)(np.float32(x)[None], np.int32(weight)[None], target))
  reached = [t for t in sorted(x) if weight[x <= t].sum() >= target]
  assert have.tolist() == [[reached[0] if reached else INF]]


def test_ties_forbidden_tokens_and_rounding_leave_something_to_draw():
  kept = lambda processor, x: np.flatnonzero(np.isfinite(free(processor)(np.float32([x])))).tolist()
  few = [-INF] * 95 + [1.0, 0.0]
  flat, zeros = [0.0] * 90 + [1.0] * 7, [0.0, -0.0, -1.0]
  assert kept(TopK(2), zeros) == kept(TopK(1), zeros) == [0, 1]  # what ties with the last is kept
  assert kept(TopK(1), flat) == kept(TopP(0.01), flat) == list(range(90, 97))
  for keeps_all in (TopK(3), TopK(97), TopK(1000), TopP(1 - 1e-7), Typical(1 - 1e-7), TopP(1.0)):
    assert kept(keeps_all, few) == [95, 96]
  wide = np.random.default_rng(0).normal(size=50257).tolist()
  assert len(kept(TopP(np.float32(1)), wide)) > 50000  # reached only but for rounding
  for keeps_one in (TopK(1), TopP(1e-9), Typical(1e-9)):
    assert len(kept(keeps_one, few)) == 1
  for processor in (TopK(1), TopP(0.5), Typical(0.5), LogitNormalization()):
    assert kept(processor, [-INF] * 5) == []  # and is not NaN: nothing can be drawn
    assert np.isneginf(free(processor)(np.full((1, 5), -INF, np.float32))).all()
    assert np.isnan(free(processor)(np.float32([[0, 1, math.nan]]))).any()  # is still found
  assert kept(TopP(0.5), [0.0, 3.4e38, -3.4e38]) == [1]
  assert np.argmax(free(TopP(0.5), TopK(5), Typical(0.9))(np.float32([[0, INF, 1]]))) == 1


def test_beams_have_at_least_one_token_that_goes_on():
  x_BV = np.float32([[9, 8, 0, -1, -2, -3]])
  for narrow in (
    dict(top_k=1),
    dict(top_p=0.01),
    dict(min_p=1),
    dict(epsilon_cutoff=0.9),
    dict(eta_cutoff=0.9),
  ):
    kept = lambda beams, ends: np.isfinite(
      free(*make_processors(Options(num_beams=beams, **narrow), V=6, ends=range(ends)))(x_BV)
    ).sum()
    assert [kept(1, 2), kept(4, 0), kept(4, 1), kept(4, 2), kept(4, 9)] == [1, 2, 2, 3, 6]
  typical = make_processors(Options(num_beams=4, typical_p=0.01), V=6, ends=[0, 1])
  assert np.isfinite(free(*typical)(x_BV)).sum() == 3


def test_infinite_and_invalid_scores():
  history = make_history([[1, 2, 3, 4]], [2], [1])
  biased = lambda bias, x: np.asarray(apply((SequenceBias.of(bias),), np.float32([x]), history))[
    0
  ].tolist()
  assert biased({(0,): INF, (2, 1): -INF}, [1, 2, 3]) == [INF, -INF, 3]
  assert biased({(0,): INF, (2, 0): -INF, (1,): INF}, [1, -INF, 3]) == [-INF, -INF, 3]
  assert biased({(0, 0): INF, (2, 0): 1.0, (1, 2, 0): 1.0, (9, 1, 2, 0): 9.0}, [1, 2]) == [3, 2]
  most = float(np.finfo(np.float32).max)
  removed = free(InfNanRemove())(np.float32([[math.nan, INF, -INF, 1]]))
  assert removed.tolist() == [[0, most, -most, 1]]
  late = make_processors(Options(exponential_decay_length_penalty=(0, 2.0)), V=13, eos=[0])
  far = make_history([[1] * 4], [900], [1])  # 2 ** 899 is beyond float32
  assert np.asarray(apply(late, np.float32([[0, 1]]), far)).tolist() == [[0, 1]]
  assert np.asarray(apply(late, np.float32([[-1, 1]]), far))[0, 0] > 1e38


def test_guided_allows_what_goes_on_and_the_end_where_it_may_stop():
  """An automaton of a(ba)*, over ids a = 0 and b = 1; 3 ends the text."""
  automaton = Automaton(
    jnp.array([[1, DEAD, DEAD, DEAD], [DEAD, 0, DEAD, 1]]), jnp.array([False, True])
  )
  history = make_history([[0] * 4] * 2, 1, 1, guide_B=[0, 1])
  kept = lambda ends: np.isfinite(
    apply((Guided(automaton, np.int32(ends)),), np.zeros((2, 4), np.float32), history)
  ).tolist()
  assert kept([3]) == [[True, False, False, False], [False, True, False, True]]
  assert kept([3, 2]) == [[True, False, False, False], [False, True, True, True]]
  assert kept([]) == [[True, False, False, False], [False, True, False, True]]  # 3 as any other


def test_a_function_says_what_may_follow():
  asked = []

  def allowed(prompt, ids):
    asked.append((prompt, ids.tolist()))
    return [prompt, len(ids)]

  history = make_history(
    [[5, 6, 7, 8]] * 3, [1, 3, 2], 1, which_B=[4, 9, 0], reason_B=[h.RUNNING, h.RUNNING, h.LIMIT]
  )
  [processor] = make_processors(Options(), V=13, prefix_allowed_tokens_fn=allowed)
  assert isinstance(processor, PrefixConstrained)
  have_BV = np.asarray(apply((processor,), np.full((3, 13), 2, np.float32), history))
  assert sorted(asked) == [(4, [5]), (9, [5, 6, 7])]  # not of a row that has stopped
  want_BV = np.full((3, 13), -INF)
  want_BV[0, [4, 1]] = want_BV[1, [9, 3]] = want_BV[2] = 2
  assert have_BV.tolist() == want_BV.tolist() and processor.error is None

  compiled = apply._cache_size()
  scores_BV = np.full((3, 13), -INF, np.float32)
  scores_BV[0, 3] = 2
  another = PrefixConstrained.of(lambda prompt, ids: np.array([3]))
  have_BV = np.asarray(apply((another,), scores_BV, history))
  assert apply._cache_size() == compiled
  assert have_BV[:2, 3].tolist() == [2, 0]  # what is forbidden already is allowed where all is
  beams = dataclasses.replace(another, beams=True)
  both = dataclasses.replace(history, which_B=np.int32([1, 1, 1]))
  assert np.asarray(apply((beams,), scores_BV, both))[:2, 3].tolist() == [2, -INF]  # of all beams


@pytest.mark.parametrize(
  'allowed,error,says',
  [
    (lambda prompt, ids: [], UserError, r'prefix_allowed_tokens_fn\(0, \[5\]\) allows no token'),
    (lambda prompt, ids: [13], UserError, 'prefix_allowed_tokens_fn has token id 13, but .* 13 ids'),
    (lambda prompt, ids: ['a'], UserError, 'prefix_allowed_tokens_fn = .* must be token ids'),
    (lambda prompt, ids: ids[9], IndexError, 'out of bounds'),
  ],
)
def test_an_error_of_the_function_forbids_all_tokens_and_is_kept(allowed, error, says):
  processor = PrefixConstrained.of(allowed)
  history = make_history([[5, 6, 7, 8]], 1, 1)
  have_BV = np.asarray(apply((processor,), np.zeros((1, 13), np.float32), history))
  assert np.isneginf(have_BV).all()
  assert isinstance(processor.error, error)
  with pytest.raises(error, match=says):
    raise processor.error


EVERY = dict(
  sequence_bias={(1, 2): 1.0, (3,): -1.0},
  repetition_penalty=1.3,
  presence_penalty=0.1,
  frequency_penalty=0.2,
  no_repeat_ngram_size=3,
  bad_words_ids=[[1, 3], [9]],
  min_length=4,
  min_new_tokens=1,
  forced_bos_token_id=3,
  forced_eos_token_id=4,
  remove_invalid_values=True,
  exponential_decay_length_penalty=(2, 1.1),
  suppress_tokens=[5],
  begin_suppress_tokens=[6],
  temperature=0.8,
  top_k=9,
  top_p=0.9,
  min_p=0.01,
  typical_p=0.9,
  epsilon_cutoff=0.001,
  eta_cutoff=0.002,
  renormalize_logits=True,
)
OTHER = dict(
  sequence_bias=[[[2, 2], 3.0], [[4], 1], [[1], 0.5], [[0], -INF]],
  repetition_penalty=2,
  presence_penalty=1,
  frequency_penalty=-1,
  no_repeat_ngram_size=1,
  bad_words_ids=[[4, 0]] * 3,
  min_length=2,
  min_new_tokens=3,
  forced_bos_token_id=0,
  forced_eos_token_id=[1, 2, 3],
  remove_invalid_values=True,
  exponential_decay_length_penalty=(0, 2),
  suppress_tokens=[1, 2, 8],
  begin_suppress_tokens=[0],
  temperature=np.float64(2),
  top_k=np.int64(10**9),
  top_p=0.5,
  min_p=1,
  typical_p=0.1,
  epsilon_cutoff=0.1,
  eta_cutoff=0.2,
  renormalize_logits=True,
)


def every(options, V=37):
  """All processors there are, and one of the user's own."""
  automaton = Automaton(jnp.zeros((1, V), jnp.int32), jnp.array([True]))
  return make_processors(
    Options(**options),
    V=V,
    eos=[EOS],
    ends=[EOS, STOP],
    guide=automaton,
    prefix_allowed_tokens_fn=lambda prompt, ids: range(V),
    extra=[MinLength(5, np.int32([1]))],
  )


def test_all_in_the_order_of_hugging_face():
  assert [type(p).__name__ for p in every(EVERY)] == [
    'SequenceBias',
    'RepetitionPenalty',
    'FrequencyPenalty',
    'PresencePenalty',
    'NoRepeatNGram',
    'SequenceBias',
    'MinLength',
    'MinNewTokens',
    'PrefixConstrained',
    'Guided',
    'ForcedBOS',
    'ForcedEOS',
    'InfNanRemove',
    'ExponentialDecay',
    'SuppressTokens',
    'SuppressAtBegin',
    'Custom',
    'Temperature',
    'TopK',
    'TopP',
    'MinP',
    'Typical',
    'Epsilon',
    'Eta',
    'LogitNormalization',
  ]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Plus:
  """A user's."""

  x: float

  def __call__(self, scores_BV, history):
    return scores_BV + self.x


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Minus(Plus):
  def __call__(self, scores_BV, history):
    return scores_BV - self.x


def test_no_processor_is_another_to_jax():
  """Where two are the same tree, as `register_dataclass` has it, `jit` may run one for the other."""
  own = make_processors(Options(), V=37, extra=[Plus(1.0), Minus(1.0)])
  trees = [jax.tree.structure(p) for p in {type(p): p for p in every(EVERY)}.values()]
  trees += map(jax.tree.structure, own)
  for i, tree in enumerate(trees):
    assert [j for j, other in enumerate(trees) if tree == other] == [i]
  assert np.asarray(apply(own, np.float32([[1, 2]]), None)).tolist() == [[1, 2]]


def test_other_numbers_compile_nothing_and_a_mesh_changes_nothing():
  rng = np.random.default_rng(0)
  B, S, V = 8, 16, 37
  history, scores_BV = random_history(rng, B, S, V), random_scores(rng, B, V, forbidden=0)
  chain = lambda *x: apply.__wrapped__(*x)
  alone = jax.jit(chain)
  both = every(EVERY), every(OTHER)  # kept: a function is known as long as its processor
  want = [np.asarray(alone(made, scores_BV, history)) for made in both]
  assert alone._cache_size() == 1
  assert (want[0] != want[1]).any()
  with mesh_of(8, 1, 1):
    rows = jax.tree.map(text_batches.place, (scores_BV, history))
    split = jax.jit(jax.shard_map(chain, in_specs=(P(), P(BATCH), P(BATCH)), out_specs=P(BATCH)))
    for want_BV, made in zip(want, both):
      np.testing.assert_array_equal(split(made, *rows), want_BV)


def test_processors_are_only_those_asked_for():
  made = lambda **options: [
    type(p).__name__ for p in make_processors(Options(**options), V=97, eos=[EOS], ends=[EOS])
  ]
  assert made() == made(do_sample=False) == []
  assert made(temperature=0.5, top_k=3, top_p=0.9) == ['Temperature', 'TopK', 'TopP']
  assert (
    made(
      temperature=1,
      top_p=1,
      min_p=0,
      typical_p=1.0,
      sequence_bias={},
      bad_words_ids=[[EOS]],
      suppress_tokens=None,
    )
    == []
  )
  assert made(do_sample=False, penalty_alpha=0.6, top_k=4) == []
  assert made(do_sample=False, no_repeat_ngram_size=2) == ['NoRepeatNGram']


def test_a_bias_has_three_forms():
  biases = ({5: -1.0, (6,): 2}, {(5,): -1.0, (6,): 2.0}, [[[5], -1.0], [[6], 2.0]])
  made = [make_processors(Options(sequence_bias=bias), V=13) for bias in biases]
  for other in made[1:]:
    for have, want in zip(jax.tree.leaves(other), jax.tree.leaves(made[0])):
      np.testing.assert_array_equal(have, want)


@pytest.mark.parametrize(
  'options,says',
  [
    (dict(temperature=0), r'temperature = 0 must be positive \(greedy: do_sample=False\)'),
    (dict(temperature=-1.0), 'temperature = -1.0 must be positive'),
    (dict(temperature=math.nan), 'temperature = nan must be positive'),
    (dict(temperature=INF), 'temperature = inf must be positive'),
    (dict(temperature='hot'), "temperature = 'hot' must be positive"),
    (dict(top_k=0), 'top_k = 0 must be a whole number of at least 1'),
    (dict(top_k=2.5), 'top_k = 2.5 must be a whole number'),
    (dict(top_k=True), 'top_k = True must be a whole number'),
    (dict(top_p=1.5), r'top_p = 1.5 must lie in \(0, 1\]'),
    (dict(top_p=0.0), 'top_p = 0.0'),
    (dict(min_p=-0.1), r'min_p = -0.1 must lie in \[0, 1\]'),
    (dict(min_p=1.1), 'min_p = 1.1'),
    (dict(typical_p=0), r'typical_p = 0 must lie in \(0, 1\]'),
    (dict(typical_p=2), 'typical_p = 2'),
    (dict(epsilon_cutoff=0.0), r'epsilon_cutoff = 0.0 must lie in \(0, 1\)'),
    (dict(eta_cutoff=1.0), r'eta_cutoff = 1.0 must lie in \(0, 1\)'),
    (
      dict(do_sample=False, top_k=4, temperature=0.5),
      'temperature = 0.5, top_k = 4 would do nothing: do_sample=False',
    ),
    (dict(do_sample=False, penalty_alpha=0.6, top_k=4, top_p=0.5), '^top_p = 0.5 would do nothing'),
    (dict(do_sample=False, penalty_alpha=0.6, top_k=0), 'top_k = 0 must be'),
    (dict(repetition_penalty=0), 'repetition_penalty = 0 must be positive'),
    (dict(repetition_penalty=INF), 'repetition_penalty = inf'),
    (dict(presence_penalty=INF), 'presence_penalty = inf must be a finite number'),
    (dict(frequency_penalty=math.nan), 'frequency_penalty = nan must be a finite number'),
    (dict(frequency_penalty=1e300), 'frequency_penalty = 1e.300 must be a finite number'),
    (dict(no_repeat_ngram_size=0), 'no_repeat_ngram_size = 0 must be a whole number of at least 1'),
    (dict(min_length=-1), 'min_length = -1 must be a whole number of at least 0'),
    (dict(min_new_tokens=1.5), 'min_new_tokens = 1.5 must be a whole number'),
    (dict(min_new_tokens=200), 'min_new_tokens = 200 is more than max_new_tokens = 128'),
    (dict(bad_words_ids=[[]]), 'bad_words_ids has an empty list'),
    (dict(bad_words_ids=[5, 6]), 'bad_words_ids = .5, 6. must be a list of lists of ids'),
    (dict(bad_words_ids='word'), "bad_words_ids = 'w?o?r?d?.* must be"),
    (dict(bad_words_ids=[[97]]), 'bad_words_ids has token id 97, but the vocabulary has 97 ids'),
    (dict(sequence_bias={(): 1.0}), 'sequence_bias has an empty list'),
    (dict(sequence_bias={-1: 1.0}), 'sequence_bias has token id -1'),
    (dict(sequence_bias={'word': 1.0}), "sequence_bias = 'word' must be token ids"),
    (dict(sequence_bias={(5,): math.nan}), r'sequence_bias of \(5,\) = nan must be a finite number'),
    (dict(sequence_bias=[5, 1.0]), 'sequence_bias = .5, 1.0. must be'),
    (dict(sequence_bias=3), 'sequence_bias = 3 must be'),
    (dict(suppress_tokens=[1, 97]), 'suppress_tokens has token id 97'),
    (dict(suppress_tokens=[1.5]), 'suppress_tokens = .1.5. must be token ids'),
    (dict(begin_suppress_tokens=[-1]), 'begin_suppress_tokens has token id -1'),
    (dict(forced_bos_token_id=97), 'forced_bos_token_id has token id 97'),
    (dict(forced_eos_token_id=[0, 97]), 'forced_eos_token_id has token id 97'),
    (dict(exponential_decay_length_penalty=3), 'exponential_decay_length_penalty = 3 must be'),
    (dict(exponential_decay_length_penalty=(-1, 1.1)), r'penalty\[0\] = -1 must be a whole number'),
    (dict(exponential_decay_length_penalty=(1, 0)), r'penalty\[1\] = 0 must be positive'),
  ],
)
def test_what_cannot_be_is_refused(options, says):
  with pytest.raises(UserError, match=says):
    make_processors(Options(**options), V=97, eos=[EOS], ends=[EOS])


def test_the_end_cannot_become_likelier_where_there_is_none():
  with pytest.raises(UserError, match='exponential_decay_length_penalty needs .* eos_token_id'):
    make_processors(Options(exponential_decay_length_penalty=(1, 1.1)), V=97)


def test_the_ngram_may_be_as_long_as_the_row():
  history = make_history([[1, 2, 1, 9], [1, 1, 1, 1]], [3, 4], 1)
  banned = lambda n: [
    np.flatnonzero(np.isneginf(row)).tolist()
    for row in apply((NoRepeatNGram(n),), np.zeros((2, 13), np.float32), history)
  ]
  assert banned(1) == [[1, 2], [1]]
  assert banned(2) == [[2], [1]]
  assert banned(4) == [[], [1]]
  assert banned(5) == banned(10**9) == [[], []]

"""Automata over tokens equal searches in the text, wherever its tokens begin and end."""

import functools
import itertools
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2_jax.core.errors import UserError
from gpt2_jax.decoding import automaton
from gpt2_jax.decoding.automaton import DEAD, Automaton, cut, held_back, walk
from gpt2_jax.tokenizer import bpe as tokenizer

FEW = settings(deadline=None, max_examples=25)
LETTERS = 'aabbé日\n'
texts = st.text(LETTERS, max_size=14)
words = st.lists(st.text(LETTERS, min_size=1, max_size=4), min_size=1, max_size=4)


@functools.cache
def bpe() -> tokenizer.Tokenizer:
  """Tokens of up to a few letters, some of which end within a character."""
  rng = np.random.default_rng(0)
  letters = list('ab0159-@. ') + ['é', 'è', '日', '本', '😀']
  return tokenizer.train_bpe([''.join(rng.choice(letters, 40)) for _ in range(60)], 420)


def split(data: bytes, seed: int) -> list[int]:
  """The bytes as tokens that are chosen at random among those that fit."""
  rng, ids, at = np.random.default_rng(seed), [], 0
  while at < len(data):
    fit = [id for id, token in bpe().token_bytes.items() if data.startswith(token, at)]
    ids.append(int(rng.choice(fit)))
    at += len(bpe().decode_bytes(ids[-1:]))
  return ids


def prefixes(ids: list[int]):
  return [ids[:n] for n in range(len(ids) + 1)]


@FEW
@given(texts, words, st.integers(0, 99))
def test_a_stop_string_is_found_as_soon_as_it_is_there(text, strings, seed):
  stop = automaton.stop_strings(strings, bpe(), 430)
  for ids in prefixes(split(text.encode(), seed)):
    data = bpe().decode_bytes(ids)
    assert stop.accept_Q[walk(stop, 0, ids)] == any(s.encode() in data for s in strings)
    assert (cut(data, strings) is None) != any(s.encode() in data for s in strings)


@pytest.mark.parametrize(
  'strings, text, accepted',
  [
    (['aab', 'ab'], 'aaab', True),
    (['abab'], 'abaabab', True),
    (['xaby', 'ab'], 'xab', True),
    (['日本'], '日日本', True),
    (['é'], 'è', False),
    (['<|endoftext|>'], '<|endoftext|>', True),
    (['aa', 'b'], 'a\na\na', False),
  ],
)
def test_stop_strings_by_example(strings, text, accepted):
  for t, V in ((bpe(), 420), (tokenizer.load('gpt2'), 50257)):
    stop = automaton.stop_strings(strings, t, V)
    for ids in (t.encode(text), t.encode(text, allow_special=True), [t.encode(c) for c in text]):
      assert stop.accept_Q[walk(stop, 0, np.hstack(ids))] == accepted


def test_once_accepted_is_accepted_and_ids_without_a_token_change_nothing():
  stop = automaton.stop_strings(['ab', 'b\n\n'], bpe(), 430)
  next_QV, accept_Q = np.asarray(stop.next_QV), np.asarray(stop.accept_Q)
  reached = np.unique(next_QV[0])
  assert accept_Q[reached].any() and not accept_Q[0]
  assert (next_QV[accept_Q] == np.flatnonzero(accept_Q)[:, None]).all()
  assert (next_QV[reached, 420:] == reached[:, None]).all()


def test_similar_stop_strings_have_tables_of_one_shape():
  shapes = {
    automaton.stop_strings(strings, bpe(), 420).next_QV.shape
    for strings in ('a', ['\n\n'], ['ab', 'aab'], 'é日')
  }
  assert shapes == {(8, 420)}


@jax.jit
def steps(machine: Automaton, tokens_BN):
  step = lambda state_B, tokens_B: (machine.step(state_B, tokens_B),) * 2
  return jax.lax.scan(step, jnp.zeros(len(tokens_BN), int), tokens_BN.T)[1].T


def test_walk_is_step():
  tokens_BN = np.random.default_rng(0).integers(0, 420, (20, 12))
  machine = Automaton(
    jnp.asarray(np.random.default_rng(1).integers(DEAD, 8, (8, 420), np.int32)), jnp.zeros(8, bool)
  )
  want_BN = [[walk(machine, 0, row[: n + 1]) for n in range(12)] for row in tokens_BN]
  np.testing.assert_array_equal(steps(machine, tokens_BN), want_BN)


@FEW
@given(texts, words)
def test_cut_and_held_back_are_their_definitions(text, strings):
  data, stops = text.encode(), [string.encode() for string in strings]
  ends = [
    (end, len(data[:end]) - max(len(s) for s in stops if data[:end].endswith(s)))
    for end in range(len(data) + 1)
    if data[:end].endswith(tuple(stops))
  ]
  assert cut(data, strings) == (ends[0][1] if ends else None)
  assert held_back(data, strings) == max(
    n for s in stops for n in range(len(s)) if data.endswith(s[:n])
  )
  for end in range(ends[0][0] if ends else len(data) + 1):  # nothing is shown that is cut later
    assert not ends or end - held_back(data[:end], strings) <= ends[0][1]


@pytest.mark.parametrize(
  'strings, message',
  [
    ([], 'one text or several'),
    ('', 'one text'),
    (['a', ''], 'none of them empty'),
    (['\ud800'], 'surrogate'),
    (['ab' * 700], r'1400 bytes in all.*1334'),
  ],
)
def test_stop_strings_that_can_not_be_used(strings, message):
  with pytest.raises(UserError, match=message):
    automaton.stop_strings(strings, tokenizer.load('byte'), 50257)


@pytest.fixture(scope='module')
def library():
  pytest.importorskip('outlines_core')


def ways(machine: Automaton, state: int) -> list[int]:
  return np.flatnonzero(np.asarray(machine.next_QV)[state] != DEAD).tolist()


def to_a_match(machine: Automaton, state: int) -> list[int]:
  """The fewest tokens from a state to an accepted one."""
  paths = {state: []}
  for q in (queue := [state]):
    if machine.accept_Q[q]:
      return paths[q]
    _, firsts = np.unique(np.asarray(machine.next_QV)[q], return_index=True)
    for token in set(firsts.tolist()) & set(ways(machine, q)):
      after = walk(machine, q, [token])
      if after not in paths:
        paths[after] = paths[q] + [token]
        queue.append(after)
  raise AssertionError(f'nothing leads from state {state} to a match')


def is_match(pattern: str, data: bytes) -> bool:
  try:
    return re.fullmatch(pattern, data.decode()) is not None
  except UnicodeDecodeError:  # ends within a character
    return False


@pytest.mark.parametrize(
  'pattern',
  [
    '[0-9]{4}-[0-9]{2}',
    'a|ab|abb',
    '(a|b)+?@(a|b)*',
    'é',
    '日本?',
    '(😀|é)*',
    '[^ab]{1,3}',
    '.*ab',
    '"[^"\n]*"',
    '^(5|-?0)\\.15$',
    '\\$',
    '',
  ],
)
@pytest.mark.parametrize('name', ['bpe', 'gpt2'])
def test_what_may_be_written_can_become_a_match(library, name, pattern):
  t, V = (bpe(), 430) if name == 'bpe' else (tokenizer.load('gpt2'), 50257)
  machine = automaton.regex(pattern, t, V)
  rng = np.random.default_rng(0)
  for _ in range(5):
    ids, state = [], 0
    for _ in range(8):
      data = t.decode_bytes(ids)
      assert machine.accept_Q[state] == is_match(pattern, data)
      assert is_match(pattern, data + t.decode_bytes(to_a_match(machine, state)))
      if not (allowed := ways(machine, state)):
        break
      assert t.eot not in allowed and max(allowed) < t.vocab_size
      ids.append(int(rng.choice(allowed)))
      state = walk(machine, state, ids[-1:])


def expressions():
  """Expressions over a and b that Python and Rust read alike."""
  suffix = st.sampled_from(['', '*', '+', '?', '*?', '+?', '??', '{2}', '{1,2}'])
  grow = lambda inner: st.one_of(
    st.tuples(inner, inner).map(''.join),
    st.tuples(inner, inner).map('|'.join),
    st.tuples(inner, suffix).map(lambda pair: f'({pair[0]}){pair[1]}'),
  )
  return st.recursive(st.sampled_from(['a', 'b', '.', '[ab]', '[^a]', '']), grow, max_leaves=6)


@settings(deadline=None, max_examples=60)
@given(expressions())
def test_accepts_what_python_matches(library, pattern):
  """All texts of up to 5 letters, for the alternatives, and the lazy ones, that are not the first."""
  t = tokenizer.load('byte')
  machine = automaton.regex(pattern, t, 257)
  next_QV = np.asarray(machine.next_QV)
  for n in range(6):
    for letters in itertools.product('ab', repeat=n):
      state = functools.reduce(
        lambda q, id: q if q == DEAD else next_QV[q, id], t.encode(''.join(letters)), 0
      )
      accepted = state != DEAD and bool(machine.accept_Q[state])
      assert accepted == bool(re.fullmatch(pattern, ''.join(letters))), letters


def test_every_way_to_write_a_match_is_allowed(library):
  machine = automaton.regex('(日本|é😀|ab-)+', bpe(), 420)
  for seed in range(20):
    state = 0
    for id in split('日本é😀ab-ab-é😀'.encode(), seed):
      assert id in ways(machine, state)
      state = walk(machine, state, [id])
    assert machine.accept_Q[state]


def test_ends_are_no_part_of_the_text(library):
  t = tokenizer.load('byte')
  a, b = t.encode('ab')
  assert ways(automaton.regex('[ab]', t, 257), 0) == [a, b]
  assert ways(automaton.regex('[ab]', t, 257, ends=[b]), 0) == [a]
  assert t.eot not in ways(automaton.regex('<.*', t, 257), 0)


def test_what_the_vocabulary_can_not_end_is_not_begun(library):
  """Without b, `ab` is never begun, nor anything at all where nothing else matches."""
  t = tokenizer.load('byte')
  b, d = t.encode('bd')
  assert ways(automaton.regex('ab|d', t, 257, ends=[b]), 0) == [d]
  with pytest.raises(UserError, match='no tokens to write a match'):
    automaton.regex('ab', t, 257, ends=[b])


@pytest.mark.parametrize(
  'pattern, message',
  [
    ('a(', 'building NFA'),
    ('(?=a)b', 'look-around'),
    ('(a)\\1', 'back references'),
    ('\\ba', 'word boundaries'),
    ('a)|(?:b', 'building NFA'),
    ('a$|b', 'without \\^ and \\$'),
    ('[a&&b]', 'matches nothing'),
    ('a\x00', 'no tokens to write'),
    ('\ud800', 'surrogates'),
    ('.{1,300}', r'needs 2401 states.*may be 1335'),
  ],
)
def test_expressions_that_can_not_be_used(library, pattern, message):
  with pytest.raises(UserError, match=message) as e:
    automaton.regex(pattern, tokenizer.load('byte'), 50257)
  assert repr(pattern) in str(e.value)


def test_a_json_schema(library):
  pattern = automaton.json_schema('{"type": "array", "items": {"enum": ["a", "b"]}}')
  assert re.fullmatch(pattern, '["a", "b"]') and not re.fullmatch(pattern, '["c"]')
  for schema in ('{', '3', '{"type": "text"}'):
    with pytest.raises(UserError, match='JSON schema'):
      automaton.json_schema(schema)


def test_without_the_package(monkeypatch):
  monkeypatch.setitem(sys.modules, 'outlines_core', None)
  with pytest.raises(UserError, match='pip install outlines-core'):
    automaton.regex('a', tokenizer.load('byte'), 257)

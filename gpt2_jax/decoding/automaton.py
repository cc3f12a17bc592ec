"""Finite automata over token ids: stop strings and regular expressions inside the compiled loop.

Both begin as an automaton over bytes, which is then lifted to tokens, each of which is some bytes. So
it does not matter where the tokens of a text begin and end, even within a character.
Letters beside the model's: `Q` states, `X` = 256 bytes.
"""

from collections.abc import Collection, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gpt2_jax.core.errors import UserError, brief
from gpt2_jax.decoding.pytree import register
from gpt2_jax.tokenizer.bpe import Tokenizer

DEAD = -1  # no way on
TABLE_BYTES = 2**28  # the most that the table [Q, V] may take: of GPT-2's vocabulary, 1335 states
END = 0  # NUL marks the end of what an expression matches: no text that is written has it
X = 256


@register
class Automaton:
  """A deterministic automaton that reads token ids; state 0 is the first."""

  next_QV: jax.Array  # int32, the state after a token, DEAD where the token is not allowed
  accept_Q: jax.Array  # bool, whether what was read is accepted

  def step(self, state_B: jax.Array, tokens_B: jax.Array) -> jax.Array:
    """Returns the states after a token each, [B]; one that is not allowed changes nothing."""
    next_B = self.next_QV[state_B, tokens_B]
    return jnp.where(next_B == DEAD, state_B, next_B)

  def allowed(self, state_B: jax.Array) -> jax.Array:
    """Returns which tokens lead on, [B, V]."""
    return self.next_QV[state_B] != DEAD

  def accepts(self, state_B: jax.Array) -> jax.Array:
    return self.accept_Q[state_B]

  def complete(self, state_B: jax.Array) -> jax.Array:
    """Whether no token leads on."""
    return ~self.allowed(state_B).any(-1)


def walk(automaton: Automaton, state: int, tokens: Iterable[int]) -> int:
  """Returns the state after some tokens, on the host: `Automaton.step` for each in turn."""
  next_QV = np.asarray(automaton.next_QV)  # copied once; JAX keeps it
  for token in tokens:
    if next_QV[state, token] != DEAD:
      state = int(next_QV[state, token])
  return state


def stop_strings(strings: str | Sequence[str], tokenizer: Tokenizer, V: int) -> Automaton:
  """Accepts a text from where its bytes hold one of some strings.

  Added tokens count as the text that they are written as; ids without a token change nothing.

  Raises:
    UserError: there is no string, one is empty, or they are too long for the table.
  """
  words = _encode(strings)
  most, total = _most(V), sum(map(len, words))
  if total >= most:
    raise UserError(
      f'stop_strings have {total} bytes in all; with a vocabulary of {V} ids they may '
      f'have {most - 1}. Name fewer, or shorter ones.'
    )
  step_QX, accept_Q = _search(words)
  next_QV = _lift(step_QX, np.arange(len(accept_Q)), tokenizer, V)
  return _automaton(next_QV, accept_Q)


def cut(data: bytes, strings: str | Sequence[str]) -> int | None:
  """Where the first stop string in `data` begins, None if there is none.

  The first is the one that ends first, as then `stop_strings` accepts; of several that end there,
  the longest.
  """
  found = [
    (data.index(word) + len(word), data.index(word)) for word in _encode(strings) if word in data
  ]
  return min(found)[1] if found else None


def held_back(data: bytes, strings: str | Sequence[str]) -> int:
  """Returns how many bytes at the end of `data` may be the beginning of a stop string.

  A stream may show what comes before: no stop string that is still to end (see `cut`) begins there.
  """
  words = _encode(strings)
  for n in range(min(len(data), max(map(len, words)) - 1), 0, -1):
    if any(len(word) > n and word.startswith(data[-n:]) for word in words):
      return n
  return 0


def regex(pattern: str, tokenizer: Tokenizer, V: int, ends: Collection[int] = ()) -> Automaton:
  """Accepts what a regular expression matches as a whole; allows tokens on the way to a match.

  The syntax is that of Rust's crate regex, without look-around, back references and `\\b`, read by
  outlines-core (Willard & Louf 2023, arXiv:2307.09702). As the whole text is matched, `^` at the
  beginning and `$` at the end change nothing; elsewhere they are refused. No text has a NUL. An
  expression with very many states, such as `a{99999}`, takes long before it is refused.

  Args:
    pattern: the regular expression.
    tokenizer: its tokens are what can be written; added tokens count as their text.
    V: ids of the model.
    ends: ids that end a text, beside the tokenizer's own: they are no part of the text.

  Raises:
    UserError: outlines-core is not there, the expression can't be read, no text of this vocabulary
      matches it, or the table [Q, V] of int32 would take more than TABLE_BYTES.
  """
  step_QX, accept_Q = _match(pattern, _most(V))
  nowhere_Q = np.full(len(accept_Q), DEAD)
  next_QV = _lift(step_QX, nowhere_Q, tokenizer, V, skip={tokenizer.eot, *ends})
  if not _trim(next_QV, accept_Q)[0]:
    raise UserError(f'regex = {brief(pattern)}: the vocabulary has no tokens to write a match with.')
  return _automaton(next_QV, accept_Q)


def json_schema(schema: str) -> str:
  """Returns the regular expression of the JSON texts that a schema, itself a JSON text, describes.

  Raises:
    UserError: the schema is not valid, or uses what outlines-core can't express.
  """
  try:
    return _outlines_core().json_schema.build_regex_from_schema(schema)
  except (TypeError, ValueError) as e:
    raise UserError(f"the JSON schema {brief(schema)} can't be used: {e}") from e


def _encode(strings: str | Sequence[str]) -> list[bytes]:
  strings = [strings] if isinstance(strings, str) else strings
  try:
    words = [string.encode() for string in strings]
  except UnicodeEncodeError as e:
    raise UserError(
      f'stop_strings = {brief(strings)} hold half of a surrogate pair: no text does.'
    ) from e
  if not words or not all(words):
    raise UserError(
      f'stop_strings = {brief(strings)} must be one text or several, none of them empty.'
    )
  return words


def _most(V: int) -> int:
  """Returns the most states that a table with V columns may have."""
  return max(8, TABLE_BYTES // (4 * V))


def _automaton(next_QV: np.ndarray, accept_Q: np.ndarray) -> Automaton:
  """With states that are never reached, up to a power of two: one compilation for similar texts."""
  Q, V = next_QV.shape
  more = min(max(8, 1 << (Q - 1).bit_length()), _most(V)) - Q
  return Automaton(
    jnp.asarray(np.pad(next_QV, ((0, more), (0, 0)), constant_values=DEAD)),
    jnp.asarray(np.pad(accept_Q, (0, more))),
  )


def _search(words: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
  """Looks for any of some words: the states after a byte, [Q + 1, X], and accepted ones, [Q].

  A state is the longest end of what was read that begins a word (Aho & Corasick 1975,
  doi:10.1145/360825.360855). Accepted ones are never left.
  """
  starts = sorted({word[:n] for word in words for n in range(len(word) + 1)}, key=len)
  number = {start: q for q, start in enumerate(starts)}
  longer = [[] for _ in starts]  # (byte, state) that lead on within the words
  for start in starts[1:]:
    longer[number[start[:-1]]].append((start[-1], number[start]))
  step_QX = np.full((len(starts) + 1, X), DEAD)
  step_QX[0] = 0
  accept_Q = np.isin(np.arange(len(starts)), [number[word] for word in words])
  shorter_Q = [0] * len(starts)  # the state of the next shorter end; shorter ones are done before
  for q in range(len(starts)):
    other_X = step_QX[shorter_Q[q]].copy()
    step_QX[q] = other_X
    accept_Q[q] |= accept_Q[shorter_Q[q]]
    for byte, after in longer[q]:
      step_QX[q, byte] = after
      shorter_Q[after] = other_X[byte]
  step_QX[:-1][accept_Q] = np.flatnonzero(accept_Q)[:, None]
  return step_QX, accept_Q


def _outlines_core() -> Any:
  try:
    import outlines_core
  except ImportError as e:
    raise UserError(
      f'regex and JSON schemas need outlines-core ({e}): pip install outlines-core.'
    ) from e
  return outlines_core


def _match(pattern: str, most: int) -> tuple[np.ndarray, np.ndarray]:
  """Matches an expression: the states after a byte, [Q + 1, X], and the accepted ones, [Q].

  The library stops at the first alternative that matches: of `a|ab`, it never goes on to `ab`, nor
  of `a+?` to `aa`. It can't where all of them end with one more character, here `END`.
  """
  library = _outlines_core()
  vocabulary = library.Vocabulary(X, {bytes([byte]): [byte] for byte in range(X)})  # X: its end id
  try:
    body = pattern.removeprefix('^')
    if body.endswith('$') and (len(body[:-1]) - len(body[:-1].rstrip('\\'))) % 2 == 0:
      body = body[:-1]
    library.Index(body, vocabulary)  # alone, as `a)(b` is none, but in parentheses would be one
    index = library.Index(f'(?:{body})\\x{END:02x}', vocabulary)
  except (AttributeError, TypeError, ValueError) as e:
    reason = 'a part of it matches nothing' if 'incompatible' in str(e) else e
    raise UserError(
      f"regex = {brief(pattern)} can't be used: {reason}. Its syntax is that of Rust's "
      'crate regex, without look-around, back references and \\b; the whole text is matched, '
      'without ^ and $.'
    ) from e
  transitions, final = index.get_transitions(), index.get_final_states()
  states = [index.get_initial_state()]
  number = {states[0]: 0}
  for state in states:  # grows meanwhile
    for byte, after in transitions[state].items():
      if byte not in (END, X) and after not in number:
        number[after] = len(states)
        states.append(after)
  if len(states) > most:
    raise UserError(
      f'regex = {brief(pattern)} needs {len(states)} states; with this vocabulary there may be '
      f'{most}. Repeat less: .{{1,20}} needs a fifth of what .{{1,100}} does.'
    )
  step_QX = np.full((len(states) + 1, X), DEAD)
  for q, state in enumerate(states):
    for byte, after in transitions[state].items():
      if byte not in (END, X):
        step_QX[q, byte] = number[after]
  return step_QX, np.array([transitions[state].get(END) in final for state in states])


def _lift(
  step_QX: np.ndarray, other_Q: np.ndarray, tokenizer: Tokenizer, V: int, skip: Collection[int] = ()
) -> np.ndarray:
  """Returns the states after all bytes of each token, [Q, V], from those after a byte, [Q + 1, X].

  Args:
    step_QX: states after a byte. DEAD, which as an index is the last row, leads to itself.
    other_Q: states after an id without bytes.
    tokenizer: knows the bytes.
    V: ids of the model, a few of which may have no token.
    skip: ids that count as if they had no bytes.
  """
  tokens = [
    (id, token) for id, token in tokenizer.token_bytes.items() if token and id < V and id not in skip
  ]
  tokens.sort(key=lambda pair: -len(pair[1]))  # those that have an i-th byte come first
  ids_N, lengths_N = np.array([(id, len(token)) for id, token in tokens], int).reshape(-1, 2).T
  longest = lengths_N.max(initial=1)
  bytes_NL = np.array([token for _, token in tokens], f'S{longest}').view(np.uint8)
  bytes_LN = bytes_NL.reshape(-1, longest).T.astype(int)
  counts_L = (lengths_N > np.arange(longest)[:, None]).sum(1)
  columns = [bytes_N[:n] for bytes_N, n in zip(bytes_LN, counts_L)]
  flat = step_QX.ravel() * X  # of states that are multiplied by X already: an index is one sum
  next_QV = np.repeat(other_Q.astype(np.int32)[:, None], V, axis=1)
  for q in range(len(next_QV)):
    state_N = np.full(len(ids_N), q * X)
    for bytes_n in columns:
      state_n = state_N[: len(bytes_n)]
      state_n[:] = flat[state_n + bytes_n]
    next_QV[q, ids_N] = state_N // X
  return next_QV


def _trim(next_QV: np.ndarray, accept_Q: np.ndarray) -> np.ndarray:
  """Makes DEAD, in place, what leads to no accepted state; which states do lead to one, [Q]."""
  Q = len(next_QV)
  leads_QQ = np.zeros((Q, Q + 1), bool)  # the last is DEAD
  for q in range(Q):
    leads_QQ[q, next_QV[q]] = True
  alive_Q, new_Q = accept_Q.copy(), accept_Q
  while new_Q.any():
    new_Q = leads_QQ[:, :-1][:, new_Q].any(1) & ~alive_Q
    alive_Q |= new_Q
  if not alive_Q.all():
    dead_Q = np.append(~alive_Q, True)
    for q in range(Q):
      next_QV[q, dead_Q[next_QV[q]]] = DEAD
  return alive_Q

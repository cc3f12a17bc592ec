"""Text that is shown while it is written, in pieces that never have to be taken back."""

import codecs
import dataclasses
from collections.abc import Sequence

from gpt2_jax.decoding import automaton
from gpt2_jax.tokenizer.bpe import Tokenizer


def _decoder():
  return codecs.getincrementaldecoder('utf-8')('replace')


@dataclasses.dataclass
class Pieces:
  """The text of ids that come one after another, piece by piece, up to the first stop string.

  The pieces joined are the text. Each is valid Unicode: a character is shown when its last byte has
  come, and nothing is shown that may turn out to be part of a stop string.

  Attributes:
    tokenizer: knows the bytes of an id.
    stop_strings: what ends the text, also within or across tokens.
    stopped: whether one has come. No more ids may be pushed.
  """

  tokenizer: Tokenizer
  stop_strings: Sequence[str] = ()
  stopped: bool = False

  def __post_init__(self):
    self._data, self._shown, self._utf8 = bytearray(), 0, _decoder()
    self._longest = max((len(string.encode()) for string in self.stop_strings), default=0)

  def push(self, token: int) -> None:
    """Takes one more id.

    Raises:
      UserError: the tokenizer has no such id.
    """
    data = self.tokenizer.decode_bytes([token])
    self._data += data
    if self.stop_strings:
      start = max(0, len(self._data) - len(data) - self._longest)  # none ends before that
      cut = automaton.cut(bytes(self._data[start:]), self.stop_strings)
      if cut is not None:
        del self._data[start + cut :]
        self.stopped = True

  def take(self, *, final: bool = False) -> str:
    """Returns the text that can be shown and was not yet; with `final`, all the rest."""
    final |= self.stopped
    held = 0
    if self.stop_strings and not final:
      held = automaton.held_back(bytes(self._data[-self._longest :]), self.stop_strings)
    end = max(self._shown, len(self._data) - held)
    piece = self._utf8.decode(bytes(self._data[self._shown : end]), final=final)
    self._shown = end
    return piece

  @property
  def shown(self) -> int:
    """The number of bytes that `take` has returned."""
    return self._shown

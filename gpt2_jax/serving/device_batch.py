"""The slots of one model on its device, the row in each slot, and the programs that change them."""

import dataclasses
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from gpt2_jax.core import seeds
from gpt2_jax.core.errors import UserError
from gpt2_jax.decoding.edited import placed
from gpt2_jax.decoding.generate import own_ends, prepare
from gpt2_jax.decoding.text_stream import Pieces
from gpt2_jax.model.decode_layout import with_wide_steps
from gpt2_jax.model.edits import Edit
from gpt2_jax.model.pretrained_model import Pretrained
from gpt2_jax.parallel import sharding
from gpt2_jax.serving import programs
from gpt2_jax.serving.requests import Prompt, Row
from gpt2_jax.serving.slot_state import (
  CHUNK,
  Slots,
  blank,
  check_memory,
  choice_of,
  chunk_sizes,
  empty,
)


@dataclasses.dataclass(frozen=True)
class PendingStep:
  """A step that the device has begun."""

  rows: list[Row | None]  # the row in each slot that gets an id from it
  result: programs.Step
  began: float  # time.perf_counter()


class DeviceBatch:
  """B slots, each idle or with a row.

  Attributes:
    rows: the row in each slot; None: the slot is free.
    ended_B: slots whose row has ended here, while the device still writes it.
  """

  def __init__(self, name: str, model: Pretrained, slots: int, edits: Sequence[Edit] = ()):
    """Raises: UserError: the model has another head, lies on several devices, or on one without the
    memory for the slots; or an edit can't be made.
    """
    self._form, self.params = prepare(model)
    devices = sharding.devices_of(self.params)
    if len(devices) > 1:
      raise UserError(f"{name} lies on several devices: a server's model lies on one.")
    self._edits = placed(edits, self._form, reach=self._form.n_positions)
    check_memory(self._form, slots, *devices)
    if sharding.platform() == 'cpu':
      self.params = with_wide_steps(self._form, self.params)
    ends = own_ends(model)
    self._eos = jnp.asarray([model.tokenizer.eot] if ends is None else ends, jnp.int32)
    self.chunks = chunk_sizes(self._form)
    self._slots: Slots | None = None
    self.rows: list[Row | None] = [None] * slots
    self.ended_B = np.zeros(slots, bool)

  # --- which row is where -------------------------------------------------------------------------

  @property
  def free(self) -> list[int]:
    """The slots without a row."""
    return [b for b, row in enumerate(self.rows) if row is None]

  def place(self, rows: Sequence[Row]) -> None:
    """Gives rows a free slot each."""
    for b, row in zip(self.free, rows):
      self.rows[b], row.slot = row, b

  def release(self, row: Row) -> None:
    """Frees the slot of a row, if it has one."""
    if row.slot is not None:
      self.rows[row.slot], self.ended_B[row.slot], row.slot = None, True, None

  # --- on the device ------------------------------------------------------------------------------

  @property
  def slots(self) -> Slots:
    """Made when they are first needed."""
    slots = self._slots = self._slots or empty(self._form, B=len(self.rows))
    return slots

  def forget(self) -> None:
    """Gives up what is on the device, after a program has failed."""
    self._slots = None

  def stop_ended(self) -> None:
    """Makes the slots idle whose rows have ended here."""
    if self.ended_B.any():
      self._slots = programs.stop(self.slots, self.ended_B)
      self.ended_B = np.zeros(len(self.rows), bool)

  def read_chunk(self, row: Row) -> tuple[int, int, programs.Scores]:
    """Reads the next ids of a row's prompt.

    Returns:
      How many ids were read, the same with padding, and the scores of the ids after them.
    """
    prompt = row.prompt
    n, start = min(prompt.unread, CHUNK), prompt.read
    T = next(size for size in self.chunks if n <= size)
    ids_2T = np.zeros((2, T), np.int32)
    ids_2T[0, :n], ids_2T[1, :n] = (prompt.ids[start + i : start + i + n] for i in (0, 1))
    prompt.cache, scores = programs.prefill(
      self._form, self.params, self._cache(row), start, *ids_2T, prompt.scored, self._edits
    )
    prompt.read += n
    return n, T, scores

  def admit(self, row: Row) -> None:
    """Lets a row run in its slot, after its prompt, all but the last id, is read."""
    self._slots = self._admitted(self.slots, row)

  def step(self) -> PendingStep | None:
    """Begins a step of the rows that run and want more ids; None: there is no such row."""
    rows = [row if row and row.admitted and row.steps < row.limit else None for row in self.rows]
    if not any(rows):
      return None
    for row in filter(None, rows):
      row.steps += 1
    began = time.perf_counter()
    self._slots, result = programs.step(self._form, self.params, self._eos, self.slots, self._edits)
    return PendingStep(rows, result, began)

  def warm(self, pieces: Pieces) -> None:
    """Compiles all that requests will need, with a row in slots of its own."""
    row = Row(Prompt([0], 1), 1, 0, 0, choice_of(self._form.vocab_size, {}), pieces, slot=0)
    slots = empty(self._form, B=len(self.rows))
    for T in self.chunks:
      ids_2T = np.zeros((2, T), np.int32)
      row.prompt.cache, _ = programs.prefill(
        self._form, self.params, self._cache(row), 0, *ids_2T, False, self._edits
      )
    slots = self._admitted(slots, row)
    slots, _ = programs.step(self._form, self.params, self._eos, slots, self._edits)
    jax.block_until_ready(programs.stop(slots, self.ended_B))

  def _cache(self, row: Row):
    """The cache of a row's prompt, made when it is first needed."""
    if row.prompt.cache is None:
      row.prompt.cache = blank(self._form)
    return row.prompt.cache

  def _admitted(self, slots: Slots, row: Row) -> Slots:
    ids = row.prompt.ids
    tokens_S = np.zeros(self._form.n_positions, np.int32)
    tokens_S[: len(ids)] = ids
    key_data = seeds.key_data(row.seed)
    new = programs.NewRow(tokens_S, len(ids), row.limit, key_data, row.sample, row.choice)
    return programs.admit(slots, row.slot, self._cache(row), new)

"""The interface of data to a training: token stores and labelled texts have it."""

from collections.abc import Iterator, Mapping, Sequence, Sized
from typing import Any, Protocol

from jax.sharding import NamedSharding

from gpt2_jax.core.buckets import AnyPath
from gpt2_jax.tokenizer.bpe import Tokenizer


class TrainingData(Protocol):
  """An open set of data, with the splits `train` and `val`."""

  @property
  def unit(self) -> str:
    """The name of what the length of a split counts: 'tokens', 'texts'."""
    ...

  @property
  def labels(self) -> tuple[str, ...]:
    """The labels that a classifier learns; none for a language model."""
    ...

  @property
  def path(self) -> str | AnyPath: ...
  @property
  def manifest(self) -> dict: ...
  @property
  def splits(self) -> Mapping[str, Sized]: ...
  @property
  def tokenizer(self) -> Tokenizer: ...

  @property
  def sha256(self) -> str:
    """Names the content: it is equal where splits and tokenizer are."""
    ...

  @property
  def eot(self) -> int:
    """The id that begins a document."""
    ...

  def check_vocabulary(self, vocab_size: int) -> None:
    """Raises a UserError where an id is known to be `vocab_size` or more."""

  def remarks(self) -> Sequence[str]:
    """Lines for the user, on what is used and what is passed over."""
    ...


class Batches(Protocol):
  """Batches of a split. Training: a function of (seed, step, rows seen before)."""

  def __init__(self, split: Any, T: int, G: int, seed: int, vocab_size: int):
    """
    Args:
      split: of a `TrainingData`.
      T: tokens a row.
      G: rows of a global batch.
      seed: of the order.
      vocab_size: all ids lie below it.
    """

  @property
  def steps_per_epoch(self) -> float: ...

  def go_on(self, step: int, seen: int) -> None:
    """Lets the batch of `step`, and those after it, follow on `seen` rows."""

  def documents(self, step: int) -> list[list[str]]:
    """Names of the documents in each row of the batch of `step`."""
    ...

  def batches(self, start: int, stop: int, A: int, sharding: NamedSharding) -> Iterator[Any]:
    """The batches of steps [start, stop), each in A micro-batches."""
    ...

  @staticmethod
  def eval_batches(split: Any, T: int, R: int, sharding: NamedSharding) -> Iterator[tuple[Any, Any]]:
    """All of a split in order: batches of R rows, and the weights 1 or 0 of their targets."""
    ...

  @staticmethod
  def eval_size(split: Any, T: int, R: int) -> int:
    """The number of batches of `eval_batches`."""
    ...

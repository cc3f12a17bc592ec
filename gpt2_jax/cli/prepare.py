"""The verb `gpt2-jax prepare`."""

import dataclasses
from typing import Literal

from gpt2_jax.core.errors import UserError, brief


@dataclasses.dataclass
class Prepare:
  """Turns text into a token store, in parallel. Run again, it goes on where it was stopped."""

  corpus: str
  """stdlib, text:PATTERN, tfds:NAME[/CONFIG] or bin:FOLDER (nanoGPT's or llm.c's tokens)."""
  output: str
  """Folder of the store, which may lie in a bucket: gs://BUCKET/PATH."""
  tokenizer: str = 'gpt2'
  """gpt2, bpe:N (N ids, trained on the corpus), byte, or a folder with vocab.json and merges.txt."""
  val_fraction: float = 0.005
  """Share of the text that is held out."""
  split: Literal['document', 'tail'] = 'document'
  """Hold out whole documents, or the end of each."""
  split_seed: int = 0
  """Chooses the documents that are held out."""
  text_field: str = 'text'
  """Field that holds the text, in .jsonl, .json, .csv, .tsv, .parquet and TFDS."""
  special: bool = False
  """The text of a special token, <|endoftext|> perhaps, is the token; if not, it is text as any."""
  workers: int | None = None
  """Processes; default: the number of cores."""
  part: str | None = None
  """I/N: do share I (from 0) of N, on hosts that see the same folder or bucket. The last one to be
  done makes the store whole; each can be killed and run again."""
  verify: bool = False
  """Read all of the store, a finished one too, and compare it with its hashes."""

  def run(self) -> None:
    from gpt2_jax.data import prepare, token_store, verify

    settings = prepare.Settings(
      self.corpus,
      self.tokenizer,
      self.val_fraction,
      self.split_seed,
      self.split,
      self.text_field,
      self.special,
    )
    if not prepare.do_share(settings, self.output, self.workers, process := self.process()):
      print('share {} of {} is done; others are not.'.format(*process))
      return
    opened = token_store.open_store(self.output)
    for name, split in opened.splits.items():
      print(f'{name:6s}{len(split):>16,} tokens {split.documents:>12,} documents')
    print(f'{opened.path}: sha256 {opened.sha256}')
    if self.verify:
      print(f'{verify.verify(opened, again=True)} shards are as they were written')

  def process(self) -> tuple[int, int]:
    """Returns which share is to be done, of how many."""
    if self.part is None:
      return 0, 1
    share, _, shares = self.part.partition('/')
    if not (share.isdecimal() and shares.isdecimal() and int(share) < int(shares) < 10**6):
      raise UserError(f'--part {brief(self.part)} must be I/N, with I from 0 to N - 1.')
    return int(share), int(shares)

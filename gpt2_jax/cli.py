"""The command line: `gpt2-jax VERB`, the same as `python -m gpt2_jax VERB`."""

import dataclasses
import json
import sys
from typing import Annotated, Literal

import tyro

from gpt2_jax.errors import UserError


@dataclasses.dataclass
class Prepare:
  """Turns text into a token store, in parallel. Run again, it goes on where it was stopped."""

  corpus: str
  """stdlib, text:PATTERN, tfds:NAME[/CONFIG] or bin:FOLDER (nanoGPT's or llm.c's tokens)."""
  output: str
  """Folder of the store."""
  tokenizer: str = 'gpt2'
  """gpt2, bpe:N (N ids, trained on the corpus), byte, or a folder with vocab.json and merges.txt."""
  val_fraction: float = 0.005
  """Share of the text that is held out."""
  split: Literal['document', 'tail'] = 'document'
  """Hold out whole documents, or the end of each."""
  split_seed: int = 0
  """Chooses the documents that are held out."""
  text_field: str = 'text'
  """Field that holds the text, in .jsonl, .parquet and TFDS."""
  workers: int | None = None
  """Processes; default: the number of cores."""

  def run(self) -> None:
    from gpt2_jax.data import prepare
    settings = prepare.Settings(self.corpus, self.tokenizer, self.val_fraction, self.split_seed,
                                self.split, self.text_field)
    opened = prepare.ensure_store(settings, self.output, self.workers)
    for name, split in opened.splits.items():
      print(f'{name:6s}{len(split):>16,} tokens {split.documents:>12,} documents')
    print(f'{opened.path}: sha256 {opened.sha256}')


@dataclasses.dataclass
class Sample:
  """Continues prompts with a trained model."""

  checkpoint: str
  """Workdir of a run, Hugging Face folder or hub name, or another checkpoint (docs/conversion.md)."""
  tokenizer: str | None = None
  """Where the checkpoint brings none: gpt2, byte, or a folder."""
  prompt: tuple[str, ...] = ('',)
  """Texts to continue; an empty one starts a new document."""
  max_new_tokens: int = 128
  """The most new tokens."""
  greedy: bool = False
  """Always take the likeliest token."""
  temperature: float = 1.0
  """Below 1 the likely tokens become likelier."""
  top_k: int | None = None
  """Draw from the k likeliest tokens only."""
  top_p: float | None = None
  """Draw from the fewest tokens whose probability reaches p."""
  num_return_sequences: int = 1
  """Continuations of each prompt."""
  seed: int = 0
  """The same prompt and seed give the same text."""
  json: bool = False
  """Print one JSON object a continuation, with ids and log-probabilities."""

  def run(self) -> None:
    import gpt2_jax
    from gpt2_jax import tokenizer
    model = gpt2_jax.from_pretrained(self.checkpoint)
    if self.tokenizer is not None:
      model.tokenizer = tokenizer.load(self.tokenizer)
    results = gpt2_jax.generate(
        model, self.prompt, max_new_tokens=self.max_new_tokens, do_sample=not self.greedy,
        temperature=self.temperature, top_k=self.top_k, top_p=self.top_p,
        num_return_sequences=self.num_return_sequences, seed=self.seed)
    for i, result in enumerate(results):
      prompt = self.prompt[result.prompt]
      if self.json:
        fields = dataclasses.asdict(result) | {'prompt': prompt}
        print(json.dumps(fields, ensure_ascii=False))
      else:
        print('-' * 78 + '\n' if i else '', prompt, result.text, sep='')


@dataclasses.dataclass
class Convert:
  """Turns a checkpoint of any format into another. What is lost: docs/conversion.md."""

  source: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar='SRC')]
  """Workdir of a run, Hugging Face folder or hub name, OpenAI's or nanoGPT's folder, llm.c's file."""
  target: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar='DST')]
  """A new folder; of nanogpt, llmc and gguf a new file."""
  to: Literal['hf', 'nanogpt', 'llmc', 'openai', 'flax', 'peft', 'gguf', 'stablehlo']
  """The format to write."""
  dtype: Literal['float32', 'bfloat16', 'float16'] | None = None
  """Of the tensors; default: as in the source."""
  max_shard_size: int | None = None
  """hf: bytes of a weights file; default 5 GB."""
  approximate: bool = False
  """nanogpt: allow a model with the tanh GELU, which nanoGPT computes with the exact one."""

  def run(self) -> None:
    from gpt2_jax import pretrained
    options = {name: value for name, value in (
        ('max_shard_size', self.max_shard_size), ('approximate', self.approximate)) if value}
    source = pretrained.open_source(self.source)
    pretrained.write(source, self.target, self.to, dtype=self.dtype, **options)
    print(f'{self.target}: {self.to}, {self.dtype or source.dtype}, from {source.where}')


Verb = (Annotated[Prepare, tyro.conf.subcommand('prepare')]
        | Annotated[Sample, tyro.conf.subcommand('sample')]
        | Annotated[Convert, tyro.conf.subcommand('convert')])


def main(argv: list[str] | None = None) -> None:
  """Runs a verb. Exit status 1 and one message where the input can't be used."""
  verb = tyro.cli(Verb, args=argv, prog='gpt2-jax', config=(tyro.conf.OmitArgPrefixes,))
  try:
    verb.run()
  except UserError as e:
    sys.exit(f'error: {e}')
  except KeyboardInterrupt:
    sys.exit(130)


if __name__ == '__main__':
  main()

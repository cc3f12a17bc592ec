"""The command line: `gpt2-jax VERB`, the same as `python -m gpt2_jax VERB`."""

import contextlib
import dataclasses
import functools
import io
import json
import os
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from gpt2_jax.cli import flags, inputs
from gpt2_jax.cli.bias import Bias
from gpt2_jax.cli.config import Config
from gpt2_jax.cli.convert import Convert
from gpt2_jax.cli.doctor import Doctor
from gpt2_jax.cli.evaluate import Evaluate
from gpt2_jax.cli.patch import Patch
from gpt2_jax.cli.plan import Plan, split_overrides
from gpt2_jax.cli.prepare import Prepare
from gpt2_jax.cli.serve import Serve
from gpt2_jax.cli.steer import Steer
from gpt2_jax.core import errors, seeds
from gpt2_jax.core.errors import UserError, brief
from gpt2_jax.decoding.options import Options

LONG = 1000  # characters of a word
RULE = '-' * 78 + '\n'


@dataclasses.dataclass
class Sample:
  """Continues prompts with a trained model."""

  checkpoint: str
  """Workdir of a run or a step of it (DIR, DIR@1200, DIR@best), Hugging Face folder, hub name, or
  another checkpoint (docs/conversion.md)."""
  tokenizer: str | None = None
  """Where the checkpoint brings none: gpt2, byte, or a folder."""
  prompt: tuple[str, ...] = ()
  """Texts to continue; '' starts a new document. None: standard input, unless it is a terminal."""
  prompt_file: Annotated[str | None, tyro.conf.arg(metavar='FILE')] = None
  """More: lines that are not blank, of a .jsonl file their "prompt". - is standard input."""
  prompt_ids: Annotated[tuple[str, ...], tyro.conf.arg(metavar='ID …')] = ()
  """Token ids, of one prompt in place of a text. In a .jsonl file, "prompt" may be a list of ids."""
  special: bool = False
  """The same as --allow-special: the text of a special token, <|endoftext|> perhaps, is the token."""
  batch_size: int = 32
  """Prompts that are continued at a time. The texts do not depend on it."""
  greedy: bool = False
  """The same as --no-do-sample."""
  json: bool = False
  """Print one JSON object a continuation, with ids, log-probabilities and all that repeats it."""
  stream: bool = False
  """Print each text as it is written, one prompt after another."""
  interactive: bool = False
  """Type the prompts in a session, whose settings the options below are."""
  assistant: str | None = None
  """Checkpoint of a smaller model with the same vocabulary, to guess ahead."""
  int8: bool = False
  """Keep the weights in 8 bits."""
  steer: Annotated[tuple[str, ...], tyro.conf.arg(metavar='FILE[:SCALE] …')] = ()
  """Vectors of gpt2-jax steer, which are added inside of the model."""
  opening: inputs.OpeningFlags = inputs.OpeningFlags()
  options: Annotated[Options, tyro.conf.arg(name='generation')] = Options()

  def run(self) -> None:
    if self.json + self.stream + self.interactive > 1:
      raise UserError('--json, --stream and --interactive exclude each other.')
    if self.interactive and (self.prompt or self.prompt_file or self.prompt_ids):
      raise UserError(
        '--interactive asks for prompts: leave --prompt, --prompt-file and --prompt-ids out.'
      )
    if self.greedy:
      self.options = dataclasses.replace(self.options, do_sample=False)
    seeds.check('--seed', self.options.seed)
    if self.special:
      self.options = dataclasses.replace(self.options, allow_special=True)
    prompts: list[str | list[int]] = [
      inputs.typed(text, f'--prompt {text[:40]!r}') for text in self.prompt
    ]
    if self.prompt_ids:
      prompts.append(inputs.ids(' '.join(self.prompt_ids)))
    if self.prompt_file is not None:
      prompts += inputs.read_prompts(self.prompt_file)
    if isinstance(sys.stdout, io.TextIOWrapper):  # an odd character ends no long work
      sys.stdout.reconfigure(encoding='utf-8' if self.json else None, errors='replace')

    import gpt2_jax
    from gpt2_jax.checkpoints import pretrained
    from gpt2_jax.interpretation.steering import steering
    from gpt2_jax.model import decode_layout

    edits = [edit for spec in self.steer for edit in steering(spec)]
    model = pretrained.open_model(self.checkpoint, self.tokenizer, self.opening)
    if self.int8:
      model = decode_layout.quantize(model)
    assistant = (
      None
      if self.assistant is None
      else (gpt2_jax.from_pretrained(self.assistant, ignore_extra=self.opening.ignore_extra))
    )
    if assistant is not None and self.tokenizer is not None:  # that of both
      assistant.tokenizer = model.tokenizer
    if self.interactive:
      from gpt2_jax.cli.interactive import Session

      return Session(model, self.options, assistant, edits).run()
    if not prompts:
      prompts = ['' if sys.stdin.isatty() else inputs.piped().removesuffix('\n')]
    known = dict(assistant_model=assistant, edits=edits, **inputs.given(self.options))
    (self.write if self.stream else self.show)(model, prompts, known)

  def write(self, model, prompts: list[str | list[int]], options: dict[str, Any]) -> None:
    """Prints texts while they are written."""
    from gpt2_jax.decoding.generate import stream

    for i, prompt in enumerate(prompts):
      pieces = stream(model, prompt, **options)
      print(RULE if i else '', text_of(model, prompt), sep='', end='', flush=True)
      for piece in pieces:
        print(piece, end='', flush=True)
      print(flush=True)

  def show(self, model, prompts: list[str | list[int]], options: dict[str, Any]) -> None:
    """Prints texts that are done."""
    from gpt2_jax.decoding.generate import generate
    from gpt2_jax.model import text_batches

    ids = text_batches.encode(
      prompts, model.tokenizer, model.config, leave=1, allow_special=self.options.allow_special
    )
    named = ('checkpoint', 'tokenizer', 'assistant', 'int8', 'steer')
    asked = {name: getattr(self, name) for name in named}
    asked |= {
      'base': self.opening.base,
      'ignore_extra': self.opening.ignore_extra,
      'options': vars(self.options),
    }
    rule = ''
    for first in range(0, len(ids), self.batch_size):
      for result in generate(model, ids[first : first + self.batch_size], **options):
        i = first + result.prompt
        if self.json:
          fields = dataclasses.asdict(dataclasses.replace(result, pieces=None)) | {
            'prompt': prompts[i],
            'prompt_index': i,
            'prompt_tokens': ids[i],
            **asked,
          }
          del fields['pieces']
          print(json.dumps(fields, ensure_ascii=False), flush=True)
        else:
          print(rule, text_of(model, prompts[i]), result.text, sep='', flush=True)
          rule = RULE


def text_of(model, prompt: str | list[int]) -> str:
  """Returns a prompt as it is printed."""
  return prompt if isinstance(prompt, str) else model.tokenizer.decode(prompt)


@dataclasses.dataclass
class Reproduce:
  """Makes a run again from its record. Exit status 1 where a step is not the same to the last bit."""

  workdir: tyro.conf.Positional[Path]
  """Of the run. Start this where the run was started: its config may have relative paths."""
  output: Path | None = None
  """Folder of the repetition; default: beside the run, with -again behind its name."""

  def run(self) -> None:
    from gpt2_jax.core.buckets import place

    if not (workdir := place(self.workdir)).is_dir():
      raise UserError(f'{workdir} is no folder: name the --workdir of a run.')
    from gpt2_jax.training import reproduce

    if status := reproduce.reproduce(workdir, self.output):
      sys.exit(status)


@dataclasses.dataclass
class Train:
  """Trains, or goes on with a run: --config=small:fineweb --workdir=DIR --config.KEY=VALUE …

  Its flags are those of launch.py: gpt2-jax train --help.
  """

  def run(self) -> None:
    raise AssertionError('`main` hands it over')


Verb = (
  Annotated[Train, tyro.conf.subcommand('train')]
  | Annotated[Config, tyro.conf.subcommand('config')]
  | Annotated[Prepare, tyro.conf.subcommand('prepare')]
  | Annotated[Sample, tyro.conf.subcommand('sample')]
  | Annotated[Serve, tyro.conf.subcommand('serve')]
  | Annotated[Convert, tyro.conf.subcommand('convert')]
  | Annotated[Evaluate, tyro.conf.subcommand('evaluate')]
  | Annotated[Bias, tyro.conf.subcommand('bias')]
  | Annotated[Steer, tyro.conf.subcommand('steer')]
  | Annotated[Patch, tyro.conf.subcommand('patch')]
  | Annotated[Plan, tyro.conf.subcommand('plan')]
  | Annotated[Reproduce, tyro.conf.subcommand('reproduce')]
  | Annotated[Doctor, tyro.conf.subcommand('doctor')]
)


def parse(argv: Sequence[str]) -> Verb:
  """Returns the verb that a command line asks for. Exit status 2 where it is none.

  A message about it shows the ends of long words only.
  """
  ask = functools.partial(
    tyro.cli, Verb, prog='gpt2-jax', registry=inputs.registry, config=(tyro.conf.OmitArgPrefixes,)
  )
  # one that is no value first: tyro would long look for options that are like it
  argv = [
    brief(word) if len(word) > LONG and re.fullmatch(r'-[^\s=]+', word) else word for word in argv
  ]
  if max(map(len, argv), default=0) > LONG:
    try:
      with contextlib.redirect_stderr(io.StringIO()):
        return ask(args=argv)
    except SystemExit:
      argv = [brief(word) if len(word) > LONG else word for word in argv]
      ask(args=argv)  # says what is wrong, and leaves
      raise UserError('a value of the command line is too long.') from None
  return ask(args=argv)


def main(argv: list[str] | None = None) -> None:
  """Runs a verb. Exit status 1 and one message where the input can't be used."""
  argv, overrides = list(sys.argv[1:] if argv is None else argv), ()
  if argv[:1] == ['--version']:
    return print(errors.versions())
  if argv[:1] == ['train']:
    began = time.monotonic()
    from gpt2_jax.cli import train

    train.use_huge_pages()
    sys.exit(train.main(['gpt2-jax train', *argv[1:]], began))
  if argv[:1] in (['plan'], ['doctor']):
    argv, overrides = split_overrides(argv)
  try:
    verb = parse(argv)
    if isinstance(verb, Plan | Doctor):
      verb.overrides = overrides
    flags.check(verb)
    verb.run()
  except UserError as e:
    sys.exit(f'error: {e}')
  except KeyboardInterrupt:
    sys.exit(130)
  except BrokenPipeError:  # the reader, `head` perhaps, has seen enough
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(1)


if __name__ == '__main__':
  main()

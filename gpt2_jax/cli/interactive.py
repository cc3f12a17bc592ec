"""`gpt2-jax sample --interactive`: one types prompts, and sees them continued."""

import contextlib
import io
import os
import signal
import sys
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path

from gpt2_jax.cli import inputs
from gpt2_jax.core.errors import UserError
from gpt2_jax.decoding.generate import Generated, stream
from gpt2_jax.decoding.options import Options
from gpt2_jax.model import text_batches
from gpt2_jax.model.edits import Edit
from gpt2_jax.model.pretrained_model import Pretrained


def note(text: str) -> None:
  """Prints what is no part of a text to standard error."""
  sys.stdout.flush()
  print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def line_editing() -> Iterator[None]:
  """Line editing, with a history that is kept; without readline, neither."""
  try:
    import readline
  except ImportError:
    yield
    return
  state = os.environ.get('XDG_STATE_HOME') or os.path.expanduser('~/.local/state')
  path = Path(state, 'gpt2_jax', 'history')
  with contextlib.suppress(OSError):
    readline.read_history_file(path)
  try:
    yield
  finally:
    readline.set_history_length(1000)
    with contextlib.suppress(OSError):
      path.parent.mkdir(parents=True, exist_ok=True)
      readline.write_history_file(path)


@contextlib.contextmanager
def ctrl_c() -> Iterator[list[int]]:
  """Puts the first Ctrl-C into a list, so that no step is broken off; the second one raises."""
  signals = []

  def handle(number, _):
    if signals:
      raise KeyboardInterrupt
    signals.append(number)

  before = signal.signal(signal.SIGINT, handle)
  try:
    yield signals
  finally:
    signal.signal(signal.SIGINT, before)


class Session:
  """A model, the settings, and the text so far. Its methods do_NAME are the commands /NAME."""

  def __init__(
    self,
    model: Pretrained,
    options: Options,
    assistant: Pretrained | None = None,
    edits: Sequence[Edit] = (),
  ):
    self.model, self.assistant, self.edits = model, assistant, edits
    self.begun: str | None = None  # the last prompt
    self.text = ''  # that, and what was written
    self.ids: list[int] | None = None  # of the text, if none of it was cut off
    self.use(options)

  def run(self) -> None:
    """Does what is typed, until Ctrl-D. What can't be done is said, and the session goes on."""
    terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if isinstance(sys.stdin, io.TextIOWrapper):
      sys.stdin.reconfigure(errors='surrogateescape')  # for inputs.typed
    note('Type a prompt; with \\ at the end of a line it goes on in the next. /help: commands.')
    with line_editing() if terminal else contextlib.nullcontext():
      while True:
        try:
          self.take(self.read('> ' if terminal else ''))
        except UserError as e:
          note(f'error: {e}')
        except KeyboardInterrupt:
          note('\nCtrl-D ends the session.')
        except EOFError:
          return print(end='\n' if terminal else '', flush=True)

  def read(self, show: str) -> str:
    line = input(show)
    while line.endswith('\\'):
      line = line[:-1] + '\n' + input(show and '. ')
    return inputs.typed(line, 'the line')

  def take(self, line: str) -> None:
    """Runs a command, or continues a prompt."""
    if line.startswith('/') and not line.startswith('//'):
      name, _, rest = line[1:].partition(' ')
      command = getattr(self, f'do_{name}', None)
      if command is None:
        raise UserError(f'there is no /{name}: see /help. A prompt that begins with / takes two.')
      command(rest.strip())
    elif line.strip():
      self.begin(line.removeprefix('/'))

  def use(self, options: Options) -> None:
    """Makes some options those of the session.

    Raises:
      UserError: no text can be streamed with them.
    """
    self.pieces('', options)
    self.options = options

  def pieces(self, prompt: str | Sequence[int], options: Options) -> Generator[str, None, Generated]:
    return stream(
      self.model, prompt, assistant_model=self.assistant, edits=self.edits, **inputs.given(options)
    )

  def begin(self, prompt: str) -> None:
    self.begun = self.text = prompt
    self.go_on(prompt, show=prompt)

  def go_on(self, text: str | list[int], show: str = '') -> None:
    """Continues a text, until Ctrl-C."""
    [ids] = text_batches.encode(
      text, self.model.tokenizer, self.model.config, leave=1, allow_special=self.options.allow_special
    )
    pieces = self.pieces(ids, self.options)
    self.ids = None
    print(show, end='', flush=True)
    end = 'stopped: /more goes on'
    try:
      with ctrl_c() as pressed:
        while not pressed:
          piece = next(pieces)
          self.text += piece
          print(piece, end='', flush=True)
    except KeyboardInterrupt:
      pass
    except StopIteration as e:
      result: Generated = e.value
      if self.model.tokenizer.decode(result.tokens) == result.text:  # no stop string was cut off
        self.ids = ids + result.tokens
      end = f'{len(result.tokens)} tokens, {result.finish_reason}, seed {self.options.seed}'
    finally:
      print(flush=True)
    note(f'[{end}]')

  def do_set(self, rest: str) -> None:
    r"""NAME VALUE …: changes a setting; without VALUE, to its default. "…" reads \n, '…' does not"""
    name, *words = inputs.words(rest) or ['']
    self.use(inputs.changed(self.options, name, words))

  def do_settings(self, _: str) -> None:
    """shows the settings; those with * are not at their defaults"""
    given = inputs.given(self.options)
    for name, value in (given | vars(self.options)).items():
      print('*' if name in given else ' ', name, '=', repr(value), flush=True)

  def do_seed(self, rest: str) -> None:
    """N: another seed, another text"""
    self.do_set(f'seed {rest}')

  def do_again(self, _: str) -> None:
    """the same prompt with the next seed"""
    if self.begun is None:
      raise UserError('there is no prompt yet.')
    self.do_seed(str(self.options.seed + 1))
    self.begin(self.begun)

  def do_more(self, _: str) -> None:
    """goes on where the last text ended"""
    self.go_on(self.ids or self.text)

  def do_free(self, _: str) -> None:
    """a text without a prompt"""
    self.begin('')

  def do_help(self, _: str) -> None:
    """lists the commands"""
    for name in dir(self):
      if name.startswith('do_'):
        print(f'/{name[3:]:9s}{getattr(self, name).__doc__}')
    print('Ctrl-C stops a text, Ctrl-D ends the session.', flush=True)

  def do_quit(self, _: str) -> None:
    """ends the session"""
    raise EOFError

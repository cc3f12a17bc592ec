"""The verb `gpt2-jax serve`."""

import contextlib
import dataclasses
import os
import re
from typing import Annotated, Literal

import tyro

from gpt2_jax.cli import flags, inputs
from gpt2_jax.core.errors import UserError, brief

KEY = 'GPT2_JAX_API_KEY'
ORIGIN = re.compile(r'\*|[a-z][a-z\d+.-]*://[^/\s?#@]+')
HOST = re.compile(r'\*|[A-Za-z\d._-]+|[A-Fa-f\d:.]+')


@dataclasses.dataclass
class Serve:
  """Answers HTTP requests as OpenAI's completions API does, with a playground (docs/serving.md)."""

  checkpoint: tuple[str, ...]
  """Workdirs of runs or steps of them (DIR, DIR@1200, DIR@best), Hugging Face folders, hub names, or
  others (docs/conversion.md)."""
  host: str = '127.0.0.1'
  """Address to listen at; 0.0.0.0: all. Beyond this machine, set a key."""
  port: int = 8000
  """Port; 0: any that is free."""
  api_key: Annotated[str | None, tyro.conf.arg(metavar='KEY')] = None
  """That requests must bring; default: $GPT2_JAX_API_KEY, which other users here don't see."""
  allow_host: tuple[str, ...] = ()
  """Names by which it may be asked, as gpt.example.org (a proxy's, say); *: any; default: localhost
  and the address that it listens at."""
  allow_origin: tuple[str, ...] = ()
  """Sites whose pages may read answers (CORS), as https://example.org; *: all; default: none."""
  tokenizer: str | None = None
  """Where a checkpoint brings none: gpt2, byte, or a folder."""
  dtype: Literal['float32', 'bfloat16'] | None = None
  """Of parameters and activations; default: float32, of a run that of the run."""
  int8: bool = False
  """Keep the weights in 8 bits."""
  steer: Annotated[tuple[str, ...], tyro.conf.arg(metavar='FILE[:SCALE] …')] = ()
  """Vectors of gpt2-jax steer, which are added inside of the models while they write."""
  slots: int = 8
  """Texts that a model writes at a time; each has a cache for the model's whole context."""
  queue: int = 64
  """Texts that may wait for a slot; beyond that, requests are refused (429)."""
  max_prompt_tokens: int | None = None
  """Of one prompt; default: the model's context."""
  max_tokens: int | None = None
  """The most that a request's max_tokens may be; default: the model's context."""
  max_texts: int = 128
  """Of one request: prompts times best_of."""
  max_body_bytes: int = 1 << 20
  """Of one request."""
  max_connections: int = 1000
  """At a time."""
  timeout: float = 600
  """Seconds for a request, waiting included."""
  opening: inputs.OpeningFlags = inputs.OpeningFlags()

  def check(self) -> None:
    """Raises a UserError that names the flag whose value can't be honoured."""
    flags.check(self)
    for host in self.allow_host:
      if not HOST.fullmatch(host):
        raise UserError(
          f'--allow-host {brief(host)} is no name: a host without scheme and port, as '
          'gpt.example.org or 192.168.1.5; or * for any.'
        )
    for origin in self.allow_origin:
      if not ORIGIN.fullmatch(origin):
        raise UserError(
          f'--allow-origin {brief(origin)} is no origin: a scheme and a host, and no '
          'path, as https://example.org or http://localhost:3000; or * for all.'
        )

  def run(self) -> None:
    self.check()
    names = model_names(self.checkpoint)
    key = self.api_key if self.api_key is not None else os.environ.get(KEY)
    if key == '':
      raise UserError(f'the API key is empty: set --api-key or ${KEY} to one, or neither.')
    try:
      from gpt2_jax.serving import server
    except ModuleNotFoundError as e:
      raise UserError(f'serve needs more packages ({e}): pip install "gpt2_jax[serve]".') from None
    connections, sockets = server.allowed(self.max_connections), server.bind(self.host, self.port)
    with contextlib.ExitStack() as bound:
      for each in sockets:
        bound.enter_context(each)
      self._serve(names, key, connections, sockets)

  def _serve(self, names: list[str], key: str | None, connections: int, sockets: list) -> None:
    """Loads the models and answers, until a signal ends it."""
    from gpt2_jax.checkpoints import pretrained
    from gpt2_jax.interpretation.steering import steering
    from gpt2_jax.model import decode_layout
    from gpt2_jax.serving import app, server
    from gpt2_jax.serving.schemas import Limits

    edits = [edit for spec in self.steer for edit in steering(spec)]
    models = {}
    for name, checkpoint in zip(names, self.checkpoint):
      model = pretrained.open_model(checkpoint, self.tokenizer, self.opening, dtype=self.dtype)
      models[name] = decode_layout.quantize(model) if self.int8 else model
    limits = Limits(
      body_bytes=self.max_body_bytes,
      prompt_tokens=self.max_prompt_tokens,
      new_tokens=self.max_tokens,
      texts=self.max_texts,
      seconds=self.timeout,
    )
    made = app.make_app(
      models,
      slots=self.slots,
      queue=self.queue,
      limits=limits,
      api_key=key,
      roots=dict(zip(names, self.checkpoint)),
      hosts=self.allow_host,
      origins=self.allow_origin,
      edits=edits,
    )
    for name, engine in made.state.serving.engines.items():
      print(f'{name}: {engine.model.config.n_positions} positions, {self.slots} slots', flush=True)
      engine.warm()
    server.make_server(made, host=self.host, sockets=sockets, connections=connections).run()


def model_names(checkpoints: tuple[str, ...]) -> list[str]:
  """By what names checkpoints are served: the last part of a path with its @STEP, or the name on
  the hub.

  Raises:
    UserError: there is none, or two are the same.
  """
  from gpt2_jax.checkpoints.workdir import split_step

  names = []
  for checkpoint in checkpoints:
    path, step = split_step(checkpoint)
    name = path.resolve().name if path.exists() else checkpoint
    names.append(name if step is None else f'{name}@{step}')
  if not names:
    raise UserError('--checkpoint names nothing to serve.')
  if twice := next((name for name in names if names.count(name) > 1), None):
    raise UserError(f'two checkpoints would be served as {twice!r}: rename one.')
  return names

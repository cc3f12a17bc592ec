"""A server under load: many clients at once, beside servers that write one text after another.

    python -m benchmarks.serving [--clients 64] [--seconds 60] [--repeats 2] [--json FILE]

needs the extra `serve`; torch and transformers too for one row. A tiny random model of
configs/tiny.py's size writes bytes. Three servers, processes of their own, are asked in turns by the
same clients, which send one request after another: ours with one slot, ours with `--slots`, and the
usual one around transformers' `generate`, a lock and a thread pool, whose texts never stream. The
answers are made beforehand, one at a time, by the server itself; each answer under load is compared
with the one it must be. A third of the requests stream, and of these the time to the first token
counts.
"""

import argparse
import asyncio
import contextlib
import functools
import importlib.util
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.common import Worker, byte_model, ratio, report, take_turns

START = """
import threading
def start(server):
  threading.Thread(target=server.run, daemon=True).start()
  while not server.started:
    time.sleep(0.01)
  return server.servers[0].sockets[0].getsockname()[1]
"""

OURS = (
  START
  + """
from gpt2_jax.checkpoints import pretrained
from gpt2_jax.serving.app import make_app
from gpt2_jax.serving.server import make_server
def run(folder, slots):
  app = make_app({'tiny': pretrained.from_pretrained(folder)}, queue=1000, slots=slots)
  app.state.serving.engines['tiny'].warm()
  return start(make_server(app, host='127.0.0.1', port=0, log_level='error'))
"""
)

THEIRS = (
  START
  + """
import torch, transformers, uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse
from starlette.routing import Route
transformers.logging.set_verbosity_error()
lock = threading.Lock()
def run(folder, slots):
  model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
  def write(body):
    ids = torch.tensor([list(body['prompt'].encode())])
    chosen = {'temperature': body.get('temperature', 1), 'top_k': body.get('top_k', 0),
              'top_p': body.get('top_p', 1)}
    with lock, torch.inference_mode():
      torch.manual_seed(body['seed'])
      ids = model.generate(
          ids, attention_mask=torch.ones_like(ids), max_new_tokens=body['max_tokens'],
          eos_token_id=256, pad_token_id=256,
          **({'do_sample': True} | chosen if chosen['temperature'] else {'do_sample': False}))
    return bytes(i for i in ids[0, len(body['prompt']):].tolist() if i < 256).decode(errors='replace')
  async def complete(request):
    return JSONResponse({'choices': [{'text': await run_in_threadpool(write, await request.json())}]})
  app = Starlette(routes=[Route('/v1/completions', complete, methods=['POST'])])
  return start(uvicorn.Server(uvicorn.Config(app, port=0, log_level='error')))
"""
)


def bodies(count: int) -> list[dict]:
  """Requests of all sorts; every third streams."""
  kinds = ({}, {'temperature': 0.7, 'top_k': 20}, {'temperature': 0}, {'top_p': 0.9})
  return [
    dict(
      prompt=f'def f{i}(' + 'x, ' * (i % 20),
      max_tokens=32 + 16 * (i % 5),
      seed=i,
      stream=i % 3 == 0,
      **kinds[i % 4],
    )
    for i in range(count)
  ]


async def ask(port: int, body: dict) -> tuple[str, float, int]:
  """The text, the seconds to its first piece, and the status; a plain HTTP client costs little."""
  content = json.dumps(body).encode()
  reader, writer = await asyncio.open_connection('127.0.0.1', port)
  began, first, lines = time.perf_counter(), 0.0, []
  writer.write(
    b'POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n'
    b'Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%s' % (len(content), content)
  )
  status = int((await reader.readline()).split()[1])
  async for line in reader:
    if line.startswith((b'data: {', b'{')):
      first = first or time.perf_counter() - began
      lines.append(line)
  writer.close()
  texts = [json.loads(line.removeprefix(b'data: '))['choices'][0]['text'] for line in lines]
  return ''.join(texts), first, status


async def load(port: int, asked: list[dict], want: list[str], clients: int, seconds: float) -> dict:
  """What so many clients see in so many seconds. Those that have begun are heard to their end."""
  began, done, firsts, wrong = time.perf_counter(), 0, [], 0

  async def client(number: int) -> None:
    nonlocal done, wrong
    i = number
    while time.perf_counter() - began < seconds:
      body = asked[i % len(asked)]
      text, first, status = await ask(port, body)
      done += 1
      wrong += status != 200 or text != want[i % len(asked)]
      if body['stream']:
        firsts.append(first)
      i += 1

  await asyncio.gather(*map(client, range(clients)))
  passed = time.perf_counter() - began
  return dict(requests=done, wrong=wrong, seconds_a_request=passed / done, firsts=firsts)


class Side:
  """A server that runs, and what its turns have shown."""

  def __init__(self, name: str, slots: int, worker: Worker, folder: str, asked: list[dict]):
    self.name, self.slots, self.worker = name, slots, worker
    self.port, self.asked, self.turns = worker.ask(folder=folder, slots=slots), asked, []

    async def one_by_one():
      return [(await ask(self.port, body))[0] for body in self.asked]

    self.texts = asyncio.run(one_by_one())
    self.before = worker.resident_bytes()

  def turn(self, clients: int, seconds: float) -> float:
    """Seconds a request."""
    self.turns.append(asyncio.run(load(self.port, self.asked, self.texts, clients, seconds)))
    seconds_a_request = self.turns[-1]['seconds_a_request']
    print(f'{self.name}, {self.slots}: {1 / seconds_a_request:.1f} requests a second', flush=True)
    return seconds_a_request

  def row(self, clients: int) -> dict:
    firsts = sorted(1e3 * first for turn in self.turns for first in turn['firsts'])
    return dict(
      server=self.name,
      slots=self.slots,
      clients=clients,
      requests=sum(turn['requests'] for turn in self.turns),
      wrong=sum(turn['wrong'] for turn in self.turns),
      seconds_a_request=[turn['seconds_a_request'] for turn in self.turns],
      first_p50_ms=statistics.median(firsts),
      first_p99_ms=firsts[min(len(firsts) - 1, int(0.99 * len(firsts)))],
      rss_before=self.before,
      rss_after=self.worker.resident_bytes(),
    )


def main() -> None:
  flags = argparse.ArgumentParser(description=(__doc__ or '').splitlines()[0])
  flags.add_argument('--clients', type=int, default=64)
  flags.add_argument('--seconds', type=float, default=60, help='of a turn')
  flags.add_argument('--repeats', type=int, default=2, help='turns of each')
  flags.add_argument('--slots', type=int, default=32)
  flags.add_argument('--requests', type=int, default=48, help='different ones, asked in turns')
  flags.add_argument('--json')
  args = flags.parse_args()
  import gpt2_jax

  model = byte_model()
  with contextlib.ExitStack() as stack:
    rows = stack.enter_context(report(args.json))
    folder = str(Path(stack.enter_context(tempfile.TemporaryDirectory())) / 'tiny')
    gpt2_jax.save_pretrained(model, folder)
    kinds = [('ours', OURS, 1), ('ours', OURS, args.slots)]
    if importlib.util.find_spec('transformers') and importlib.util.find_spec('torch'):
      kinds.append(('transformers', THEIRS, 1))
    sides = {
      f'{name}, {slots}': Side(
        name,
        slots,
        stack.enter_context(Worker(code, JAX_PLATFORMS='cpu')),
        folder,
        bodies(args.requests),
      )
      for name, code, slots in kinds
    }
    one, many, *_ = sides.values()
    if one.texts != many.texts:
      sys.exit(f'the texts of one slot and of {args.slots} differ')
    seconds = take_turns(
      {
        name: functools.partial(side.turn, args.clients, args.seconds) for name, side in sides.items()
      },
      args.repeats,
    )
    print(
      f'{"server":14s}{"slots":>5s}{"requests":>9s}{"wrong":>6s}{"req/s":>8s}{"first p50":>11s}'
      f'{"p99, ms":>9s}{"RSS MiB":>9s}{"after":>7s}   many slots write'
    )
    ours = list(seconds.values())[1]
    for name, side in sides.items():
      row = side.row(args.clients) | dict(times=ratio(seconds[name], ours))
      rows.append(row)
      print(
        f'{side.name:14s}{side.slots:5d}{row["requests"]:9d}{row["wrong"]:6d}'
        f'{1 / statistics.median(row["seconds_a_request"]):8.1f}{row["first_p50_ms"]:11.0f}'
        f'{row["first_p99_ms"]:9.0f}{row["rss_before"] >> 20:9d}{row["rss_after"] >> 20:7d}   '
        '{:.2f} ({:.2f}-{:.2f}) times as much'.format(*row['times'])
      )
  if any(row['wrong'] for row in rows):
    sys.exit('answers were wrong')


if __name__ == '__main__':
  main()

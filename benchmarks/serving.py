"""A server under load: many clients at once, beside servers that write one text after another.

    python -m benchmarks.serving [--clients 64] [--seconds 60] [--slots 32] [--json FILE]

needs the extra `serve`; torch and transformers too for one row. A tiny random model of
configs/tiny.py's size writes bytes. Three servers, processes of their own, are asked one after the
other by the same clients, which send one request after another: ours with one slot, ours with
`--slots`, and the usual one around transformers' `generate`, a lock and a thread pool, whose texts
never stream. Answers of ours are made beforehand, one at a time, by the server itself; each answer
under load is compared with the one it must be. A third of the requests stream, and of these the time
to the first token counts.
"""

import argparse
import asyncio
import contextlib
import importlib.util
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.common import Worker, report

SERVER = '''
import threading
from gpt2_jax import pretrained
from gpt2_jax.serving.app import make_app
from gpt2_jax.serving.server import make_server
def run(**options):
  if 'slots' not in options:
    return {'rss': 1024 * int(open('/proc/self/status').read().partition('VmRSS:')[2].split()[0])}
  app = make_app({'tiny': pretrained.from_pretrained(folder)}, queue=1000, **options)
  app.state.serving.engines['tiny'].warm()
  server = make_server(app, host='127.0.0.1', port=0, log_level='error')
  threading.Thread(target=server.run, daemon=True).start()
  while not server.started:
    time.sleep(0.01)
  return {'port': server.servers[0].sockets[0].getsockname()[1]}
'''

PEER = '''
import threading
import torch, transformers, uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse
from starlette.routing import Route
transformers.logging.set_verbosity_error()
lock = threading.Lock()
def run(**options):
  if 'slots' not in options:
    return {'rss': 1024 * int(open('/proc/self/status').read().partition('VmRSS:')[2].split()[0])}
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
  server = uvicorn.Server(uvicorn.Config(app, port=0, log_level='error'))
  threading.Thread(target=server.run, daemon=True).start()
  while not server.started:
    time.sleep(0.01)
  return {'port': server.servers[0].sockets[0].getsockname()[1]}
'''


def bodies(count: int = 48) -> list[dict]:
  """Requests of all sorts; every third streams."""
  kinds = ({}, {'temperature': 0.7, 'top_k': 20}, {'temperature': 0}, {'top_p': 0.9})
  return [dict(prompt=f'def f{i}(' + 'x, ' * (i % 20), max_tokens=32 + 16 * (i % 5), seed=i,
               stream=i % 3 == 0, **kinds[i % 4]) for i in range(count)]


async def ask(port: int, body: dict) -> tuple[str, float, int]:
  """The text, the seconds to its first piece, and the status; a plain HTTP client costs little."""
  content = json.dumps(body).encode()
  reader, writer = await asyncio.open_connection('127.0.0.1', port)
  began, first, lines = time.perf_counter(), 0.0, []
  writer.write(b'POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\n'
               b'Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%s'
               % (len(content), content))
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
      wrong += status != 200 or (bool(want) and text != want[i % len(asked)])
      if body['stream']:
        firsts.append(first)
      i += 1

  await asyncio.gather(*map(client, range(clients)))
  passed = time.perf_counter() - began
  firsts.sort()
  return dict(requests=done, wrong=wrong, seconds=passed, requests_per_second=done / passed,
              first_p50_ms=1e3 * statistics.median(firsts),
              first_p99_ms=1e3 * firsts[min(len(firsts) - 1, int(0.99 * len(firsts)))])


def measure(server: str, code: str, folder: str, slots: int, clients: int, seconds: float) -> dict:
  """A row of the table, and the texts one at a time."""
  with Worker(f'folder = {folder!r}\n' + code, JAX_PLATFORMS='cpu') as worker:
    port, asked = worker.ask(slots=slots)['port'], bodies()

    async def one_by_one():
      return [(await ask(port, body))[0] for body in asked]

    texts = asyncio.run(one_by_one())
    before = worker.ask()['rss']
    # torch's generator is one for all: there a text depends on what was written before
    row = asyncio.run(load(port, asked, texts if code == SERVER else [], clients, seconds))
    return dict(server=server, slots=slots, clients=clients, **row, rss_before=before,
                rss_after=worker.ask()['rss'], texts=texts)


def main() -> None:
  flags = argparse.ArgumentParser(description=(__doc__ or '').splitlines()[0])
  flags.add_argument('--clients', type=int, default=64)
  flags.add_argument('--seconds', type=float, default=60)
  flags.add_argument('--slots', type=int, default=32)
  flags.add_argument('--json')
  args = flags.parse_args()
  import gpt2_jax
  from configs import tiny
  from gpt2_jax import tokenizer
  from gpt2_jax.config import GPTConfig
  sizes = tiny.get_config().model
  config = GPTConfig(vocab_size=257, n_positions=sizes.n_positions, n_embd=sizes.n_embd,
                     n_layer=sizes.n_layer, n_head=sizes.n_head)
  model = gpt2_jax.bind(config, gpt2_jax.init_params(config, 0))
  model.tokenizer = tokenizer.load('byte')
  with contextlib.ExitStack() as stack:
    rows = stack.enter_context(report(args.json))
    folder = str(Path(stack.enter_context(tempfile.TemporaryDirectory())) / 'tiny')
    gpt2_jax.save_pretrained(model, folder)
    print(f'{"server":14s}{"slots":>5s}{"requests":>9s}{"wrong":>6s}{"req/s":>8s}{"first p50":>11s}'
          f'{"p99, ms":>9s}{"RSS MiB":>9s}{"after":>7s}', flush=True)
    sides, texts = [('ours', SERVER, 1), ('ours', SERVER, args.slots)], []
    if importlib.util.find_spec('transformers') and importlib.util.find_spec('torch'):
      sides.append(('transformers', PEER, 1))
    for server, code, slots in sides:
      row = measure(server, code, folder, slots, args.clients, args.seconds)
      texts.append(row.pop('texts'))
      rows.append(row)
      print(f'{server:14s}{slots:5d}{row["requests"]:9d}{row["wrong"]:6d}'
            f'{row["requests_per_second"]:8.1f}{row["first_p50_ms"]:11.0f}{row["first_p99_ms"]:9.0f}'
            f'{row["rss_before"] >> 20:9d}{row["rss_after"] >> 20:7d}', flush=True)
    rate = [row['requests_per_second'] for row in rows]
    for row in rows[:1] + rows[2:]:
      row['times'] = rate[1] / row['requests_per_second']
      print(f'{args.slots} slots write {row["times"]:.1f} times what {row["server"]} with one does')
  if texts[0] != texts[1]:
    sys.exit(f'the texts of one slot and of {args.slots} differ')
  if any(row['wrong'] for row in rows):
    sys.exit('answers were wrong')


if __name__ == '__main__':
  main()

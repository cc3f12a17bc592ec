"""A server under load: many clients at once, beside the same server with one slot.

    python -m benchmarks.serving [--clients 64] [--seconds 60] [--slots 32] [--json FILE]

needs the extra `serve`. A tiny random model of configs/tiny.py's size writes bytes. Both servers are
processes of their own, asked one after the other by the same clients, which send one request after
another. The requests' answers are made beforehand, one at a time, by the server itself; each answer
under load is compared with the one it must be. A third of the requests stream, and of these the time
to the first token counts.
"""

import argparse
import asyncio
import contextlib
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
  tokens = 0

  async def client(number: int) -> None:
    nonlocal done, wrong, tokens
    i = number
    while time.perf_counter() - began < seconds:
      body = asked[i % len(asked)]
      text, first, status = await ask(port, body)
      done += 1
      wrong += status != 200 or text != want[i % len(asked)]
      tokens += body['max_tokens']
      if body['stream']:
        firsts.append(first)
      i += 1

  await asyncio.gather(*map(client, range(clients)))
  passed = time.perf_counter() - began
  firsts.sort()
  return dict(requests=done, wrong=wrong, seconds=passed, requests_per_second=done / passed,
              tokens_per_second=tokens / passed,
              first_p50_ms=1e3 * statistics.median(firsts),
              first_p99_ms=1e3 * firsts[min(len(firsts) - 1, int(0.99 * len(firsts)))])


def measure(folder: str, slots: int, clients: int, seconds: float) -> dict:
  """A row of the table."""
  with Worker(f'folder = {folder!r}\n' + SERVER, JAX_PLATFORMS='cpu') as worker:
    port, asked = worker.ask(slots=slots)['port'], bodies()

    async def one_by_one():
      return [(await ask(port, body))[0] for body in asked]

    want = asyncio.run(one_by_one())
    before = worker.ask()['rss']
    row = asyncio.run(load(port, asked, want, clients, seconds))
    return dict(slots=slots, clients=clients, **row, rss_before=before, rss_after=worker.ask()['rss'],
                want=want)


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
    print(f'{"slots":>5s}{"requests":>9s}{"wrong":>6s}{"req/s":>8s}{"tok/s":>8s}{"first p50":>11s}'
          f'{"p99, ms":>9s}{"RSS MiB":>9s}{"after":>7s}', flush=True)
    texts = []
    for slots in (1, args.slots):
      row = measure(folder, slots, args.clients, args.seconds)
      texts.append(row.pop('want'))
      rows.append(row)
      print(f'{slots:5d}{row["requests"]:9d}{row["wrong"]:6d}{row["requests_per_second"]:8.1f}'
            f'{row["tokens_per_second"]:8.0f}{row["first_p50_ms"]:11.0f}{row["first_p99_ms"]:9.0f}'
            f'{row["rss_before"] >> 20:9d}{row["rss_after"] >> 20:7d}', flush=True)
    ratio = rows[1]['tokens_per_second'] / rows[0]['tokens_per_second']
    print(f'{args.slots} slots write {ratio:.1f} times what one does; the texts are '
          f'{"the same" if texts[0] == texts[1] else "not the same"}')
    rows.append(dict(ratio=ratio, same_texts=texts[0] == texts[1]))
  if any(row['wrong'] for row in rows[:2]):
    sys.exit('answers were wrong')


if __name__ == '__main__':
  main()

"""An emulated Cloud Storage, with what a real one has and gcp-storage-emulator lacks.

    python tests/bucket_server.py PORT FOLDER

Many requests at a time; preconditions (ifGenerationMatch), generations; `asked.txt` in FOLDER, a list
of what was asked for: method, path and range of each request; and, told by a file of JSON named
`faults.json` in FOLDER, `latency_s` of each answer and `failing`: the share of answers that are 429,
503, or a connection that is cut, before the answer or in the middle of it.
"""

import functools
import http.server
import io
import json
import os
import random
import signal
import sys
import threading
import time
from pathlib import Path

from gcp_storage_emulator import server
from gcp_storage_emulator.handlers import buckets
from gcp_storage_emulator.storage import Storage

LOCK = threading.Lock()
BUCKET = 'bucket'


class Handler(server.RequestHandler):
  generation = ''

  def __init__(self, folder: Path, storage: Storage, *args):
    self.folder = folder
    super().__init__(storage, *args)

  def _object(self, method: str) -> tuple[str | None, str]:
    """Returns the generation that a request wants an object to have, and that it has; '0': none."""
    request = server.Request(self, method)
    wanted = request.query.get('ifGenerationMatch', [None])[0]
    name = (request.query.get('name') or [None])[0]
    if wanted and name is None and method == 'POST':  # it stands in the body, which is read again
      body = self.rfile.read(int(self.headers.get('Content-Length') or 0))
      self.rfile = io.BytesIO(body)
      name = request.data['meta']['name']
      self.rfile = io.BytesIO(body)
    name = name or server.unquote(request.path.rpartition('/o/')[2])
    bucket = request.path.partition('/b/')[2].partition('/')[0]
    try:
      return wanted, str(self.storage.get_file_obj(bucket, name)['generation'])
    except Exception:
      return wanted, '0'

  def end_headers(self):
    if self.generation:
      self.send_header('x-goog-generation', self.generation)
    super().end_headers()

  def _answer(self, method: str) -> None:
    with open(self.folder / 'asked.txt', 'a') as asked:
      print(method, self.path, self.headers.get('Range') or '', file=asked)
    try:
      faults = json.loads((self.folder / 'faults.json').read_text())
    except (OSError, ValueError):
      faults = {}
    time.sleep(faults.get('latency_s', 0))
    if random.random() < faults.get('failing', 0):
      status = random.choice((429, 503, None, 'half'))
      if status == 'half' and method == 'GET':
        self._answer_half()
      elif status != 'half' and status is not None:
        self.rfile.read(int(self.headers.get('Content-Length') or 0))
        self.send_error(status)
      return  # otherwise the connection ends without an answer
    with LOCK:
      wanted, have = self._object(method)
      if wanted not in (None, have):
        self.send_error(412)
        return
      self.generation = have if method == 'GET' and have != '0' else ''
      server.Router(self).handle(method)

  def _answer_half(self) -> None:
    there, self.wfile = self.wfile, io.BytesIO()
    with LOCK:
      server.Router(self).handle('GET')
    content = self.wfile.getvalue()
    self.wfile = there
    there.write(content[: len(content) - len(content.partition(b'\r\n\r\n')[2]) // 2 - 1])

  def log_message(self, format, *args):
    pass

  def do_GET(self):
    self._answer('GET')

  def do_POST(self):
    self._answer('POST')

  def do_PUT(self):
    self._answer('PUT')

  def do_DELETE(self):
    self._answer('DELETE')

  def do_PATCH(self):
    self._answer('PATCH')


class Server(http.server.ThreadingHTTPServer):
  request_queue_size = 1024  # of 5, those who come at once would have to come again a second later


def main() -> None:
  port, folder = int(sys.argv[1]), Path(sys.argv[2])
  storage = Storage(data_dir=str(folder / 'objects'))
  buckets.create_bucket(BUCKET, storage)

  def leave(*_) -> None:  # not in the middle of a write
    LOCK.acquire()
    os._exit(0)

  signal.signal(signal.SIGTERM, lambda *_: threading.Thread(target=leave).start())
  handler = functools.partial(Handler, folder, storage)
  there = Server(('127.0.0.1', port), handler)
  there.handle_error = lambda *_: None  # who asked has gone
  there.serve_forever()


if __name__ == '__main__':
  main()

"""A hub on this machine."""

import hashlib
import http.server
import shutil
import threading
from pathlib import Path

import pytest

from support.processes import ROOT

GOLDEN = ROOT / 'tests' / 'golden' / 'huggingface'


COMMIT = 'c0ffee' * 6 + 'c0ff'


class Hub(http.server.BaseHTTPRequestHandler):
  """Serves `folder / NAME / FILE` at the hub's addresses, and notes what it was asked for."""

  folder: Path
  asked: list[str]

  def do_HEAD(self):
    self.respond(body=False)

  def do_GET(self):
    self.respond(body=True)

  def respond(self, body):
    name, rest = self.path.lstrip('/').split('/resolve/')
    revision, file = rest.split('/', 1)
    self.asked.append(f'{self.command} {file} @{revision}')
    model = self.folder / name
    problem = (
      'RepoNotFound'
      if not model.is_dir()
      else 'RevisionNotFound'
      if revision not in ('main', COMMIT)
      else 'EntryNotFound'
      if not (model / file).is_file()
      else None
    )
    content = b'' if problem else (model / file).read_bytes()
    self.send_response(404 if problem else 200)
    if problem:
      self.send_header('X-Error-Code', problem)
    self.send_header('X-Repo-Commit', COMMIT)
    self.send_header('ETag', f'"{hashlib.sha256(content).hexdigest()}"')
    self.send_header('Content-Length', str(len(content)))
    self.end_headers()
    if body:
      self.wfile.write(content)

  def log_message(self, format, *args):
    pass


@pytest.fixture
def hub(tmp_path):
  """(folder of models, environment of a process that talks to it, what was asked)."""
  asked, folder = [], tmp_path / 'hub'
  model = folder / 'some' / 'name'
  shutil.copytree(GOLDEN / 'plain', model)
  handler = type('Handler', (Hub,), {'folder': folder, 'asked': asked})
  server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler)
  threading.Thread(target=server.serve_forever, daemon=True).start()
  env = {
    'HF_ENDPOINT': f'http://127.0.0.1:{server.server_port}',
    'HF_HOME': str(tmp_path / 'cache'),
    'HF_HUB_OFFLINE': '0',
    'HF_HUB_DISABLE_TELEMETRY': '1',
  }
  yield folder, env, asked
  server.shutdown()
  server.server_close()

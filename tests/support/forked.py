"""Python processes that begin with the product's libraries imported: that takes seconds, a fork none.

A process of its own, the template, imports them once, starts no thread and no backend of JAX, and
forks for each start. What begins so is a child of the tests like any other (its signals, exit status
and pipes are real), with arguments, environment, folder and files of its own. What the forks share:
the imported modules and what these took from the environment, the seed of Python's hashes and the
layout of the address space; launch.py has no huge pages, for which it starts itself anew. Tests of
these, and of how a start goes, use `subprocess`; and what differs in more than READ_LATER names, or
is another program, is started here as it is there.
"""

import ctypes
import gc
import json
import os
import runpy
import socket
import subprocess
import sys
import threading
import types
import warnings
from pathlib import Path
from typing import ClassVar

import jax  # which sets two of the variables

IMPORTS = (
  'gpt2_jax.training.train',
  'gpt2_jax.cli.main',
  'gpt2_jax.decoding.generate',
  'gpt2_jax.checkpoints.pretrained',
  'gpt2_jax.cli.plan',
  'ml_collections.config_flags',
  'matplotlib.backends.backend_agg',
  'matplotlib.figure',
)
# what may differ between the template and a fork: no library reads it while it is imported
READ_LATER = (
  'XLA_FLAGS',
  'PYTEST_CURRENT_TEST',
  'OMPI_',
  'GPT2_JAX_',
  'JAX_COMPILATION_CACHE_DIR',
  'JAX_ENABLE_COMPILATION_CACHE',
)
START = dict(os.environ)  # as the tests begin; one that changes it later is served without a fork
PR_SET_CHILD_SUBREAPER = 36


def collect_rarely() -> None:
  """Tracing makes so many objects that looking for garbage is a tenth of the time that tests take."""
  gc.freeze()
  gc.set_threshold(100_000, 20, 50)


class Template:
  """The client's side of the process that forks."""

  made: ClassVar[dict[str, 'Template']] = {}  # by PYTHONPATH: the tree whose code is imported
  lock = threading.Lock()

  def __init__(self, root: str):
    self.socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    self.socket.settimeout(300)
    self.env = {k: v for k, v in START.items() if not k.startswith(READ_LATER)}
    self.env['PYTHONPATH'] = root
    command = [sys.executable, __file__, str(theirs.fileno())]
    with theirs:
      self.process = subprocess.Popen(command, env=self.env, cwd=root, pass_fds=[theirs.fileno()])
    self.prctl = ctypes.CDLL(None, use_errno=True).prctl

  def fork(self, argv: list[str], cwd: str, env: dict[str, str], files: list[int]) -> int:
    """The process id of a new child of this process."""
    told = json.dumps([argv, cwd, env]).encode()
    self.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)  # whose parent ends becomes a child of ours
    try:
      socket.send_fds(self.socket, [told], files)
      pid, ready = self.socket.recv(99), self.socket.recv(99)
    finally:
      self.prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)
    if not pid or ready != b'ready':
      raise RuntimeError(f'the template of processes has ended: {self.process.poll()}')
    return int(pid)


def forkable(args: list[str], env: dict[str, str], template: dict[str, str]) -> bool:
  """Whether a fork of the template is the same as this command in this environment."""
  program = args[1:2] in (['launch.py'], ['-c']) or args[1:3] == ['-m', 'gpt2_jax']
  differ = {k for k in env.keys() | template.keys() if env.get(k) != template.get(k)}
  return program and args[0] == sys.executable and all(k.startswith(READ_LATER) for k in differ)


class Popen(subprocess.Popen):
  """subprocess.Popen, by a fork of the template where that is the same."""

  def _execute_child(self, args, executable, preexec_fn, close_fds, pass_fds, cwd, env, *rest):
    # rest: startupinfo, creationflags, shell, each pipe's two ends, restore_signals, gid, gids, uid,
    # umask, start_new_session …
    shell, pipes, session = rest[2], rest[3:9], rest[14]
    args = [args] if isinstance(args, (str, os.PathLike)) else [os.fspath(arg) for arg in args]
    env = dict(os.environ if env is None else env)
    if sys.platform == 'linux' and not (preexec_fn or pass_fds or shell or session):
      with Template.lock:
        root = env.get('PYTHONPATH', '')
        if os.path.exists(f'{root}/launch.py') and root not in Template.made:
          Template.made[root] = Template(root)
        template = Template.made.get(root)
        if template and forkable(args, env, template.env):
          ends = zip((pipes[0], pipes[3], pipes[5]), range(3))
          files = [end if end != -1 else usual for end, usual in ends]
          cwd = os.path.abspath(cwd or '.')
          self.pid = template.fork(args[1:], cwd, env, files)
          self._child_created = True
          self._close_pipe_fds(*pipes)
          return
    super()._execute_child(args, executable, preexec_fn, close_fds, pass_fds, cwd, env, *rest)


def run(command: list[str], timeout: float | None = None, **options) -> subprocess.CompletedProcess:
  """subprocess.run with its output captured as text, by a fork."""
  pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
  with Popen(command, **pipes | options) as process:
    try:
      output = process.communicate(timeout=timeout)
    except BaseException:
      process.kill()
      raise
  return subprocess.CompletedProcess(command, process.returncode, *output)


# --- the template ---------------------------------------------------------------------------------


def serve(server: socket.socket) -> tuple[list[str], str, dict[str, str], list[int]]:
  """Forks once for each request, to the end of those that ask. Returns in the forks alone."""
  while True:
    told, files, *_ = socket.recv_fds(server, 1 << 20, 3)
    if not told:
      os._exit(0)
    with warnings.catch_warnings(action='ignore'):  # of threads: BLAS has some, and can be forked
      middle = os.fork()
    if not middle:
      if child := os.fork():
        server.send(str(child).encode())
        os._exit(0)
      return *json.loads(told), files
    os.waitpid(middle, 0)  # from now on the child is one of the process that asked
    server.send(b'ready')
    for file in files:
      os.close(file)


def become(argv: list[str], cwd: str, env: dict[str, str], files: list[int]) -> None:
  """Makes this process what `python *argv` is before it runs its program."""
  for file, number in zip(files, range(3)):
    os.dup2(file, number)
    os.close(file)
  os.chdir(cwd)
  os.environ.clear()
  os.environ.update({'GLIBC_TUNABLES': ''} | env)  # else launch.py starts itself anew
  for number, (name, mode) in enumerate((('stdin', 'r'), ('stdout', 'w'), ('stderr', 'w'))):
    old = getattr(sys, name)
    lines = 1 if name == 'stderr' or os.isatty(number) else -1
    file = open(number, mode, lines, encoding=old.encoding, errors=old.errors, closefd=False)
    setattr(sys, name, file)
    setattr(sys, f'__{name}__', file)
  jax.config.update('jax_compilation_cache_dir', env.get('JAX_COMPILATION_CACHE_DIR'))
  cached = env.get('JAX_ENABLE_COMPILATION_CACHE') != 'false'
  jax.config.update('jax_enable_compilation_cache', cached)
  sys.orig_argv = [sys.executable, *argv]
  sys.argv = ['-c', *argv[2:]] if argv[0] == '-c' else argv[argv[0] == '-m' :]
  sys.path[0] = '' if argv[0][0] == '-' else os.path.abspath(os.path.dirname(argv[0]))


if __name__ == '__main__':
  import importlib

  gc.disable()
  for name in IMPORTS:
    importlib.import_module(name)
  collect_rarely()
  gc.enable()
  argv, *rest = serve(socket.socket(fileno=int(sys.argv[1])))
  become(argv, *rest)
  if argv[0] == '-m':
    runpy.run_module(argv[1], run_name='__main__', alter_sys=True)
  else:
    program = sys.modules['__main__'] = types.ModuleType('__main__')
    source = argv[1] if argv[0] == '-c' else Path(argv[0]).read_text()
    if argv[0] != '-c':
      program.__file__ = argv[0]
    exec(compile(source, '<string>' if argv[0] == '-c' else argv[0], 'exec'), program.__dict__)

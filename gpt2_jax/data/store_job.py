"""The job of making a token store: who does which part of it, and what is finished.

All of it stands in the folder of the store, which may lie in a bucket: `job.json` says what is made,
a record (`part-00000.json`) that the shards of a part are there, and `done-1-of-4.json` that one of
several processes has done its share. They know nothing else of each other: each may be started when
one likes, be killed and be started again. The one that finds all shares done writes the manifest.
"""

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import json
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

from gpt2_jax.core import buckets
from gpt2_jax.core.buckets import AnyPath
from gpt2_jax.core.errors import UserError
from gpt2_jax.core.files import read_json, write_whole
from gpt2_jax.data.splits import Settings

JOB = 'job.json'
POLL_S, SAID_S = 1.0, 60.0


@dataclasses.dataclass(frozen=True)
class Job:
  """A store to be made, by one or several processes.

  Attributes:
    folder: of the store.
    settings: of the store.
    corpus: JSON that says which text it is made of.
    process: which process this is, of how many.
  """

  folder: AnyPath
  settings: Settings
  corpus: dict
  process: tuple[int, int] = (0, 1)

  @property
  def scratch(self) -> Path:
    """Where shards are written: the folder, or for a bucket one of this machine."""
    if isinstance(self.folder, Path):
      return self.folder
    return buckets.kept(self.folder) / 'prepare-{}-of-{}'.format(*self.process)

  @property
  def content(self) -> dict:
    """What `job.json` says."""
    return json_of({'settings': self.settings.as_json(), 'corpus': self.corpus})

  @property
  def key(self) -> str:
    """Names the job: equal on hosts whose copies of a corpus have been written at other times."""
    return hashlib.sha256(json.dumps(timeless(self.content), sort_keys=True).encode()).hexdigest()

  def begin(self) -> None:
    """Makes the folder ready, and keeps the finished parts of an earlier try at the same."""
    path = self.folder / JOB
    with contextlib.suppress(UserError):  # there is none, or a broken one: then all is made anew
      if read_json(path) == self.content:
        return
    rest = [name for name in names(self.folder) if name not in (JOB, f'{JOB}.tmp')]
    if rest:
      if not path.exists():
        raise UserError(f'{self.folder} exists and is no token store: choose another folder.')
      print(f'{self.folder}: an unfinished preparation of something else is replaced.')
      remove(self.folder, rest)  # the job last, so that a kill in between leaves it
    if isinstance(self.folder, Path):  # in a bucket, folders are names
      self.folder.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(self.content))

  def begun(self) -> bool:
    """Whether process 0 has begun this job, and made its tokenizer."""
    with contextlib.suppress(UserError):
      found = read_json(self.folder / JOB)
      return timeless(found) == timeless(self.content) and self.has_tokenizer()
    return False

  def has_tokenizer(self) -> bool:
    return (self.folder / 'tokenizer' / 'done').exists()

  def _mark(self, process: int) -> AnyPath:
    return self.folder / f'done-{process}-of-{self.process[1]}.json'

  def share_done(self) -> bool:
    """Notes that this process has done its share; whether all have."""
    process, processes = self.process
    if processes == 1:
      return True
    write_whole(self._mark(process), json.dumps({'job': self.key}))
    return all(self._is_done(other) for other in range(processes))

  def _is_done(self, process: int) -> bool:
    with contextlib.suppress(UserError):
      return read_json(self._mark(process)).get('job') == self.key
    return False

  def clean(self) -> None:
    """Removes what a finished store does not need."""
    ours = [n for n in names(self.folder) if n.startswith(('part-', 'done-')) and n.endswith('.json')]
    remove(self.folder, [*ours, JOB])


def timeless(job: dict) -> dict:
  """Returns what `job.json` says without the times at which files were written."""
  corpus = dict(job.get('corpus') or {})
  if isinstance(corpus.get('files'), list):
    corpus['files'] = [file[:2] for file in corpus['files']]
  return json_of(job | {'corpus': corpus})


def wait(until: Callable[[], bool], folder: AnyPath, what: str) -> None:
  """Waits for other processes, and says now and then for what."""
  said = time.monotonic()
  while not until():
    time.sleep(POLL_S)
    if time.monotonic() - said > SAID_S:
      said = time.monotonic()
      print(f'{folder}: waiting for {what}', file=sys.stderr, flush=True)


def names(folder: AnyPath) -> list[str]:
  """Returns the names of what lies in the folder of a store; in a bucket, of files below it."""
  if isinstance(folder, Path):
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []
  return list(buckets.listing(folder))


def remove(folder: AnyPath, which: list[str]) -> None:
  """Removes files and folders, whether they are there or not."""
  if isinstance(folder, Path):
    for path in (folder / name for name in which):
      shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    return

  def work(name: str) -> None:
    with contextlib.suppress(FileNotFoundError):
      (folder / name).unlink()

  with concurrent.futures.ThreadPoolExecutor(buckets.THREADS) as pool:
    list(pool.map(work, which))


def json_of(value: dict) -> dict:
  """Returns `value` as it comes back from JSON."""
  return json.loads(json.dumps(value))

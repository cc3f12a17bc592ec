"""What is on the disk is as it was written, and one run at a time writes it: hashes, locks, records,
and small files that hold anything.
"""

import contextlib
import fcntl
import importlib.metadata
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import forked
from support.processes import ROOT, environment, run
from support.texts import make_text

import gpt2_jax
from gpt2_jax.checkpoints import manifest, orbax_store, saved_steps
from gpt2_jax.cli.main import main
from gpt2_jax.core import files, verified
from gpt2_jax.core.errors import UserError, saving
from gpt2_jax.data import prepare, token_store, verify
from gpt2_jax.training import workdir_lock
from gpt2_jax.training.stopping import Patience
from gpt2_jax.training.train import train
from gpt2_jax.training.watch import goodput, metrics_file, run_record, run_summary

few = settings(deadline=None, max_examples=20, suppress_health_check=list(HealthCheck))


def tiny_config(folder: Path, **train_section):
  from configs import base

  config = base.get_config()
  config.model.update(n_layer=1, n_embd=16, n_head=2, n_positions=16, dtype='float32')
  config.data.update(
    corpus=f'text:{folder}/*.txt',
    directory=str(folder / 'data'),
    tokenizer='byte',
    split='tail',
    val_fraction=0.05,
  )
  config.train.update(dict(steps=6, global_batch_tokens=128) | train_section)
  config.optim.warmup_steps = 1
  config.checkpoint.every = 2
  config.evaluate.every = 6
  config.log.sample_tokens = 2
  config.log.to = ''
  return config


@pytest.fixture(scope='session')
def made(tmp_path_factory):
  """A folder with texts, a store of them in `data`, and a finished run of 6 steps in `run`."""
  folder = tmp_path_factory.mktemp('integrity')
  rng = np.random.default_rng(0)
  for i in range(3):
    (folder / f'{i}.txt').write_text(make_text(rng, 200))
  assert train(tiny_config(folder), folder / 'run') == 0
  return folder


@pytest.fixture
def copy(made, tmp_path):
  """The same, to be damaged."""
  shutil.copytree(made / 'run', tmp_path / 'run')
  return tmp_path / 'run'


def the_store(folder: Path) -> Path:
  return next(path.parent for path in (folder / 'data').rglob(token_store.MANIFEST))


# --- small files that hold anything ---------------------------------------------------------------

VALUES = st.sampled_from(
  [
    None,
    True,
    -1,
    0,
    2**63,
    10**30,
    1.5,
    float('nan'),
    float('inf'),
    '',
    'x',
    '../x',
    '\0',
    'ä' * 300,
    [],
    [1],
    {},
    {'a': 1},
  ]
)


def mutate_leaf(value, data):
  """One value within it, whichever, made another or removed."""
  if not isinstance(value, (dict, list)) or not value or data.draw(st.integers(0, 9)) == 0:
    return data.draw(VALUES)
  keys = list(value) if isinstance(value, dict) else range(len(value))
  key = data.draw(st.sampled_from(keys))
  if data.draw(st.integers(0, 4)) == 0:
    del value[key]
  else:
    value[key] = mutate_leaf(value[key], data)
  return value


def mutate(path: Path, data) -> None:
  """Damages a file in one of the ways that disks, editors and people have."""
  content = path.read_bytes()
  kinds = ['bytes', 'cut', 'leaf', 'leaf', 'leaf', 'other', 'folder', 'gone']
  kind = data.draw(st.sampled_from(kinds))
  if kind == 'bytes':
    changed = bytearray(content)
    for _ in range(data.draw(st.integers(1, 3))):
      changed[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(changed)
  elif kind == 'cut':
    path.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
  elif kind == 'leaf':
    lines = content.decode().splitlines() if path.suffix == '.jsonl' else [content.decode()]
    at = data.draw(st.integers(0, len(lines) - 1))
    lines[at] = json.dumps(mutate_leaf(json.loads(lines[at]), data))
    path.write_text('\n'.join(lines) + '\n')
  elif kind == 'other':
    path.write_bytes(
      data.draw(
        st.sampled_from(
          [
            b'',
            b'{',
            b'[' * 100_000,
            b'{"a":' * 1000,
            b'\xff\xfe',
            b'null',
            b'1' * 5000,
            b'{}',
            b'[]',
            bytes(len(content)),
            b'"\\ud800"',
          ]
        )
      )
    )
  else:
    path.unlink()
    if kind == 'folder':
      path.mkdir()


@contextlib.contextmanager
def or_refused():
  """What is done in it works, or ends in a short message."""
  try:
    yield
  except UserError as e:
    assert len(str(e)) < 2000


RUN = [
  'config.json',
  'env.json',
  'metrics.jsonl',
  'tokenizer/vocab.json',
  'checkpoints/6/manifest.json',
  'checkpoints/6/meta/metadata',
  'checkpoints/6/_CHECKPOINT_METADATA',
]


@pytest.mark.parametrize('name', RUN)
@settings(few, max_examples=8)
@given(data=st.data())
def test_readers_of_a_run_with_a_damaged_file(made, name, data):
  """read_meta, from_pretrained (sample, evaluate, convert, serve), reproduce: never a traceback."""
  from gpt2_jax.checkpoints import model_card, workdir
  from gpt2_jax.training import knobs, reproduce

  with tempfile.TemporaryDirectory() as scratch:
    run = Path(scratch) / 'run'
    shutil.copytree(made / 'run', run)
    mutate(run / name, data)
    with or_refused():
      assert saved_steps.read_meta(run)['step'] in (4, 6)
    with or_refused():
      source = workdir.open_source(run)
      source.tensor('wte.weight')
      model_card.model_card(source)
    with or_refused():
      knobs.check(reproduce.as_config(reproduce._recorded(run)[0]))
    with or_refused():
      run_record.finished(run)


@pytest.mark.parametrize('loss', [[], 'low', {}, True])
def test_a_held_out_loss_that_is_no_number_is_not_shown(copy, loss):
  from gpt2_jax.checkpoints import model_card, workdir

  lines = metrics_file.read(copy)
  kept = [json.dumps(line) for line in lines[:-1]] + [json.dumps(lines[-1] | {'eval/loss': loss})]
  (copy / metrics_file.FILE).write_text('\n'.join(kept) + '\n')
  source = workdir.open_source(copy)
  assert source.record is not None
  assert loss is True or lines[-1]['step'] not in [line['step'] for line in source.record['losses']]
  assert model_card.model_card(source)


@pytest.mark.parametrize('name', RUN[:3])
@few
@given(data=st.data())
def test_a_start_of_a_run_with_a_damaged_file(made, name, data):
  """It is set aside, and what follows from the rest can be had."""
  with tempfile.TemporaryDirectory() as scratch:
    run = Path(scratch) / 'run'
    shutil.copytree(made / 'run', run)
    mutate(run / name, data)
    with or_refused():
      run_record.set_aside(run)
      lines = metrics_file.read(run)
      metrics_file.flaws(run, 6)
      assert goodput.goodput(goodput.seconds_before(lines, run_record.starts(run), 4)) >= 0
      Patience(1, lines, 6)
      run_record.mark_finished(run)
      if lines:
        run_summary.summary(run, '', 'x', dict.fromkeys(goodput.KINDS, 1.0))


@pytest.mark.parametrize('lost', ['step', 'seconds'])
def test_a_start_that_notes_its_step_or_its_seconds_alone_is_set_aside(copy, lost):
  found = json.loads((copy / 'env.json').read_text())
  del found['starts'][-1][lost]
  (copy / 'env.json').write_text(json.dumps(found))
  with pytest.raises(UserError, match='env.json'):
    run_record.starts(copy)
  run_record.set_aside(copy)
  assert goodput.seconds_before(metrics_file.read(copy), run_record.starts(copy), 4)['step'] >= 0


def test_a_run_goes_on_from_what_is_whole(made, copy, capfd):
  """The newest checkpoint's manifest is brackets, no small file is whole: nothing keeps it."""
  (copy / 'checkpoints' / '6' / manifest.FILE).write_text('[' * 1000)
  (copy / 'config.json').write_text('{')
  (copy / 'env.json').write_text('{"starts": [3]}')
  one, two, three, _, five, six = (copy / metrics_file.FILE).read_bytes().splitlines(keepends=True)
  (copy / metrics_file.FILE).write_bytes(
    one + three[:20] + b'\xff' + three[20:] + two + two + five + six
  )
  assert train(tiny_config(made), copy) == 0
  out, err = capfd.readouterr()
  assert 'checkpoint of step 6: manifest.json is damaged' in err
  assert 'resumed from step 4 of 6' in out
  assert re.search(r'config.json can\'t be read: .*is now config.json.damaged-1, and the run', out)
  assert re.search(r'env.json can\'t be read: starts\[0\] is 3.*is now env.json.damaged-1', out)
  assert (
    "metrics.jsonl: there is no line of step 3 to 4; 1 lines can't be read; 1 steps stand "
    'there twice, of which the last counts (the file as it was: metrics.jsonl.damaged-1). The '
    'run goes on.'
  ) in out
  assert [line['step'] for line in metrics_file.read(copy)] == [1, 2, 5, 6]
  assert (copy / 'metrics.jsonl.damaged-1').read_bytes().count(b'\xff') == 1
  lines = {line['step']: line for line in metrics_file.read(made / 'run')}
  for line in metrics_file.read(copy):  # bitwise those of the run that nothing happened to
    assert metrics_file.plain(line) == metrics_file.plain(lines[line['step']])
  assert len(run_record.starts(copy)) == 1 and json.loads((copy / 'config.json').read_text())


def test_a_record_with_a_gap_is_noticed(made, copy, capfd):
  lines = (copy / metrics_file.FILE).read_text().splitlines(keepends=True)
  (copy / metrics_file.FILE).write_text(''.join(lines[:2] + lines[5:]) + lines[5][:30])
  assert train(tiny_config(made), copy) == 0
  out = capfd.readouterr().out
  assert f'{copy / metrics_file.FILE}: there is no line of step 3 to 5. The run goes on.' in out
  assert not list(copy.glob('*.damaged*'))  # nothing was lost: the line that a kill cut short is none


# --- token stores ---------------------------------------------------------------------------------


@pytest.fixture
def stored(made, tmp_path):
  """A copy of the store, to be damaged."""
  shutil.copytree(the_store(made), tmp_path / 'store')
  return tmp_path / 'store'


@settings(few, max_examples=60)
@given(data=st.data())
@pytest.mark.parametrize(
  'name', [token_store.MANIFEST, verified.FILE, 'tokenizer/tokenizer_config.json']
)
def test_a_store_with_a_damaged_file(made, name, data):
  with tempfile.TemporaryDirectory() as scratch:
    folder = Path(scratch) / 'store'
    shutil.copytree(the_store(made), folder)
    mutate(folder / name, data)
    with or_refused():
      opened = token_store.open_store(folder)
      verify.verify(opened)
      split = opened.splits['train']
      split.documents_in(0, 40)
      assert split.read(0, 40).max() <= 256 and opened.eot <= 256
      assert opened.tokenizer.vocab_size and opened.sha256
      opened.check_vocabulary(257)


@few
@given(data=st.data())
@pytest.mark.parametrize('name', ['job.json', 'part-00000.json', 'train-00000.bin', 'val-00000.idx'])
def test_a_half_prepared_store_with_a_damaged_file(made, name, data):
  """It is made anew where it isn't whole; what comes out is the same, or found out."""
  with tempfile.TemporaryDirectory() as scratch:
    folder = Path(scratch) / 'store'
    shutil.copytree(the_store(made), folder)
    whole = token_store.open_store(folder)
    shards = {split: s['shards'][0] for split, s in whole.manifest['splits'].items()}
    settings_ = prepare.Settings(**whole.manifest['settings'])
    (folder / token_store.MANIFEST).unlink()
    (folder / 'tokenizer' / 'done').touch()
    identity = prepare.corpora.open_corpus(settings_.corpus).identity
    job = prepare.Job(folder, settings_, identity)
    (folder / 'part-00000.json').write_text(json.dumps(shards | {'job': job.key}))
    (folder / 'job.json').write_text(
      json.dumps({'settings': whole.manifest['settings'], 'corpus': identity})
    )
    if name.endswith('json'):
      mutate(folder / name, data)
    else:
      (folder / name).write_bytes((folder / name).read_bytes()[: data.draw(st.integers(0, 100))])
    with or_refused():
      again = prepare.ensure_store(settings_, folder, 1)
      assert again.sha256 == whole.sha256
      assert verify.verify(again, again=True) == 2


def flip(path: Path, at: int = 100) -> None:
  """Changes a byte, as a disk does: neither size nor time tells."""
  content, stat = bytearray(path.read_bytes()), path.stat()
  content[at] ^= 1
  path.write_bytes(content)
  os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_a_shard_is_checked_once(stored, monkeypatch):
  (stored / verified.FILE).unlink()
  read = []
  monkeypatch.setattr(
    verified,
    'digest',
    lambda paths, *a, _digest=verified.digest: (read.append(paths[0].name), _digest(paths, *a))[1],
  )
  opened = token_store.open_store(stored)
  assert verify.verify(opened, ['val']) == 1 and read == ['val-00000.bin']
  assert verify.verify(opened) == 2 and read[1:] == ['train-00000.bin']
  assert verify.verify(opened) == 2 and not read[2:]
  os.utime(stored / 'val-00000.idx')  # another time of change: it is read again
  assert verify.verify(opened) == 2 and read[2:] == ['val-00000.bin']
  flip(stored / 'val-00000.bin')
  verify.verify(opened)
  with pytest.raises(UserError, match=r'val-00000.bin .*has other content.*prepare it again'):
    verify.verify(opened, again=True)


def test_what_was_checked_is_remembered_where_a_store_is_read_only(stored, monkeypatch, tmp_path):
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
  (stored / verified.FILE).unlink()
  write = verified.write_whole

  def no_write(path, content):
    if path.parent == stored:
      raise PermissionError(13, 'Permission denied')
    write(path, content)

  monkeypatch.setattr(verified, 'write_whole', no_write)
  opened = token_store.open_store(stored)
  verify.verify(opened)
  monkeypatch.setattr(verified, 'digest', lambda *_: pytest.fail('read again'))
  verify.verify(opened)
  assert not (stored / verified.FILE).exists()
  assert list((tmp_path / 'cache' / 'gpt2_jax' / 'verified').iterdir())


@pytest.mark.parametrize('name', ['train-00000.bin', 'val-00000.bin', 'train-00000.idx'])
def test_a_run_on_a_damaged_store_ends_and_saves_nothing(made, stored, tmp_path, monkeypatch, name):
  """However late that is found out."""
  (stored / verified.FILE).unlink()
  flip(stored / name, 9)
  late = threading.Event()

  def slow(paths, *rest, _digest=verified.digest):
    late.wait(60)
    return _digest(paths, *rest)

  monkeypatch.setattr(verified, 'digest', slow)
  monkeypatch.setattr(
    verify.Background, 'wait', lambda self, _wait=verify.Background.wait: (late.set(), _wait(self))
  )
  config = tiny_config(made)
  config.data.store = str(stored)
  with pytest.raises(UserError, match=f'{name[:-4]}.*has other content .* nothing was saved'):
    train(config, tmp_path / 'other')
  assert late.is_set() and not list((tmp_path / 'other' / 'checkpoints').iterdir())


def test_evaluate_refuses_a_damaged_store(made, stored, capsys):
  (stored / verified.FILE).unlink()
  flip(stored / 'val-00000.bin')
  with pytest.raises(SystemExit, match='val-00000.bin .*has other content'):
    main(['evaluate', '--checkpoint', str(made / 'run'), '--tasks', f'store:{stored}'])


def test_prepare_verifies(made, stored, capsys):
  options = [
    '--corpus',
    f'text:{made}/*.txt',
    '--tokenizer',
    'byte',
    '--split',
    'tail',
    '--val-fraction',
    '0.05',
    '--output',
    str(stored),
    '--verify',
  ]
  main(['prepare', *options])
  assert '2 shards are as they were written' in capsys.readouterr().out
  flip(stored / 'train-00000.bin')
  with pytest.raises(SystemExit, match='train-00000.bin .*has other content'):
    main(['prepare', *options])


def test_a_store_has_the_tokenizer_that_made_it(stored):
  path = stored / 'tokenizer' / 'tokenizer_config.json'
  opened = token_store.open_store(stored)
  assert opened.tokenizer.sha256 == opened.manifest['tokenizer']['sha256']
  shutil.rmtree(stored / 'tokenizer')
  from gpt2_jax.tokenizer import bpe

  bpe.train_bpe(['some text, some text'], 260).save(stored / 'tokenizer')
  assert path.exists()
  with pytest.raises(UserError, match='is not the tokenizer that made the tokens'):
    _ = token_store.open_store(stored).tokenizer


# --- one run at a time ----------------------------------------------------------------------------


def test_a_second_run_says_who_holds_the_workdir(made, copy):
  before = {path: path.read_bytes() for path in copy.rglob('*') if path.is_file()}
  with workdir_lock.held(copy):
    held_by = re.escape(f'process {os.getpid()} on ')
    with pytest.raises(UserError, match=rf'{held_by}\S+, since 20\d\d-.*Z\).*--workdir') as refused:
      train(tiny_config(made, steps=8), copy)
    assert '\n' not in str(refused.value)
    after = {path: path.read_bytes() for path in copy.rglob('*') if path.is_file()}
    del before[copy / workdir_lock.FILE], after[copy / workdir_lock.FILE]
    assert after == before  # nothing of the first is harmed
    assert saved_steps.read_meta(copy)['step'] == 6  # who reads needs no lock
  assert train(tiny_config(made), copy) == 0  # it is done already, and held by none


HOLDER = """
import os, sys, time
from gpt2_jax.training import workdir_lock
with workdir_lock.held(sys.argv[1]):
  if os.fork() == 0:  # as a worker: it outlives the run
    print(os.getpid(), flush=True)
    time.sleep(60)
    os._exit(0)
  time.sleep(60)
"""


def test_a_lock_ends_with_its_process(tmp_path):
  """SIGKILL, with a forked child that lives on."""
  process = forked.Popen(
    [sys.executable, '-c', HOLDER, str(tmp_path)],
    stdout=subprocess.PIPE,
    text=True,
    cwd=ROOT,
    env=environment(),
  )
  assert process.stdout is not None
  child = int(process.stdout.readline())
  try:
    with pytest.raises(UserError, match=f'process {process.pid} on '), workdir_lock.held(tmp_path):
      pass
    process.kill()
    process.wait()
    os.kill(child, 0)  # it is there
    with workdir_lock.held(tmp_path):
      assert json.loads((tmp_path / workdir_lock.FILE).read_text())['pid'] == os.getpid()
  finally:
    os.kill(child, signal.SIGKILL)
    process.kill()
    process.stdout.close()


def test_a_run_that_came_to_nothing_leaves_no_workdir(tmp_path):
  with contextlib.suppress(UserError), workdir_lock.held(tmp_path / 'run'):
    raise UserError('there is no such corpus')
  assert not list(tmp_path.iterdir())


def test_a_lock_with_a_record_that_is_none(tmp_path):
  for content in (b'', b'\xff', b'[' * 100_000, b'{"pid": "x"}'):
    (tmp_path / workdir_lock.FILE).write_bytes(content)
    with open(tmp_path / workdir_lock.FILE, 'rb') as file:
      fcntl.flock(file, fcntl.LOCK_EX)
      with pytest.raises(UserError, match='another process'), workdir_lock.held(tmp_path):
        pass


# --- what can't be written, and what is no place --------------------------------------------------


@pytest.mark.parametrize(
  'make,says',
  [
    (lambda path: path.write_text(''), 'A file is where a folder should be'),
    (
      lambda path: (path.mkdir(), (path / workdir_lock.FILE).mkdir()),
      'A file is where a folder should',
    ),
  ],
)
def test_a_workdir_that_is_none(made, tmp_path, make, says):
  make(tmp_path / 'run')
  with pytest.raises(UserError, match=says):
    train(tiny_config(made), tmp_path / 'run')
  with pytest.raises(UserError, match='A file is where'):
    (tmp_path / 'file').write_text('')
    train(tiny_config(made), tmp_path / 'file' / 'run')


@pytest.mark.parametrize(
  'number,way_out',
  [
    ('ENOSPC', 'Make room'),
    ('EDQUOT', 'Make room'),
    ('EFBIG', 'ulimit -f'),
    ('EACCES', 'may write to'),
    ('EROFS', 'may write to'),
    ('ENOENT', 'missing: make it'),
    ('ENOTDIR', 'move it away'),
    ('EEXIST', 'move it away'),
    ('EIO', 'fails'),
  ],
)
def test_each_refusal_has_its_own_way_out(number, way_out):
  import errno

  with pytest.raises(UserError, match=way_out) as refused, saving('x', '/there'):
    raise OSError(getattr(errno, number), os.strerror(getattr(errno, number)))
  assert ('Make room' in str(refused.value)) == (number in ('ENOSPC', 'EDQUOT'))


@pytest.mark.parametrize(
  'section,key,value',
  [
    ('data', 'corpus', 'text:az://bucket/*.txt'),
    ('data', 'store', 'ftp://bucket/store'),
    ('data', 'directory', 'az://bucket/data'),
    ('data', 'tokenizer', 'hf://gpt2'),
    (None, 'init_from', 'https://host/model'),
  ],
)
def test_an_address_in_a_config_is_refused(made, tmp_path, monkeypatch, section, key, value):
  monkeypatch.chdir(tmp_path)
  config = tiny_config(made)
  (config[section] if section else config)[key] = value
  with pytest.raises(UserError, match=f'{key} .*://.*not supported: name a local path'):
    train(config, tmp_path / 'run')
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
  'argv',
  [
    ['sample', '--checkpoint', 'az://b/x'],
    ['sample', '--checkpoint', 'x', '--tokenizer', 'az://b/x'],
    ['sample', '--checkpoint', 'x', '--prompt-file', 'ftp://b/x'],
    ['convert', 'x', 'az://b/x', '--to', 'hf'],
    ['convert', 'az://b/x', 'x', '--to', 'hf'],
    ['serve', '--checkpoint', 'a', 'az://b/x'],
    ['reproduce', 'az://b/x'],
    ['reproduce', '.', '--output', 'az://b/x'],
    ['evaluate', '--checkpoint', 'x', '--tasks', 'store:az://b/x'],
    ['evaluate', '--checkpoint', 'x', '--tasks', 'lambada', '--data', 'az://b/x'],
    ['evaluate', '--checkpoint', 'x', '--tasks', 'lambada', '--json', 'az://b/x'],
    ['bias', '--checkpoint', 'x', '--json', 'az://b/x'],
    ['plan', '--config', 'c', '--topology', 'v5e:2x2', '--dump', 'az://b/x'],
    ['prepare', '--corpus', 'text:az://b/*', '--output', 'x'],
    ['prepare', '--corpus', 'stdlib', '--output', 'az://b/x'],
  ],
)
def test_an_address_is_refused_by_each_verb(argv, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(SystemExit, match='://b/.*not supported: name a local path'):
    main(argv)
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
  'door',
  [
    gpt2_jax.from_pretrained,
    token_store.open_store,
    saved_steps.read_meta,
    orbax_store.Checkpoints,
    lambda path: files.write_whole(path, ''),
    lambda path: files.whole(path).__enter__(),
    lambda path: workdir_lock.held(path).__enter__(),
    lambda path: prepare.ensure_store(prepare.Settings('stdlib', 'byte'), path),
  ],
)
def test_an_address_is_refused_by_each_function(door, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  for address in ('az://bucket/run', Path('az://bucket/run'), 'https://host/x'):
    with pytest.raises(UserError, match='(az://bucket/run|https://host/x).*not supported'):
      door(address)
  assert not list(tmp_path.iterdir())
  assert files.local('a:b') == Path('a:b') and files.local('/x//y:z') == Path('/x/y:z')


# --- the command line -----------------------------------------------------------------------------


def launch(*arguments: str) -> subprocess.CompletedProcess:
  return run('launch.py', *arguments, timeout=120)


def test_a_workdir_that_vanishes_hides_no_message(tmp_path):
  workdir = tmp_path / 'run'
  with pytest.raises(UserError, match='what went wrong'), workdir_lock.held(workdir):
    shutil.rmtree(workdir)
    raise UserError('what went wrong')
  with workdir_lock.held(workdir):  # it can be held again
    assert workdir.is_dir()


def test_launch_tells_what_it_takes():
  told = launch('--help')
  assert told.returncode == 0 and not told.stderr
  for part in ('--config', '--workdir', '--dry_run', '--distributed', 'configs/small.py:openwebtext'):
    assert part in told.stdout
  assert re.fullmatch(r'gpt2_jax \S+, jax \S+, Python 3\S+\n', launch('--version').stdout)


def test_versions(capsys):
  main(['--version'])
  own = importlib.metadata.version('gpt2_jax')  # tests/test_site.py: of setup.cfg, and no other
  assert capsys.readouterr().out.startswith(f'gpt2_jax {own}, jax {jax.__version__}, Python ')
  assert gpt2_jax.__version__ == own


@pytest.mark.parametrize(
  'flag,says',
  [
    ('--config.train.stepz=3', r'there is no knob \'train.stepz\'; near it: train.steps'),
    ('--config.trian.steps=3', r'there is no knob \'trian.steps\'; near it: train.steps'),
    ('--wrokdir=x', 'there is no flag --wrokdir; near it: workdir'),
    ('--workdir=az://bucket/run', 'az://bucket/run.* not supported'),
  ],
)
def test_a_flag_that_is_none(flag, says):
  told = launch('--config=configs/tiny.py', flag)
  assert told.returncode == 1 and not told.stdout
  assert re.match(rf'error: .*{says}', told.stderr) and told.stderr.count('\n') == 1


def test_commands_that_are_offered_can_be_pasted(made, tmp_path):
  shutil.copytree(made / 'run', tmp_path / 'my run')
  text = run_summary.summary(
    tmp_path / 'my run', 'It\'s "new"', 'x', dict.fromkeys(goodput.KINDS, 1.0)
  )
  offered = [line for line in text.splitlines() if line.startswith('  gpt2-jax')]
  assert shlex.split(offered[0]) == [
    'gpt2-jax',
    'sample',
    '--checkpoint',
    str(tmp_path / 'my run'),
    '--prompt',
    'It\'s "new"',
  ]


@pytest.mark.slow
def test_a_limit_on_the_size_of_files_is_one_line(made, tmp_path):
  """No trace of asyncio's before it. (JAX's cache of programs couldn't be written either.)"""
  code = (
    'import sys; sys.path[:0] = ["tests", "tests/checkpoints"]\n'
    'from pathlib import Path\nfrom test_integrity import tiny_config\n'
    'from gpt2_jax.core.errors import UserError\nfrom gpt2_jax.training.train import train\n'
    f'try:\n  train(tiny_config(Path({str(made)!r})), {str(tmp_path / "run")!r})\n'
    'except UserError as e:\n  sys.exit(f"error: {e}")'
  )
  told = subprocess.run(
    ['bash', '-c', 'ulimit -f 10; exec "$0" -c "$1"', sys.executable, code],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=120,
    env=environment(JAX_ENABLE_COMPILATION_CACHE='false'),
  )
  assert told.returncode == 1, told.stderr
  *rest, last = told.stderr.splitlines()
  assert re.match('error: cannot write .* File too large.*ulimit -f', last), told.stderr
  assert all(line.startswith(('training', 'evaluating')) for line in rest), told.stderr

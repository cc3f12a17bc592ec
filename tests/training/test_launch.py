"""Real runs in processes of their own: started, killed, continued, refused."""

import contextlib
import json
import os
import pty
import random
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
from support.processes import ROOT, environment, run
from support.runs import STEPS, arguments, lines, plain, start_and_send


def test_a_run_leaves_its_record(finished, text_folder):
  workdir, printed = finished
  record = lines(workdir)
  assert [line['step'] for line in record] == list(range(1, STEPS + 1))
  assert [line['step'] for line in record if 'eval/loss' in line] == [8, 16, 24]
  for key in (
    'train/learning_rate',
    'train/tokens',
    'perf/step_seconds',
    'perf/memory_gib',
    'perf/tokens_per_second',
    'perf/flops_per_second',
  ):
    assert all(line[key] > 0 for line in record), key
  assert record[-1]['train/tokens'] == STEPS * 512
  assert abs(record[0]['train/loss'] - np.log(257)) < 0.2
  assert record[-1]['eval/loss'] < record[0]['train/loss'] - 1

  config = json.loads((workdir / 'config.json').read_text())
  assert config['train']['steps'] == STEPS and config['model']['n_embd'] == 32
  (start,) = json.loads((workdir / 'env.json').read_text())['starts']
  assert start['mesh'] == {'data': 1, 'fsdp': 1, 'seq': 1, 'tensor': 1}
  assert start['command'][0] == 'launch.py' and start['versions']['jax']
  assert (workdir / 'loss.png').read_bytes()[:8] == b'\x89PNG\r\n\x1a\n'
  assert list((workdir / 'tensorboard').glob('events.*'))
  assert json.loads((workdir / 'tokenizer' / 'vocab.json').read_text())['<|endoftext|>'] == 256
  assert 'gpt2-jax sample --checkpoint' in printed and 'held-out loss' in printed


@pytest.mark.slow
def test_a_killed_run_continues_bitwise(finished, text_folder, tmp_path):
  """SIGKILL at a random step, then SIGTERM at another, then to the end."""
  steps = random.randint(2, 9), random.randint(12, 20)
  workdir = tmp_path / 'killed'
  command = arguments(text_folder, workdir)
  assert start_and_send(signal.SIGKILL, steps[0], command, workdir) == -signal.SIGKILL
  assert start_and_send(signal.SIGTERM, steps[1], command, workdir) == 128 + signal.SIGTERM
  saved = lines(workdir)[-1]['step']
  assert str(saved) in os.listdir(workdir / 'checkpoints'), 'SIGTERM saves'
  result = run(*command)
  assert result.returncode == 0, result.stderr
  assert f'resumed from step {saved}' in result.stdout
  assert plain(workdir) == plain(finished[0]), f'killed at {steps}'
  assert len(json.loads((workdir / 'env.json').read_text())['starts']) == 3


def test_a_second_signal_leaves_at_once():
  code = """
import os, signal
from gpt2_jax.training.stopping import StopSignal
with StopSignal() as stop:
  os.kill(os.getpid(), signal.SIGINT)
  print('first', stop.received, flush=True)
  os.kill(os.getpid(), signal.SIGTERM)
  print('second')"""
  result = run('-c', code)
  assert result.returncode == 128 + signal.SIGTERM
  assert result.stdout == f'first {int(signal.SIGINT)}\n' and 'once more' in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize('mesh', ['fsdp=8', 'data=2,tensor=2'])
def test_a_run_continues_on_another_mesh(finished, text_folder, tmp_path, mesh):
  workdir = tmp_path / 'moved'
  shutil.copytree(finished[0], workdir)
  for step in os.listdir(workdir / 'checkpoints'):
    if int(step) != 20:
      shutil.rmtree(workdir / 'checkpoints' / step)
  sizes = dict(size.split('=') for size in mesh.split(','))
  overrides = {f'mesh.{axis}': size for axis, size in sizes.items()}
  overrides |= {'train.micro_batch_rows': 1}
  result = run(*arguments(text_folder, workdir, **overrides), devices=8)
  assert result.returncode == 0, result.stderr
  assert 'resumed from step 20' in result.stdout and 'Involuntary' not in result.stderr
  for have, want in zip(plain(workdir), plain(finished[0]), strict=True):
    assert have == pytest.approx(want, rel=2e-5)


def test_a_run_with_another_model_or_data_is_refused(finished, text_folder):
  workdir, before = finished[0], plain(finished[0])
  result = run(*arguments(text_folder, workdir, model__n_layer=3))
  assert result.returncode == 1 and 'Traceback' not in result.stderr
  assert 'model.n_layer: 2 there, 3 here' in result.stderr
  result = run(
    *arguments(text_folder, workdir, data__store=workdir.parent / 'other', data__val_fraction=0.2)
  )
  assert result.returncode == 1 and 'data.sha256' in result.stderr
  assert plain(workdir) == before


@pytest.mark.slow
def test_a_finished_run_says_so_and_more_steps_go_on(finished, text_folder, tmp_path):
  workdir = tmp_path / 'longer'
  shutil.copytree(finished[0], workdir)
  result = run(*arguments(text_folder, workdir))
  assert result.returncode == 0 and f'step {STEPS} of {STEPS} is done already' in result.stdout
  result = run(*arguments(text_folder, workdir, train__steps=STEPS + 3))
  assert result.returncode == 0, result.stderr
  assert f'train.steps: {STEPS} there, {STEPS + 3} here' in result.stdout
  assert plain(workdir)[:STEPS] == plain(finished[0])
  assert len(lines(workdir)) == STEPS + 3


@pytest.mark.slow
def test_an_evaluation_that_was_stopped_is_made_up_for_at_the_end_too(
  finished, text_folder, tmp_path
):
  """As a signal within the last one leaves it: its step is saved, its held-out loss is missing."""
  workdir = tmp_path / 'cut'
  shutil.copytree(finished[0], workdir)
  *before, last = lines(workdir)
  del last['eval/loss']
  (workdir / 'metrics.jsonl').write_text(''.join(json.dumps(x) + '\n' for x in (*before, last)))
  result = run(*arguments(text_folder, workdir))
  assert result.returncode == 0, result.stderr
  assert plain(workdir) == plain(finished[0])
  assert 'is done already' in run(*arguments(text_folder, workdir)).stdout


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_the_run(text_folder, tmp_path):
  workdir = tmp_path / 'run'
  result = run(
    *arguments(
      text_folder,
      workdir,
      optim__peak_lr=1e25,
      optim__warmup_steps=0,
      optim__clip_norm=0.0,
      checkpoint__every=1,
    )
  )
  assert result.returncode == 1 and 'Traceback' not in result.stderr
  assert 'Nothing of it was saved' in result.stderr and 'row 0: train-00000:' in result.stderr
  assert 'last good checkpoint' in result.stderr and 'that of step' in result.stderr
  assert all(np.isfinite(line['train/loss']) for line in lines(workdir))


@pytest.mark.slow
@pytest.mark.parametrize(
  'limit,every,says',
  [(6_000, 100, 'error: cannot write metrics'), (200_000, 2, 'error: cannot write a checkpoint')],
)
def test_a_full_disk_is_said(finished, text_folder, tmp_path, limit, every, says):
  """The system refuses files beyond a limit, as it would without room."""
  command = arguments(text_folder, tmp_path / 'run', checkpoint__every=every)
  limited = (
    f'import resource, runpy, sys; sys.argv = {command!r}\n'
    f'resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n'
    'runpy.run_path("launch.py", run_name="__main__")'
  )
  result = run('-c', limited)
  message = result.stderr[result.stderr.index('error: ') :].splitlines()[0]
  assert result.returncode == 1 and message.startswith(says)
  assert 'run the same command again' in message
  assert run(*command).returncode == 0
  assert plain(tmp_path / 'run') == plain(finished[0])


@pytest.mark.slow
def test_a_terminal_shows_bars(finished, text_folder, tmp_path):
  """In a pseudo-terminal: a bar for the training, and one inside it for each evaluation."""
  outer, inner = pty.openpty()
  command = arguments(text_folder, tmp_path / 'run', train__steps=10)
  process = subprocess.Popen(
    [sys.executable, *command],
    cwd=ROOT,
    env=environment(TERM='xterm', COLUMNS='150'),
    stdout=inner,
    stderr=inner,
  )
  os.close(inner)
  shown = b''
  with contextlib.suppress(OSError):  # how Linux ends a pseudo-terminal
    while chunk := os.read(outer, 4096):
      shown += chunk
  os.close(outer)
  assert process.wait() == 0, shown.decode()
  for text in ('━', 'training', 'evaluating', '100%', 'step 10: held-out loss', 'tokens/s'):
    assert text.encode() in shown, text


@pytest.mark.slow
def test_sampling_from_a_run(finished, tmp_path):
  command = [
    '-m',
    'gpt2_jax',
    'sample',
    '--checkpoint',
    str(finished[0]),
    '--prompt',
    'the model',
    'a b',
    '--max-new-tokens',
    '12',
    '--seed',
    '3',
    '--top-k',
    '20',
    '--json',
  ]
  results = [run(*command, cwd=tmp_path) for _ in range(2)]
  assert results[0].returncode == 0, results[0].stderr
  assert results[0].stdout == results[1].stdout
  first, second = map(json.loads, results[0].stdout.splitlines())
  assert (first['prompt'], second['prompt']) == ('the model', 'a b')
  assert len(first['tokens']) == len(first['logprobs']) <= 12
  code = f"""
import gpt2_jax
model = gpt2_jax.from_pretrained({str(finished[0])!r})
print(gpt2_jax.generate(model, 'the model', max_new_tokens=12, seed=3, top_k=20)[0].text)"""
  assert run('-c', code).stdout == first['text'] + '\n'


@pytest.mark.parametrize(
  'arguments,says',
  [
    ([], 'say which config'),
    (['--config=configs/nano.py'], 'configs/nano.py'),
    (['--config=configs/small.py:wikipedia'], "recipe 'wikipedia' is none of: stdlib"),
    (['--config=configs/tiny.py', '--config.train.stepz=3'], 'stepz'),
    (['--config=configs/tiny.py', '--config.train.steps=many'], 'many'),
    (['--config=configs/tiny.py', 'resume'], "what is 'resume'"),
    (['--config=configs/tiny.py', '--workdri=x'], 'workdri'),
    (['--config=configs/tiny.py', '--config.mesh.tensor=7'], 'does not cover the 1 devices'),
    (['--config=configs/tiny.py', '--config.data.sequence_length=9999'], 'longer than the model'),
    (['--config=configs/tiny.py', '--config.data.corpus=text:/nowhere'], 'no such file or folder'),
    (['--config=configs/tiny.py', '--distributed=on'], 'could not be joined (--distributed=on)'),
  ],
)
def test_wrong_input_gets_one_message(tmp_path, arguments, says):
  result = run('launch.py', *arguments, *([f'--workdir={tmp_path / "run"}']))
  assert result.returncode == 1, result.stdout
  assert says in result.stderr and 'Traceback' not in result.stderr
  assert len(result.stderr.strip().splitlines()) <= 3, result.stderr
  assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize(
  'arguments,says',
  [
    (['sample', '--checkpoint', '/nowhere'], '/nowhere is neither a file or folder here nor a name'),
    (['prepare', '--corpus', 'text:/nowhere', '--output', 'OUT'], 'no such file or folder'),
    (['prepare', '--corpus', 'stdlib', '--output', 'OUT', '--tokenizer', 'bpe:9'], 'at least 257'),
    (['prepare', '--corpus', 'stdlib', '--output', '/proc/a'], 'cannot write the token store to'),
    (['prepare', '--corpus', 'stdlib', '--output', '/proc/a/b'], 'cannot write the token store to'),
  ],
)
def test_wrong_arguments_get_one_message(tmp_path, arguments, says):
  arguments = [str(tmp_path / 'out') if a == 'OUT' else a for a in arguments]
  result = run('-m', 'gpt2_jax', *arguments)
  assert result.returncode == 1
  assert says in result.stderr and 'Traceback' not in result.stderr

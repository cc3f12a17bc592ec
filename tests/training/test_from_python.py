"""`gpt2_jax.train` as a session uses it: again and again, in a notebook, stopped by its button; and
how what it returns is shown.
"""

import contextlib
import queue
import signal
import threading
import time

import jax
import numpy as np
import pytest
from support.processes import ROOT, environment

import gpt2_jax
from gpt2_jax import configs
from gpt2_jax.data import token_store
from gpt2_jax.model.config import GPTConfig
from gpt2_jax.training.stopping import StopSignal


def small_run(text_folder, folder, **train):
  config = configs.tiny()
  config.data.update(
    corpus=f'text:{text_folder}', directory=str(folder / 'data'), tokenizer='byte', val_fraction=0.2
  )
  config.model.update(n_embd=16, n_layer=1, n_head=2, n_positions=32)
  config.train.update(global_batch_tokens=32 * 8, **train)
  config.log.update(sample_tokens=4)
  return config


def test_a_config_is_called_by_its_name():
  import gpt2_jax.configs.tiny as module  # which is the same object then

  assert configs.small('fineweb').to_dict() == configs.load('small:fineweb').to_dict()
  assert configs.tiny().train.steps == 600 and module.get_config().train.steps == 600
  with pytest.raises(AttributeError, match='configs: tiny, small'):
    configs.tny  # noqa: B018


@pytest.mark.slow
def test_again_and_on_other_meshes_in_one_process(text_folder, tmp_path):
  """The same losses; and nothing is left: no handler, thread, lock, folder of compiled programs."""
  handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
  jax.config.update('jax_compilation_cache_dir', None)
  try:
    runs, threads = [], []
    for i, mesh in enumerate(({}, {}, dict(fsdp=2, tensor=2), dict(data=2, fsdp=4))):
      config = small_run(text_folder, tmp_path, steps=3)
      config.mesh.update(mesh)
      runs.append(gpt2_jax.train(config, tmp_path / f'{i}' / 'run'))
      threads.append(threading.active_count())
      assert jax.config.jax_compilation_cache_dir is None
    assert jax.sharding.get_abstract_mesh().empty
  finally:
    jax.config.update('jax_compilation_cache_dir', environment()['JAX_COMPILATION_CACHE_DIR'])
  assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
  assert threads[-1] == threads[0], [thread.name for thread in threading.enumerate()]
  losses = np.array([run.table['train/loss'] for run in runs])
  np.testing.assert_array_equal(losses[0], losses[1])
  np.testing.assert_allclose(losses, losses[:1].repeat(4, 0), rtol=1e-5)
  for i in (0, 2):
    assert (tmp_path / f'{i}' / '.jax_cache').is_dir()
  again = gpt2_jax.train(config, tmp_path / '3' / 'run', train={'steps': 4})  # the lock is free
  assert again.table['step'] == [1, 2, 3, 4]


def test_a_second_ctrl_c_in_a_session_is_an_interrupt(monkeypatch, capsys):
  monkeypatch.setattr('sys.ps1', '>>> ', raising=False)
  with pytest.raises(KeyboardInterrupt), StopSignal() as stop:
    signal.raise_signal(signal.SIGINT)
    assert stop.due()
    signal.raise_signal(signal.SIGINT)
  assert 'SIGINT: saving and leaving' in capsys.readouterr().err


@pytest.mark.slow
def test_what_is_held_is_shown_in_short(text_folder, tmp_path):
  run = gpt2_jax.train(small_run(text_folder, tmp_path, steps=2), tmp_path / 'run')
  model = run.model
  assert '<caption>GPT-2' in model._repr_html_() and run.plot()._repr_png_()[:4] == b'\x89PNG'
  [found] = gpt2_jax.features(model, 'abc')
  assert repr(found) == (
    'Features(3 tokens, last_hidden_state [3, 16], hidden_states [2, 3, 16], attentions [1, 2, 3, 3])'
  )
  [made] = gpt2_jax.generate(model, 'a', max_new_tokens=5, seed=1)
  assert len(repr(made)) < 200 and "finish_reason='length', mean logprob -" in repr(made)
  assert len(made.pieces) == 5 and made._repr_html_().count('<span') == 5
  assert f'title="{np.exp(made.logprobs[0]):.1%}"' in made._repr_html_()
  [store] = (path for path in (tmp_path / 'data').iterdir() if path.is_dir())
  assert repr(token_store.open_store(store)).startswith(f"TokenStore('{store}', tokens: train ")
  assert repr(GPTConfig(n_layer=2)) == 'GPTConfig(n_layer=2)'
  pandas = pytest.importorskip('pandas')
  assert pandas.DataFrame(run.table)['step'].tolist() == [1, 2]


def test_figures_that_few_steps_have_are_in_the_table(tmp_path):
  polars = pytest.importorskip('polars')
  record = [{'step': i, 'train/loss': 1.0} for i in range(1, 301)]
  record[-1]['eval/loss'] = 2.0
  lines = ''.join(f'{line}\n'.replace("'", '"') for line in record)
  (tmp_path / 'metrics.jsonl').write_text(lines)
  table = polars.DataFrame(gpt2_jax.TrainedRun(tmp_path, True).table)
  assert table.shape == (300, 3) and table['eval/loss'][-1] == 2.0


# --- a real kernel --------------------------------------------------------------------------------

CELL = """
import gpt2_jax
config = gpt2_jax.configs.tiny()
config.data.update(corpus='text:{text}', directory='data', tokenizer='byte', val_fraction=0.2)
config.model.update(n_embd=64, n_layer=2, n_head=2, n_positions=64)
config.train.update(global_batch_tokens=64 * 32, steps={steps})
run = gpt2_jax.train(config, 'run')
print('finished', run.finished, run.table['step'][-1])
"""


@pytest.fixture
def kernel(tmp_path):
  pytest.importorskip('ipykernel')
  manager = pytest.importorskip('jupyter_client').KernelManager(kernel_name='python3')
  env = environment() | {'IPYTHONDIR': str(tmp_path / 'ipython')}
  manager.start_kernel(cwd=str(tmp_path), env=env)
  client = manager.client()
  client.start_channels()
  client.wait_for_ready(60)
  yield manager, client
  client.stop_channels()
  manager.shutdown_kernel(now=True)


def messages(client, sent, seconds):
  """What a cell shows, until it has ended."""
  last = time.monotonic() + seconds
  while time.monotonic() < last:
    with contextlib.suppress(queue.Empty):
      message = client.get_iopub_msg(timeout=1)
      if message['parent_header'].get('msg_id') != sent:
        continue
      if (
        message['header']['msg_type'] == 'status' and message['content']['execution_state'] == 'idle'
      ):
        return
      yield message['header']['msg_type'], message['content']
  raise TimeoutError(sent)


@pytest.mark.slow
@pytest.mark.filterwarnings('ignore')  # of Jupyter's own
def test_the_stop_button_saves_and_the_cell_goes_on(kernel, text_folder):
  manager, client = kernel
  assert (ROOT / 'gpt2_jax').is_dir()

  def cell(steps, interrupt_at=''):
    printed, bars, stopped = '', [], False
    sent = client.execute(CELL.format(text=text_folder, steps=steps))
    for kind, content in messages(client, sent, 240):
      assert kind != 'error', content
      printed += content['text'] if kind == 'stream' else ''
      if kind in ('display_data', 'update_display_data'):
        bars.append(content['data'].get('text/html', ''))
      if interrupt_at and not stopped and any(interrupt_at in bar for bar in bars[-1:]):
        manager.interrupt_kernel()
        stopped = True
    return printed, bars

  printed, bars = cell(100_000, interrupt_at='training 1')
  assert 'SIGINT: saving and leaving' in printed and 'finished False' in printed
  assert any('<progress' in bar and 'tokens/s' in bar for bar in bars)
  done = int(printed.split()[-1])
  printed, _ = cell(done + 5)
  assert f'resumed from step {done}' in printed and f'finished True {done + 5}' in printed

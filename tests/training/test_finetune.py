"""Fine-tuning: whole, by adapters, as a classifier; early stopping; on a mesh as on one device."""

import dataclasses
import json
import random
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from support.arrays import assert_close, mesh_of
from support.processes import ROOT, run
from support.texts import make_text

import gpt2_jax
from configs import base, finetune
from gpt2_jax.checkpoints import orbax_store
from gpt2_jax.core.errors import UserError
from gpt2_jax.data import labelled_texts
from gpt2_jax.model.config import LoRA
from gpt2_jax.model.gpt2 import bind, init_params
from gpt2_jax.model.pretrained_model import params_of
from gpt2_jax.model.sizes import num_params, num_trained, trainable_paths
from gpt2_jax.training import run_data, run_plan, stopping
from gpt2_jax.training import train as loop
from gpt2_jax.training.optimizer import make_optimizer, make_schedule
from gpt2_jax.training.run import evaluate
from gpt2_jax.training.step import init_state, make_eval_step, make_train_step

ADAPTERS = LoRA(3, 6.0, ('c_attn', 'c_proj', 'c_fc'), dropout=0.1)


@pytest.fixture(scope='module')
def pretrained(text_folder, tmp_path_factory):
  """The workdir of a small run on made-up text, made by a process of its own."""
  folder = tmp_path_factory.mktemp('pretrained')
  result = run(
    'launch.py',
    '--config=configs/tiny.py',
    f'--workdir={folder}/run',
    *flags(
      {
        'model.n_positions': 32,
        'model.n_embd': 64,
        'data.corpus': f'text:{text_folder}',
        'data.tokenizer': 'byte',
        'data.val_fraction': 0.05,
        'data.directory': folder / 'data',
        'train.steps': 40,
        'train.global_batch_tokens': 512,
        'optim.warmup_steps': 4,
        'log.sample_tokens': 4,
      }
    ),
  )
  assert result.returncode == 0, result.stdout + result.stderr
  return folder / 'run'


def flags(values):
  return [f'--config.{key}={value}' for key, value in values.items()]


def other_text(path):
  """Text that a model of conftest's words has not seen."""
  path.write_text(make_text(np.random.default_rng(1), 6000).upper().replace(' ', '-'))
  return path


def lines(workdir):
  return [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]


@pytest.fixture
def one_device(monkeypatch):
  """For tests in which the mesh is no matter: a step on eight simulated devices takes far longer."""
  first = jax.devices()[:1]
  monkeypatch.setattr(jax, 'devices', lambda *_: first)


def tuning(init_from, text, recipe='full', **overrides):
  """A fine-tuning config for this process's devices."""
  config = finetune.get_config(recipe)
  config.init_from = str(init_from)
  config.data.update(corpus=f'text:{text}', directory=str(text.parent / 'data'), val_fraction=0.2)
  if len(jax.devices()) > 1:
    config.mesh.update(data=2, fsdp=2, tensor=2)
  config.optim.update(peak_lr=1e-2, warmup_steps=2)
  config.train.update(steps=12, global_batch_tokens=512)
  config.checkpoint.every = config.evaluate.every = 4
  config.log.update(sample_tokens=4, to='')
  for key, value in overrides.items():
    section, knob = key.split('__')
    config[section][knob] = value
  return config


# --- adapters ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_adapters_lower_the_loss_on_other_text(pretrained, one_device, tmp_path, capsys):
  text = other_text(tmp_path / 'other.txt')
  config = tuning(pretrained, text, 'lora', train__steps=40, evaluate__every=20)
  made = run_plan.make_plan(config)
  assert num_trained(made.model) < 0.05 * num_params(made.model)
  assert loop.train(config, tmp_path / 'run') == 0
  before = float(re.search(r'step 0: held-out loss ([\d.]+)', capsys.readouterr().out)[1])
  after = [line['eval/loss'] for line in lines(tmp_path / 'run') if 'eval/loss' in line][-1]
  assert after < before - 0.5, (before, after)

  tuned, first = (gpt2_jax.from_pretrained(path) for path in (tmp_path / 'run', pretrained))
  have, want = (flatten_dict(params_of(m)) for m in (tuned, first))
  assert {path[-1] for path in have.keys() - want.keys()} == {'lora_A', 'lora_B'}
  for path in want:  # what is frozen has not moved by a bit
    np.testing.assert_array_equal(have[path], want[path])
  for path in have.keys() - want.keys():
    assert np.abs(have[path]).max() > 0

  # merged = unmerged = adapters written and read again = merged and written
  probe = [[1, 2, 3, 70, 71]]
  state = lambda model: gpt2_jax.features(model, probe)[0].hidden_states
  want = state(tuned)
  assert np.abs(want - state(first)).max() > 0.01
  assert_close(state(gpt2_jax.merge_adapters(tuned)), want)
  gpt2_jax.save_pretrained(tuned, tmp_path / 'adapters', to='peft')
  np.testing.assert_array_equal(state(gpt2_jax.from_pretrained(tmp_path / 'adapters')), want)
  gpt2_jax.save_pretrained(tuned, tmp_path / 'hf')
  assert_close(state(gpt2_jax.from_pretrained(tmp_path / 'hf')), want)
  card = (tmp_path / 'hf' / 'README.md').read_text()
  last = lines(tmp_path / 'run')[-1]['train/loss']
  assert f'Fine-tuned from `{pretrained}`' in card
  assert f'| 40 | 20,480 | {last:.4f} | {after:.4f} |' in card
  assert (tmp_path / 'adapters' / 'adapter_model.safetensors').stat().st_size < 50_000


def train_steps(config, mesh, A=1, steps=3):
  """Losses, gradient norms and parameters of some steps on random tokens."""
  optim = base.get_config().optim
  # eps: AdamW would make noise out of a gradient that is rounding alone, such as that of keys' biases
  optim.update(peak_lr=1e-2, warmup_steps=2, eps=1e-4)
  schedule = make_schedule(optim, 10)
  tx = make_optimizer(optim, schedule)
  rng = np.random.default_rng(0)
  with mesh_of(*mesh):
    state = init_state(config, tx, 0, ema=True)
    step = jax.jit(make_train_step(config, tx, schedule, seed=0, ema_decay=0.5))
    out = []
    for _ in range(steps):
      if config.head == 'lm':
        batch = rng.integers(0, 97, (A, 8 // A, 13)).astype(np.int32)
      else:
        batch = {
          'tokens': rng.integers(0, 97, (A, 8 // A, 12)).astype(np.int32),
          'lengths': rng.integers(1, 13, (A, 8 // A)).astype(np.int32),
          'labels': rng.integers(0, 3, (A, 8 // A)).astype(np.int32),
        }
      place = lambda x: jax.device_put(x, jax.P(None, ('data', 'fsdp')))
      state, values = step(state, jax.tree.map(place, batch))
      out.append([float(values['train/loss']), float(values['train/grad_norm'])])
    return np.array(out), jax.device_get(state.params)


@pytest.mark.parametrize(
  'fields',
  [
    pytest.param(dict(lora=ADAPTERS), marks=pytest.mark.slow, id='lora'),
    pytest.param(
      dict(head='sequence_classification', num_labels=3), marks=pytest.mark.slow, id='head'
    ),
    pytest.param(
      dict(head='sequence_classification', num_labels=3, lora=ADAPTERS),
      marks=pytest.mark.slow,
      id='both',
    ),
  ],
)
def test_meshes_and_micro_batches_change_nothing(tiny, fields):
  config = dataclasses.replace(tiny, resid_pdrop=0.1, initializer_range=0.1, **fields)
  want, params = train_steps(config, (1, 1, 1))
  for mesh, A in (((2, 2, 2), 2), ((1, 4, 1), 1)):
    have, there = train_steps(config, mesh, A)
    assert_close(have, want, 2e-5)
    for a, b in zip(jax.tree.leaves(there), jax.tree.leaves(params)):
      np.testing.assert_allclose(a, b, atol=5e-5)


def test_an_adapter_begins_as_nothing_and_learns(tiny):
  config = dataclasses.replace(tiny, lora=ADAPTERS)
  params = init_params(config, 0)
  tokens = jnp.asarray(np.random.default_rng(0).integers(0, 97, (2, 9)))

  @jax.jit
  def compute(params):
    plain = {k: v for k, v in flatten_dict(params).items() if 'lora' not in k[-1]}
    from flax.traverse_util import unflatten_dict

    loss = lambda p: bind(config, p)(tokens)[..., 3].sum()
    return (
      bind(config, params)(tokens),
      bind(tiny, unflatten_dict(plain))(tokens),
      flatten_dict(jax.grad(loss)(params)),
    )

  have, want, gradients = compute(params)
  np.testing.assert_array_equal(have, want)
  for path in trainable_paths(config):  # B is zero, so A's first gradient is zero, and B's is not
    assert (np.abs(gradients[path]).max() > 0) == (path[-1] == 'lora_B'), path
  assert {path[-1] for path in trainable_paths(config)} == {'lora_A', 'lora_B'}


# --- early stopping and resume ----------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_stops_when_the_loss_rises_and_offers_its_best(
  pretrained, one_device, tmp_path, capsys
):
  text = tmp_path / 'short.txt'  # so little that it is soon learnt by heart
  text.write_text(make_text(np.random.default_rng(2), 250))
  settings = dict(
    train__steps=400,
    evaluate__every=8,
    checkpoint__every=4,
    checkpoint__keep=1,
    evaluate__patience=2,
    optim__schedule='constant',
    data__val_fraction=0.3,
  )
  config = tuning(pretrained, text, **settings)
  assert loop.train(config, tmp_path / 'run') == 0
  held_out = {
    line['step']: line['eval/loss'] for line in lines(tmp_path / 'run') if 'eval/loss' in line
  }
  best, last = min(held_out, key=held_out.get), max(held_out)
  assert last < 400 and last == best + 16, held_out
  assert f'no lower held-out loss since step {best}' in capsys.readouterr().out
  kept = {
    int(p.name) for p in (tmp_path / 'run' / orbax_store.FOLDER).iterdir() if p.name.isdecimal()
  }
  assert kept == {best, last}

  made = run_plan.make_plan(config)
  model = gpt2_jax.from_pretrained(tmp_path / 'run', mesh=made.mesh)
  with jax.set_mesh(made.mesh):
    loss = evaluate(
      made.eval_step(),
      params_of(model),
      run_data.open_data(made).splits['val'],
      made,
      stopping.StopSignal(),
    )['eval/loss']
  assert_close(loss, held_out[best], 1e-6)
  assert loop.train(config, tmp_path / 'run') == 0  # the same command again
  assert f'its best is step {best}' in capsys.readouterr().out
  assert max(line['step'] for line in lines(tmp_path / 'run')) == last


@pytest.mark.parametrize(
  'recipe',
  [
    pytest.param('lora', marks=pytest.mark.slow),
    pytest.param('classification', marks=pytest.mark.slow),
  ],
)
def test_a_resumed_run_is_the_same_run(pretrained, tmp_path, recipe):
  text = (
    reviews(tmp_path / 'r.jsonl') if recipe == 'classification' else other_text(tmp_path / 'o.txt')
  )
  config = tuning(pretrained, text, recipe)
  if recipe == 'classification':
    config.data.sequence_length = 16
    config.train.global_batch_tokens = 16 * 16
  loop.train(config, tmp_path / 'whole')
  config.train.steps = 6
  config.optim.decay_steps = 12
  loop.train(config, tmp_path / 'parts')
  config.train.steps = 12
  loop.train(config, tmp_path / 'parts')
  want, have = (
    [(m['train/loss'], m['train/grad_norm']) for m in lines(tmp_path / name)]
    for name in ('whole', 'parts')
  )
  assert have == want
  config.train.steps = 20
  config.init_from = str(tmp_path / 'whole')
  with pytest.raises(UserError, match='init_from: .* there, .* here'):
    loop.train(config, tmp_path / 'parts')


# --- classification ---------------------------------------------------------------------------------


def reviews(path, count=120):
  rng = random.Random(0)
  with open(path, 'w') as file:
    for _ in range(count):
      label = rng.choice(['bad', 'good'])
      words = rng.choices(['film', 'the', 'plot'], k=rng.randint(1, 3))
      words.insert(rng.randrange(len(words) + 1), {'bad': 'DULL', 'good': 'fine'}[label])
      file.write(json.dumps({'text': ' '.join(words), 'label': label}) + '\n')
  return path


@pytest.mark.slow
@pytest.mark.parametrize('r', [0, 4])
def test_a_classifier_learns_and_says_its_labels(pretrained, one_device, tmp_path, r):
  config = tuning(
    pretrained,
    reviews(tmp_path / 'r.jsonl'),
    'classification',
    lora__r=r,
    train__steps=40,
    train__global_batch_tokens=32 * 32,
    data__sequence_length=32,
    evaluate__every=20,
    optim__peak_lr=1e-2 if r else 2e-3,
  )
  assert loop.train(config, tmp_path / 'run') == 0
  last = [line for line in lines(tmp_path / 'run') if 'eval/accuracy' in line][-1]
  assert last['eval/accuracy'] > 0.9, last
  model = gpt2_jax.from_pretrained(tmp_path / 'run')
  texts = ['the film fine', 'DULL plot', 'fine the plot']
  judged = gpt2_jax.classify(model, texts)
  assert [j.label for j in judged] == ['good', 'bad', 'good']
  assert all(abs(sum(j.probabilities.values()) - 1) < 1e-5 for j in judged)
  (alone,) = gpt2_jax.classify(model, texts[1])
  assert_close(alone.probabilities['bad'], judged[1].probabilities['bad'])

  gpt2_jax.save_pretrained(model, tmp_path / 'hf')
  keys = json.loads((tmp_path / 'hf' / 'config.json').read_text())
  assert keys['architectures'] == ['GPT2ForSequenceClassification']
  assert keys['id2label'] == {'0': 'bad', '1': 'good'}
  again = gpt2_jax.classify(gpt2_jax.from_pretrained(tmp_path / 'hf'), texts)
  assert [j.label for j in again] == ['good', 'bad', 'good']
  if r:
    gpt2_jax.save_pretrained(model, tmp_path / 'adapters', to='peft')
    (again,) = gpt2_jax.classify(gpt2_jax.from_pretrained(tmp_path / 'adapters'), texts[1])
    assert_close(list(again.probabilities.values()), list(alone.probabilities.values()))


def test_a_text_is_judged_by_its_last_token_whatever_pads_it(tiny):
  config = dataclasses.replace(tiny, head='sequence_classification', num_labels=3)
  params = init_params(config, 0)
  rng = np.random.default_rng(0)
  lengths = np.array([3, 9, 12], np.int32)
  tokens = rng.integers(0, 97, (1, 3, 12)).astype(np.int32)
  labels, weights = np.array([[0, 1, 2]], np.int32), np.array([[1, 1, 0]], np.float32)
  step = jax.jit(make_eval_step(config))
  judge = jax.jit(lambda x, n: bind(config, params)(x, lengths_B=n))
  batch = {'tokens': tokens, 'lengths': lengths[None], 'labels': labels}
  want, logits = step(params, batch, weights), judge(tokens[0], lengths)
  for b, n in enumerate(lengths):
    tokens[0, b, n:] = rng.integers(0, 97, 12 - n)
  np.testing.assert_array_equal(judge(tokens[0], lengths), logits)
  total, count, right = step(params, batch, weights)
  assert count == 2 and (total, right) == (want[0], want[2])
  p = jax.nn.log_softmax(logits)
  assert_close(total, -(p[0, 0] + p[1, 1]))
  assert right == sum(int(np.argmax(logits[i]) == i) for i in (0, 1))


def data_section(path, **changes):
  data = base.get_config().data
  data.update(corpus=f'text:{path}', val_fraction=0.25, **changes)
  return data


def test_labelled_texts_are_split_by_their_text(tmp_path):
  from gpt2_jax.tokenizer import bpe

  path = tmp_path / 'a.jsonl'
  rows = [{'text': f'text {i // 2}', 'label': i % 3} for i in range(60)]  # each text twice
  path.write_text('\n'.join(map(json.dumps, rows)) + '\n\n')
  data = labelled_texts.open_labelled(data_section(path), bpe.load('byte'), 6)
  train, val = (data.splits[name] for name in ('train', 'val'))
  assert len(train) + len(val) == 60 and data.labels == ('0', '1', '2') and data.cut == 40
  texts = lambda split: {rows[int(name.split(':')[1]) - 1]['text'] for name, _, _ in split.examples}
  assert texts(train) and texts(val) and not texts(train) & texts(val)
  assert all(len(ids) <= 6 for _, ids, _ in train.examples)
  loader = labelled_texts.LabelledBatches(train, 6, len(train), 0, 257)
  assert sorted(loader.documents(0)) == sorted([name] for name, _, _ in train.examples)  # an epoch
  other = labelled_texts.open_labelled(data_section(path, split_seed=1), bpe.load('byte'), 6)
  assert texts(other.splits['val']) != texts(val) and other.sha256 != data.sha256


def test_labelled_lines_end_as_they_end(tmp_path):
  """CRLF is no part of a text; what else Unicode ends a line with is, and ends no line of JSON."""
  from gpt2_jax.tokenizer import bpe

  bytes_of = bpe.load('byte')
  texts = [f'a\u2028b\x85c\r\n{i}' for i in range(40)]
  lines = [
    json.dumps({'text': text, 'label': i % 2}, ensure_ascii=False) for i, text in enumerate(texts)
  ]
  found = []
  for end in ('\n', '\r\n'):
    (tmp_path / 'a.jsonl').write_bytes(end.join(lines).encode())
    data = labelled_texts.open_labelled(data_section(tmp_path / 'a.jsonl'), bytes_of, 64)
    found.append(
      sorted(bytes_of.decode(ids) for split in data.splits.values() for _, ids, _ in split.examples)
    )
  assert found == [sorted(texts)] * 2


def test_special_tokens_of_labelled_texts(tmp_path):
  from gpt2_jax.tokenizer import bpe

  rows = [{'text': f'a<|endoftext|>{i}', 'label': i % 2} for i in range(40)]
  (tmp_path / 'a.jsonl').write_text('\n'.join(map(json.dumps, rows)))
  plain, special = (
    labelled_texts.open_labelled(data_section(tmp_path / 'a.jsonl', special=on), bpe.load('byte'), 64)
    for on in (False, True)
  )
  count = lambda data: sum(
    256 in ids for split in data.splits.values() for _, ids, _ in split.examples
  )
  assert (count(plain), count(special)) == (0, 40) and plain.sha256 != special.sha256


@pytest.mark.parametrize(
  'content,match',
  [
    ('{"text": "a", "label": "x"}\n{"text": "b"}\n', "line 2 has no field 'label'"),
    ('{"text": "a", "label": "x"}\nnonsense\n', 'line 2: not a line of JSON'),
    ('{"text": 3, "label": "x"}\n', "line 1: 'text' is a number, not a text: 3"),
    ('{"text": "a", "label": [1]}\n', "line 1: 'label' is a list, not a text or whole number"),
    ('{"text": "a", "label": "x"}\n', "needs two labels, there is 'x'"),
    ('', 'needs two labels, there is no example'),
    ('{"text": "a", "label": "x"}\n{"text": "a", "label": "y"}\n', 'leave none for the split'),
  ],
)
def test_labelled_files_that_cannot_be_used(tmp_path, content, match):
  from gpt2_jax.tokenizer import bpe

  (tmp_path / 'a.jsonl').write_text(content)
  with pytest.raises(UserError, match=match):
    labelled_texts.open_labelled(data_section(tmp_path / 'a.jsonl'), bpe.load('byte'), 8)


# --- what doesn't fit together ----------------------------------------------------------------------


@pytest.mark.slow
def test_configs_that_contradict_their_source(pretrained, tmp_path):
  def refused(match, change, config=None):
    config = config or tuning(pretrained, other_text(tmp_path / 'o.txt'))
    change(config)
    with pytest.raises(UserError, match=match):
      run_plan.make_plan(config)

  refused('trains adapters of a model that is there', lambda c: c.lora.update(r=4), base.get_config())
  refused(
    "'n_layer': 12, .* is of another shape: use configs/finetune.py",
    lambda c: c.update(init_from=str(pretrained)),
    base.get_config(),
  )
  refused(
    'evaluate.every = 4 a multiple of checkpoint.every = 3', lambda c: c.checkpoint.update(every=3)
  )
  refused('/nowhere is neither a file', lambda c: c.update(init_from='/nowhere'))
  refused("'wte' is none of", lambda c: c.lora.update(r=4, target_modules=('wte',)))
  refused(
    'token_classification can be loaded and converted, not trained',
    lambda c: c.model.update(head='token_classification'),
  )
  refused(
    'a classifier learns from text:FILE', lambda c: c.model.update(head='sequence_classification')
  )
  refused(
    'has no tokenizer that can be used',
    lambda c: c.update(init_from=str(ROOT / 'tests/golden/huggingface/plain')),
  )


@pytest.mark.slow
@pytest.mark.parametrize('mesh', [(1, 1, 1), (2, 4, 1)])
def test_a_longer_context(pretrained, tmp_path, mesh):
  """Spread positions pass through the old ones; added ones are those of a new model."""
  config = tuning(
    pretrained, tmp_path / 'x', model__n_positions=63, train__global_batch_tokens=8 * 63
  )
  config.mesh.update(data=mesh[0], fsdp=mesh[1], tensor=1)
  old = gpt2_jax.from_pretrained(pretrained)
  devices = jax.devices()[: mesh[0] * mesh[1]]
  made = run_plan.make_plan(config, devices)
  assert made.model.n_positions == 63
  with jax.set_mesh(made.mesh):
    spread = made.load_source()
    wpe = np.asarray(spread['wpe']['weight'])
    np.testing.assert_array_equal(wpe[::2], old.model.wpe.weight[...])
    assert_close(wpe[1::2], (wpe[:-1:2] + wpe[2::2]) / 2, 1e-6)
    config.init_positions = 'extend'
    wpe = np.asarray(made.load_source()['wpe']['weight'])
    fresh = init_params(made.model, config.train.seed)['wpe']['weight']
    np.testing.assert_array_equal(wpe[:32], old.model.wpe.weight[...])
    assert_close(wpe[32:], fresh[32:], 1e-6)
    config.init_positions = 'rotate'
    with pytest.raises(UserError, match="'rotate' is none of interpolate, extend"):
      made.load_source()
  with pytest.raises(UserError, match="n_positions': 16"):
    run_plan.make_plan(tuning(pretrained, tmp_path / 'x', model__n_positions=16))

"""Tokens seen are what a run has seen, whatever the batches that they came in."""

import importlib
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.contexts import one_device, shrunk  # noqa: F401# noqa: F401

from configs import base
from gpt2_jax.checkpoints.orbax_store import Checkpoints
from gpt2_jax.core.errors import UserError
from gpt2_jax.data import labelled_texts, token_batches, token_store
from gpt2_jax.training import knobs, train
from gpt2_jax.training.optimizer import SCHEDULES, make_schedule
from gpt2_jax.training.watch import metrics_file

T = 64


def lines(workdir):
  return [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]


def config_of(texts, rows, steps, **optim):
  config = shrunk(importlib.import_module('configs.tiny').get_config('shakespeare'), texts)
  config.train.update(steps=steps, global_batch_tokens=rows * T)
  config.evaluate.every = 1000
  config.optim.update(**optim)
  return config


@pytest.mark.slow
def test_a_run_goes_on_with_other_batches(texts, tmp_path, monkeypatch, capsys):
  """Tokens, the order of the data and the learning rate, over four starts."""
  optim = dict(warmup_tokens=4 * T, decay_tokens=20 * T)
  seen, rows = [], token_batches.TokenBatches.rows

  def watched(self, step, which):
    seen.extend((step, self.number(step, row)) for row in which)
    return rows(self, step, which)

  monkeypatch.setattr(token_batches.TokenBatches, 'rows', watched)
  for batch, steps in ((2, 3), (4, 5), (1, 7), (2, 8)):
    if steps == 5:  # as an early version left its checkpoints
      monkeypatch.setattr(
        Checkpoints,
        'meta',
        lambda self, step, meta=Checkpoints.meta: {
          key: value for key, value in meta(self, step).items() if key not in ('tokens', 'rows')
        },
      )
    assert train.train(config_of(texts, batch, steps, **optim), tmp_path / 'run') == 0
    monkeypatch.undo()
    monkeypatch.setattr(token_batches.TokenBatches, 'rows', watched)
  tokens = [line['train/tokens'] for line in lines(tmp_path / 'run')]
  assert tokens == [rows * T for rows in (2, 4, 6, 10, 14, 15, 16, 18)]
  printed = capsys.readouterr().out
  assert 'resumed from step 3 of 5, 384 tokens seen of 896' in printed
  assert 'resumed from step 7 of 8, 1,024 tokens seen of 1,152' in printed

  split = token_store.open_store(texts / 'byte-0.1-tail').splits['train']
  plain = token_batches.TokenBatches(split, T, 1, 0, 257)
  in_order = [number for _, number in sorted(seen, key=lambda pair: pair[0])]
  assert in_order == [plain.number(i, 0) for i in range(18)]

  # with rows of one each, in one go: as much is seen, at the same rates
  schedule = make_schedule(config_of(texts, 1, 18, **optim).optim, 18, T)
  starts = [0, 2, 4, 6, 10, 14, 15, 16]  # rows before each step
  rates = [line['train/learning_rate'] for line in lines(tmp_path / 'run')]
  at = [float(schedule(row)) for row in starts]
  np.testing.assert_allclose(rates[2:], at[2:], rtol=1e-5)  # behind the warm-up
  assert rates[0] == pytest.approx(1e-2 * 2 / 4) and rates[1] == pytest.approx(1e-2)


@settings(max_examples=25, deadline=None)
@given(
  st.lists(st.tuples(st.integers(1, 7), st.integers(1, 5)), min_size=1, max_size=5),
  st.integers(1, 40),
  st.integers(0, 3),
)
def test_no_row_is_repeated_or_left_out(starts, size, seed):
  """Starts, each with so many rows a batch and so many steps."""
  step = seen = 0
  found = []
  for G, steps in starts:
    order = token_batches.Order(size, G, seed)
    order.go_on(step, seen)
    found += [order.number(s, row) for s in range(step, step + steps) for row in range(G)]
    step, seen = step + steps, seen + G * steps
  plain = token_batches.Order(size, 1, seed)
  assert found == [plain.number(i, 0) for i in range(seen)]
  for epoch in range(len(found) // size):
    assert sorted(found[epoch * size : (epoch + 1) * size]) == list(range(size))


def test_labelled_texts_go_on_likewise():
  split = labelled_texts.Split('train', tuple((str(i), [i], 0) for i in range(6)))
  names = lambda G: labelled_texts.LabelledBatches(split, 4, G, 0, 257)
  first, then = names(2), names(4)
  then.go_on(1, 2)
  both = [name for [name] in first.documents(0) + then.documents(1)]
  assert sorted(both) == sorted(str(i) for i in range(6))


def test_tokens_of_an_early_record():
  """It took all steps for such of the batch that it had just then; lines may be missing."""
  rows = [2, 2, 2, 4, 4, 1, 1]
  record = [{'step': i, 'train/tokens': i * n * T} for i, n in enumerate(rows, 1)]
  assert metrics_file.tokens_seen(record, 7, 0) == sum(rows) * T
  assert metrics_file.tokens_seen(record, 4, 0) == 10 * T  # what lies beyond is dropped
  assert metrics_file.tokens_seen([], 5, 3 * T) == 15 * T
  assert metrics_file.tokens_seen(record[:3], 5, 0) == 10 * T
  assert metrics_file.tokens_seen(record[3:], 7, 0) == (4 * 5 + 2) * T


@pytest.mark.parametrize('name', SCHEDULES)
def test_a_schedule_of_tokens_is_that_of_steps_where_the_batch_stays(name):
  optim = base.get_config().optim
  optim.update(schedule=name, warmup_steps=10, decay_steps=80)
  by_steps = make_schedule(optim, 100, 512)
  by_tokens = make_schedule(_with(optim, warmup_tokens=10 * 512, decay_tokens=80 * 512), 100, 512)
  half = make_schedule(_with(optim, warmup_tokens=10 * 512, decay_tokens=80 * 512), 100, 256)
  for step in (0, 1, 5, 9, 10, 11, 40, 70, 79, 80, 99):
    assert float(by_tokens(step)) == pytest.approx(float(by_steps(step)), rel=1e-6)
    if step >= 10:  # half as many tokens a step: the same at twice the step
      assert float(half(2 * step)) == pytest.approx(float(by_steps(step)), rel=1e-5)


def _with(optim, **changes):
  changed = optim.copy_and_resolve_references()
  changed.update(decay_steps=None, **changes)
  return changed


def test_schedules_that_cannot_be():
  optim = base.get_config().optim
  optim.update(decay_steps=5, decay_tokens=5)
  with pytest.raises(UserError, match='leave one of them unset'):
    make_schedule(optim, 10, 4)
  with pytest.raises(UserError, match='optim.warmup_tokens = -1 must be a whole number from 0'):
    knobs.SECTIONS['optim']['warmup_tokens'].check('optim.warmup_tokens', -1)

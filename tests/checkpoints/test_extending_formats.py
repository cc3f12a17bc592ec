"""What docs/extending.md says is enough: each section's example is added here, and used."""

import importlib.util
import json
import sys
import types

import numpy as np
import pytest
from support.processes import ROOT

import gpt2_jax
from gpt2_jax.checkpoints import format_table, pretrained
from gpt2_jax.checkpoints.format_table import Format, Option
from gpt2_jax.checkpoints.tensors import Source, check_tensors, shapes
from gpt2_jax.cli import convert, main
from gpt2_jax.core.bounds import Bool
from gpt2_jax.core.errors import UserError
from gpt2_jax.data import benchmarks, sources
from gpt2_jax.evaluation import example_tasks, protocols
from gpt2_jax.evaluation.figures import mean
from gpt2_jax.model.config import GPTConfig
from gpt2_jax.model.gpt2 import bind, make_params
from gpt2_jax.model.pretrained_model import Pretrained
from gpt2_jax.tokenizer import bpe

PAGE = (ROOT / 'docs' / 'extending.md').read_text()
TINY = GPTConfig(vocab_size=257, n_positions=64, n_embd=8, n_layer=1, n_head=2)


def _recognises(path):
  return path.suffix == '.npz'


def _open(path, opening=None):
  arrays = dict(np.load(path))
  config = GPTConfig(**json.loads(str(arrays.pop('config'))))
  check_tensors(config, {name: array.shape for name, array in arrays.items()}, path)
  return Source(config, arrays.__getitem__, 'float32', str(path))


def _write(source, target, *, compressed=False):
  sizes = {name: getattr(source.config, name) for name in ('vocab_size', 'n_positions', 'n_embd')}
  sizes |= {'n_layer': source.config.n_layer, 'n_head': source.config.n_head}
  arrays = {name: source.tensor(name) for name in shapes(source.config)}
  with open(target, 'wb') as file:
    (np.savez_compressed if compressed else np.savez)(file, config=json.dumps(sizes), **arrays)


def test_a_checkpoint_format(monkeypatch, tmp_path, capsys):
  module = types.ModuleType('mine')
  module.recognises, module.open_source, module.write = _recognises, _open, _write
  monkeypatch.setitem(sys.modules, 'mine', module)
  row = Format(
    'mine', 'mine.npz', 'file', {'compressed': Option(bool, Bool(), 'mine: compress the tensors.')}
  )
  monkeypatch.setitem(format_table.FORMATS, 'mine', row)
  spec = importlib.util.spec_from_file_location('convert_again', convert.__file__)
  again = importlib.util.module_from_spec(spec)  # its choices are made when it is imported
  monkeypatch.setitem(sys.modules, 'convert_again', again)
  spec.loader.exec_module(again)

  model = bind(TINY, make_params(TINY, 0))
  gpt2_jax.save_pretrained(model, tmp_path / 'hf')
  verb = main.tyro.cli(
    again.Convert,
    args=[str(tmp_path / 'hf'), str(tmp_path / 'm.npz'), '--to', 'mine', '--compressed'],
    config=(main.tyro.conf.OmitArgPrefixes,),
  )
  verb.run()
  assert ': mine, float32, from' in capsys.readouterr().out
  tokens = np.arange(10)[None]
  want, have = model(tokens), gpt2_jax.from_pretrained(tmp_path / 'm.npz')(tokens)
  np.testing.assert_array_equal(have, want)
  with pytest.raises(UserError, match=r'Wanted: .*; mine\.npz\.'):
    pretrained.open_source(tmp_path)
  assert "'mine.npz', 'file'" in PAGE


def test_every_format_is_in_the_docs():
  page = (ROOT / 'docs' / 'conversion.md').read_text()
  for name in format_table.written():
    assert f'(`{name}`)' in page, name


def test_a_benchmark_task(monkeypatch, tmp_path, capsys):
  monkeypatch.setitem(
    benchmarks.PUBLISHED,
    'colours',
    benchmarks.Published(
      'test',
      lambda content, path: [json.loads(line) for line in content.splitlines()],
      (benchmarks.Part(sources.Source('colours.jsonl', (), None, None, '', 'CC0')),),
    ),
  )
  plain = protocols.Protocol('colours/plain', 'choices', ('acc', 'acc_norm'), 'a test')
  first = protocols.Protocol('colours/first', 'always_first', ('acc',), 'a test')
  for protocol in (plain, first):
    monkeypatch.setitem(protocols.PROTOCOLS, protocol.name, protocol)
  monkeypatch.setitem(
    example_tasks.KINDS,
    'always_first',
    lambda scorer, protocol, benchmark: {'acc': mean([e['label'] == 0 for e in benchmark.examples])},
  )
  rows = [{'query': 'Snow is', 'endings': ['white', 'red'], 'label': i} for i in (0, 1)]
  (tmp_path / 'colours.jsonl').write_text('\n'.join(map(json.dumps, rows)))
  model = Pretrained(bind(TINY, make_params(TINY, 0)), bpe.load('byte'))
  gpt2_jax.save_pretrained(model, tmp_path / 'hf')

  out = tmp_path / 'out.json'
  words = ['--checkpoint', str(tmp_path / 'hf'), '--tasks', 'colours', '--data', str(tmp_path)]
  main.main(['evaluate', *words, '--json', str(out)])
  capsys.readouterr()
  found = {r['protocol']['name']: r['metrics'] for r in json.loads(out.read_text())['results']}
  assert found['colours/plain']['acc']['value'] == found['colours/first']['acc']['value'] == 0.5
  for kind in example_tasks.KINDS.keys() - {'store', 'always_first'}:
    assert f'`{kind}`' in PAGE, kind

"""What docs/extending.md says is enough: each section's example is added here, and used."""

import importlib.util
import json
import sys
import types

import numpy as np
import pytest
from conftest import ROOT

import gpt2_jax
from gpt2_jax import cli, convert, pretrained, tokenizer
from gpt2_jax.bounds import Bool
from gpt2_jax.config import GPTConfig
from gpt2_jax.data import benchmarks, sources
from gpt2_jax.errors import UserError
from gpt2_jax.evaluation import protocols, tasks
from gpt2_jax.evaluation.scorer import mean
from gpt2_jax.interop import formats
from gpt2_jax.interop.formats import Format, Option
from gpt2_jax.interop.tensors import Source, check_tensors, shapes
from gpt2_jax.model import bind, make_params
from gpt2_jax.pretrained_model import Pretrained

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
  monkeypatch.setitem(formats.FORMATS, 'mine', row)
  spec = importlib.util.spec_from_file_location('convert_again', convert.__file__)
  again = importlib.util.module_from_spec(spec)  # its choices are made when it is imported
  monkeypatch.setitem(sys.modules, 'convert_again', again)
  spec.loader.exec_module(again)

  model = bind(TINY, make_params(TINY, 0))
  gpt2_jax.save_pretrained(model, tmp_path / 'hf')
  verb = cli.tyro.cli(
    again.Convert,
    args=[str(tmp_path / 'hf'), str(tmp_path / 'm.npz'), '--to', 'mine', '--compressed'],
    config=(cli.tyro.conf.OmitArgPrefixes,),
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
  for name in formats.written():
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
    tasks.KINDS,
    'always_first',
    lambda scorer, protocol, benchmark: {'acc': mean([e['label'] == 0 for e in benchmark.examples])},
  )
  rows = [{'query': 'Snow is', 'endings': ['white', 'red'], 'label': i} for i in (0, 1)]
  (tmp_path / 'colours.jsonl').write_text('\n'.join(map(json.dumps, rows)))
  model = Pretrained(bind(TINY, make_params(TINY, 0)), tokenizer.load('byte'))
  gpt2_jax.save_pretrained(model, tmp_path / 'hf')

  out = tmp_path / 'out.json'
  words = ['--checkpoint', str(tmp_path / 'hf'), '--tasks', 'colours', '--data', str(tmp_path)]
  cli.main(['evaluate', *words, '--json', str(out)])
  capsys.readouterr()
  found = {r['protocol']['name']: r['metrics'] for r in json.loads(out.read_text())['results']}
  assert found['colours/plain']['acc']['value'] == found['colours/first']['acc']['value'] == 0.5
  for kind in tasks.KINDS.keys() - {'store', 'always_first'}:
    assert f'`{kind}`' in PAGE, kind

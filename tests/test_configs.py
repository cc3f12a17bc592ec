"""Every config loads, every knob can be set, and nothing has a hidden default."""

import ast
import dataclasses
import importlib
import json
import re
import sys

import jax
import pytest
from absl import flags
from ml_collections import ConfigDict, config_flags
from support.processes import ROOT, run

from configs import base, finetune, recipes
from gpt2_jax.model.config import GPTConfig, LoRA
from gpt2_jax.model.sizes import num_params
from gpt2_jax.training import run_plan

SIZES = {'small': 124_439_808, 'medium': 354_823_168, 'large': 774_030_080, 'xl': 1_557_611_200}
ALL = [
  (name, recipe)
  for name in (*SIZES, 'tiny')
  for recipe in recipes.RECIPES
  if name != 'tiny' or recipe in ('stdlib', 'shakespeare')
]


@pytest.mark.parametrize('name,recipe', ALL)
def test_every_config_makes_a_plan(name, recipe):
  config = importlib.import_module(f'configs.{name}').get_config(recipe)
  made = run_plan.make_plan(config, devices=jax.devices()[:1])
  assert made.G * made.T == config.train.global_batch_tokens
  if name in SIZES:
    # a context of shorter rows has so many positions less
    shorter = 1024 - (config.data.sequence_length or 1024)
    assert num_params(made.model) == SIZES[name] - shorter * made.model.n_embd
    assert made.model.n_positions == made.T
    assert made.model.vocab_size == 50257 and made.model.padded_vocab_size == 50304
  assert config.keys() == base.get_config().keys()
  for section in sections(config):
    assert config[section].keys() == base.get_config()[section].keys()


def sections(config):
  return [name for name, value in config.items() if isinstance(value, ConfigDict)]


@pytest.mark.parametrize('recipe', finetune.RECIPES)
def test_the_finetuning_config_makes_a_plan_on_any_model(recipe, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'a.jsonl').write_text(
    ''.join(json.dumps({'text': f'text {i}', 'label': i % 3}) + '\n' for i in range(20))
  )
  config = finetune.get_config(recipe)
  assert set(config) == set(base.get_config())
  for section in sections(config):
    assert set(config[section]) <= set(base.get_config()[section])
  config.update(init_from=str(ROOT / 'tests' / 'golden' / 'huggingface' / 'plain'))
  config.data.update(tokenizer='byte', corpus='text:a.jsonl', sequence_length=16)
  made = run_plan.make_plan(config, devices=jax.devices()[:1])
  assert (made.model.n_embd, made.model.n_head, made.model.vocab_size) == (15, 3, 97)
  assert made.model.resid_pdrop == 0.1 and made.T == 16
  assert (made.model.lora is not None) == (recipe == 'lora')
  assert made.model.num_labels == (3 if recipe == 'classification' else 2)


def test_the_model_section_has_every_field():
  # by the data, by init_from, a section, by decoding
  derived = {'num_labels', 'classifier_dropout', 'lora', 'form'}
  assert set(base.get_config().model) | derived == {f.name for f in dataclasses.fields(GPTConfig)}
  fields = {f.name for f in dataclasses.fields(LoRA)}
  assert set(base.get_config().lora) == fields


def test_every_knob_can_be_set_by_a_flag(monkeypatch):
  values, arguments = {}, ['launch.py', f'--config={ROOT}/configs/small.py']
  for section in sections(base.get_config()):
    for knob in base.get_config()[section]:
      kind = base.get_config()[section].get_type(knob)
      value = {int: 3, float: 0.25, str: 'word', bool: False, tuple: ('c_fc',)}[kind]
      values[section, knob] = value
      arguments.append(f'--config.{section}.{knob}={value}')
  arguments.append('--config.init_from=somewhere')
  holder = flags.FlagValues()
  config = config_flags.DEFINE_config_file('config', flag_values=holder)
  monkeypatch.setattr(sys, 'argv', arguments)  # where config_flags looks for the overrides
  holder(arguments)
  for (section, knob), value in values.items():
    assert config.value[section][knob] == value, (section, knob)
  assert config.value.init_from == 'somewhere'


def test_configs_are_data_alone():
  for path in (ROOT / 'configs').glob('*.py'):
    for node in ast.walk(ast.parse(path.read_text())):
      names = (
        [a.name for a in node.names]
        if isinstance(node, ast.Import)
        else [node.module]
        if isinstance(node, ast.ImportFrom)
        else []
      )
      allowed = r'gpt2_jax\.configs|ml_collections|importlib|pathlib|sys|types|typing'
      assert all(re.match(allowed, n) for n in names), (path, names)


def test_the_library_has_no_hidden_defaults():
  for path in (ROOT / 'gpt2_jax').rglob('*.py'):
    found = re.findall(r'(?:config|optim|data|train)\.get\(.*', path.read_text())
    assert not found, (path, found)


def test_dry_run_prints_what_a_run_needs(tmp_path):
  result = run('launch.py', '--config=configs/tiny.py', '--dry_run', f'--workdir={tmp_path / "r"}')
  assert result.returncode == 0, result.stderr
  assert re.search(r'model +[\d,]+ parameters', result.stdout)
  assert re.search(r'[\d,]+ FLOPs a token \(6·P \+ 12·L·D·T\)', result.stdout)
  assert re.search(r'memory +[\d,]+ bytes a device', result.stdout)
  assert not (tmp_path / 'r').exists()


@pytest.mark.slow
@pytest.mark.parametrize('name', SIZES)
def test_every_size_compiles(name):
  result = run('launch.py', f'--config=configs/{name}.py', '--dry_run', timeout=900)
  assert result.returncode == 0, result.stderr
  assert f'{SIZES[name]:,} parameters' in result.stdout

"""lm-evaluation-harness with our model against the same with its own one, on the same weights."""

import json
import math
import os
import re
from pathlib import Path

import numpy as np
import pytest
from support.models import byte_model
from support.processes import ROOT, run

import gpt2_jax
from gpt2_jax.model.config import GPTConfig
from gpt2_jax.tokenizer import bpe

lm_eval = pytest.importorskip('lm_eval')
torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')
DATA = os.environ.get('GPT2_JAX_TEST_DATA')
needs_data = pytest.mark.skipif(not DATA, reason='GPT2_JAX_TEST_DATA is not set')
# slow all of it: two of its parts would make the same models twice
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings('ignore')]  # theirs

LAMBADA = """
task: local_lambada
output_type: loglikelihood
doc_to_text: "{{text.split(' ')[:-1]|join(' ')}}"
doc_to_target: "{{' '+text.split(' ')[-1]}}"
metric_list:
  - {metric: perplexity, aggregation: perplexity, higher_is_better: false}
  - {metric: acc, aggregation: mean, higher_is_better: true}
"""
HELLASWAG = """
task: local_hellaswag
output_type: multiple_choice
doc_to_text: "{{query}}"
doc_to_target: "{{label}}"
doc_to_choice: "endings"
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
"""
WIKITEXT = """
task: local_wikitext
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{page}}"
metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}, {metric: bits_per_byte}]
"""
FREE = """
task: local_free
output_type: loglikelihood
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: acc}, {metric: perplexity, aggregation: perplexity}]
"""
WRITE = """
task: local_write
output_type: generate_until
doc_to_text: "{{text}}"
doc_to_target: "the"
generation_kwargs: {until: [" the", "\\n\\n"], max_gen_toks: 24, do_sample: false}
metric_list: [{metric: exact_match}]
"""


def lines(name: str, n: int) -> list[dict]:
  with open(Path(DATA or '') / name) as f:
    return [json.loads(line) for line, _ in zip(f, range(n))]


@pytest.fixture(scope='module')
def tasks(tmp_path_factory) -> Path:
  """A folder with tasks and their data, as a user would write them."""
  folder = tmp_path_factory.mktemp('tasks')
  pages = (Path(DATA or '') / 'wikitext-2' / 'test.txt').read_text().split('\n \n')
  texts = lines('lambada_test.jsonl', 12)
  short = [{'text': row['text'][: 150 + 80 * i]} for i, row in enumerate(texts[:6])]
  for name, yaml, rows in (
    ('lambada', LAMBADA, texts),
    ('hellaswag', HELLASWAG, lines('hellaswag_val_1000.jsonl', 8)),
    ('wikitext', WIKITEXT, [{'page': page} for page in pages[:5] if page.strip()]),
    ('free', FREE, [{'text': text} for text in ('A man', '<|endoftext|>a', texts[0]['text'])]),
    ('write', WRITE, short + short[:1]),
  ):
    data = folder / f'{name}.jsonl'
    data.write_text(''.join(json.dumps(row) + '\n' for row in rows))
    (folder / f'{name}.yaml').write_text(
      f'{yaml}dataset_path: json\ntest_split: test\nmetadata: {{version: 1}}\n'
      f'dataset_kwargs: {{data_files: {{test: "{data}"}}, cache_dir: "{folder / "cache"}"}}\n'
    )
  return folder


@pytest.fixture(scope='module')
def models(tmp_path_factory) -> dict[str, Path]:
  """Folders of a random model and of one that was trained a little, with GPT-2's tokenizer."""
  folder = tmp_path_factory.mktemp('models')
  config = GPTConfig(n_positions=96, n_embd=32, n_layer=2, n_head=4, initializer_range=0.1)
  model = gpt2_jax.bind(config, gpt2_jax.init_params(config, 0))
  model = gpt2_jax.Pretrained(model, bpe.load('gpt2'))
  gpt2_jax.save_pretrained(model, folder / 'random')
  theirs = transformers.GPT2LMHeadModel.from_pretrained(folder / 'random')
  text = (Path(DATA or '') / 'wikitext-2' / 'valid.txt').read_text()[:60000]
  ids = torch.tensor(model.tokenizer.encode(text)[: 96 * 100]).reshape(100, 96)
  optimizer = torch.optim.AdamW(theirs.parameters(), lr=1e-2)
  theirs.train()
  torch.manual_seed(0)
  for step in range(25):
    batch = ids[step % 25 * 4 : step % 25 * 4 + 4]
    theirs(batch, labels=batch).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
  theirs.save_pretrained(folder / 'theirs')
  trained = gpt2_jax.from_pretrained(folder / 'theirs')
  trained.tokenizer = model.tokenizer
  gpt2_jax.save_pretrained(trained, folder / 'trained')
  return {'random': folder / 'random', 'trained': folder / 'trained'}


def evaluate(model, args, tasks: Path, names: str, **options):
  from lm_eval.tasks import TaskManager

  from gpt2_jax.evaluation import lm_eval_adapter  # noqa: F401  registers gpt2_jax

  manager = TaskManager(include_path=str(tasks), include_defaults=False)
  return lm_eval.simple_evaluate(
    model,
    model_args=args,
    tasks=[f'local_{name}' for name in names.split()],
    task_manager=manager,
    bootstrap_iters=0,
    **options,
  )


@needs_data
@pytest.mark.parametrize('name', ['trained', 'random'])
def test_every_result_is_the_one_of_its_own_model(models, tasks, name):
  names = 'lambada hellaswag wikitext free write'
  args = dict(pretrained=str(models[name]))
  ours = evaluate('gpt2_jax', args, tasks, names)
  theirs = evaluate('hf', args | {'dtype': 'float32'}, tasks, names, device='cpu', batch_size=8)
  assert ours['results'].keys() == theirs['results'].keys() and len(ours['results']) == 5
  for task, want in theirs['results'].items():
    have = ours['results'][task]
    compared = [k for k, value in want.items() if isinstance(value, float) and 'stderr' not in k]
    assert compared
    for key in compared:
      if 'acc' in key or 'match' in key:
        assert have[key] == want[key], (task, key)
      else:
        assert math.isclose(have[key], want[key], rel_tol=1e-4), (task, key, have[key], want[key])
    for one, other in zip(ours['samples'][task], theirs['samples'][task], strict=True):
      compare(one['resps'], other['resps'])


def compare(have, want) -> None:
  """Answers, in lists of lists: texts and flags the same, log-likelihoods to 1e-4."""
  if isinstance(want, (list, tuple)):
    assert len(have) == len(want)
    for one, other in zip(have, want):
      compare(one, other)
  elif isinstance(want, float):
    np.testing.assert_allclose(have, want, rtol=1e-4)
  else:
    assert have == want


@needs_data
def test_the_trained_model_is_worth_testing_with(models, tasks):
  """Otherwise equal accuracies would be equal zeros, and texts that never stop."""
  results = evaluate('gpt2_jax', dict(pretrained=str(models['trained'])), tasks, 'hellaswag write')
  assert 0 < results['results']['local_hellaswag']['acc,none'] < 1
  texts = [sample['resps'][0][0] for sample in results['samples']['local_write']]
  assert len(set(texts)) > 1 and not any(' the' in text or '\n\n' in text for text in texts)


@needs_data
def test_nothing_depends_on_the_batch_the_mesh_or_the_cache(models, tasks, tmp_path):
  names = 'lambada write'
  args = dict(pretrained=str(models['trained']))
  want = evaluate('gpt2_jax', args, tasks, names)['samples']
  for more, options in (
    ({}, {'batch_size': 3}),
    ({'data': 4, 'fsdp': 2}, {}),
    ({}, {'use_cache': str(tmp_path / 'answers')}),
    ({}, {'use_cache': str(tmp_path / 'answers')}),
  ):
    have = evaluate('gpt2_jax', args | more, tasks, names, **options)['samples']
    for task in want:
      for one, other in zip(have[task], want[task], strict=True):
        compare(one['resps'], other['resps'])


def requests_of(*args):
  return [type('Instance', (), {'args': arg})() for arg in args]


@pytest.fixture(scope='module')
def small():
  from gpt2_jax.evaluation.lm_eval_adapter import GPT2LM

  return GPT2LM(byte_model(n_positions=48), max_gen_toks=12)


def test_each_answer_enters_the_cache_with_what_was_asked(small):
  kept = {}
  small.set_cache_hook(
    type('Hook', (), {'add_partial': lambda self, *entry: kept.update({repr(entry[:2]): entry[2]})})()
  )
  pairs = [('ab', ' cd'), ('', 'x'), ('ab', ' ce')]
  answers = small.loglikelihood(requests_of(*pairs), disable_tqdm=True)
  total = small.loglikelihood_rolling(requests_of(('abc' * 40,), ('',)))
  text = small.generate_until(requests_of(('ab', {'until': ['z']})))
  assert total[1] == 0 and total[0] < 0
  assert kept == {repr(('loglikelihood', pair)): a for pair, a in zip(pairs, answers)} | {
    repr(('loglikelihood_rolling', ('abc' * 40,))): total[0],
    repr(('loglikelihood_rolling', ('',))): 0.0,
    repr(('generate_until', ('ab', {'until': ['z']}))): text[0],
  }


def test_sampled_repeats_differ_and_repeat(small):
  options = {'until': [], 'do_sample': True, 'temperature': 1.5, 'max_gen_toks': 8}
  asked = [('ab', options)] * 3 + [('b', options)]
  texts = small.generate_until(requests_of(*asked))
  assert len(set(texts)) == 4 and texts == small.generate_until(requests_of(*asked))
  greedy = small.generate_until(requests_of(*[('ab', {'until': [], 'max_gen_toks': 8})] * 2))
  assert greedy[0] == greedy[1]


def test_a_long_context_loses_its_beginning(small):
  long, options = 'the quick brown fox ' * 9, {'until': [], 'max_gen_toks': 8}
  texts = small.generate_until(requests_of((long, options), (long[-40:], options), ('', options)))
  assert texts[0] == texts[1] and len(texts) == 3
  have = small.loglikelihood(requests_of((long, 'jumps'), (long[-44:], 'jumps')), disable_tqdm=True)
  assert have[0] == have[1]


@pytest.mark.parametrize(
  'options,parts',
  [
    ({'until': [], 'max_gen_toks': 48}, ['48 new tokens', 'no room', 'max_gen_toks']),
    ({'until': [], 'topp': 0.5}, ["'topp'", 'top_p']),
    ({'until': [], 'do_sample': True, 'temperature': 0.0}, ['temperature']),
  ],
)
def test_options_that_cannot_be_honoured_are_named(small, options, parts):
  with pytest.raises(gpt2_jax.UserError) as e:
    small.generate_until(requests_of(('ab', options)))
  for part in parts:
    assert part in str(e.value)


@needs_data
def test_the_command_of_the_page(models, tasks, tmp_path):
  page = (ROOT / 'docs' / 'lm-eval.md').read_text()
  [command] = re.findall(r'^python (-m gpt2_jax.evaluation.lm_eval .*)$', page, re.M)
  command = command.replace('pretrained=X', f'pretrained={models["random"]}')
  command = re.sub(r'--tasks \S+', '--tasks local_lambada', command)
  done = run(
    *command.split(),
    '--include_path',
    str(tasks),
    '--limit',
    '4',
    '--output_path',
    str(tmp_path),
    HF_HOME=str(tmp_path / 'hf'),
  )
  assert done.returncode == 0, done.stderr
  assert 'local_lambada' in done.stdout and 'perplexity' in done.stdout
  [file] = tmp_path.rglob('results_*.json')
  assert json.loads(file.read_text())['config']['model_num_parameters'] > 1_600_000


@pytest.mark.parametrize(
  'options,parts',
  [
    ({'max_length': 97}, ['max_length=97', '48']),
    ({'pretrained': 'no/where'}, ['no/where']),
    ({'device': 'cuda:1'}, ['cuda:1', 'JAX_PLATFORMS']),
    ({'apply_chat_template': True}, ['chat template']),
  ],
)
def test_arguments_that_cannot_be_honoured_are_named(small, options, parts):
  from gpt2_jax.evaluation.lm_eval_adapter import GPT2LM

  with pytest.raises(gpt2_jax.UserError) as e:
    if options.pop('apply_chat_template', False):
      small.chat_template(True)
    GPT2LM(**{'pretrained': small.model} | options)
  for part in parts:
    assert part in str(e.value)

"""The released weights: what is to be checked where they can be reached.

    pytest -n 0 --released tests/released            # all sizes: 11 GB, and the benchmarks
    pytest -n 0 --released tests/released -k '[gpt2:'  # one of them

Needs the extra `parity`. `expected.json` says what is expected of which model, and who says so;
`--expected FILE` names another one, which is how
tests/checkpoints/test_released_standin.py runs all of this on random weights.
"""

import json
from pathlib import Path

import numpy as np
import pytest
from support.arrays import assert_close
from support.processes import run

import gpt2_jax
from gpt2_jax.checkpoints import hub

HERE = Path(__file__).parent
# A figure that was published with 3 or 4 digits, perhaps in half precision, on the same data
BAND = {'acc': 0.005, 'acc_norm': 0.005, 'other': 0.01}


def pytest_generate_tests(metafunc):
  wanted = metafunc.function.__name__.removeprefix('test_')
  subjects = []
  if metafunc.config.getoption('released'):
    subjects = json.loads(
      Path(metafunc.config.getoption('expected') or HERE / 'expected.json').read_text()
    )
  cases = [
    (subject['model'], expected)
    for subject in subjects
    if wanted in subject
    for expected in (subject[wanted] if wanted == 'written' else [subject[wanted]])
  ]
  metafunc.parametrize(
    'name,expected', cases, ids=[f'{name}:{i}' for i, (name, _) in enumerate(cases)]
  )


@pytest.fixture(autouse=True, scope='module')
def needs_released(request):
  if not request.config.getoption('released'):
    pytest.skip('needs the released weights: pytest --released tests/released')


MODELS: dict[str, gpt2_jax.Pretrained] = {}


def load(name: str) -> gpt2_jax.Pretrained:
  """A model by its name on the hub; one is kept in memory."""
  if name not in MODELS:
    MODELS.clear()
    MODELS[name] = gpt2_jax.from_pretrained(name)
  return MODELS[name]


def test_parameters(name, expected):
  from gpt2_jax.model import sizes

  assert sizes.num_params(load(name).config) == expected


def test_logits(name, expected):
  """Of transformers, on the same files, in float64: what differs is our rounding."""
  torch, transformers = pytest.importorskip('torch'), pytest.importorskip('transformers')
  model = load(name)
  theirs = transformers.GPT2LMHeadModel.from_pretrained(hub.fetch(name)).double().eval()
  for text in expected:
    ids = model.tokenizer.encode(text)
    with torch.no_grad():
      want = theirs(torch.tensor([ids])).logits.numpy()
    assert_close(model(np.array([ids])), want)


def test_written(name, expected):
  """What others' tests say that the model writes, alone and in a batch with the other prompts."""
  model = load(name)
  encode = model.tokenizer.encode
  options = dict(expected['options'])
  if 'bad_words' in options:
    options['bad_words_ids'] = [encode(word) for word in options.pop('bad_words')]
  new = [
    len(encode(text)) - len(encode(prompt))
    for prompt, text in zip(expected['prompts'], expected['texts'])
  ]
  groups = [expected['prompts']] if len(set(new)) == 1 else []
  for prompts in [*groups, *([prompt] for prompt in expected['prompts'])]:
    n = new[expected['prompts'].index(prompts[0])]
    results = gpt2_jax.generate(model, prompts, do_sample=False, max_new_tokens=n, **options)
    for prompt, result in zip(prompts, results, strict=True):
      assert prompt + result.text == expected['texts'][expected['prompts'].index(prompt)]


def test_drawn(name, expected):
  """Texts that others drew with torch's random numbers: each token is among our likeliest ones."""
  model = load(name)
  encode = model.tokenizer.encode
  for text in expected['texts']:
    [prompt] = [prompt for prompt in expected['prompts'] if text.startswith(prompt)]
    ids, begin = encode(text), len(encode(prompt))
    logits_TV = np.asarray(model(np.array([ids])))[0]
    for t in range(begin, len(ids)):
      rank = (logits_TV[t - 1] > logits_TV[t - 1, ids[t]]).sum()
      assert rank < expected['top_k'], f'{text!r}: token {t} is number {rank + 1}'


def test_table(name, expected, tmp_path):
  """`gpt2-jax evaluate`, held against published figures of the same protocols."""
  if expected == 'published':
    from gpt2_jax.evaluation import published

    expected = {
      'rows': [
        [row.protocol, row.metric, row.values[name], row.source]
        for row in published.TABLE
        if row.same and name in row.values
      ]
    }
  rows = expected['rows']
  if not rows:
    pytest.skip(f'nobody has published a figure of {name} by one of our protocols')
  file = tmp_path / 'table.json'
  tasks = ','.join(dict.fromkeys(row[0] for row in rows))
  data = ('--data', expected['data']) if 'data' in expected else ()
  done = run(
    '-m',
    'gpt2_jax',
    'evaluate',
    '--checkpoint',
    name,
    '--tasks',
    tasks,
    '--json',
    str(file),
    *data,
    timeout=24 * 3600,
  )
  assert done.returncode == 0, done.stderr
  found = {
    result['protocol']['name']: result['metrics']
    for result in json.loads(file.read_text())['results']
  }
  far = []
  for protocol, metric, want, source in rows:
    have = found[protocol][metric]['value']
    band = expected.get('tolerance')
    allowed = (
      band * abs(want)
      if band is not None
      else BAND[metric]
      if metric in BAND
      else BAND['other'] * want
    )
    if not abs(have - want) <= allowed:
      far.append(f'{protocol} {metric}: {have}, but {want} ± {allowed:.2g} of {source}')
  assert not far, '\n'.join(far)

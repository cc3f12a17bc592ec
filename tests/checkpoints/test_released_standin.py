"""The checks of the released weights, run whole on a stand-in: random weights behind a local hub.

What is expected is computed by transformers on the same weights, and by plain loops over it.
"""

import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from support.processes import ROOT, environment

import gpt2_jax
from gpt2_jax.model.config import GPTConfig
from gpt2_jax.tokenizer import bpe

torch = pytest.importorskip('torch', reason='needs the extra parity')
transformers = pytest.importorskip('transformers', reason='needs the extra parity')
pytestmark = pytest.mark.slow

STANDIN = 'stand-in'
PROMPTS = ['The dog', 'Hello, my dog is a little']
LAMBADA = [
  'He took his hat and his hat was on his head',
  'She said yes and then she said no',
  'One two three four five',
  'In the end there was the end',
]
WIKITEXT = ' = Title = \n\n' + ' '.join(f'The year {1900 + i} was like the last .' for i in range(60))
SAME = 1e-5


def logprobs(theirs, ids) -> np.ndarray:
  """[T - 1, V] log-probabilities of what comes after each token but the last, in float64."""
  with torch.no_grad():
    logits = theirs(torch.tensor([list(ids)])).logits[0, :-1]
  return torch.log_softmax(logits, -1).numpy()


def write(theirs, prompt: str, new: int, encode, decode, **options) -> str:
  ids = torch.tensor([encode(prompt)])
  out = theirs.generate(
    ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, pad_token_id=50256, **options
  )
  return decode(out[0].tolist())


def lambada(theirs, encode) -> tuple[float, float]:
  """Perplexity and accuracy of last words, one at a time."""
  sums, right = [], []
  for text in LAMBADA:
    context, _, word = text.rpartition(' ')
    context, target = encode(context), encode(' ' + word)
    table = logprobs(theirs, context + target)[len(context) - 1 :]
    sums.append(table[range(len(target)), target].sum())
    right.append(table.argmax(-1).tolist() == target)
  return float(np.exp(-np.mean(sums))), float(np.mean(right))


def sliding(theirs, ids, window: int, stride: int) -> float:
  """Perplexity of a token, each given the window that ends with its stride."""
  total, scored, end = 0.0, 0, 0
  for begin in range(0, len(ids), stride):
    last, end = end, min(begin + window, len(ids))
    table = logprobs(theirs, ids[begin:end])
    for t in range(max(last, begin + 1), end):
      total, scored = total - table[t - begin - 1, ids[t]], scored + 1
    if end == len(ids):
      break
  return float(np.exp(total / scored))


def test_every_check_runs_and_holds_on_the_stand_in(hub, tmp_path):
  folder, env, asked = hub
  config = GPTConfig(n_positions=64, n_embd=32, n_layer=2, n_head=4, initializer_range=0.3)
  model = gpt2_jax.bind(config, gpt2_jax.init_params(config, 0))
  model = gpt2_jax.Pretrained(model, bpe.load('gpt2'))
  gpt2_jax.save_pretrained(model, folder / STANDIN)
  theirs = transformers.GPT2LMHeadModel.from_pretrained(folder / STANDIN).double().eval()
  encode, decode = model.tokenizer.encode, model.tokenizer.decode
  data = tmp_path / 'data'
  (data / 'wikitext-2').mkdir(parents=True)
  (data / 'lambada_test.jsonl').write_text(''.join(json.dumps({'text': t}) + '\n' for t in LAMBADA))
  (data / 'wikitext-2' / 'test.txt').write_text(WIKITEXT)
  lines = WIKITEXT.split('\n')
  tokens = encode('\n\n'.join(line + '\n' if line.strip() else '' for line in lines))
  ppl, acc = lambada(theirs, encode)
  torch.manual_seed(0)
  greedy, beams = dict(do_sample=False), dict(do_sample=False, num_beams=2)
  expected = [
    {
      'model': STANDIN,
      'parameters': sum(p.numel() for p in theirs.parameters()),
      'logits': PROMPTS,
      'written': [
        {
          'prompts': PROMPTS,
          'options': {},
          'texts': [write(theirs, prompt, 9, encode, decode, **greedy) for prompt in PROMPTS],
        },
        {
          'prompts': PROMPTS[:1],
          'options': {'num_beams': 2},
          'texts': [write(theirs, PROMPTS[0], 7, encode, decode, **beams)],
        },
        {
          'prompts': PROMPTS[:1],
          'options': {'repetition_penalty': 1.3, 'bad_words': [' is']},
          'texts': [
            write(
              theirs,
              PROMPTS[0],
              7,
              encode,
              decode,
              repetition_penalty=1.3,
              bad_words_ids=[encode(' is')],
              **greedy,
            )
          ],
        },
      ],
      'drawn': {
        'top_k': 50,
        'prompts': PROMPTS,
        'texts': [
          write(theirs, prompt, 3, encode, decode, do_sample=True, top_k=50) for prompt in PROMPTS
        ],
      },
      'table': {
        'data': str(data),
        'tolerance': SAME,
        'rows': [
          ['lambada/lm-eval', 'ppl', ppl, 'a loop'],
          ['lambada/lm-eval', 'acc', acc, 'a loop'],
          ['wikitext-2/hf-512', 'token_ppl', sliding(theirs, tokens, 64, 64), 'a loop'],
        ],
      },
    }
  ]

  # none of the checks holds of whatever it is given: the same model, expected to be another
  shutil.copytree(folder / STANDIN, folder / 'other')
  [wrong] = json.loads(json.dumps(expected))
  wrong['model'] = 'other'
  wrong['parameters'] += 1
  for row in wrong['written']:
    row['texts'] = [row['prompts'][0] + ' is not what it writes at all'] * len(row['texts'])
  ids = encode(PROMPTS[0])
  unlikely = int(np.argmin(model(np.array([ids]))[0, -1]))
  wrong['drawn']['texts'] = [decode([*ids, unlikely])]
  for row in wrong['table']['rows']:
    row[2] = row[2] * 1.001 + 0.001

  file = tmp_path / 'expected.json'
  file.write_text(json.dumps([*expected, wrong]))
  done = subprocess.run(
    [
      sys.executable,
      '-m',
      'pytest',
      '-n',
      '0',
      '-q',
      '-p',
      'no:cacheprovider',
      '-rA',
      '--released',
      '--expected',
      str(file),
      'tests/released',
    ],
    cwd=ROOT,
    env=environment(**env),
    capture_output=True,
    text=True,
    timeout=900,
  )
  said = {
    name: verdict
    for verdict, name in re.findall(r'^(PASSED|FAILED) \S+::test_(\S+\])', done.stdout, re.M)
  }
  assert len(said) == 14, done.stdout + done.stderr
  for name, verdict in said.items():
    holds = STANDIN in name or name.startswith('logits')
    assert verdict == ('PASSED' if holds else 'FAILED'), (name, done.stdout)
  assert all(name in done.stdout for name in ('lambada/lm-eval acc', 'wikitext-2/hf-512 token_ppl'))
  assert any('model.safetensors' in line for line in asked)

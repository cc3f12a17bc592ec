"""Evaluation: every protocol against plain loops over a float64 model, and what must not matter."""

import dataclasses
import hashlib
import json
import math
import re
import signal
import sys
import time
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import forked
from support.arrays import assert_close, mesh_of
from support.processes import ROOT, environment
from support.texts import make_text

import gpt2_jax
from gpt2_jax.cli import main
from gpt2_jax.core.errors import UserError
from gpt2_jax.data.benchmarks import Benchmark
from gpt2_jax.data.token_store import open_store
from gpt2_jax.evaluation import (
  detokenizers,
  example_tasks,
  protocols,
  published,
  score_cache,
  token_scores,
)
from gpt2_jax.evaluation.figures import Scorer
from gpt2_jax.evaluation.token_scores import Request, rolling, score
from gpt2_jax.model.config import GPTConfig
from gpt2_jax.model.pretrained_model import params_of
from gpt2_jax.model.sizes import num_params
from gpt2_jax.tokenizer import bpe
from gpt2_jax.training.step import nll

CONFIG = GPTConfig(
  vocab_size=257, n_positions=48, n_embd=32, n_layer=2, n_head=4, initializer_range=0.25
)
EOT = 256
BYTES = bpe.load('byte')


@pytest.fixture(scope='module', autouse=True)
def small_batches():
  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(token_scores.BATCH_TOKENS, 'cpu', 256)
    patch.setitem(token_scores.LOGITS, 'cpu', 5 * 384 * 20)  # at the longest, in three stretches
    yield


@pytest.fixture(scope='module')
def model():
  model = gpt2_jax.bind(CONFIG, gpt2_jax.init_params(CONFIG, 0))
  model = gpt2_jax.Pretrained(model, BYTES)
  return model


def trained_params():
  """Returns weights that have learned a little of made-up text."""
  words = make_text(np.random.default_rng(0), 4000).encode()
  text = np.frombuffer(words, np.uint8).astype(np.int32)
  tx, rows = optax.adam(1e-2), text[: len(text) // 784 * 784].reshape(-1, 16, 49)
  params = gpt2_jax.init_params(dataclasses.replace(CONFIG, initializer_range=0.02), 0)

  def step(carry, tokens):
    params, state = carry
    loss, gradients = jax.value_and_grad(
      lambda params: nll(gpt2_jax.bind(CONFIG, params), tokens).total
    )(params)
    updates, state = tx.update(gradients, state)
    return (optax.apply_updates(params, updates), state), loss

  train = jax.jit(lambda carry, rows: jax.lax.scan(step, carry, rows))
  order = np.arange(200) % len(rows)
  (params, _), losses = train((params, tx.init(params)), rows[order])
  assert losses[-1] < 2.5 < 5 < losses[0]  # letters alone: about 3.1
  return params


@pytest.fixture(scope='module', params=['random', pytest.param('trained', marks=pytest.mark.slow)])
def subject(request, model):
  """The models whose figures are compared with plain loops."""
  if request.param == 'random':
    return model
  trained = gpt2_jax.bind(CONFIG, trained_params())
  trained = gpt2_jax.Pretrained(trained, BYTES)
  return trained


@pytest.fixture(scope='module')
def slow(subject):
  """ids -> log-probabilities [T, V] of what follows each: GPT-2 in float64, written out."""
  params = params_of(subject)
  p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)

  def norm(x, w):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * w['weight'] + w['bias']

  def forward(ids):
    T, h = len(ids), p['h']
    assert 0 < T <= CONFIG.n_positions
    x = p['wte']['weight'][ids] + p['wpe']['weight'][:T]
    for i in range(CONFIG.n_layer):
      w = jax.tree.map(lambda leaf, i=i: leaf[i], h)
      q, k, v = (
        np.einsum('td,dcnh->ctnh', norm(x, w['ln_1']), w['attn']['c_attn']['weight'])
        + (w['attn']['c_attn']['bias'][:, None])
      )
      a = np.einsum('tnh,snh->nts', q, k) / math.sqrt(CONFIG.H)
      a = np.where(np.tri(T, dtype=bool), a, -np.inf)
      a = np.exp(a - a.max(-1, keepdims=True))
      out = np.einsum('nts,snh->tnh', a / a.sum(-1, keepdims=True), v)
      x = (
        x
        + np.einsum('tnh,nhd->td', out, w['attn']['c_proj']['weight'])
        + (w['attn']['c_proj']['bias'])
      )
      u = norm(x, w['ln_2']) @ w['mlp']['c_fc']['weight'] + w['mlp']['c_fc']['bias']
      u = 0.5 * u * (1 + np.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u**3)))
      x = x + u @ w['mlp']['c_proj']['weight'] + w['mlp']['c_proj']['bias']
    logits = norm(x, p['ln_f']) @ p['wte']['weight'][: CONFIG.vocab_size].T
    top = logits.max(-1, keepdims=True)
    return logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))

  return forward


def requests(n: int = 24) -> list[Request]:
  rng = np.random.default_rng(0)
  draw = lambda most: rng.integers(0, 257, rng.integers(1, most)).tolist()
  return [Request(draw(60), draw(40 if i % 3 else 8)) for i in range(n)]


def same(one, other) -> bool:
  return all(
    np.array_equal(a.logprobs, b.logprobs) and np.array_equal(a.greedy, b.greedy)
    for a, b in zip(one, other, strict=True)
  )


def test_scores_are_those_of_the_whole_model_in_float64(subject, slow):
  asked = requests()
  for request, scored in zip(asked, score(subject, asked)):
    ids, n = [*request.context, *request.target][-CONFIG.n_positions - 1 :], len(request.target)
    want = slow(ids[:-1])[-n:]
    assert_close(scored.logprobs, want[np.arange(n), request.target], 1e-6)
    assert (scored.greedy == (want.argmax(-1) == request.target)).all()


def test_a_score_does_not_depend_on_what_else_is_asked_bitwise(model):
  asked = requests()
  whole = score(model, asked)
  order = np.random.default_rng(1).permutation(len(asked))
  assert same(score(model, [asked[i] for i in order]), [whole[i] for i in order])
  for i in range(0, len(asked), 7):
    assert same(score(model, [asked[i]]), [whole[i]])


@pytest.mark.slow
@pytest.mark.parametrize('sizes', [(2, 2, 2), (1, 2, 2, 2)])
def test_a_score_does_not_depend_on_the_mesh(model, sizes):
  asked = [request for request in requests() if len(request.context) > 40][:8]
  with mesh_of(*sizes):
    on_mesh = gpt2_jax.bind(CONFIG, gpt2_jax.init_params(CONFIG, 0))
  for one, other in zip(score(model, asked), score(on_mesh, asked)):
    assert_close(one.logprobs, other.logprobs)
    assert (one.greedy == other.greedy).all()
  assert score_cache.fingerprint(model) == score_cache.fingerprint(on_mesh)


@given(
  n=st.integers(0, 60),
  window=st.integers(1, 12),
  stride=st.integers(1, 12),
  prefix=st.sampled_from([None, EOT]),
)
def test_windows_have_every_token_once_behind_all_that_fits(n, window, stride, prefix):
  tokens = list(range(n))
  text = tokens if prefix is None else [prefix, *tokens]
  if stride > window:
    with pytest.raises(UserError, match='stride'):
      rolling(tokens, window=window, stride=stride, prefix=prefix)
    return
  at = 1
  for request in rolling(tokens, window=window, stride=stride, prefix=prefix):
    context, target = list(request.context), list(request.target)
    assert text[at - len(context) : at + len(target)] == context + target
    assert context and len(target) <= (window if at == 1 else stride)
    assert len(context) + len(target) == min(window + 1, at + len(target))
    at += len(target)
  assert at == max(1, len(text))


class Killed(BaseException):
  pass


def test_what_was_scored_before_a_kill_is_not_scored_again(model, tmp_path, monkeypatch):
  asked, path = requests(), tmp_path / 'scores'
  whole = score(model, asked)
  collect, batches = token_scores._collect, []

  def dies(*args):
    if len(batches) == 2:
      raise Killed
    batches.append(args[1])
    return collect(*args)

  monkeypatch.setattr(token_scores, '_collect', dies)
  with pytest.raises(Killed):
    score(model, asked, kept=score_cache.Kept(path, 'model'))
  with open(path, 'ab') as f:
    f.write(b'["half a li')  # the kill came within a line
  before = sum(map(len, batches))
  batches = []
  monkeypatch.setattr(
    token_scores, '_collect', lambda *args: batches.append(args[1]) or collect(*args)
  )
  assert same(score(model, asked, kept=score_cache.Kept(path, 'model')), whole)
  assert 0 < before == len(asked) - sum(map(len, batches))
  batches.clear()
  assert same(score(model, asked, kept=score_cache.Kept(path, 'model')), whole)
  assert not batches
  score(model, asked[:1], kept=score_cache.Kept(path, 'another model'))
  assert batches
  path.write_text('something else\n')
  with pytest.raises(UserError, match='remove it'):
    score_cache.Kept(path, 'model')


def test_a_request_that_cannot_be_scored_is_named(model):
  for request, message in (
    (Request([], [1]), 'request 0 has no context'),
    (Request([1], []), 'no target'),
    (Request([1], [1] * 49), '49 tokens to score'),
    (Request([1], [257]), 'token id 257'),
  ):
    with pytest.raises(UserError, match=message):
      score(model, [request])


# ---- protocols, each against plain loops

CORPUS = ' \n'.join(
  [
    '',
    ' = Ann =',
    '',
    ' He had " 5 @.@ 5 " @-@ ball , the boys \' .',
    ' = = Go = =',
    " I do n't",
    ' = Bo =',
    ' She said : no ( it is ) N .',
    '',
  ]
)
LAMBADA = [
  {'text': 'It was the “cat” he saw. A cat'},
  {'text': 'a z'},
  {'text': "She did n't ask for the long-lost isle"},
]
HELLASWAG = [
  {'query': f'Go: {q}', 'endings': ['is up', 'on', 'do it again.', 'é'], 'label': k}
  for k, q in enumerate(('He', 'She ran and', 'We'))
]
WINOGRANDE = [
  {
    'sentence': 'The cup beat the jar as _ was big.',
    'option1': 'the cup',
    'option2': 'the jar',
    'answer': '2',
  },
  {'sentence': 'Ann fed Bo; _ ate.', 'option1': 'Ann', 'option2': 'Bo', 'answer': '1'},
]
WSC = [
  {'text': 'The men saw Ann and [she] ran.', 'options': ['The men', 'Ann'], 'answer': 'Ann'},
  {'text': 'The man. [His] dog', 'options': ['The man', 'The boy'], 'answer': 'The boy'},
]
CBT = [
  {
    'context': ['Ann ran .', "`` Go , '' he said ."],
    'question': f"So {q} did n't .",
    'answer': 'man',
    'options': ['man', 'dog', 'Ann'],
  }
  for q in ('the XXXXX', '`` XXXXX')
]


def benchmark(name: str, examples: list[dict]) -> Benchmark:
  return Benchmark(name, 'test', examples, '0' * 64, 'here')


@pytest.fixture(scope='module')
def run(subject):
  def values(name: str, examples: list[dict]) -> dict[str, float]:
    protocol = protocols.PROTOCOLS[name]
    scorer = Scorer(subject, score_cache.Kept(None, 'model'))
    found = example_tasks.KINDS[protocol.kind](
      scorer, protocol, benchmark(protocol.benchmark, examples)
    )
    assert found.keys() == set(protocol.metrics)
    return {metric: value.value for metric, value in found.items()}

  return values


def ids(text: str) -> list[int]:
  return BYTES.encode(text)


def continued(slow, context: list[int], target: list[int]) -> np.ndarray:
  """Log p of each target token, one forward pass for each."""
  row = [*context, *target]
  return np.array(
    [slow(row[max(0, t - CONFIG.n_positions) : t])[-1][row[t]] for t in range(len(context), len(row))]
  )


def cut(slow, context: list[int], target: list[int]) -> np.ndarray:
  """The same where the context loses what does not fit beside all of the target."""
  return continued(slow, context[-(CONFIG.n_positions + 1 - len(target)) :], target)


def near(have: dict[str, float], **want: float) -> None:
  # a perplexity is the exponential of what float32 has computed: of its rounding, too
  logs = lambda found: {k: math.log(v) if 'ppl' in k else v for k, v in found.items()}
  assert logs(have) == pytest.approx(logs(want), rel=1e-6)


@pytest.mark.parametrize(
  'name',
  [
    'wikitext-2/raw-32',
    'wikitext-103/detokenized-32',
    'ptb/detokenized-512',
    'lm1b/raw-32',
    'enwik8/raw-32',
    'text8/raw-1024',
  ],
)
def test_corpora(run, slow, name):
  protocol, W = protocols.PROTOCOLS[name], CONFIG.n_positions
  of_bytes = protocol.benchmark in ('enwik8', 'text8')
  text = CORPUS
  if protocol.text == 'detokenized':
    text = detokenizers.OF[protocol.benchmark].detokenize(text)
  row, stride = [EOT, *ids(text)], min(protocol.stride, W)
  nll = 0.0
  for t in range(1, len(row)):
    end = W if t <= W else min(len(row) - 1, W + stride * math.ceil((t - W) / stride))
    nll -= slow(row[max(0, end - W) : t])[-1][row[t]]
  have = run(name, [{'text': CORPUS.encode() if of_bytes else CORPUS}])
  words = len(CORPUS.split()) + CORPUS.count('\n')
  first = {
    'bits_per_byte': nll / math.log(2) / len(CORPUS.encode()),
    'bits_per_character': nll / math.log(2) / len(CORPUS),
    'word_ppl': math.exp(nll / words),
  }[protocol.metrics[0]]
  near(have, **{protocol.metrics[0]: first, 'token_ppl': math.exp(nll / (len(row) - 1))})


@pytest.mark.parametrize('name', ['wikitext-2/hf-512', 'wikitext-2/hf-1024'])
def test_hugging_faces_page(run, slow, name):
  """As its loop says it: labels of -100, shifted within the model."""
  row = ids('\n\n'.join(line if line.strip() else '' for line in CORPUS.splitlines(keepends=True)))
  W, stride = CONFIG.n_positions, min(protocols.PROTOCOLS[name].stride, CONFIG.n_positions)
  total, count, before = 0.0, 0, 0
  for begin in range(0, len(row), stride):
    end = min(begin + W, len(row))
    window = row[begin:end]
    labels = [-100] * (len(window) - (end - before)) + window[len(window) - (end - before) :]
    logprobs = slow(window)
    for t, label in enumerate(labels[1:]):
      if label != -100:
        total, count = total - logprobs[t][label], count + 1
    before = end
    if end == len(row):
      break
  near(run(name, [{'text': CORPUS}]), token_ppl=math.exp(total / count))


def test_windows_of_hugging_faces_page_overlap(slow):
  tokens = np.arange(25)
  asked = example_tasks.corpus_tasks.hf_windows(tokens, 10, 4)
  assert [(r.context[0], len(r.context), r.target.tolist()) for r in asked] == [
    (0, 1, [1, 2, 3, 4, 5, 6, 7, 8, 9]),
    (4, 6, [10, 11, 12, 13]),
    (8, 6, [14, 15, 16, 17]),
    (12, 6, [18, 19, 20, 21]),
    (16, 6, [22, 23, 24]),
  ]


def test_lm_evals_wikitext(run, slow):
  pages = [page for page in re.split(r'\n(?= = \w+ = )', CORPUS) if page.strip()]
  nll, W = 0.0, CONFIG.n_positions
  for page in pages:
    row = [EOT, *ids(detokenizers.lm_eval_wikitext(page))]
    for first in range(1, len(row), W):
      end = min(first + W, len(row))
      start = max(0, end - 1 - W)
      logprobs = slow(row[start : end - 1])
      nll -= sum(logprobs[t - 1 - start][row[t]] for t in range(first, end))
  words, size = sum(len(re.split(r'\s+', p)) for p in pages), sum(len(p.encode()) for p in pages)
  near(
    run('wikitext-2/lm-eval', [{'text': CORPUS}]),
    word_ppl=math.exp(nll / words),
    byte_ppl=math.exp(nll / size),
    bits_per_byte=nll / size / math.log(2),
  )


def test_held_out_tokens_of_a_store_as_in_training(subject, slow, tmp_path):
  rng = np.random.default_rng(3)
  for split, n in (('train', 40), ('val', 120)):
    rng.integers(0, 257, n).astype('<u2').tofile(tmp_path / f'{split}.bin')
  row, T = np.fromfile(tmp_path / 'val.bin', '<u2').astype(int), CONFIG.n_positions
  nll = [
    -slow(row[first:t])[-1][row[t]]
    for first in range(0, 119, T)
    for t in range(first + 1, min(first + T + 1, 120))
  ]
  found = example_tasks.KINDS['store'](
    Scorer(subject, score_cache.Kept(None, 'model')),
    protocols.store_protocol(str(tmp_path)),
    open_store(tmp_path),
  )
  near(
    {name: value.value for name, value in found.items()},
    loss=np.mean(nll),
    token_ppl=math.exp(np.mean(nll)),
  )
  assert found['loss'].n == len(nll) == 119


def plain(text: str) -> str:
  return '\n' + text.replace('“', '"').replace('”', '"').strip()


def test_lambada(run, slow):
  def ends(pairs):
    found = [(cut(slow, context, target), [*context, *target], target) for context, target in pairs]
    greedy = [
      all(
        slow(row[:n][-CONFIG.n_positions :])[-1].argmax() == row[n]
        for n in range(len(row) - len(target), len(row))
      )
      for _, row, target in found
    ]
    return {
      'ppl': math.exp(-np.mean([logprobs.sum() for logprobs, _, _ in found])),
      'acc': np.mean(greedy),
    }

  texts = [plain(example['text']) for example in LAMBADA]
  near(run('lambada/last-token', LAMBADA), **ends([(ids(t[:-1]), ids(t[-1])) for t in texts]))
  words = lambda texts: [
    (ids(' '.join(t.split(' ')[:-1])), ids(' ' + t.split(' ')[-1])) for t in texts
  ]
  near(run('lambada/last-word', LAMBADA), **ends(words(texts)))
  near(run('lambada/lm-eval', LAMBADA), **ends(words([e['text'] for e in LAMBADA])))


def test_lambada_as_the_model_would_go_on(run, slow):
  """The texts are made so that the first one is right; the second one's word is a stop word."""
  banned = [ids(letter)[0] for letter in 'aist']
  assert all(letter in example_tasks.STOP_WORDS for letter in 'aist')

  def written(context: str) -> str:
    row, n = ids(context), len(ids(context))
    for _ in range(3):
      logprobs = slow(row[-CONFIG.n_positions :])[-1].copy()
      logprobs[banned] = -np.inf
      row.append(int(logprobs.argmax()))
      if row[-1] == EOT:
        return BYTES.decode(row[n:-1])
    return BYTES.decode(row[n:])

  rng = np.random.default_rng(5)
  words = lambda text: re.findall(r'\w+|[^\w\s]', text)
  examples, right = [], []
  for _ in range(6):
    context = ''.join(chr(c) for c in rng.integers(97, 123, 9))
    word = words(written('\n' + context))
    examples.append({'text': f'{context} {word[0] if word and len(examples) % 2 else "sun"}'})
    text = plain(examples[-1]['text'])
    last = words(text)[-1]
    found = words(written(text[: text.rindex(last)].rstrip(' ')))
    right.append(bool(found) and found[0].lower() == last.lower())
  near(run('lambada/last-word-stopwords', examples), acc=np.mean(right))


def best(slow, rows: list[list[tuple[str, str]]], size=None) -> list[int]:
  scores = [
    [cut(slow, ids(a), ids(b)).sum() / (size(b) if size else 1) for a, b in row] for row in rows
  ]
  return [int(np.argmax(row)) for row in scores]


def test_choices(run, slow):
  rows = [[(e['query'], ' ' + ending) for ending in e['endings']] for e in HELLASWAG]
  share = lambda size=None: np.mean([a == b for a, b in zip(best(slow, rows, size), (0, 1, 2))])
  near(run('hellaswag/lm-eval', HELLASWAG), acc=share(), acc_norm=share(lambda b: len(b) - 1))
  near(run('hellaswag/per-token', HELLASWAG), acc=share(), acc_norm=share(lambda b: len(ids(b))))


def test_partial_evaluation(run, slow):
  rows = [
    [
      (e['sentence'].split('_')[0] + e[option], ' ' + e['sentence'].split('_')[1].strip())
      for option in ('option1', 'option2')
    ]
    for e in WINOGRANDE
  ]
  near(
    run('winogrande/partial', WINOGRANDE),
    acc=np.mean([a == b for a, b in zip(best(slow, rows), (1, 0))]),
  )
  rows = [
    [(f'The men saw Ann and {who}', ' ran.') for who in ('the men', 'Ann')],
    [(f"The man. {who}'s", ' dog') for who in ('The man', 'The boy')],
  ]
  near(run('wsc273/partial', WSC), acc=np.mean([a == b for a, b in zip(best(slow, rows), (1, 1))]))


def test_cloze(run, slow):
  story = 'Ann ran. "Go," he said. So '
  right = []
  for before, quote in ((story + 'the', ' '), (story[:-1], ' "')):
    scores = [
      cut(slow, [EOT, *ids(before)], ids(f"{quote}{o} didn't.")).sum() for o in ('man', 'dog', 'Ann')
    ]
    right.append(np.argmax(scores) == 0)
  near(run('cbt-cn/paper', CBT), acc=np.mean(right))


# ---- the command, and what it says


@pytest.fixture(scope='module')
def checkpoint(subject, tmp_path_factory):
  folder = tmp_path_factory.mktemp('checkpoint') / 'hf'
  gpt2_jax.save_pretrained(subject, folder)
  return str(folder)


@pytest.fixture
def data(tmp_path):
  write = lambda name, rows: (tmp_path / name).write_text('\n'.join(map(json.dumps, rows)) + '\n')
  write('lambada_test.jsonl', LAMBADA)
  write('hellaswag_val.jsonl', HELLASWAG)
  return tmp_path


def test_the_command_says_all_that_a_figure_follows_from(checkpoint, data, capsys, run, monkeypatch):
  monkeypatch.setattr(jax, 'device_count', lambda: 1)  # the killed one below runs on two
  file = data / 'out' / 'result.json'
  main.main(
    [
      'evaluate',
      '--checkpoint',
      checkpoint,
      '--tasks',
      'hellaswag,lambada/lm-eval',
      '--data',
      str(data),
      '--json',
      str(file),
    ]
  )
  shown, said = capsys.readouterr().out, json.loads(file.read_text())
  assert said['dtype'] == 'float32' and said['backend'] == 'cpu' and said['size'] is None
  assert said['parameters'] == num_params(CONFIG) and said['packages']['jax'] == jax.__version__
  names = [result['protocol']['name'] for result in said['results']]
  assert names == ['hellaswag/lm-eval', 'hellaswag/per-token', 'lambada/lm-eval']
  for result in said['results']:
    path = Path(result['data']['source'])
    assert result['data']['sha256'] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert f'{result["protocol"]["name"]} version 1: test of {path}, sha256 ' in shown or (
      result['data']['split'] == 'validation'
    )
  have = {name: metric['value'] for name, metric in said['results'][-1]['metrics'].items()}
  near(run('lambada/lm-eval', LAMBADA), **have)
  assert 'gpt2 40.06' in shown and 'same protocol' in shown
  assert sorted(path.name for path in file.parent.iterdir()) == ['result.json']  # no scores are left


@pytest.mark.parametrize(
  'words, message',
  [
    (['--tasks', 'lambda'], "'lambda' is none of paper"),
    (['--tasks', ','], 'names no task'),
    (['--tasks', 'lambada,hellaswag', '--data', 'lambada_test.jsonl'], 'is one file'),
    (['--tasks', 'paper', '--data', 'empty'], 'there is no data of any'),
    (['--tasks', 'text8', '--data', 'empty'], 'text8'),
    (['--tasks', 'store:empty'], 'is not a token store'),
    (['--tasks', 'lambada', '--limit', '0', '--data', '.'], '--limit 0'),
  ],
)
def test_what_the_command_cannot_use_is_named(checkpoint, data, monkeypatch, capsys, words, message):
  (data / 'empty').mkdir()
  monkeypatch.chdir(data)
  with pytest.raises(SystemExit, match=message):
    main.main(['evaluate', '--checkpoint', checkpoint, *words])


@pytest.mark.slow
def test_a_killed_evaluation_goes_on_and_ends_the_same(checkpoint, data):
  """By SIGKILL, as soon as anything is kept."""
  (data / 'wikitext-2').mkdir()
  (data / 'wikitext-2' / 'wiki.test.tokens').write_text(CORPUS * 100)
  file = data / 'result.json'
  words = [
    sys.executable,
    '-m',
    'gpt2_jax',
    'evaluate',
    '--checkpoint',
    checkpoint,
    '--tasks',
    'wikitext-2/raw-32,lambada/last-token',
    '--data',
    str(data),
    '--json',
    str(file),
  ]
  kept = data / 'result.json.scores'
  process = forked.Popen(words, cwd=ROOT, env=environment(2))
  while not (kept.exists() and kept.stat().st_size) and process.poll() is None:
    time.sleep(0.01)
  process.kill()
  assert process.wait() == -signal.SIGKILL and kept.exists()
  forked.run(words, cwd=ROOT, env=environment(2)).check_returncode()
  once = json.loads(file.read_text())['results']
  assert not kept.exists()
  file.unlink()
  forked.run(words, cwd=ROOT, env=environment(2)).check_returncode()
  assert json.loads(file.read_text())['results'] == once


def test_every_protocol_and_every_published_figure_stands_in_the_docs():
  page = (ROOT / 'docs' / 'evaluation.md').read_text()
  for protocol in protocols.PROTOCOLS.values():
    assert f'`{protocol.name}`' in page, protocol.name
    assert protocol.source in page, protocol.source
  assert set(protocols.PAPER) <= protocols.PROTOCOLS.keys()
  for row in published.TABLE:
    assert row.protocol == 'store' or row.metric in protocols.PROTOCOLS[row.protocol].metrics
    assert row.source in page and row.same == (not row.why), row
    for value in row.values.values():
      assert re.search(rf'(?<![\d.]){value:.10g}(?!\d)', page), (row.source, row.protocol, value)


def test_released_sizes_are_told_by_their_parameters():
  for n, (layers, width, heads) in zip(
    published.SIZES, ((12, 768, 12), (24, 1024, 16), (36, 1280, 20), (48, 1600, 25))
  ):
    assert num_params(GPTConfig(n_layer=layers, n_embd=width, n_head=heads)) == n

"""`gpt2-jax sample`: prompts from everywhere, every option as a flag, JSON, streams, sessions."""

import contextlib
import io
import json
import os
import pty
import re
import select
import subprocess
import sys
import time

import pytest
import tyro
from hypothesis import given, settings
from hypothesis import strategies as st
from support.models import byte_model
from support.processes import ROOT, environment

import gpt2_jax
from gpt2_jax.cli import inputs, main
from gpt2_jax.core.errors import UserError
from gpt2_jax.decoding.options import Options
from gpt2_jax.decoding.samplers import SAMPLERS
from gpt2_jax.model import text_batches
from gpt2_jax.tokenizer import bpe

# each option in words, as after its flag or /set, and the value
SPELLED = {
  'max_new_tokens': ('9', 9),
  'min_new_tokens': ('2', 2),
  'min_length': ('3', 3),
  'eos_token_id': ('3 4', [3, 4]),
  'stop_token_ids': ('7', [7]),
  'stop_strings': ('a b', ('a', 'b')),
  'max_time': ('1.5', 1.5),
  'context': ('slide', 'slide'),
  'do_sample': ('False', False),
  'num_return_sequences': ('2', 2),
  'seed': ('5', 5),
  'temperature': ('0.7', 0.7),
  'top_k': ('4', 4),
  'top_p': ('0.9', 0.9),
  'min_p': ('0.1', 0.1),
  'typical_p': ('0.8', 0.8),
  'epsilon_cutoff': ('1e-4', 1e-4),
  'eta_cutoff': ('1e-3', 1e-3),
  'repetition_penalty': ('1.2', 1.2),
  'presence_penalty': ('-0.5', -0.5),
  'frequency_penalty': ('0.25', 0.25),
  'no_repeat_ngram_size': ('3', 3),
  'bad_words_ids': ('[[1,2],[3]]', [[1, 2], [3]]),
  'sequence_bias': ('[[[1,2],-0.5]]', [[[1, 2], -0.5]]),
  'suppress_tokens': ('1 2', [1, 2]),
  'begin_suppress_tokens': ('8', [8]),
  'forced_bos_token_id': ('6', 6),
  'forced_eos_token_id': ('6', 6),
  'exponential_decay_length_penalty': ('5 1.1', (5, 1.1)),
  'regex': (r'\d+', r'\d+'),
  'remove_invalid_values': ('True', True),
  'renormalize_logits': ('True', True),
  'num_beams': ('4', 4),
  'length_penalty': ('0.5', 0.5),
  'early_stopping': ('never', 'never'),
  'num_beam_groups': ('2', 2),
  'diversity_penalty': ('0.3', 0.3),
  'penalty_alpha': ('0.6', 0.6),
  'prompt_lookup_num_tokens': ('3', 3),
  'max_matching_ngram_size': ('4', 4),
  'num_assistant_tokens': ('6', 6),
  'top_logprobs': ('2', 2),
  'allow_special': ('True', True),
}
PROMPTS = ['the model', ' a b', 'é ü']


@pytest.fixture(scope='module')
def model(tmp_path_factory):
  """(a tiny random model of bytes, its folder)"""
  made = byte_model(n_head=2, initializer_range=0.2)
  folder = tmp_path_factory.mktemp('model') / 'tiny'
  gpt2_jax.save_pretrained(made, folder)
  return gpt2_jax.from_pretrained(folder), str(folder)


@pytest.fixture
def sample(model, monkeypatch, capsys):
  """Runs the command in this process, with so much on standard input; what it prints."""

  def run(*arguments: str, stdin: bytes = b'') -> str:
    monkeypatch.setattr(sys, 'stdin', io.TextIOWrapper(io.BytesIO(stdin), encoding='utf-8'))
    main.main(['sample', '--checkpoint', model[1], *arguments])
    return capsys.readouterr().out

  return run


def test_every_option_is_a_flag_with_its_docstring(capsys):
  assert SPELLED.keys() == inputs.TYPES.keys()
  want = Options(**{name: value for name, (_, value) in SPELLED.items()})
  assert len(inputs.given(want)) == len(SPELLED)
  flags, options = [], Options()
  for name, (words, value) in SPELLED.items():
    flag = '--' + name.replace('_', '-')
    if isinstance(value, bool):
      flags.append(flag if value else flag.replace('--', '--no-'))
    else:
      flags += [flag, *words.split()]
    options = inputs.changed(options, name, inputs.words(words))
    assert inputs.given(inputs.changed(options, name, [])) | {name: value} == inputs.given(options)
  assert options == want
  made = tyro.cli(
    main.Sample,
    args=['--checkpoint', 'x', *flags],
    registry=inputs.registry,
    config=(tyro.conf.OmitArgPrefixes,),
  )
  assert made.options == want

  with pytest.raises(SystemExit) as end:
    main.main(['sample', '--help'])
  assert end.value.code == 0
  printed = re.sub(r'[\s│]+', ' ', capsys.readouterr().out)
  source = (ROOT / 'gpt2_jax' / 'decoding' / 'options.py').read_text()
  described = re.findall(r'^  (\w+): .*\n  """(.*)"""$', source, re.M)
  described += [(name, rule.help) for name, rule in SAMPLERS.items() if rule.type is not None]
  assert len(described) == len(SPELLED)
  for name, text in described:
    assert '--' + name.replace('_', '-') in printed and text in printed, name


@pytest.mark.parametrize(
  'name,words,says',
  [
    ('temprature', '1', 'do you mean temperature?'),
    ('temperature', 'hot', 'takes float, not hot'),
    ('top_k', '3 4', 'takes int | None, not 3 4'),
    ('context', 'slid', "Literal['stop', 'slide']"),
    ('do_sample', 'maybe', 'takes bool'),
    ('bad_words_ids', '[[1', '[[ID,…],…]'),
    ('stop_strings', '"a" "b', 'a word is not closed'),
    ('stop_strings', r'"\x"', 'no JSON string'),
  ],
)
def test_a_wrong_setting_is_one_line(name, words, says, capsys):
  with pytest.raises(UserError) as error:
    inputs.changed(Options(), name, inputs.words(words))
  assert says in str(error.value) and '\n' not in str(error.value)
  assert capsys.readouterr() == ('', '')


@settings(deadline=None, max_examples=50)
@given(st.lists(st.text(st.characters(exclude_categories=['Cs']), max_size=6), max_size=4))
def test_words_are_what_was_quoted(texts):
  line = '  '.join(json.dumps(text, ensure_ascii=False) for text in texts)
  assert inputs.words(line) == texts
  plain = [text.replace("'", '') for text in texts]
  assert inputs.words(' '.join(f"'{text}'" for text in plain)) == plain


def test_a_json_line_repeats_itself(model, sample, tmp_path):
  """From every place, in batches of any size: the same lines. One alone is enough for its text."""
  flags = [
    '--max-new-tokens',
    '6',
    '--num-return-sequences',
    '2',
    '--seed',
    '3',
    '--top-k',
    '50',
    '--min-new-tokens',
    '6',
    '--top-logprobs',
    '2',
    '--json',
  ]
  printed = sample('--prompt', *PROMPTS, *flags)
  lines = [json.loads(line) for line in printed.split('\n')[:-1]]
  assert [(line['prompt'], line['prompt_index']) for line in lines] == [
    (prompt, i) for i, prompt in enumerate(PROMPTS) for _ in range(2)
  ]
  assert 'é ü' in printed and '\\u00e9' not in printed
  for one, other in zip(lines[::2], lines[1::2]):
    assert one['prompt_tokens'] == bpe.load('byte').encode(one['prompt'])
    repeated = gpt2_jax.generate(model[0], one['prompt_tokens'], **one['options'])
    for result, line in zip(repeated, (one, other), strict=True):
      assert (result.text, result.tokens) == (line['text'], line['tokens'])
      assert result.logprobs == pytest.approx(line['logprobs'], abs=1e-4)
      assert line['checkpoint'] == model[1] and line['finish_reason'] == 'length'

  text, jsonl = tmp_path / 'prompts.txt', tmp_path / 'printed.jsonl'
  text.write_bytes(b'\xef\xbb\xbf' + '\r\n \n'.join(PROMPTS).encode())
  jsonl.write_text('\n'.join(printed.split('\n')[::2]), encoding='utf-8')
  batch = ['--batch-size', '1']
  for arguments in (
    ['--prompt-file', str(text), *batch],
    ['--prompt-file', str(jsonl)],
    ['--prompt', PROMPTS[0], '--prompt-file', '-'],
  ):
    again = sample(*arguments, *flags, stdin='\n'.join(PROMPTS[1:]).encode())
    for line, want in zip(again.split('\n')[:-1], lines, strict=True):
      have = json.loads(line)
      assert {**have, **{key: want[key] for key in ('logprobs', 'top_logprobs')}} == want
      assert have['logprobs'] == pytest.approx(want['logprobs'], abs=1e-4)


def test_a_stream_is_what_is_printed_at_the_end(sample):
  flags = ['--max-new-tokens', '12', '--seed', '1', '--prompt', *PROMPTS]
  plain = sample(*flags)
  assert sample('--stream', *flags) == plain
  assert plain.count('-' * 78) == 2 and all(prompt in plain for prompt in PROMPTS)


@pytest.mark.parametrize('end', ['\n', '\r\n'])
def test_standard_input_is_one_prompt(sample, end):
  flags = ['--greedy', '--max-new-tokens', '5', '--json']
  line = json.loads(sample(*flags, stdin='a\n\né\rb\n'.replace('\n', end).encode()))
  assert line['prompt'] == 'a\n\né\rb' and line['options']['do_sample'] is False
  free = json.loads(sample(*flags))
  assert (free['prompt'], free['prompt_tokens']) == ('', [256])


def test_lines_may_end_as_windows_ends_them(sample, tmp_path):
  """In a file and a pipe, with a byte order mark or without, and in a session."""
  flags, wanted = ['--greedy', '--max-new-tokens', '2', '--json'], ['ab', 'é\rc', 'd']
  content = b'\xef\xbb\xbf' + '\r\n'.join(wanted).encode() + b'\r\n'
  (tmp_path / 'prompts.txt').write_bytes(content)
  for path in (str(tmp_path / 'prompts.txt'), '-'):
    printed = sample(*flags, '--prompt-file', path, stdin=content).splitlines()
    assert [json.loads(line)['prompt'] for line in printed] == wanted
  session = [
    sample(
      '--interactive',
      '--greedy',
      '--max-new-tokens',
      '4',
      stdin=end.join(['ab\\', 'c', '/again', '']).encode(),
    )
    for end in ('\n', '\r\n')
  ]
  assert session[0] == session[1] and session[0].startswith('ab\nc')


def test_a_special_token_in_a_prompt(sample, capsys):
  """Text, which is said once; or the token, at every door where one asks for it."""
  flags = ['--greedy', '--max-new-tokens', '3']
  text, end = 'a<|endoftext|>b', [64, 256, 65]
  text_batches.say_once.cache_clear()
  with contextlib.redirect_stderr(io.StringIO()) as said:
    printed = sample(*flags, '--json', '--prompt', text, 'a', text)
  assert json.loads(printed.splitlines()[0])['prompt_tokens'] == bpe.load('byte').encode(text)
  assert [line for line in said.getvalue().splitlines() if 'note:' in line] == [
    "note: '<|endoftext|>' in a prompt is read as text. To have the special token, say so: "
    '--special, allow_special=True, or give ids.'
  ]
  text_batches.say_once.cache_clear()
  with contextlib.redirect_stderr(io.StringIO()) as said:
    for more in (
      ['--prompt', text, '--special'],
      ['--prompt', text, '--allow-special'],
      ['--prompt-ids', '64', '256', '65'],
      ['--prompt-ids', '[64, 256,65]'],
    ):
      line = json.loads(sample(*flags, '--json', *more))
      assert line['prompt_tokens'] == end and line['prompt'] in (text, end)
    whole = sample(*flags, '--prompt', text, '--special')
    assert whole == sample(*flags, '--prompt-ids', '64', '256', '65')
    assert whole == sample(*flags, '--stream', '--prompt-ids', '64,256,65')
    session = ['/set allow_special True', text, '/quit']
    assert whole == sample('--interactive', *flags, stdin='\n'.join(session).encode())
    assert whole == sample('--interactive', '--special', *flags, stdin=text.encode() + b'\n')
  assert 'note:' not in said.getvalue()


def test_ids_in_a_file_of_prompts(sample, tmp_path):
  """What --json printed repeats itself, of ids too."""
  flags = ['--greedy', '--max-new-tokens', '3', '--json']
  printed = sample(*flags, '--prompt', 'ab', '--prompt-ids', '97', '256')
  (tmp_path / 'printed.jsonl').write_text(printed)
  assert sample(*flags, '--prompt-file', str(tmp_path / 'printed.jsonl')) == printed
  assert [json.loads(line)['prompt'] for line in printed.splitlines()] == ['ab', [97, 256]]


@pytest.mark.slow
def test_eight_bits_and_an_assistant(model, sample):
  flags = ['--prompt', 'a', '--greedy', '--max-new-tokens', '8', '--min-new-tokens', '8', '--json']
  plain, guessed, small = (
    json.loads(sample(*flags, *more)) for more in ((), ('--assistant', model[1]), ('--int8',))
  )
  assert guessed['tokens'] == plain['tokens'] and guessed['assistant'] == model[1]
  assert small['int8'] and 0 < abs(small['logprobs'][0] - plain['logprobs'][0]) < 0.1


@pytest.mark.parametrize(
  'arguments,stdin,says',
  [
    (['--stream', '--json'], b'', 'exclude each other'),
    (['--interactive', '--prompt', 'a'], b'', '--interactive asks for prompts'),
    (['--batch-size', '0'], b'', '--batch-size 0'),
    (['--prompt-ids', '1', 'x2'], b'', "--prompt-ids '1 x2' are no ids"),
    (['--prompt-ids', '9' * 5000], b'', 'are no ids'),
    (['--prompt-ids', '257'], b'', 'token id 257, but the vocabulary has 257'),
    (['--interactive', '--prompt-ids', '1'], b'', '--interactive asks for prompts'),
    (['--prompt-file', 'FILE.jsonl'], b'{"prompt": [1, true]}', 'FILE.jsonl:1: wanted'),
    (['--prompt', 'a', '--seed', '-1'], b'', '--seed = -1 must be a whole number from 0 to 2**64'),
    (['--prompt', 'a', '--seed', f'{2**64}'], b'', 'must be a whole number from 0 to 2**64'),
    (['--prompt', 'ab\udcff'], b'', 'is not UTF-8: byte 0xff at offset 2.'),
    ([], b'ab\ncd\x80', 'standard input is not UTF-8: byte 0x80 at offset 5.'),
    (['--prompt-file', 'FILE'], b'a\n\xc3', 'FILE is not UTF-8: byte 0xc3 at offset 2.'),
    (['--prompt-file', 'FILE.jsonl'], b'{"prompt": "a"}\n{"text": 1}', 'FILE.jsonl:2: wanted'),
    (['--prompt-file', 'FILE.jsonl'], b'{"prompt": "a\\ud800"}', 'FILE.jsonl:1: the prompt is not'),
    (['--prompt-file', 'FILE'], b' \n\n', 'FILE holds no prompt'),
    (['--prompt-file', '/nowhere/a'], b'', 'cannot read prompts from /nowhere/a: No such file'),
    (['--prompt', 'a', '--temperature', '0'], b'', 'temperature = 0'),
    (['--prompt', 'x' * 64], b'', 'prompt 0 has 64 tokens'),
    (['--stream', '--num-return-sequences', '2'], b'', 'num_return_sequences = 1'),
    (['--interactive', '--num-return-sequences', '2'], b'', 'num_return_sequences = 1'),
  ],
)
def test_what_can_not_be_done_is_said(sample, tmp_path, monkeypatch, arguments, stdin, says):
  monkeypatch.chdir(tmp_path)
  for argument in arguments:
    if argument.startswith('FILE'):
      (tmp_path / argument).write_bytes(stdin)
  with pytest.raises(SystemExit) as end:
    sample(*arguments, stdin=stdin)
  message = end.value.code
  assert message.startswith('error: ') and says in message and '\n' not in message


def test_a_session_writes_what_generate_does(model, sample):
  options = dict(top_k=5, temperature=0.9, suppress_tokens=[256])
  generate = lambda prompt, n, seed: gpt2_jax.generate(
    model[0], prompt, max_new_tokens=n, seed=seed, **options
  )[0]
  script = [
    '/set max_new_tokens 7',
    '/set top-k 5',
    '/seed 2',
    'the\\',
    '/model ',
    '/more',
    '/again',
    '//x',
    '/free',
    '/seed',
    '/set stop_strings "a\\n" \'b\\n\'',
    '/settings',
    '/quit',
    'no',
  ]
  printed = sample(
    '--interactive',
    '--temperature',
    '0.9',
    '--suppress-tokens',
    '256',
    stdin='\n'.join(script).encode(),
  )
  prompt = 'the\n/model '
  tokens, decode = generate(prompt, 14, 2).tokens, model[0].tokenizer.decode
  want = [prompt + decode(tokens[:7]), decode(tokens[7:])]  # /more goes on as one long text would
  want += [text + generate(text, 7, 3).text for text in (prompt, '/x', '')]
  assert printed.startswith('\n'.join(want) + '\n')
  shown = printed[len('\n'.join(want)) + 1 :].splitlines()
  assert len(shown) == len(SPELLED) and shown[:6] == [
    '* max_new_tokens = 7',
    "* stop_strings = ('a\\n', 'b\\\\n')",
    '* suppress_tokens = [256]',
    '* temperature = 0.9',
    '* top_k = 5',
    '  eos_token_id = None',
  ]


def test_what_a_session_refuses_does_not_end_it(sample):
  refused = {
    b'/set temperature -1': 'temperature = -1',
    b'/set heat 1': "no option 'heat'",
    b'/set temperature hot': 'temperature takes float, not hot',
    b'/set': "no option ''",
    b'/go': 'no /go',
    b'/again': 'no prompt yet',
    b'/set num_beams 2': 'num_beams =',
    b'\xff': 'byte 0xff at offset 0',
    b'x' * 70: 'has 70 tokens',
  }
  with contextlib.redirect_stderr(io.StringIO()) as errors:
    printed = sample('--interactive', stdin=b'\n'.join([*refused, b'', b'/help']))
  said = [line for line in errors.getvalue().splitlines() if line.startswith('error: ')]
  for line, says in zip(said, refused.values(), strict=True):
    assert says in line
  assert [line.split()[0] for line in printed.splitlines()[:8]] == [
    '/again',
    '/free',
    '/help',
    '/more',
    '/quit',
    '/seed',
    '/set',
    '/settings',
  ]


@pytest.mark.slow
def test_ctrl_c_stops_the_text_and_not_the_session(model, tmp_path):
  """Typed into a pseudo-terminal, which sends the signal to a process of its own."""
  outer, inner = pty.openpty()
  code = (
    'import os, signal, sys; os.login_tty(os.dup(0)); '
    'signal.signal(signal.SIGINT, signal.default_int_handler); '  # a background job ignores it
    'from gpt2_jax.cli import main; main.main(sys.argv[1:])'
  )
  process = subprocess.Popen(
    [
      sys.executable,
      '-c',
      code,
      'sample',
      '--interactive',
      '--checkpoint',
      model[1],
      '--context',
      'slide',
      '--max-new-tokens',
      '1000000',
      '--suppress-tokens',
      '256',
      '10',
    ],
    stdin=inner,
    stdout=inner,
    stderr=inner,
    env=environment(TERM='dumb', XDG_STATE_HOME=str(tmp_path / 'state')),
  )
  os.close(inner)
  shown = ''

  def type_after(pattern: str, text: str, again: str = '') -> None:
    """Types once the screen, from where the last pattern ended, matches. Until then, what is to be
    typed `again` every second: a Ctrl-C just before readline waits is seen with the next key only.
    """
    nonlocal shown
    deadline = time.monotonic() + 120
    while not (match := re.search(pattern, shown, re.S)):
      assert time.monotonic() < deadline, shown
      if select.select([outer], [], [], 1)[0]:
        shown += os.read(outer, 4096).decode('utf-8', 'replace')
      else:
        os.write(outer, again.encode())
    shown = shown[match.end() :]
    os.write(outer, text.encode())

  try:
    type_after('> ', 'endless\n')
    type_after('endless.*endless.{100}', '\x03')
    type_after('stopped: /more goes on.*> ', '\x03')
    type_after('Ctrl-D ends the session.*> ', '/set max_new_tokens 4\n', again='\x03')
    type_after('> ', 'after it\n')
    type_after('after it.*4 tokens, length, seed 0.*> ', '/more\n')
    type_after('4 tokens, length, seed 0.*> ', '\x04')
    assert process.wait(30) == 0
  finally:
    process.kill()
    process.wait()
    os.close(outer)
  history = (tmp_path / 'state' / 'gpt2_jax' / 'history').read_text().splitlines()
  assert history[-4:] == ['endless', '/set max_new_tokens 4', 'after it', '/more']


@pytest.mark.slow
def test_as_a_filter_in_a_pipe(model):
  """Real processes: bytes as the system gives them, an output that can't show them, or is closed."""
  command = [sys.executable, '-m', 'gpt2_jax', 'sample', '--checkpoint', model[1]]
  start = lambda *more, **env: subprocess.Popen(
    [*command, *more],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    cwd=ROOT,
    env=environment(**env),
  )
  ascii = start('--max-new-tokens', '20', '--json', PYTHONIOENCODING='ascii')
  closed = start('--max-new-tokens', '20', '--stream')
  wrong = start('--prompt', os.fsdecode(b'ab\xff'))
  closed.stdout.close()
  out, err = ascii.communicate('é\n'.encode())
  assert ascii.returncode == 0 and json.loads(out)['prompt'] == 'é', err
  closed.stdin.close()
  assert (closed.wait(), closed.stderr.read()) == (1, b'')
  closed.stderr.close()
  _, err = wrong.communicate()
  assert wrong.returncode == 1 and err.endswith(b'is not UTF-8: byte 0xff at offset 2.\n'), err

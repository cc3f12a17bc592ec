"""The model card, `README.md` of a Hugging Face folder, from what is known of a model."""

import json
import shlex
import textwrap

import yaml

from gpt2_jax.checkpoints.tensors import Source
from gpt2_jax.model.sizes import num_params


def _table(rows: list[tuple]) -> str:
  head, *body = [f'| {" | ".join(str(cell) for cell in row)} |' for row in rows]
  return '\n'.join([head, '|' + '---|' * len(rows[0]), *body])


def model_card(source: Source) -> str:
  """Returns Markdown with the hub's YAML header. Of a run: data, tokens, losses, commit, command."""
  c, record = source.config, source.record
  task = {
    'lm': 'text-generation',
    'sequence_classification': 'text-classification',
    'token_classification': 'token-classification',
  }[c.head]
  header = {'library_name': 'transformers', 'pipeline_tag': task, 'tags': ['gpt2', 'gpt2_jax']}
  name = {
    'lm': 'language model',
    'sequence_classification': 'classifier of texts',
    'token_classification': 'classifier of tokens',
  }[c.head]
  sizes = [
    ('parameters', 'layers', 'width', 'heads', 'context', 'vocabulary', 'dtype'),
    (
      f'{num_params(c):,}',
      c.n_layer,
      c.n_embd,
      c.n_head,
      c.n_positions,
      f'{c.vocab_size:,}',
      source.dtype,
    ),
  ]
  parts = [f'---\n{yaml.safe_dump(header, sort_keys=False)}---', f'# GPT-2, {name}', _table(sizes)]
  if c.head != 'lm':
    labels = source.keys.get('id2label') or {i: f'LABEL_{i}' for i in range(c.num_labels)}
    parts.append('Labels: ' + ', '.join(f'`{label}`' for label in labels.values()) + '.')
  if record is None or 'env' not in record:  # not a run of ours
    parts.append(f'Converted by gpt2_jax from `{source.where}`; how it was trained stands there.')
  else:
    parts += _training(record)
  if c.head == 'lm':
    parts.append(
      textwrap.dedent("""\
        ## Use

        ```python
        from transformers import AutoModelForCausalLM, AutoTokenizer
        model = AutoModelForCausalLM.from_pretrained(PATH)
        tokenizer = AutoTokenizer.from_pretrained(PATH)
        ```

        or, in JAX, `gpt2_jax.generate(gpt2_jax.from_pretrained(PATH), 'Hello, ', seed=42)`.""")
    )
  return '\n\n'.join(parts) + '\n'


def _training(record) -> list[str]:
  """Returns sections on the run: see `workdir.record` for the keys."""
  data, env = record['data'], record['env']
  losses = [('step', 'tokens', 'training loss', 'held-out loss')] + [
    (
      f'{line["step"]:,}',
      f'{line["train/tokens"]:,}',
      f'{line["train/loss"]:.4f}',
      '–' if line.get('eval/loss') is None else f'{line["eval/loss"]:.4f}',
    )
    for line in record['losses']
  ]
  settings = {k: v for section in ('optim', 'train') for k, v in record['config'][section].items()}
  return [
    '## Data',
    f'Corpus `{data["corpus"]}`, {data["tokens"]:,} training tokens'
    + (f', licence: {data["licence"]}' if data['licence'] else '')
    + f'. sha256 of the token store: `{data["sha256"]}`.',
    '## Training',
    (
      f'Fine-tuned from `{record["config"]["init_from"]}`. '
      if record['config'].get('init_from')
      else 'Trained from scratch. '
    )
    + f'This is step {record["step"]:,}. Losses are in nats a token, held-out ones over the whole '
    'held-out split.',
    _table(losses),
    f'Devices: {env["devices"]}. Mesh: {env["mesh"]}. Python {env["python"]}, '
    f'jax {env["versions"]["jax"]}, flax {env["versions"]["flax"]}. '
    f'Commit: `{env["git_commit"] or "unknown"}`. Command:',
    '```\n' + shlex.join(map(str, env['command'])) + '\n```',
    f'Settings: `{json.dumps(settings, sort_keys=True)}`.',
  ]

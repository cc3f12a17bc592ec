"""What to train on, by the argument behind a config's name: `--config=configs/small.py:fineweb`.

The sizes' configs say how big the model is and how fast it learns, the recipes which text it sees,
how much of it, and in what portions. docs/data.md says how to fetch the text.

stdlib (the default, so that each config runs as it is)
    The sources of the running Python's standard library: 5.6 M tokens of GPT-2's. A run of 1,000
    steps x 8,192 tokens passes over them 1.5 times. For trying things out; the loss says little.

openwebtext
    9,035,582,198 tokens of training text in 8,013,769 documents (nanoGPT's split). 600,000 steps x
    524,288 tokens. Reference (not ours): nanoGPT reaches a held-out loss of about 2.85 with 124M in
    4 days on 8 A100s; GPT-2's own weights have 3.12, 2.84, 2.67 and 2.54 there, small to XL.

fineweb
    10 B tokens of FineWeb (sample-10BT), once: 18,865 steps x 524,288 tokens, warm-up 700, as
    llm.c. XL: 32,000 steps x 1,048,576. Reference (not ours): llm.c reaches a held-out loss of about
    3.28 with 124M; GPT-2's own weights have 3.42, 3.08, 3.00 and 2.83.

shakespeare
    1,115,394 bytes, the last tenth held out, dropout 0.2, rows and context of 256. 2,000 steps
    x 16,384 tokens is 108 passes: watch the held-out loss turn. tiny.py has its own, by bytes.
"""


def stdlib(config):
  config.data.corpus = 'stdlib'
  config.data.val_fraction = 0.01
  config.train.update(steps=1000, global_batch_tokens=8 * 1024)
  config.optim.warmup_steps = 100
  config.checkpoint.every = config.evaluate.every = 250


def openwebtext(config):
  config.data.corpus = 'text:data/openwebtext/**/*.parquet'
  config.data.val_fraction = 0.0005
  config.train.update(steps=600_000, global_batch_tokens=512 * 1024)
  config.optim.warmup_steps = 2000


def fineweb(config):
  config.data.corpus = 'text:data/fineweb/**/*.parquet'
  config.data.val_fraction = 0.001
  config.train.update(steps=18_865, global_batch_tokens=512 * 1024)
  config.optim.update(warmup_steps=700, end_lr_fraction=0.0)
  config.evaluate.every = 250


def shakespeare(config):
  config.data.update(
    corpus='text:data/shakespeare.txt', split='tail', val_fraction=0.1, sequence_length=256
  )
  config.model.update(embd_pdrop=0.2, attn_pdrop=0.2, resid_pdrop=0.2)
  config.train.update(steps=2000, global_batch_tokens=64 * 256)
  config.optim.warmup_steps = 100
  config.checkpoint.every = config.evaluate.every = 250
  config.log.sample_prompt = 'ROMEO:\n'


RECIPES = {
  'stdlib': stdlib,
  'openwebtext': openwebtext,
  'fineweb': fineweb,
  'shakespeare': shakespeare,
}


def apply(config, recipe: str) -> None:
  """Changes `config` as the recipe says; a ValueError names the recipes where it is unknown."""
  if recipe not in RECIPES:
    raise ValueError(f'recipe {recipe!r} is none of: {", ".join(RECIPES)}')
  RECIPES[recipe](config)

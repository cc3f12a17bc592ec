r"""Any GPT-2 trained further on your text, or to label it.

    python launch.py --config=configs/finetune.py --config.data.corpus=text:mine.txt
    python launch.py --config=configs/finetune.py:lora --config.data.corpus=text:mine.txt
    python launch.py --config=configs/finetune.py:classification \
      --config.data.corpus=text:mine.jsonl

`--config.init_from=X` (default gpt2) is whatever `gpt2_jax.from_pretrained` reads: a name on the hub,
a folder, a run's workdir. Sizes and tokenizer are its own; dropout is GPT-2's 0.1. A run stops when
the held-out loss was not lower in three evaluations, and offers its best step to all that reads it.

full
    All parameters. Learning rate 2e-5, linear to zero.

lora
    Rank 8 on c_attn, PEFT's default for GPT-2: 0.24 % of the parameters of 124M. Learning rate 3e-4,
    since adapters begin at zero. `gpt2-jax convert RUN OUT --to peft` writes them alone, `--to hf` a
    merged model.

classification
    Lines of {"text": …, "label": …}. The head is Hugging Face's `score`, on the last token; all
    parameters are trained (with --config.lora.r=8: adapters and head). Rows of 128 tokens: longer
    texts are cut, see --config.data.sequence_length.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from gpt2_jax.configs import base

RECIPES = ('full', 'lora', 'classification')


def get_config(recipe: str = 'full'):
  if recipe not in RECIPES:
    raise ValueError(f'recipe {recipe!r} is none of: {", ".join(RECIPES)}')
  config = base.get_config()
  config.init_from = 'gpt2'
  # the other fields are those of init_from
  kept = ('dtype', 'remat', 'scan_layers', 'attention', 'reduce_dtype', 'head', 'vocab_multiple')
  config.model = ConfigDict({key: config.model[key] for key in kept})
  config.model.n_positions = placeholder(int)  # a larger one: see init_positions in base.py
  config.model.update(embd_pdrop=0.1, attn_pdrop=0.1, resid_pdrop=0.1)
  config.data.update(val_fraction=0.05, split='tail')
  config.optim.update(
    peak_lr=2e-5, warmup_steps=50, weight_decay=0.01, schedule='linear', end_lr_fraction=0.0, b2=0.999
  )
  config.train.update(steps=1000, global_batch_tokens=8 * 1024)
  config.evaluate.update(every=50, patience=3)
  config.checkpoint.every = 50
  if recipe == 'lora':
    config.lora.r = 8
    config.optim.update(peak_lr=3e-4, weight_decay=0.0)
  if recipe == 'classification':
    config.model.head = 'sequence_classification'
    config.data.update(sequence_length=128, val_fraction=0.1, split='document')
    config.train.update(steps=500, global_batch_tokens=16 * 128)
  return config

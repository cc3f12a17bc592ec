"""GPT-2 124M: 12 layers, width 768, 12 heads, 124,439,808 parameters ("gpt2").

    python launch.py --config=configs/small.py               the recipe stdlib: runs as it is
    python launch.py --config=configs/small.py:fineweb       others: configs/recipes.py
    python launch.py --config=configs/small.py --dry_run     what it needs, without running

Measured on 2 CPU cores (AMD EPYC, AVX-512), float32, jax 0.10.2, commit 9992cb3, with
--config.train.steps=3: 132 tokens/s, a step of 8,192 tokens in 62 s, peak memory 9.3 GiB. Not yet
measured on an accelerator.
"""

from gpt2_jax.configs import base, recipes


def get_config(recipe: str = 'stdlib'):
  config = base.get_config()
  config.optim.peak_lr = 6e-4  # GPT-3's for this size (arXiv:2005.14165, table 2.1)
  recipes.apply(config, recipe)
  return config

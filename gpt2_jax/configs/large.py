"""GPT-2 774M: 36 layers, width 1280, 20 heads, 774,030,080 parameters ("gpt2-large").

    python launch.py --config=configs/large.py               the recipe stdlib: runs as it is
    python launch.py --config=configs/large.py:fineweb       others: configs/recipes.py
    python launch.py --config=configs/large.py --dry_run     what it needs, without running

--dry_run on one CPU device (float32, micro-batches of one row of 1,024 tokens, jax 0.10.2, commit
9992cb3): 17,614,702,676 bytes. Not yet trained or measured on an accelerator.
"""

from gpt2_jax.configs import base, recipes


def get_config(recipe: str = 'stdlib'):
  config = base.get_config()
  config.model.update(n_layer=36, n_embd=1280, n_head=20)
  config.optim.peak_lr = 2.5e-4  # GPT-3's for this size (arXiv:2005.14165, table 2.1)
  recipes.apply(config, recipe)
  return config

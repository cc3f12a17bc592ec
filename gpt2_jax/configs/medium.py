"""GPT-2 355M: 24 layers, width 1024, 16 heads, 354,823,168 parameters ("gpt2-medium").

    python launch.py --config=configs/medium.py               the recipe stdlib: runs as it is
    python launch.py --config=configs/medium.py:fineweb       others: configs/recipes.py
    python launch.py --config=configs/medium.py --dry_run     what it needs, without running

--dry_run on one CPU device (float32, micro-batches of one row of 1,024 tokens, jax 0.10.2, commit
9992cb3): 15,601,023,532 bytes. Not yet trained or measured on an accelerator.
"""

from gpt2_jax.configs import base, recipes


def get_config(recipe: str = 'stdlib'):
  config = base.get_config()
  config.model.update(n_layer=24, n_embd=1024, n_head=16)
  config.optim.peak_lr = 3e-4  # GPT-3's for this size (arXiv:2005.14165, table 2.1)
  recipes.apply(config, recipe)
  return config

"""GPT-2 1558M: 48 layers, width 1600, 25 heads, 1,557,611,200 parameters ("gpt2-xl").

    python launch.py --config=configs/xl.py               the recipe stdlib: runs as it is
    python launch.py --config=configs/xl.py:fineweb       others: configs/recipes.py
    python launch.py --config=configs/xl.py --dry_run     what it needs, without running

--dry_run on one CPU device (float32, micro-batches of one row of 1,024 tokens, jax 0.10.2, commit
9992cb3): 31,907,745,876 bytes. Not yet trained or measured on an accelerator.
"""

from gpt2_jax.configs import base, recipes


def get_config(recipe: str = 'stdlib'):
  config = base.get_config()
  config.model.update(n_layer=48, n_embd=1600, n_head=25)  # 25 heads: tensor 1, 5, 25
  config.optim.peak_lr = 2e-4  # GPT-3's for this size (arXiv:2005.14165, table 2.1)
  recipes.apply(config, recipe)
  if recipe == 'fineweb':  # llm.c's
    config.train.update(steps=32_000, global_batch_tokens=1024 * 1024)
    config.optim.update(peak_lr=6e-4, end_lr_fraction=0.1)
  return config

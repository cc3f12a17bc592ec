"""GPT-2 774M: 36 layers, width 1280, 20 heads, 774,030,080 parameters ("gpt2-large").

    python launch.py --config=configs/large.py               the recipe stdlib: runs as it is
    python launch.py --config=configs/large.py:fineweb       others: configs/recipes.py
    python launch.py --config=configs/large.py --dry_run     what it needs, without running

@@large@@
"""

from configs import base, recipes


def get_config(recipe: str = 'stdlib'):
  config = base.get_config()
  config.model.update(n_layer=36, n_embd=1280, n_head=20, remat='dots')
  config.optim.peak_lr = 2.5e-4  # GPT-3's for this size (arXiv:2005.14165, table 2.1)
  recipes.apply(config, recipe)
  return config

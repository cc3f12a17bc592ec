"""A GPT-2 that two CPU cores train in three minutes on Python's standard library.

    python launch.py --config=configs/tiny.py
"""

from configs import base


def get_config(recipe: str = 'stdlib'):
  config = base.get_config()
  config.model.update(n_positions=256, n_embd=192, n_layer=4, n_head=6)
  config.data.tokenizer = 'bpe:2048'
  config.data.val_fraction = 0.02
  config.train.update(steps=700, global_batch_tokens=2048)
  config.optim.update(peak_lr=2e-3, warmup_steps=50, weight_decay=0.1)
  config.checkpoint.every = 200
  config.evaluate.every = 200
  config.log.update(sample_prompt='def ')
  return config

"""The model that the experiments vary: 2 layers, width 64, by bytes, trained in seconds on a CPU.

150 steps x 8 rows x 64 bytes of the running Python's standard library = 77 kB of text: an experiment
with two dozen runs is over in minutes. So what it shows is how training behaves at its beginning,
in a small model; its losses (nats a byte, over the ends of all files) are not those of a good one.
"""

from configs import base


def get_config():
  config = base.get_config()
  config.model.update(n_positions=64, n_embd=64, n_layer=2, n_head=4)
  config.data.update(tokenizer='byte', split='tail', val_fraction=0.002)
  config.optim.update(peak_lr=2e-3, warmup_steps=15)
  config.train.update(steps=150, global_batch_tokens=8 * 64)
  config.checkpoint.every = config.evaluate.every = 150
  config.evaluate.batch_rows = 32
  config.log.update(to='', sample_tokens=1)
  return config

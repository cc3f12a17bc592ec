"""Small configs to train with."""

from configs import base


def optim(**fields):
  config = base.get_config().optim
  config.update(peak_lr=1e-2, warmup_steps=2, **fields)
  return config


def tiny_config(**fields):
  config = base.get_config()
  config.model.update(vocab_size=97, n_positions=32, n_embd=32, n_layer=2, n_head=4)
  config.train.update(global_batch_tokens=32 * 16, steps=10)
  for key, value in fields.items():
    section, name = key.split('__')
    config[section][name] = value
  return config

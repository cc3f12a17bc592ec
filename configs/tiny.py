"""@@LAB@@
"""

from configs import base, recipes


def get_config(recipe: str = 'stdlib'):
  config = base.get_config()
  config.model.update(n_positions=256, n_embd=128, n_layer=4, n_head=2)
  recipes.apply(config, recipe)
  config.optim.update(peak_lr=2e-3, warmup_steps=50)
  config.checkpoint.every = config.evaluate.every = 200
  config.log.update(sample_temperature=0.7, sample_top_k=50)
  if recipe == 'stdlib':
    config.data.update(tokenizer='bpe:2048', val_fraction=0.02)
    config.train.update(steps=600, global_batch_tokens=8 * 256)
    config.log.sample_prompt = 'def '
  if recipe == 'shakespeare':  # by bytes, as nanoGPT's shakespeare_char on a CPU
    config.data.update(tokenizer='byte', sequence_length=64)
    config.model.update(embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0)
    config.train.update(steps=2000, global_batch_tokens=12 * 64)
    config.optim.update(peak_lr=1e-3, warmup_steps=100, b2=0.99)
  return config

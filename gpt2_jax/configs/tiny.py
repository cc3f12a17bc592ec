"""A GPT-2 that two CPU cores train in about three minutes: 4 layers, width 128, 2 heads.

    python launch.py --config=configs/tiny.py                   on Python's standard library
    python launch.py --config=configs/tiny.py:shakespeare       by bytes, see configs/recipes.py

stdlib: 600 steps x 8 rows x 256 tokens = 1.2 M tokens of a 2,048-entry vocabulary trained on the
text, 40 % of an epoch. Measured on 2 CPU cores (AMD EPYC, AVX-512), Python 3.11.7, jax 0.10.2, commit
984a801: 7,200 tokens/s, 3 min 25 s in all, peak memory 0.9 GiB, held-out loss 5.05, 4.79, 4.62 at
steps 200, 400, 600. The text is that of the running Python, so another version's loss differs a
little; two runs on one machine give the same to the last bit.

shakespeare: 2,000 steps x 12 rows x 64 bytes, which is its context, the size of nanoGPT's example for
a CPU. Measured likewise at 9992cb3: 10,200 tokens/s, held-out loss 2.04 and 1.8865 (nats a byte, over
the whole last tenth of the text) at steps 1,000 and 2,000.
"""

from gpt2_jax.configs import base, recipes


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
    config.log.sample_prompt = 'import os\n\n\ndef main('
  if recipe == 'shakespeare':  # by bytes, as nanoGPT's shakespeare_char on a CPU
    config.data.update(tokenizer='byte', sequence_length=64)
    config.model.update(embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0)
    config.train.update(steps=2000, global_batch_tokens=12 * 64)
    config.optim.update(peak_lr=1e-3, warmup_steps=100, b2=0.99)
  return config

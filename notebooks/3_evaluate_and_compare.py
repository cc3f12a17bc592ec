# %% [markdown]
# # Evaluate, and compare
#
# Two runs that differ in one knob, on the same held-out text: which is better, and is it more than chance?

# %%
import subprocess
import sys

REPOSITORY = 'URL'  # in Colab: the address that this notebook was opened from
if 'google.colab' in sys.modules:
  package = f'gpt2_jax @ git+{REPOSITORY}'
  subprocess.run([sys.executable, '-m', 'pip', 'install', '-q', package], check=True)

# %%
import gpt2_jax

runs = {}
for rate in (5e-4, 2e-3):
  runs[rate] = gpt2_jax.train(
    'tiny',
    f'runs/rate-{rate}',
    train={'steps': 40},
    optim={'peak_lr': rate, 'warmup_steps': 10},
    log={'sample_tokens': 4},
  )

# %%
import matplotlib.pyplot as plt

for rate, run in runs.items():
  plt.plot(run.table['train/tokens'], run.table['train/loss'], label=f'peak_lr {rate}')
plt.xlabel('tokens seen')
plt.ylabel('training loss (nats a token)')
plt.legend()
plt.show()

# %% [markdown]
# `gpt2-jax evaluate` scores every token of the held-out split, each with all the context that fits, and
# writes what the figure was measured on and with.

# %%
import json
import subprocess
import sys
from pathlib import Path

[store] = (path.parent for path in Path('data').glob('stdlib-*/manifest.json'))
figures = {}
for rate, run in runs.items():
  file = run.workdir / 'held-out.json'
  words = ['--checkpoint', str(run.workdir), '--tasks', f'store:{store}']
  command = [sys.executable, '-m', 'gpt2_jax', 'evaluate', *words, '--json', str(file)]
  print(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
  figures[rate] = json.loads(file.read_text())

# %% [markdown]
# With released weights: `gpt2-jax evaluate --checkpoint gpt2 --tasks paper` makes the ten columns of the
# paper's table, beside what others published.
#
# The same texts, token by token: where is the better model better?

# %%
import jax.numpy as jnp
import numpy as np

text = "import os\n\ndef main():\n  for name in os.listdir('.'):\n    print(name)\n"
for rate, run in runs.items():
  tokens = run.model.tokenizer.encode(text)
  logits = run.model(jnp.array([tokens]))[0]
  logprobs = np.array(logits - jnp.log(jnp.exp(logits).sum(-1, keepdims=True)))
  losses = -logprobs[np.arange(len(tokens) - 1), tokens[1:]]
  error = losses.std() / len(losses) ** 0.5
  print(f'peak_lr {rate}: {losses.mean():.3f} ± {error:.3f} nats a token, of {len(losses)} tokens')

# %% [markdown]
# One run a setting says little: another seed moves a loss, too. `experiments/` has sweeps over seeds, with
# intervals and paired tests.

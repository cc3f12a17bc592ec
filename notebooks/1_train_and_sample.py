# %% [markdown]
# # Train a GPT-2, and let it write
#
# The model of this notebook has a million parameters, and learns from the source code of your Python's
# standard library: nothing is downloaded. On two CPU cores it takes a minute.

# %%
import subprocess
import sys

REPOSITORY = 'URL'  # in Colab: the address that this notebook was opened from
if 'google.colab' in sys.modules:
  package = f'gpt2_jax @ git+{REPOSITORY}'
  subprocess.run([sys.executable, '-m', 'pip', 'install', '-q', package], check=True)

# %% [markdown]
# A config is a run as data. Every knob has a default; a few are set here.

# %%
import gpt2_jax

config = gpt2_jax.configs.tiny()
config.train.steps = 80
config.evaluate.every = config.checkpoint.every = 40
config.optim.warmup_steps = 20
print(config.model)

# %% [markdown]
# The stop button saves what is done; the same cell then goes on from there, to the last bit as if it had
# never been stopped.

# %%
run = gpt2_jax.train(config, 'runs/first')
run

# %% [markdown]
# A model that knows nothing gives each of 2,048 tokens the same probability: a loss of ln 2048 nats. What
# the curve falls below that is what was learnt.

# %%
import math

print(
  f'{math.log(2048):.3f} nats at the start, {run.metrics[-1]["eval/loss"]:.3f} on held-out text now'
)
run.plot()

# %% [markdown]
# The record is a table, for `pandas.DataFrame(run.table)` or `polars.DataFrame(run.table)`.

# %%
for line in run.metrics[::20]:
  print(line['step'], round(line['train/loss'], 3), f'{line["perf/tokens_per_second"]:,.0f} tokens/s')

# %% [markdown]
# Samples. The darker a token, the likelier the model found it; hold the mouse on one to see its
# probability. A seed gives the same text each time.

# %%
results = gpt2_jax.generate(
  run.model, 'import os\n\n\ndef main(', num_return_sequences=2, max_new_tokens=60, seed=1
)
results[0]

# %% [markdown]
# Low temperatures take what is likely, and repeat themselves; high ones take risks.

# %%
for temperature in (0.3, 0.8, 1.5):
  [result] = gpt2_jax.generate(run.model, 'def ', temperature=temperature, max_new_tokens=30, seed=2)
  mean = sum(result.logprobs) / len(result.logprobs)
  print(f'--- temperature {temperature}, {mean:.2f} nats a token\n{result.text}')

# %% [markdown]
# **Further.** `gpt2_jax.train(gpt2_jax.configs.small('fineweb'), 'runs/small')` is GPT-2 124M on FineWeb, for
# accelerators. `gpt2_jax.from_pretrained('gpt2')` loads the released weights.

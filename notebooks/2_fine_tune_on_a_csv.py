# %% [markdown]
# # Fine-tune on a CSV
#
# A classifier of your own records: `text,label` lines. Here they are lines of Python's library, and the
# label is the module that a line is from.

# %%
import subprocess
import sys

REPOSITORY = 'URL'  # in Colab: the address that this notebook was opened from
if 'google.colab' in sys.modules:
  package = f'gpt2_jax @ git+{REPOSITORY}'
  subprocess.run([sys.executable, '-m', 'pip', 'install', '-q', package], check=True)

# %% [markdown]
# A small model to look at: four layers, 60 steps on the source code of Python's own library, half a
# minute on a CPU. With the internet `gpt2_jax.from_pretrained('gpt2')` is the released one, and all that
# follows works with it.

# %%
import gpt2_jax

run = gpt2_jax.train('tiny', 'runs/small', train={'steps': 60}, log={'sample_tokens': 20})
model = run.model
model

# %% [markdown]
# The records. Any .csv with these two columns will do.

# %%
import ast
import csv
import random

with open('lines.csv', 'w', newline='') as file:
  rows = csv.writer(file)
  rows.writerow(['text', 'label'])
  for module in (ast, random):
    for line in open(module.__file__):
      if len(line) > 20:
        rows.writerow([line.strip(), module.__name__])
print(open('lines.csv').read(400))

# %% [markdown]
# `init_from` is the model to begin with: a run, a folder, or a name such as `gpt2`, the released one.

# %%
config = gpt2_jax.configs.finetune('classification')
config.init_from = 'runs/small'
config.data.update(corpus='text:lines.csv', sequence_length=32)
config.train.update(steps=60, global_batch_tokens=1024)
config.optim.peak_lr = 1e-3
config.evaluate.every = config.checkpoint.every = 20
tuned = gpt2_jax.train(config, 'runs/lines')

# %% [markdown]
# Held-out lines that are told right, before each number of steps:

# %%
for line in tuned.metrics:
  if 'eval/accuracy' in line:
    print(f'step {line["step"]:3}: {line["eval/accuracy"]:.1%}')
tuned.plot()

# %%
texts = ['def visit_Call(self, node):', 'return a + (b-a) * self.random()']
for text, judged in zip(texts, gpt2_jax.classify(tuned.model, texts)):
  print(judged.label, {name: round(p, 3) for name, p in judged.probabilities.items()}, text)

# %% [markdown]
# The folder that this writes loads in `transformers`, as `GPT2ForSequenceClassification`.

# %%
gpt2_jax.save_pretrained(tuned.model, 'out/lines')

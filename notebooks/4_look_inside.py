# %% [markdown]
# # Look inside
#
# Hidden states, attention, and what each layer would say: the logit lens.

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
# `features` gives, of each text, the residual stream behind every block and each head's attention.

# %%
text = 'def add(self, other):\n    return self'
[found] = gpt2_jax.features(model, text)
pieces = [model.tokenizer.decode([token]) for token in found.tokens]
print(found)
print(pieces)

# %% [markdown]
# ## Attention
#
# A row is a token, and shows which ones before it it looks at. Nothing looks ahead.

# %%
import matplotlib.pyplot as plt

layers, heads = found.attentions.shape[:2]
figure, axes = plt.subplots(heads, layers, figsize=(3 * layers, 3 * heads), squeeze=False)
for layer in range(layers):
  for head in range(heads):
    axes[head][layer].imshow(found.attentions[layer, head], cmap='Blues', vmin=0, vmax=1)
    axes[head][layer].set_title(f'layer {layer}, head {head}', fontsize=9)
plt.show()

# %% [markdown]
# ## The logit lens
#
# What would the model say next if it stopped behind a layer? The last layer norm and the table of tokens
# turn any hidden state into logits. (The last hidden state has been through that norm already.)

# %%
import jax.numpy as jnp
import numpy as np

from gpt2_jax.model.pretrained_model import params_of

params = params_of(model)
table = np.array(params['wte']['weight'][: model.config.vocab_size])
scale, shift = np.array(params['ln_f']['weight']), np.array(params['ln_f']['bias'])


def norm(x):
  x = x - x.mean(-1, keepdims=True)
  return x / np.sqrt((x**2).mean(-1, keepdims=True) + model.config.layer_norm_epsilon) * scale + shift


states = np.concatenate([norm(found.hidden_states[:-1]), found.hidden_states[-1:]])
logits = states @ table.T  # [L + 1, T, V]
logits -= logits.max(-1, keepdims=True)
probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
for layer, p in enumerate(probabilities[:, -1]):
  best = p.argsort()[::-1][:4]
  print(layer, [(model.tokenizer.decode([i]), round(float(p[i]), 3)) for i in best])

# %% [markdown]
# The last row is the model's own answer:

# %%
own = np.array(model(jnp.array([found.tokens]))[0, -1])
own = np.exp(own - own.max()) / np.exp(own - own.max()).sum()
print('largest difference', float(abs(own - probabilities[-1, -1]).max()))

# %% [markdown]
# How sure is each layer of what really comes next?

# %%
right = probabilities[:, np.arange(len(pieces) - 1), found.tokens[1:]]
plt.figure(figsize=(10, 3))
plt.imshow(right, cmap='Blues', aspect='auto')
plt.xticks(range(len(pieces) - 1), [repr(piece)[1:-1] for piece in pieces[1:]], rotation=90)
plt.ylabel('behind layer')
plt.colorbar(label='probability of the next token')
plt.show()

# %% [markdown]
# With released weights, `gpt2_jax.from_pretrained('gpt2')`, the lens shows an answer that forms layer by layer.

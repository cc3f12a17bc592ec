"""The activation functions of an MLP, by their names."""

import functools

import jax
import jax.numpy as jnp

# Names of GPT-2's tanh form of the GELU, in Hugging Face's version first.
TANH_GELU = ('gelu_new', 'gelu_pytorch_tanh', 'gelu_python_tanh', 'gelu_fast', 'gelu_accurate')


# Hugging Face's names (transformers `activations.py`, ACT2FN) -> function.
ACTIVATIONS = {
  **dict.fromkeys(TANH_GELU, functools.partial(jax.nn.gelu, approximate=True)),
  'gelu': functools.partial(jax.nn.gelu, approximate=False),
  'gelu_python': functools.partial(jax.nn.gelu, approximate=False),
  'gelu_10': lambda x: jnp.clip(jax.nn.gelu(x, approximate=False), -10, 10),
  'quick_gelu': lambda x: x * jax.nn.sigmoid(1.702 * x),
  'relu': jax.nn.relu,
  'relu2': lambda x: jnp.square(jax.nn.relu(x)),
  'relu6': jax.nn.relu6,
  'leaky_relu': jax.nn.leaky_relu,
  'hardswish': jax.nn.hard_swish,
  'laplace': lambda x: 0.5 * (1 + jax.lax.erf((x - 0.707107) / (0.282095 * 2**0.5))),
  'sqrtsoftplus': lambda x: jnp.sqrt(jax.nn.softplus(x)),
  'silu': jax.nn.silu,
  'swish': jax.nn.silu,
  'mish': jax.nn.mish,
  'sigmoid': jax.nn.sigmoid,
  'tanh': jnp.tanh,
  'linear': lambda x: x,
}

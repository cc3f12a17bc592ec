"""What one types: the verbs of `gpt2-jax`."""

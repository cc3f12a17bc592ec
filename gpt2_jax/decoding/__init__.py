"""Text from a model: searches, samplers, processors."""

"""A package, since TensorFlow Datasets looks for a builder's files beside its module."""

"""Scores of a model: protocols, benchmarks, bias."""

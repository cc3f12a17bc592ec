"""Errors, files, bounds, chips: knows no model."""

"""Optimizers beside AdamW, and what they share. They are chosen in `training/optimizer.py`."""

"""GPT-2: all that is traced of it."""

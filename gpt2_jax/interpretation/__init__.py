"""What the parts of a model do: sweeps of patches, and what each part adds to a logit."""

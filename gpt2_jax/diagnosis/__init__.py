"""Whether a run is as it should be: by its config, its data and its record."""

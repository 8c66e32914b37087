"""One run, from its data to its record."""

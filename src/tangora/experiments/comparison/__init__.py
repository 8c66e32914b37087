"""The runs of a comparison: their choice, and their execution with recovery from failures."""

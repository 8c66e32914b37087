"""Whole experiments: a training run in a folder, a comparison, an export. Imports nothing: settings need no torch."""

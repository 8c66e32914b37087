"""Whole experiments: one run, a training run in a folder, a comparison."""

from tangora.experiments.compare import CompareSettings, compare
from tangora.experiments.settings import RunSettings
from tangora.experiments.train import train

__all__ = ["CompareSettings", "RunSettings", "compare", "train"]

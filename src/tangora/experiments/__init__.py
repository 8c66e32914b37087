"""Whole experiments: a training run in a folder, a comparison, an export."""

from tangora.experiments.compare import CompareSettings, compare
from tangora.experiments.export import Exported, export
from tangora.experiments.settings import RunSettings
from tangora.experiments.train import train

__all__ = ["CompareSettings", "Exported", "RunSettings", "compare", "export", "train"]

"""Whole experiments: a training run in a folder, a comparison, an export."""

from tangora.experiments.compare import Resources, compare, compare_tasks
from tangora.experiments.comparison.plan import CompareSettings, PlanSettings
from tangora.experiments.export import Exported, export
from tangora.experiments.settings import RunSettings
from tangora.experiments.train import train

__all__ = [
    "CompareSettings",
    "Exported",
    "PlanSettings",
    "Resources",
    "RunSettings",
    "compare",
    "compare_tasks",
    "export",
    "train",
]

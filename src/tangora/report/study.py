"""Several comparisons side by side."""

from collections.abc import Mapping
from pathlib import Path

from tangora.report.files import write_atomic
from tangora.report.records import Comparison


def write_study(comparisons: Mapping[str, Comparison], path: Path, title: str, command: str) -> Path:
    """Placeholder."""
    return write_atomic(path, title + command + " ".join(comparisons))

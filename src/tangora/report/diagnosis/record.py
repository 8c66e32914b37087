"""The file that a diagnosis leaves behind."""

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from tangora.diagnostics import Diagnosis
from tangora.report.recorded import Recorded, read_record


class DiagnosisRecord(Recorded):
    """A diagnosis, and where it comes from."""

    schema_version: Literal[1] = 1
    title: str
    command: str = Field(description="The command line that repeats it.")
    settings: dict[str, Any]
    diagnosis: Diagnosis


def load_diagnosis(path: str | Path) -> DiagnosisRecord:
    """Read what ``tangora diagnose`` wrote."""
    return read_record(DiagnosisRecord, path, "diagnosis")

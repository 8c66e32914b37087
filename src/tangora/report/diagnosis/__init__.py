"""From a diagnosis to sentences, a terminal table and one self-contained page."""

from tangora.report.diagnosis.diagnosis_findings import diagnosis_sentences
from tangora.report.diagnosis.diagnosis_page import (
    DiagnosisRecord,
    load_diagnosis,
    render_diagnosis,
    write_diagnosis,
)
from tangora.report.diagnosis.diagnosis_tables import diagnosis_tables

__all__ = [
    "DiagnosisRecord",
    "diagnosis_tables",
    "diagnosis_sentences",
    "load_diagnosis",
    "render_diagnosis",
    "write_diagnosis",
]

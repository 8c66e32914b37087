"""From a diagnosis to sentences, a terminal table and one self-contained page."""

from tangora.report.diagnosis.page import render_diagnosis, write_diagnosis
from tangora.report.diagnosis.record import DiagnosisRecord, load_diagnosis
from tangora.report.diagnosis.summary import KindRow, findings, kind_rows
from tangora.report.diagnosis.tables import diagnosis_tables

__all__ = [
    "DiagnosisRecord",
    "KindRow",
    "diagnosis_tables",
    "findings",
    "kind_rows",
    "load_diagnosis",
    "render_diagnosis",
    "write_diagnosis",
]

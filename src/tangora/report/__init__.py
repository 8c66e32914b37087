"""From the records of a comparison to tables, figures and one self-contained page."""

from tangora.report.diagnosis import (
    DiagnosisRecord,
    diagnosis_tables,
    findings,
    load_diagnosis,
    render_diagnosis,
    write_diagnosis,
)
from tangora.report.figures import loss_figure, sweep_figure, time_figure
from tangora.report.page import render_page, write_page
from tangora.report.picture import save_picture
from tangora.report.records import (
    Comparison,
    EvaluationRecord,
    MemoryUse,
    Record,
    StepRecord,
    TimeSplit,
    load_comparison,
    load_record,
    save_comparison,
    save_json,
)
from tangora.report.selection import SweepPoint, best_learning_rate, sweep_points
from tangora.report.summary import Row, summarize
from tangora.report.tables import markdown_table, rich_table, write_csv
from tangora.report.verdict import verdict

__all__ = [
    "Comparison",
    "DiagnosisRecord",
    "EvaluationRecord",
    "MemoryUse",
    "Record",
    "Row",
    "StepRecord",
    "SweepPoint",
    "TimeSplit",
    "best_learning_rate",
    "diagnosis_tables",
    "findings",
    "load_comparison",
    "load_diagnosis",
    "load_record",
    "loss_figure",
    "markdown_table",
    "render_diagnosis",
    "render_page",
    "rich_table",
    "save_comparison",
    "save_json",
    "save_picture",
    "summarize",
    "sweep_figure",
    "sweep_points",
    "time_figure",
    "verdict",
    "write_csv",
    "write_diagnosis",
    "write_page",
]

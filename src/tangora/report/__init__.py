"""From the records of a comparison to tables, figures and one self-contained page."""

from tangora.report.comparison.figures import loss_figure, sweep_figure, time_figure
from tangora.report.comparison.further import rate_verdict, speed_verdict, tasks_verdict
from tangora.report.comparison.page import missing_sentence, render_page, write_page
from tangora.report.comparison.picture import save_picture
from tangora.report.comparison.study import load_study, study_verdict, write_study
from tangora.report.comparison.tables import markdown_table, rich_table, write_csv
from tangora.report.comparison.verdict import recommendation_sentence, verdict
from tangora.report.diagnosis import (
    DiagnosisRecord,
    diagnosis_tables,
    findings,
    load_diagnosis,
    render_diagnosis,
    write_diagnosis,
)
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
from tangora.report.statistics.recommendation import Recommendation, recommend, recommendation
from tangora.report.statistics.robustness import Robustness, robustness
from tangora.report.statistics.selection import SweepPoint, best_learning_rate, sweep_points
from tangora.report.statistics.speed import Speed, speeds
from tangora.report.statistics.summary import Row, summarize
from tangora.report.statistics.tasks import TaskMatrix, matrix

__all__ = [
    "Comparison",
    "DiagnosisRecord",
    "EvaluationRecord",
    "MemoryUse",
    "Recommendation",
    "Record",
    "Robustness",
    "Row",
    "Speed",
    "StepRecord",
    "SweepPoint",
    "TaskMatrix",
    "TimeSplit",
    "best_learning_rate",
    "diagnosis_tables",
    "findings",
    "load_comparison",
    "load_diagnosis",
    "load_record",
    "load_study",
    "loss_figure",
    "markdown_table",
    "matrix",
    "missing_sentence",
    "rate_verdict",
    "recommend",
    "recommendation",
    "recommendation_sentence",
    "render_diagnosis",
    "render_page",
    "rich_table",
    "robustness",
    "save_comparison",
    "save_json",
    "save_picture",
    "speed_verdict",
    "speeds",
    "study_verdict",
    "summarize",
    "sweep_figure",
    "sweep_points",
    "tasks_verdict",
    "time_figure",
    "verdict",
    "write_csv",
    "write_diagnosis",
    "write_page",
    "write_study",
]

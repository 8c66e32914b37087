"""From the records of a comparison to tables, figures and one self-contained page."""

from tangora.report.comparison.comparison_page import (
    missing_sentence,
    render_page,
    save_picture,
    write_measured,
    write_page,
)
from tangora.report.comparison.recommendation import Recommendation, recommendation, recommendation_sentence
from tangora.report.comparison.results_table import rich_table, write_csv
from tangora.report.comparison.study import load_study, study_verdict, write_study
from tangora.report.comparison.verdict import verdict
from tangora.report.diagnosis.diagnosis_page import (
    DiagnosisRecord,
    diagnosis_sentences,
    load_diagnosis,
    render_diagnosis,
    write_diagnosis,
)
from tangora.report.diagnosis.diagnosis_tables import diagnosis_tables
from tangora.report.record_files import save_json
from tangora.report.run_records import (
    Comparison,
    EvaluationRecord,
    MemoryUse,
    Record,
    StepRecord,
    TimeSplit,
    load_comparison,
    load_record,
)
from tangora.report.statistics.judgement import Row, summarize
from tangora.report.statistics.selection import SweepPoint, best_learning_rate, sweep_points

__all__ = [
    "Comparison",
    "DiagnosisRecord",
    "EvaluationRecord",
    "MemoryUse",
    "Recommendation",
    "Record",
    "Row",
    "StepRecord",
    "SweepPoint",
    "TimeSplit",
    "best_learning_rate",
    "diagnosis_tables",
    "diagnosis_sentences",
    "load_comparison",
    "load_diagnosis",
    "load_record",
    "load_study",
    "missing_sentence",
    "recommendation",
    "recommendation_sentence",
    "render_diagnosis",
    "render_page",
    "rich_table",
    "save_json",
    "save_picture",
    "study_verdict",
    "summarize",
    "sweep_points",
    "verdict",
    "write_csv",
    "write_diagnosis",
    "write_measured",
    "write_page",
    "write_study",
]

"""From an experiment's numbers to pictures, a record and one self-contained page."""

from tangora.report.drawing.panels import Figure, Heatmap, Panel, Series
from tangora.report.drawing.pictures import save_pictures
from tangora.report.reproduction.page import outcome, render_reproduction, write_reproduction
from tangora.report.reproduction.record import ReproductionRecord, load_reproduction, save_reproduction
from tangora.report.reproduction.records import Check, Result, Table
from tangora.report.reproduction.tables import rich_checks

__all__ = [
    "Check",
    "Figure",
    "Heatmap",
    "Panel",
    "ReproductionRecord",
    "Result",
    "Series",
    "Table",
    "load_reproduction",
    "outcome",
    "render_reproduction",
    "rich_checks",
    "save_pictures",
    "save_reproduction",
    "write_reproduction",
]

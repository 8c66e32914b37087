"""A repeated experiment as one HTML page that needs no network and nothing beside it."""

from pathlib import Path

from tangora.report import formats
from tangora.report.drawing.charts import charts
from tangora.report.files import write_atomic
from tangora.report.layout import flat, render
from tangora.report.reproduction.record import ReproductionRecord
from tangora.report.reproduction.tables import CHECK_COLUMNS, check_rows, table_rows

_TEMPLATE = "reproduction.html.j2"


def write_reproduction(record: ReproductionRecord, path: str | Path) -> Path:
    """Write the page of an experiment.

    Args:
        record: What was found.
        path: The HTML file.

    Returns:
        The path written.
    """
    return write_atomic(path, render_reproduction(record))


def render_reproduction(record: ReproductionRecord) -> str:
    """Make the page of an experiment; the same record gives the same text.

    Args:
        record: What was found.

    Returns:
        A whole HTML page: findings, checks, interactive figures, tables, stand-ins, and what is needed to repeat it.
    """
    result = record.result
    return render(
        _TEMPLATE,
        record.title,
        record=record,
        result=result,
        outcome=outcome(record),
        checks=(CHECK_COLUMNS, check_rows(result.checks)),
        figures=[(figure, charts(figure)) for figure in result.figures],
        tables=[(table, table_rows(table)) for table in result.tables],
        duration=formats.seconds(record.seconds),
        settings=flat(record.settings),
        versions=sorted(record.versions.items()),
    )


def outcome(record: ReproductionRecord) -> str:
    """Say how many checks hold.

    Args:
        record: What was found.

    Returns:
        One sentence.
    """
    checks = record.result.checks
    good = sum(check.passed for check in checks)
    size = " at the quick size, which is too small to judge the source by" if record.quick else ""
    if good == len(checks) == 1:
        return f"The only check agrees with the source{size}."
    if good == len(checks):
        return f"All {formats.plural(good, 'check')} agree with the source{size}."
    failed = len(checks) - good
    verb = "disagrees" if failed == 1 else "disagree"
    return f"{failed} of {formats.plural(len(checks), 'check')} {verb} with the source{size}."

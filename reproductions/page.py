"""An experiment as one HTML page that needs no network and nothing beside it, and as text for the terminal."""

from collections.abc import Sequence

from rich import box
from rich.table import Table as RichTable
from rich.text import Text

from reproductions.result import Cell, Outcome, Record, Table
from tangora.report import formats
from tangora.report.drawing.charts import figure_section
from tangora.report.layout import Section, render, repeat
from tangora.report.report_table import Table as PageTable
from tangora.report.report_table import cell

_COLUMNS = ("what the source says", "measured", "must be", "agrees", "where")


def render_page(record: Record) -> str:
    """Make the page of an experiment; the same record gives the same text."""
    result = record.result
    stand_ins = Section("stand-ins", "What differs from the source", notes=record.stand_ins)
    return render(
        record.title,
        [
            f"python -m reproductions {record.name}",
            *(["quick"] if record.quick else []),
            record.source,
            formats.seconds(record.seconds),
        ],
        record.created,
        [summary(record), *result.findings],
        [
            Section("checks", "Checks", table=_checks(result.checks)),
            *map(figure_section, result.figures),
            *(
                _table_section(f"table-{number}", table)
                for number, table in enumerate(result.tables, start=1)
            ),
            stand_ins if record.stand_ins else None,
        ],
        repeat(record),
        look="wide-panels",
    )


def _checks(checks: Sequence[Outcome]) -> PageTable:
    rows = []
    for check in checks:
        *texts, agrees, where = check_row(check)
        rows.append([*texts, cell(agrees, kind=agrees), where])
    return PageTable.texts("checks", "", _COLUMNS, rows, words=_COLUMNS[4:], sortable=False)


def _table_section(name: str, table: Table) -> Section:
    rows = [list(map(cell_text, row)) for row in table.rows]
    shown = PageTable.texts(name, table.caption, table.columns, rows, sortable=False)
    return Section(name, table.title, table=shown)


def summary(record: Record) -> str:
    """Say how many checks agree with the source."""
    checks = record.result.checks
    good = sum(check.passed for check in checks)
    size = " at the quick size, which is too small to judge the source by" if record.quick else ""
    if good == len(checks) == 1:
        return f"The only check agrees with the source{size}."
    if good == len(checks):
        return f"All {formats.plural(good, 'check')} agree with the source{size}."
    verb = "disagrees" if len(checks) - good == 1 else "disagree"
    return f"{len(checks) - good} of {formats.plural(len(checks), 'check')} {verb} with the source{size}."


def cell_text(value: Cell) -> str:
    """Write texts as they are, whole numbers in full, other numbers with three figures."""
    if isinstance(value, str):
        return value
    if value is None or isinstance(value, int):
        return formats.MISSING if value is None else str(value).replace("-", formats.MINUS)
    if 1000 <= abs(value) < 1e5:
        return f"{value:.0f}".replace("-", formats.MINUS)
    mantissa, mark, exponent = f"{value:.3g}".partition("e")
    return (f"{mantissa}e{int(exponent)}" if mark else mantissa).replace("-", formats.MINUS)


def bounds_text(check: Outcome) -> str:
    """Write the interval that a check allows, for example "at most 1e−10" or "0.9 to 1.1"."""
    low, high = check.low, check.high
    if low is None:
        return "finite" if high is None else f"at most {cell_text(high)}"
    if high is None:
        return f"at least {cell_text(low)}"
    return cell_text(low) if low == high else f"{cell_text(low)} to {cell_text(high)}"


def check_row(check: Outcome) -> list[str]:
    """Write a check: claim, number, interval, whether it agrees, source."""
    value = "not finite" if check.value is None else cell_text(check.value)
    return [check.claim, value, bounds_text(check), "yes" if check.passed else "no", check.source]


def terminal_table(record: Record) -> RichTable:
    """Make the table of the checks for a terminal."""
    table = RichTable(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("", no_wrap=True)
    table.add_column(_COLUMNS[0])
    for heading in _COLUMNS[1:3]:
        table.add_column(heading, justify="right", no_wrap=True)
    for check in record.result.checks:
        mark = Text("✓", style="green") if check.passed else Text("✗", style="bold red")
        table.add_row(mark, *map(Text, check_row(check)[:3]))
    return table

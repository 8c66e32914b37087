"""An experiment as one HTML page that needs no network and nothing beside it, and as text for the terminal."""

from pathlib import Path

from jinja2 import ChoiceLoader, Environment, FileSystemLoader, PackageLoader, StrictUndefined
from markupsafe import Markup
from rich import box
from rich.table import Table as RichTable
from rich.text import Text

from reproductions.result import Cell, Outcome, Record
from tangora.report import formats
from tangora.report.drawing.charts import charts
from tangora.report.layout import flat, packed_plotly

_COLUMNS = ("what the source says", "measured", "must be", "agrees", "where")


def render_page(record: Record) -> str:
    """Make the page of an experiment; the same record gives the same text."""
    # tangora's own pages hold the frame, the style and the macros
    folders = [FileSystemLoader(Path(__file__).parent), PackageLoader("tangora.report")]
    environment = Environment(
        loader=ChoiceLoader(folders),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    result = record.result
    return environment.get_template("reproduction.html.j2").render(
        title=record.title,
        plotly=Markup(packed_plotly()),
        record=record,
        result=result,
        summary=summary(record),
        columns=_COLUMNS,
        checks=[check_row(check) for check in result.checks],
        figures=[(figure, charts(figure)) for figure in result.figures],
        tables=[
            (table, (table.columns, [list(map(cell_text, row)) for row in table.rows]))
            for table in result.tables
        ],
        duration=formats.seconds(record.seconds),
        settings=flat(record.settings),
        versions=sorted(record.versions.items()),
    )


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

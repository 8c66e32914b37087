"""Tables and checks of an experiment, as text."""

from collections.abc import Sequence

from rich import box
from rich.table import Table as RichTable
from rich.text import Text

from tangora.report import formats
from tangora.report.reproduction.records import Cell, Check, Table

CHECK_COLUMNS = ("what the source says", "measured", "must be", "agrees", "where")


def cell_text(value: Cell) -> str:
    """Write one value of a table.

    Args:
        value: A text, a number or nothing.

    Returns:
        Texts as they are, whole numbers in full, others with three figures.
    """
    if isinstance(value, str):
        return value
    if value is None or isinstance(value, int):
        return formats.MISSING if value is None else str(value).replace("-", formats.MINUS)
    if 1000 <= abs(value) < 1e5:
        return f"{value:.0f}".replace("-", formats.MINUS)
    text = f"{value:.3g}"
    mantissa, mark, exponent = text.partition("e")
    return (f"{mantissa}e{int(exponent)}" if mark else text).replace("-", formats.MINUS)


def bounds_text(check: Check) -> str:
    """Write the interval that a check allows.

    Args:
        check: The check.

    Returns:
        For example "at most 1e−10" or "0.9 to 1.1".
    """
    if check.low is None and check.high is None:
        return "finite"
    if check.low is None:
        return f"at most {cell_text(check.high)}"
    if check.high is None:
        return f"at least {cell_text(check.low)}"
    if check.low == check.high:
        return cell_text(check.low)
    return f"{cell_text(check.low)} to {cell_text(check.high)}"


def check_rows(checks: Sequence[Check]) -> list[list[str]]:
    """Write checks as rows under `CHECK_COLUMNS`.

    Args:
        checks: The checks.

    Returns:
        One row for each.
    """
    return [
        [
            check.claim,
            "not finite" if check.value is None else cell_text(check.value),
            bounds_text(check),
            "yes" if check.passed else "no",
            check.source,
        ]
        for check in checks
    ]


def table_rows(table: Table) -> tuple[list[str], list[list[str]]]:
    """Write a table.

    Args:
        table: The table.

    Returns:
        Headings and rows.
    """
    return list(table.columns), [[cell_text(cell) for cell in row] for row in table.rows]


def rich_checks(checks: Sequence[Check]) -> RichTable:
    """Make the table of the checks for a terminal.

    Args:
        checks: The checks.

    Returns:
        Claim, number, interval and whether it holds.
    """
    table = RichTable(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("", no_wrap=True)
    for heading in CHECK_COLUMNS[:3]:
        first = heading == CHECK_COLUMNS[0]
        table.add_column(heading, justify="left" if first else "right", no_wrap=not first)
    for check, (claim, value, bounds, _, _) in zip(checks, check_rows(checks), strict=True):
        mark = Text("✓", style="green") if check.passed else Text("✗", style="bold red")
        table.add_row(mark, Text(claim), Text(value), Text(bounds))
    return table

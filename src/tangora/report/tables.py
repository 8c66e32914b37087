"""The rows of a comparison as a terminal, Markdown, CSV or HTML table; all show the same cells."""

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from tangora.report import formats
from tangora.report.files import write_atomic
from tangora.report.records import Comparison
from tangora.report.summary import BASELINE, Row

_EDGE_MARKS = {"low": " ↓", "high": " ↑", None: ""}
_MARKDOWN_ESCAPES = str.maketrans({mark: f"\\{mark}" for mark in "\\`*_|<>[]"} | {"\n": " "})


@dataclass(frozen=True)
class Column:
    """One column of the table of results.

    Attributes:
        header: What it shows.
        cell: The text of a row's cell.
        short: The header in a terminal; empty leaves the column out there.
        beneath: Whether the page, to stay narrow, shows it beneath the cell to its left.
    """

    header: str
    cell: Callable[[Row], str]
    short: str = ""
    beneath: bool = False


def columns(comparison: Comparison) -> list[Column]:
    """List the columns of the table of results, the recipe's name first.

    Args:
        comparison: Names the metric.

    Returns:
        The columns, from left to right.
    """
    metric = comparison.metric
    return [
        Column("recipe", lambda row: row.recipe, "recipe"),
        Column(f"test {metric}", lambda row: formats.metric(row.test), f"test\n{metric}"),
        Column("95 % interval", lambda row: formats.interval(row.interval), "95 %\ninterval", beneath=True),
        Column(f"vs {BASELINE}", lambda row: formats.difference(row.difference), f"vs\n{BASELINE}"),
        Column(
            f"95 % interval vs {BASELINE}",
            lambda row: formats.interval(row.difference_interval, sign=True),
            beneath=True,
        ),
        Column("gap closed", lambda row: formats.share(row.gap_closed), "gap\nclosed"),
        Column(
            "learning rate",
            lambda row: formats.learning_rate(row.learning_rate) + _EDGE_MARKS[row.edge],
            "rate",
        ),
        Column("seeds", lambda row: str(row.num_seeds), "seeds"),
        Column("validation loss", lambda row: formats.metric(row.validation_loss)),
        Column("time per run", lambda row: formats.seconds(row.time and row.time.total), "time"),
        Column("optimizer step", lambda row: formats.milliseconds(row.step_milliseconds), "opt.\nstep"),
        Column("optimizer state", lambda row: formats.size(row.optimizer_state_bytes), "opt.\nstate"),
        Column("peak memory", lambda row: formats.size(row.peak_bytes)),
        Column("trained", lambda row: formats.count(row.trainable_parameters)),
        Column(
            "diverged, failed runs", lambda row: f"{row.num_diverged}, {row.num_failed} of {row.num_runs}"
        ),
    ]


def rich_table(rows: Sequence[Row], comparison: Comparison) -> Table:
    """Make the table of results for a terminal.

    Args:
        rows: From `summarize`.
        comparison: The runs the rows come from.

    Returns:
        A table without the less important columns.
    """
    shown = [column for column in columns(comparison) if column.short]
    table = Table(
        title=Text(comparison.title),
        caption=_legend(rows),
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=0,
        pad_edge=False,
    )
    for index, column in enumerate(shown):
        # In a narrow terminal only names and intervals wrap; numbers stay whole.
        wraps = index == 0 or "interval" in column.header
        table.add_column(
            Text(column.short), justify="right" if index else "left", overflow="fold", no_wrap=not wraps
        )
    for row in rows:
        # Text, so that brackets in a name are no markup.
        table.add_row(*(Text(column.cell(row)) for column in shown))
    return table


def _legend(rows: Sequence[Row]) -> str | None:
    if any(row.edge for row in rows):
        return "↑ ↓: the learning rate lies at the high or low end of its grid"
    return None


def markdown_table(rows: Sequence[Row], comparison: Comparison) -> str:
    """Make the table of results for a README.

    Args:
        rows: From `summarize`.
        comparison: The runs the rows come from.

    Returns:
        A GitHub-flavoured Markdown table with all columns, ending in a newline.
    """
    shown = columns(comparison)
    lines = [
        [column.header.translate(_MARKDOWN_ESCAPES) for column in shown],
        ["---", *["---:"] * (len(shown) - 1)],
        *([column.cell(row).translate(_MARKDOWN_ESCAPES) for column in shown] for row in rows),
    ]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def write_csv(rows: Sequence[Row], path: str | Path) -> Path:
    """Write every field of the rows, unrounded, in seconds, bytes and milliseconds.

    Args:
        rows: From `summarize`.
        path: The file.

    Returns:
        The path written.
    """
    flat = [_flatten(row) for row in rows]
    names = list(dict.fromkeys(name for cells in flat for name in cells))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return write_atomic(path, text.getvalue())


def _flatten(row: Row) -> dict[str, Any]:
    # Spread intervals and the time split over columns of their own.
    cells = asdict(row)
    for name in [name for name in cells if name.endswith("interval")]:
        low, high = cells.pop(name) or (None, None)
        cells |= {f"{name}_low": low, f"{name}_high": high}
    time = cells.pop("time")
    return cells | ({f"seconds_{part}": value for part, value in time} if time else {})

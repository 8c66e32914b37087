"""The rows of a comparison as a terminal, Markdown, CSV or HTML table; all show the same cells."""

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from tangora.report import formats
from tangora.report.comparison.setup import busy_sentences, setup_line
from tangora.report.files import write_atomic
from tangora.report.records import Comparison
from tangora.report.statistics.intervals import Interval
from tangora.report.statistics.summary import BASELINE, CEILING, Row

_EDGE_MARKS = {"low": " ↓", "high": " ↑", None: ""}
_MARKDOWN_ESCAPES = str.maketrans({mark: f"\\{mark}" for mark in "\\`*_|<>[]"} | {"\n": " "})


@dataclass(frozen=True)
class Column:
    """One column of the table of results.

    Attributes:
        header: What it shows.
        cell: The text of a row's cell.
        value: The number, or the name, that the cell is about.
        short: The header in a terminal; empty leaves the column out there.
        beneath: Whether the page, to stay narrow, shows it beneath the cell to its left.
        cost: Whether it is about what a run costs, which the page shows in a table of its own.
    """

    header: str
    cell: Callable[[Row], str]
    value: Callable[[Row], float | str | None]
    short: str = ""
    beneath: bool = False
    cost: bool = False


def columns(comparison: Comparison) -> list[Column]:
    """List the columns of the table of results, the recipe's name first."""
    return [
        Column("recipe", lambda row: row.recipe, lambda row: row.recipe, "recipe"),
        *_quality(comparison),
        *_costs(),
    ]


def _quality(comparison: Comparison) -> list[Column]:
    metric = comparison.metric
    return [
        _number(f"test {metric}", lambda row: row.test, formats.metric, f"test\n{metric}"),
        _interval("95 % interval", lambda row: row.interval, formats.interval, "95 %\ninterval"),
        _number(f"vs {BASELINE}", lambda row: row.difference, formats.difference, f"vs\n{BASELINE}"),
        _interval(f"95 % interval vs {BASELINE}", lambda row: row.difference_interval, _signed),
        _number(f"corrected p vs {BASELINE}", lambda row: row.p_corrected, formats.p_value, beneath=True),
        _number(f"vs {CEILING}", lambda row: row.versus_full, formats.difference),
        _interval(f"95 % interval vs {CEILING}", lambda row: row.versus_full_interval, _signed),
        _number("gap closed", lambda row: row.gap_closed, formats.share, "gap\nclosed"),
        _interval("95 % interval of the gap closed", lambda row: row.gap_closed_interval, formats.shares),
        Column(
            "learning rate",
            lambda row: formats.learning_rate(row.learning_rate) + _EDGE_MARKS[row.edge],
            lambda row: row.learning_rate,
            "rate",
        ),
        _number("seeds", lambda row: row.num_seeds, str, "seeds"),
        _number("validation loss", lambda row: row.validation_loss, formats.metric),
        Column(
            "diverged, failed runs",
            lambda row: f"{row.num_diverged}, {row.num_failed} of {row.num_runs}",
            lambda row: row.num_diverged + row.num_failed,
        ),
    ]


def _costs() -> list[Column]:
    return [
        _cost("time per run", lambda row: row.seconds, formats.seconds, "time"),
        _range("range of the time", lambda row: row.seconds_range, formats.seconds),
        _cost("optimizer step", lambda row: row.step_milliseconds, formats.milliseconds, "opt.\nstep"),
        _range("range of the step", lambda row: row.step_milliseconds_range, formats.milliseconds),
        _cost("optimizer state", lambda row: row.optimizer_state_bytes, formats.size, "opt.\nstate"),
        _cost("peak memory", lambda row: row.peak_bytes, formats.size),
        _cost("trained", lambda row: row.trainable_parameters, formats.count),
    ]


def _number(
    header: str,
    value: Callable[[Row], Any],
    write: Callable[[Any], str],
    short: str = "",
    *,
    beneath: bool = False,
    cost: bool = False,
) -> Column:
    return Column(header, lambda row: write(value(row)), value, short, beneath, cost)


def _interval(
    header: str, value: Callable[[Row], Interval | None], write: Callable[[Any], str], short: str = ""
) -> Column:
    return Column(header, lambda row: write(value(row)), lambda _: None, short, beneath=True)


def _cost(header: str, value: Callable[[Row], Any], write: Callable[[Any], str], short: str = "") -> Column:
    return _number(header, value, write, short, cost=True)


def _range(header: str, value: Callable[[Row], Interval | None], write: Callable[[float], str]) -> Column:
    return Column(
        header, lambda row: formats.span(value(row), write), lambda _: None, beneath=True, cost=True
    )


def _signed(value: Interval | None) -> str:
    return formats.interval(value, sign=True)


def rich_table(rows: Sequence[Row], comparison: Comparison) -> Table:
    """Make the table of results for a terminal."""
    shown = [column for column in columns(comparison) if column.short]
    table = Table(
        title=Text(f"{comparison.title}\n{setup_line(comparison)}".strip()),
        title_justify="left",
        caption=_legend(comparison, rows),
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


def _legend(comparison: Comparison, rows: Sequence[Row]) -> str | None:
    lines = (
        ["↑ ↓: the learning rate lies at the high or low end of its grid"]
        if any(r.edge for r in rows)
        else []
    )
    if any(row.seconds is not None and row.num_seeds > 1 for row in rows):
        lines.append("time, opt. step: medians over the runs")
    return "\n".join([*lines, *busy_sentences(comparison, rows)]) or None


def markdown_table(rows: Sequence[Row], comparison: Comparison) -> str:
    """Make the table of results for a README."""
    shown = columns(comparison)
    lines = [
        [column.header.translate(_MARKDOWN_ESCAPES) for column in shown],
        ["---", *["---:"] * (len(shown) - 1)],
        *([column.cell(row).translate(_MARKDOWN_ESCAPES) for column in shown] for row in rows),
    ]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def write_csv(rows: Sequence[Row], path: str | Path) -> Path:
    """Write every field of the rows, unrounded, in seconds, bytes and milliseconds."""
    return write_atomic(path, csv_text([flat_row(row) for row in rows]))


def csv_text(lines: Sequence[Mapping[str, Any]]) -> str:
    """Write lines of named cells as CSV."""
    names = list(dict.fromkeys(name for cells in lines for name in cells))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def flat_row(row: Row) -> dict[str, Any]:
    """Spread the intervals, ranges and the time split of a row over columns of their own."""
    cells = asdict(row)
    for name in [name for name in cells if name.endswith(("interval", "range"))]:
        low, high = cells.pop(name) or (None, None)
        cells |= {f"{name}_low": low, f"{name}_high": high}
    time = cells.pop("time")
    return cells | ({f"seconds_{part}": value for part, value in time} if time else {})

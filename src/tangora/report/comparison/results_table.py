"""The rows of a comparison as the table of results: on the page, in a terminal and as CSV."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table as RichTable

from tangora.report import formats
from tangora.report.comparison.setup import busy_sentences, setup_line
from tangora.report.files import write_atomic
from tangora.report.layout import Section
from tangora.report.records import Comparison
from tangora.report.statistics.intervals import Interval
from tangora.report.statistics.judgement import BASELINE, CEILING, Row
from tangora.report.table import Cell, Table, Value, csv_text, terminal_table

_EDGE_MARKS = {"low": " ↓", "high": " ↑", None: ""}


@dataclass(frozen=True)
class Column:
    """One column of the table of results."""

    header: str
    text: Callable[[Row], str]
    value: Callable[[Row], Value] = lambda _: None
    """What it is sorted by."""
    short: str = ""
    """The header in a terminal; empty leaves the column out there."""
    beneath: bool = False
    """Whether the page, to stay narrow, shows it beneath the cell to its left."""


def result_columns(metric: str) -> list[Column]:
    """List the columns that say how good each recipe is, the recipe's name first."""
    return [
        Column("recipe", lambda row: row.recipe, lambda row: row.recipe, "recipe"),
        number_column(f"test {metric}", "test", formats.metric, f"test\n{metric}"),
        _interval("95 % interval", "interval", formats.interval, "95 %\ninterval"),
        number_column(f"vs {BASELINE}", "difference", formats.difference, f"vs\n{BASELINE}"),
        _interval(f"95 % interval vs {BASELINE}", "difference_interval", _signed),
        Column(f"corrected p vs {BASELINE}", lambda row: formats.p_value(row.p_corrected), beneath=True),
        number_column(f"vs {CEILING}", "versus_full", formats.difference),
        _interval(f"95 % interval vs {CEILING}", "versus_full_interval", _signed),
        number_column("gap closed", "gap_closed", formats.share, "gap\nclosed"),
        _interval("95 % interval of the gap closed", "gap_closed_interval", formats.shares),
        Column(
            "learning rate",
            lambda row: formats.learning_rate(row.learning_rate) + _EDGE_MARKS[row.edge],
            lambda row: row.learning_rate,
            "rate",
        ),
        number_column("seeds", "num_seeds", str, "seeds"),
        number_column("validation loss", "validation_loss", formats.metric),
        Column(
            "diverged, failed runs",
            lambda row: f"{row.num_diverged}, {row.num_failed} of {row.num_runs}",
            lambda row: row.num_diverged + row.num_failed,
        ),
    ]


def cost_columns() -> list[Column]:
    """List the columns that say what each recipe costs."""
    return [
        number_column("time per run", "seconds", formats.seconds, "time"),
        _range("range of the time", "seconds_range", formats.seconds),
        number_column("optimizer step", "step_milliseconds", formats.milliseconds, "opt.\nstep"),
        _range("range of the optimizer step", "step_milliseconds_range", formats.milliseconds),
        number_column("optimizer state", "optimizer_state_bytes", formats.size, "opt.\nstate"),
        number_column("peak memory", "peak_bytes", formats.size),
        number_column("trained", "trainable_parameters", formats.count),
    ]


def number_column(header: str, field: str, write: Callable[[Any], str], short: str = "") -> Column:
    """Make a column of one field of the rows."""
    return Column(header, lambda row: write(getattr(row, field)), lambda row: getattr(row, field), short)


def _interval(header: str, field: str, write: Callable[[Any], str], short: str = "") -> Column:
    return Column(header, lambda row: write(getattr(row, field)), short=short, beneath=True)


def _range(header: str, field: str, write: Callable[[Any], str]) -> Column:
    return Column(header, lambda row: formats.span(getattr(row, field), write), beneath=True)


def _signed(value: Interval | None) -> str:
    return formats.interval(value, sign=True)


def rows_table(name: str, caption: str, wanted: Sequence[Column], rows: Sequence[Row]) -> Table:
    """Make a table for a page, without the columns that are empty."""
    shown = [column for column in wanted if any(column.text(row) != formats.MISSING for row in rows)]
    headers = [column.header for column in shown if not column.beneath]
    return Table(name, caption, headers, [_cells(shown, row) for row in rows])


def _cells(shown: Sequence[Column], row: Row) -> list[Cell]:
    cells: list[Cell] = []
    for column in shown:
        text = column.text(row)
        if not column.beneath:
            cells.append(Cell([text], column.value(row)))
        elif text != formats.MISSING:
            cells[-1] = Cell([*cells[-1].lines, text], cells[-1].value)
    return cells


def results_section(comparison: Comparison, rows: Sequence[Row]) -> Section:
    """Show how good each recipe is."""
    caption = "Each recipe at the learning rate that is best on validation data."
    table = rows_table("results", caption, result_columns(comparison.metric), rows)
    return Section("results", "Results", table=table, notes=_notes(rows, comparison))


def _notes(rows: Sequence[Row], comparison: Comparison) -> list[str]:
    resampled = sorted({row.interval_over for row in rows if row.interval_over})
    direction = "Higher" if comparison.higher_is_better else "Lower"
    notes = [
        f"{direction} {comparison.metric} is better. Learning rates are chosen on validation data, never on test.",
        (
            "Beneath a number: its 95 % interval, and the p-value of no difference. ↑ ↓ beside a learning rate: it "
            f"lies at the high or low end of its grid. vs {BASELINE}, vs {CEILING}: difference in test "
            f"{comparison.metric}. Gap closed: the difference from {BASELINE} as a share of {CEILING} minus {BASELINE}."
        ),
        *(
            f"No share of the gap is given: {reason}."
            for reason in sorted({row.gap_closed_missing for row in rows if row.gap_closed_missing})
        ),
    ]
    if resampled:
        notes.append(
            f"Intervals are Student's t over {formats.listing(resampled)}, paired in differences where seeds agree; "
            "few seeds make them wide. Significant means p below 0.05 after Holm's correction for the number of "
            "recipes; with a single seed no difference is called significant."
        )
    return notes


def rich_table(rows: Sequence[Row], comparison: Comparison) -> RichTable:
    """Make the table of results for a terminal."""
    every = [*result_columns(comparison.metric), *cost_columns()]
    shown = [column for column in every if column.short]
    return terminal_table(
        f"{comparison.title}\n{setup_line(comparison)}".strip(),
        [column.short for column in shown],
        [[column.text(row) for column in shown] for row in rows],
        caption=_legend(comparison, rows),
        # In a narrow terminal only names and intervals wrap; numbers stay whole.
        wrapped=[i for i, column in enumerate(shown) if i == 0 or "interval" in column.header],
        tight=True,
    )


def _legend(comparison: Comparison, rows: Sequence[Row]) -> str | None:
    lines = []
    if any(row.edge for row in rows):
        lines.append("↑ ↓: the learning rate lies at the high or low end of its grid")
    if any(row.seconds is not None and row.num_seeds > 1 for row in rows):
        lines.append("time, opt. step: medians over the runs")
    return "\n".join([*lines, *busy_sentences(comparison, rows)]) or None


def write_csv(rows: Sequence[Row], path: str | Path) -> Path:
    """Write every field of the rows, unrounded, in seconds, bytes and milliseconds."""
    return write_atomic(path, csv_text([flat_row(row) for row in rows]))


def flat_row(row: Row) -> dict[str, Any]:
    """Spread the intervals, ranges and the time split of a row over columns of their own."""
    cells = asdict(row)
    for name in [name for name in cells if name.endswith(("interval", "range"))]:
        low, high = cells.pop(name) or (None, None)
        cells |= {f"{name}_low": low, f"{name}_high": high}
    time = cells.pop("time")
    return cells | ({f"seconds_{part}": value for part, value in time} if time else {})

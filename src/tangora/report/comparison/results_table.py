"""The rows of a comparison as the table of results: on the page, in a terminal and as CSV."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tangora.report import formats
from tangora.report.comparison.costs import busy_sentences
from tangora.report.layout import Section
from tangora.report.record_files import write_atomic
from tangora.report.report_table import Cell, Table, cell, csv_text, number
from tangora.report.run_records import Comparison
from tangora.report.setup_facts import setup_line
from tangora.report.statistics.judgement import BASELINE, CEILING, Judgement, Row, runs_behind
from tangora.report.terminal_table import TerminalTable

ZERO_SHOT = "zero-shot"
"""Name of the row of the untrained base model."""

_EDGE_MARKS = {"low": " ↓", "high": " ↑", None: ""}


def _quality(metric: str) -> dict[str, Callable[[Row], Cell | str]]:
    return {
        "recipe": lambda row: row.recipe,
        f"test {metric}": lambda row: number(row.test, formats.metric, formats.interval(row.interval)),
        f"vs {BASELINE}": lambda row: number(
            row.difference,
            formats.difference,
            formats.interval(row.difference_interval, sign=True),
            formats.p_value(row.p_corrected),
        ),
        f"vs {CEILING}": lambda row: number(
            row.versus_full, formats.difference, formats.interval(row.versus_full_interval, sign=True)
        ),
        "gap closed": lambda row: number(
            row.gap_closed, formats.share, formats.shares(row.gap_closed_interval)
        ),
        "learning rate": lambda row: cell(_rate(row), value=row.learning_rate),
        "seeds": lambda row: number(row.num_seeds, str),
        "validation loss": lambda row: number(row.validation_loss, formats.metric),
        "diverged, failed runs": lambda row: cell(
            f"{row.num_diverged}, {row.num_failed} of {row.num_runs}", value=row.num_diverged + row.num_failed
        ),
    }


def _rate(row: Row) -> str:
    return formats.learning_rate(row.learning_rate) + _EDGE_MARKS[row.edge]


def _with_untrained(rows: Sequence[Row], comparison: Comparison) -> list[Row]:
    """Add a row of the base model's test metric before training, where one run has measured it."""
    metric, better = comparison.metric, comparison.higher_is_better
    found = [record.metrics["before"] for record in comparison.records if "before" in record.metrics]
    added = [
        Row(ZERO_SHOT, metric, better, 0, 0, 0, 0, test=metrics[metric])
        for metrics in found
        if metric in metrics
    ]
    return [*rows, *added[:1]]


def results_section(judged: Judgement) -> Section:
    """Show how good each recipe is."""
    comparison, rows = judged.comparison, judged.rows
    caption = "Each recipe at the learning rate that is best on validation data."
    shown = _with_untrained(rows, comparison)
    table = Table.of("results", caption, shown, _quality(comparison.metric)).filled()
    resampled = sorted({row.interval_over for row in rows if row.interval_over})
    direction = "Higher" if comparison.higher_is_better else "Lower"
    notes = [
        f"{direction} {comparison.metric} is better. Learning rates are chosen on validation data, never on test.",
        (
            "Below a number: its 95 % interval, and the p-value of no difference. ↑ ↓ next to a "
            f"learning rate: it is at the high or low end of its grid. vs {BASELINE}, vs {CEILING}: difference in test "
            f"{comparison.metric}."
            + (
                f" Gap closed: the difference from {BASELINE} as a share of {CEILING} minus {BASELINE}."
                if any(row.gap_closed is not None for row in rows)
                else ""
            )
        ),
        *(
            f"No share of the gap is shown: {reason}."
            for reason in sorted({row.gap_closed_missing for row in rows if row.gap_closed_missing})
        ),
    ]
    if len(shown) > len(rows):
        notes.append(f"{ZERO_SHOT}: the base model before any training, measured once.")
    if resampled:
        notes.append(
            f"Intervals are Student's t over {formats.listing(resampled)}, paired in differences where seeds agree; "
            "few seeds make them wide. Significant means p below 0.05 after Holm's correction for the number of "
            "recipes; with a single seed no difference is called significant."
        )
    return Section("results", "Results", table=table, notes=notes)


def rich_table(rows: Sequence[Row], comparison: Comparison) -> TerminalTable:
    """Make the table of results for a terminal."""
    columns: dict[str, Callable[[Row], str]] = {
        "recipe": lambda row: row.recipe,
        f"test\n{comparison.metric}": lambda row: formats.metric(row.test),
        "95 %\ninterval": lambda row: formats.interval(row.interval),
        f"vs\n{BASELINE}": lambda row: formats.difference(row.difference),
        "gap\nclosed": lambda row: formats.share(row.gap_closed),
        "rate": _rate,
        "seeds": lambda row: str(row.num_seeds),
        "time": lambda row: formats.seconds(row.seconds),
        "opt.\nstep": lambda row: formats.milliseconds(row.step_milliseconds),
        "opt.\nstate": lambda row: formats.size(row.optimizer_state_bytes),
    }
    return TerminalTable(
        f"{comparison.title}\n{setup_line(comparison)}".strip(),
        list(columns),
        [[write(row) for write in columns.values()] for row in _with_untrained(rows, comparison)],
        caption=_legend(comparison, rows),
        wrapped=(0, 2),  # in a narrow terminal only names and intervals wrap; numbers stay whole
        tight=True,
    )


def _legend(comparison: Comparison, rows: Sequence[Row]) -> str | None:
    lines = []
    if any(row.edge for row in rows):
        lines.append("↑ ↓: the learning rate is at the high or low end of its grid")
    if any(row.seconds is not None and row.num_seeds > 1 for row in rows):
        lines.append("time, opt. step: medians over the runs")
    return "\n".join([*lines, *busy_sentences(runs_behind(comparison, rows))]) or None


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

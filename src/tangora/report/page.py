"""A comparison as one HTML page that needs no network and nothing beside it."""

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tangora.report import formats
from tangora.report.figures import loss_figure, sweep_figure, time_figure
from tangora.report.files import write_atomic
from tangora.report.flatness import flatness_figure, flatness_notes, flatness_table, has_flatness
from tangora.report.layout import Chart, flat, plain, render
from tangora.report.records import Comparison, Record
from tangora.report.selection import judged_runs
from tangora.report.styles import SVG_DASHES, recipe_styles
from tangora.report.summary import BASELINE, CEILING, Row, group_by_recipe, summarize
from tangora.report.tables import Column, columns
from tangora.report.verdict import verdict

_TEMPLATE = "page.html.j2"
_ERROR_CHARACTERS = 120


@dataclass(frozen=True)
class _Run:
    """One line of the table of runs, as text."""

    recipe: str
    learning_rate: str
    seed: int
    stage: str
    status: str
    in_result: bool
    validation: str
    test: str
    time: str
    error_head: str
    error: str


def write_page(comparison: Comparison, path: str | Path) -> Path:
    """Write the report of a comparison.

    Args:
        comparison: The runs.
        path: The HTML file.

    Returns:
        The path written.
    """
    return write_atomic(path, render_page(comparison))


def render_page(comparison: Comparison) -> str:
    """Make the report of a comparison; the same comparison gives the same text.

    Args:
        comparison: The runs.

    Returns:
        A whole HTML page: verdict, results, figures, runs, and what is needed to repeat it.
    """
    rows = summarize(comparison)
    groups = group_by_recipe(comparison)
    shown = [c for c in columns(comparison) if any(c.cell(row) != formats.MISSING for row in rows)]
    return render(
        _TEMPLATE,
        comparison.title,
        comparison=comparison,
        verdict=verdict(rows),
        headers=[column.header for column in shown if not column.beneath],
        table=[_cells(shown, row) for row in rows],
        styles=recipe_styles(groups),
        svg_dashes=SVG_DASHES,
        notes=_notes(rows, comparison),
        charts=_charts(comparison, rows),
        flatness=_flatness(comparison, rows),
        runs=[run for row in rows for run in _runs(groups[row.recipe], row)],
        settings=flat(comparison.settings),
        recipe_settings=[(row.recipe, _example_settings(groups[row.recipe], row)) for row in rows],
        versions=_versions(comparison.records),
        machines=sorted({record.machine for record in comparison.records}),
        commits=sorted({record.commit for record in comparison.records if record.commit}),
    )


def _cells(shown: Sequence[Column], row: Row) -> list[list[str]]:
    # Each cell is a list of lines.
    cells: list[list[str]] = []
    for column in shown:
        if not column.beneath:
            cells.append([column.cell(row)])
        elif column.cell(row) != formats.MISSING:
            cells[-1].append(column.cell(row))
    return cells


def _charts(comparison: Comparison, rows: Sequence[Row]) -> list[Chart]:
    best = "highest" if comparison.higher_is_better else "lowest"
    return [
        Chart(
            "loss",
            "Training loss",
            "Mean over the seeds at each recipe's best learning rate, lightly smoothed; the band reaches from the "
            "smallest to the largest seed. Point at a line for the raw value.",
            plain(loss_figure(comparison, rows)),
        ),
        Chart(
            "sweep",
            "Learning-rate sweep",
            f"Mean validation {comparison.metric} over the seeds, with bars from the smallest to the largest. A "
            f"ring marks the chosen learning rate ({best} mean); a cross marks runs that diverged, which have no "
            "value and are drawn at the worst one.",
            plain(sweep_figure(comparison, rows)),
        ),
        Chart(
            "time",
            "Where the time went",
            "Seconds per run at the best learning rate, mean over the seeds.",
            plain(time_figure(rows)),
        ),
    ]


def _flatness(comparison: Comparison, rows: Sequence[Row]) -> dict[str, Any] | None:
    if not has_flatness(comparison):
        return None
    headers, cells = flatness_table(comparison, rows)
    return {
        "headers": headers,
        "cells": cells,
        "notes": flatness_notes(comparison),
        "chart": Chart(
            "flatness-gap",
            "Flatness and generalisation gap",
            "Each judged run. Runs of one method differ by their seeds alone; a trend between so few methods is no "
            "cause.",
            plain(flatness_figure(comparison, rows)),
        ),
    }


def _notes(rows: Sequence[Row], comparison: Comparison) -> list[str]:
    resampled = sorted({row.interval_over for row in rows if row.interval_over})
    direction = "Higher" if comparison.higher_is_better else "Lower"
    notes = [
        f"{direction} {comparison.metric} is better. Learning rates are chosen on validation data, never on test.",
        (
            "Beneath a number: its 95 % interval. "
            f"↑ ↓ beside a learning rate: it lies at the high or low end of its grid. vs {BASELINE}: difference in "
            f"test {comparison.metric}. Gap closed: that difference as a share of {CEILING} minus {BASELINE}, given "
            "only when this gap is larger than noise."
        ),
    ]
    if resampled:
        notes.append(
            f"Intervals are Student's t over {formats.listing(resampled)}, paired in differences where seeds agree; "
            "few seeds make them wide. More than noise means p below 0.05 after Holm's correction for the number "
            "of recipes; a single seed is never called more than noise."
        )
    return notes


def _runs(records: Sequence[Record], row: Row) -> list[_Run]:
    in_result = {run.id for run in judged_runs(records, row.learning_rate)}
    ordered = sorted(records, key=lambda run: (run.learning_rate, run.seed, run.stage))
    return [_run(record, row.metric, in_result=record.id in in_result) for record in ordered]


def _run(record: Record, metric: str, *, in_result: bool) -> _Run:
    error = (record.error or "").strip()
    lines = error.splitlines()
    head = lines[-1] if lines else ""  # a traceback says last what went wrong
    if len(head) > _ERROR_CHARACTERS:
        head = head[:_ERROR_CHARACTERS] + "…"
    return _Run(
        recipe=record.recipe,
        learning_rate=formats.learning_rate(record.learning_rate),
        seed=record.seed,
        stage=record.stage,
        status=record.status,
        in_result=in_result,
        validation=formats.metric(record.metrics.get("validation", {}).get(metric)),
        test=formats.metric(record.metrics.get("test", {}).get(metric)),
        time=formats.seconds(record.time.total),
        error_head=head,
        error=error if error != head else "",
    )


def _example_settings(records: Sequence[Record], row: Row) -> str:
    run = next(iter(judged_runs(records, row.learning_rate)), records[0])
    return json.dumps({"id": run.id} | run.settings, indent=2, default=str, ensure_ascii=False)


def _versions(records: Iterable[Record]) -> list[tuple[str, str]]:
    # List every version that some run used: more than one is worth knowing.
    found: dict[str, set[str]] = defaultdict(set)
    for record in records:
        for package, version in record.versions.items():
            found[package].add(version)
    return [(package, ", ".join(sorted(found[package]))) for package in sorted(found)]

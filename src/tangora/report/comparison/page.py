"""A comparison as one HTML page that needs no network and nothing beside it."""

import json
from base64 import b64encode
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tangora.report import formats
from tangora.report.comparison.alignment import measured_sections
from tangora.report.comparison.runs import runs_csv, runs_grid, trouble_section
from tangora.report.comparison.sections import (
    costs_section,
    curve_sections,
    flatness_section,
    forgetting_section,
    results_section,
    speed_section,
    sweep_section,
    time_section,
)
from tangora.report.comparison.setup import setup_facts
from tangora.report.comparison.tables import csv_text, flat_row
from tangora.report.comparison.verdict import recommendation_sentence, verdict
from tangora.report.drawing.styles import MARKS, SVG_DASHES, recipe_styles
from tangora.report.files import write_atomic
from tangora.report.layout import flat, render
from tangora.report.records import Comparison, Record
from tangora.report.statistics.recommendation import has_comparable_times, recommend
from tangora.report.statistics.selection import group_by_recipe, judged_runs
from tangora.report.statistics.summary import Row, judge

_TEMPLATE = "page.html.j2"


def write_page(comparison: Comparison, path: str | Path) -> Path:
    """Write the report of a comparison."""
    return write_atomic(path, render_page(comparison))


def render_page(comparison: Comparison) -> str:
    """Make the report of a comparison; the same comparison gives the same text."""
    rows, samples = judge(comparison)
    advice = recommend(rows, samples, timed=has_comparable_times(comparison))
    groups = group_by_recipe(comparison)
    parts = [
        results_section(comparison, rows),
        costs_section(comparison, rows),
        *curve_sections(comparison, rows),
        sweep_section(comparison, rows),
        speed_section(comparison, rows),
        *measured_sections(comparison, rows),
        flatness_section(comparison, rows),
        forgetting_section(comparison, rows),
        time_section(rows),
        trouble_section(comparison, rows),
    ]
    return render(
        _TEMPLATE,
        comparison.title,
        comparison=comparison,
        missing=missing_sentence(comparison),
        setup=setup_facts(comparison),
        verdict=verdict(rows),
        recommendation=recommendation_sentence(advice),
        recipes=[row.recipe for row in rows],
        styles=recipe_styles(groups),
        svg_dashes=SVG_DASHES,
        marks=MARKS,
        sections=[part for part in parts if part is not None],
        runs=runs_grid(comparison, rows),
        filters={
            "recipe": [row.recipe for row in rows],
            "status": sorted({record.status for record in comparison.records}),
            "stage": sorted({record.stage for record in comparison.records}),
        },
        downloads={
            "summary.csv": data_link(csv_text([flat_row(row) for row in rows])),
            "runs.csv": data_link(runs_csv(comparison, rows)),
        },
        settings=flat(comparison.settings),
        recipe_settings=[(row.recipe, _example_settings(groups[row.recipe], row)) for row in rows],
        versions=_versions(comparison.records),
        machines=sorted({record.machine for record in comparison.records}),
        commits=sorted({record.commit for record in comparison.records if record.commit}),
    )


def missing_sentence(comparison: Comparison) -> str | None:
    """Say what has not been run."""
    if not comparison.missing:
        return None
    done, left = len(comparison.records), len(comparison.missing)
    are = "is" if done == 1 else "are"
    return f"{formats.plural(done, 'run')} {are} done, {left} or more are left: the same command continues."


def data_link(text: str) -> str:
    """Make an address that holds a CSV file itself."""
    return f"data:text/csv;charset=utf-8;base64,{b64encode(text.encode()).decode()}"


def _example_settings(records: Sequence[Record], row: Row) -> str:
    run = next(iter(judged_runs(records, row.learning_rate)), records[0])
    return json.dumps({"id": run.id} | _given(run.settings), indent=2, default=str, ensure_ascii=False)


def _given(settings: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if value is not None}


def _versions(records: Iterable[Record]) -> list[tuple[str, str]]:
    # List every version that some run used: more than one is worth knowing.
    found: dict[str, set[str]] = defaultdict(set)
    for record in records:
        for package, version in record.versions.items():
            found[package].add(version)
    return [(package, ", ".join(sorted(found[package]))) for package in sorted(found)]

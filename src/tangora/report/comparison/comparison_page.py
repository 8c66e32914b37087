"""A comparison as one page, and as one picture for a README."""

import json
from collections import defaultdict
from pathlib import Path

from tangora._folders import ComparisonFolder
from tangora.report import formats
from tangora.report.comparison.benchmark_table import benchmarks_section
from tangora.report.comparison.brief import brief
from tangora.report.comparison.costs import costs_section, time_section
from tangora.report.comparison.curves import alignment_section, curve_sections, loss_curves, loss_panel
from tangora.report.comparison.end_points import answers_section, flatness_section, forgetting_section
from tangora.report.comparison.learning_rates import sweep_panel, sweep_section
from tangora.report.comparison.published import published_section
from tangora.report.comparison.recommendation import recommend, recommendation_sentence
from tangora.report.comparison.results_table import results_section
from tangora.report.comparison.runs_table import runs_section, trouble_section
from tangora.report.comparison.speed import speed_section
from tangora.report.comparison.through_training import (
    save_through_training,
    through_training_csv,
    through_training_section,
)
from tangora.report.comparison.verdict import verdict
from tangora.report.drawing.panels import Figure, recipe_styles
from tangora.report.drawing.pictures import save_pictures
from tangora.report.layout import Repeat, render
from tangora.report.record_files import write_atomic
from tangora.report.run_records import Comparison
from tangora.report.setup_facts import setup_facts
from tangora.report.statistics.judgement import Judgement, judge

_PANEL_SIZE = (5.5, 4.0)


def write_page(comparison: Comparison, path: str | Path) -> Path:
    """Write the report of a comparison."""
    return write_atomic(path, render_page(comparison))


def render_page(comparison: Comparison) -> str:
    """Make the report of a comparison; the same comparison gives the same text."""
    judged = judge(comparison)
    rows, advised = judged.rows, recommend(judged)
    advice = recommendation_sentence(advised)
    styles = recipe_styles(judged.recorded)
    return render(
        comparison.title,
        [
            "tangora comparison",
            formats.plural(len(rows), "recipe"),
            formats.plural(len(comparison.records), "run"),
        ],
        comparison.created,
        [*verdict(rows), *([advice] if advice else [])],
        [
            results_section(judged),
            benchmarks_section(judged),
            published_section([comparison]),
            costs_section(judged),
            *curve_sections(judged),
            sweep_section(judged),
            speed_section(judged),
            through_training_section(judged),
            alignment_section(judged),
            flatness_section(judged),
            forgetting_section(judged),
            answers_section(judged),
            time_section(rows),
            trouble_section(judged),
            runs_section(judged),
        ],
        _repeat(judged),
        heading="Verdict",
        brief=brief(judged, advised),
        setup=setup_facts(comparison),
        notice=missing_sentence(comparison),
        styles={row.recipe: styles[row.recipe] for row in rows},
    )


def save_picture(comparison: Comparison, path: str | Path) -> Path:
    """Draw training losses and the learning-rate sweep side by side, and write them as PNG."""
    judged, path = judge(comparison), Path(path)
    losses = loss_panel("Training at the best learning rate", loss_curves(judged))
    sweep = sweep_panel(judged, "learning rate (ring: chosen, x: diverged)")
    figure = Figure(path.stem, comparison.title, "", [losses, sweep])
    return save_pictures([figure], path.parent, size=_PANEL_SIZE)[0]


def write_measured(judged: Judgement, folder: ComparisonFolder) -> None:
    """Write what was measured through training as CSV and as PNG, if anything was."""
    if points := through_training_csv(judged):
        write_atomic(folder.measured, points)
        save_through_training({judged.comparison.title: judged}, folder.measured_picture)


def missing_sentence(comparison: Comparison) -> str | None:
    """Say what has not been run."""
    if not comparison.missing:
        return None
    done, left = len(comparison.records), len(comparison.missing)
    are = "is" if done == 1 else "are"
    return f"{formats.plural(done, 'run')} {are} done, {left} or more remain: the same command continues."


def _repeat(judged: Judgement) -> Repeat:
    comparison, records = judged.comparison, judged.comparison.records
    # every version that some run used: more than one is worth knowing
    versions: dict[str, set[str]] = defaultdict(set)
    for record in records:
        for package, version in record.versions.items():
            versions[package].add(version)
    return Repeat(
        comparison.command,
        comparison.settings,
        [(package, ", ".join(sorted(versions[package]))) for package in sorted(versions)],
        sorted({record.machine for record in records}),
        sorted({record.commit for record in records if record.commit}),
        by_recipe=[(row.recipe, _example_settings(judged, row.recipe)) for row in judged.rows],
    )


def _example_settings(judged: Judgement, recipe: str) -> str:
    run = judged.runs.get(recipe, judged.recorded[recipe])[0]
    given = {key: value for key, value in run.settings.items() if value is not None}
    return json.dumps({"id": run.id} | given, indent=2, default=str, ensure_ascii=False)

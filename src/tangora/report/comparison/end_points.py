"""Where the runs ended: how flat the loss is there, next to the generalisation gap, and what was forgotten."""

from collections.abc import Callable, Sequence
from statistics import fmean

import numpy as np
from rich.table import Table as RichTable

from tangora.report import formats
from tangora.report.drawing.charts import panel_chart
from tangora.report.drawing.panels import Panel, Series
from tangora.report.drawing.styles import recipe_styles
from tangora.report.layout import Section
from tangora.report.report_table import Cell, Table, cell, number
from tangora.report.run_records import Comparison, Flatness, Forgetting
from tangora.report.statistics.intervals import Interval, estimate
from tangora.report.statistics.judgement import Row, runs_behind

_MEASURES: dict[str, Callable[[Flatness], float | None]] = {
    "train loss": lambda flat: flat.train_loss,
    "test loss": lambda flat: flat.test_loss,
    "generalisation gap": lambda flat: flat.gap,
    "λ max, weights": lambda flat: _of(flat, "weights", "largest"),
    "trace, weights": lambda flat: _of(flat, "weights", "trace"),
    "rise in the ball": lambda flat: flat.rise,
    "λ max, tangent": lambda flat: _of(flat, "tangent", "largest"),
    "trace, tangent": lambda flat: _of(flat, "tangent", "trace"),
    "λ max, factors": lambda flat: _of(flat, "factors", "largest"),
    "trace, factors": lambda flat: _of(flat, "factors", "trace"),
}
# headers in a terminal, which has no room for all, and shows no factors
_SHORT = {
    "recipe": "recipe",
    "generalisation gap": "general.\ngap",
    "λ max, weights": "λ max,\nweights",
    "trace, weights": "trace,\nweights",
    "rise in the ball": "rise in\nthe ball",
    "λ max, tangent": "λ max,\ntangent",
}
_FACTORS = (
    "Factors: these figures are not to be compared between the rows. They belong to the pair (A, B) that a run ended "
    "with, and change under (B, A) → (BR, R⁻¹A), which leaves the weights, the outputs and all other columns as they "
    "are. They stand here to be seen next to those that can be compared."
)
_SPACES = (
    "Weights: all entries of the adapted layers' weights, the same space for every method. Tangent: the directions in "
    "which an adapter of that rank can move them at the end point; full fine-tuning has no such space."
)
_FORGOTTEN: dict[str, Callable[[Forgetting], float]] = {
    "loss before": lambda item: item.before,
    "loss after": lambda item: item.after,
    "rise": lambda item: item.rise,
}


def _of(flat: Flatness, space: str, measure: str) -> float | None:
    found = flat.spaces.get(space)  # pyright: ignore[reportArgumentType, reportCallIssue]
    return None if found is None else getattr(found, measure)


def has_flatness(comparison: Comparison) -> bool:
    """Tell whether a comparison was run with ``--curvature``."""
    return any(record.flatness is not None for record in comparison.records)


def flatness_sentences(flat: Flatness) -> list[str]:
    """Say how flat the loss is at the end of one run: what can be compared with other runs, and no factors."""
    if flat.missing is not None:
        return [f"Curvature was not measured: {flat.missing}."]
    names = {"weights": "Over the weights", "tangent": "In the tangent space"}
    return [
        f"{names[space]} the largest curvature is {formats.significant(found.largest)} and the trace "
        f"{formats.significant(found.trace)}."
        for space, found in flat.spaces.items()
        if space in names
    ]


def flatness_section(comparison: Comparison, rows: Sequence[Row]) -> Section | None:
    """Show how flat the loss is where the runs ended."""
    if not has_flatness(comparison):
        return None
    chart = panel_chart(
        "flatness-gap",
        _gap_panel(comparison, rows),
        "Each run behind the results. Runs of one recipe differ only in their seeds; a trend over so few recipes "
        "proves no cause.",
    )
    table, notes = flatness_table(comparison, rows), _flatness_notes(comparison)
    return Section("flatness", "End points", table=table, notes=notes, charts=[chart], keyed=True)


def rich_flatness(comparison: Comparison, rows: Sequence[Row]) -> RichTable:
    """Make the table of end points for a terminal."""
    return flatness_table(comparison, rows).only(_SHORT).rich("End points", tight=True)


def flatness_table(comparison: Comparison, rows: Sequence[Row]) -> Table:
    """Make the table of end points."""
    measured = {
        recipe: flats
        for recipe, runs in runs_behind(comparison, rows).items()
        if (flats := [run.flatness for run in runs if run.flatness is not None])
    }
    shown = {
        header: value
        for header, value in _MEASURES.items()
        if any(value(flat) is not None for flats in measured.values() for flat in flats)
    }
    columns = {
        header: lambda item, value=value: _flatness_cell(item[1], value) for header, value in shown.items()
    }
    caption = (
        "How flat the loss is at the end of the runs behind the results, next to the generalisation gap."
    )
    return Table.of("flatness", caption, measured.items(), {"recipe": lambda item: item[0], **columns})


def _flatness_cell(flats: Sequence[Flatness], value: Callable[[Flatness], float | None]) -> Cell:
    values = [found for flat in flats if (found := value(flat)) is not None]
    if not values:
        return cell(formats.MISSING)
    mean, noise = _mean(values)
    ends = [formats.significant(end) for end in noise or ()]
    return number(mean, formats.significant, " to ".join(ends) or formats.MISSING)


def _mean(values: Sequence[float]) -> tuple[float, Interval | None]:
    estimated = estimate(np.array(values)[:, None])
    return fmean(values), estimated.interval if estimated else None


def _flatness_notes(comparison: Comparison) -> list[str]:
    flats = [record.flatness for record in comparison.records if record.flatness is not None]
    examples = sorted({formats.plural(flat.num_examples, "example") for flat in flats})
    radii = sorted({formats.significant(flat.radius) for flat in flats if flat.radius is not None})
    read = (
        f"Curvature of the training loss on the first {formats.listing(examples)}, the same for all runs; the gap is "
        "the test loss minus the loss on as many training examples. Beneath a number: 95 % interval of the mean, "
        "Student's over the seeds."
    )
    notes = [read, _SPACES]
    if patterns := sorted({flat.weight_layers for flat in flats if flat.weight_layers}):
        notes.append(f"Weights: only those of the layers {formats.listing(patterns)}.")
    if radii:
        notes.append(
            f"Rise in the ball: the largest rise of that loss that an ascent found within a distance of "
            f"{formats.listing(radii)} over the weights (Frobenius norm)."
        )
    if any("factors" in flat.spaces for flat in flats):
        notes.append(_FACTORS)
    reasons = sorted({flat.missing for flat in flats if flat.missing})
    return [*notes, *(f"Not measured: {reason}." for reason in reasons)]


def _gap_panel(comparison: Comparison, rows: Sequence[Row]) -> Panel:
    styles = recipe_styles(row.recipe for row in rows)
    series = []
    for recipe, runs in runs_behind(comparison, rows).items():
        points = [
            (top, run.flatness.gap, run.seed)
            for run in runs
            if run.flatness is not None and (top := _of(run.flatness, "weights", "largest")) is not None
        ]
        hover = "seed %{customdata}<br>λ max %{x:.3g}, gap %{y:.4f}"
        x, y, seeds = ([point[part] for point in points] for part in range(3))
        series.append(Series(recipe, x, y, style="points", look=styles[recipe], hover=hover, data=seeds))
    return Panel(
        "Flatness and generalisation gap",
        "largest eigenvalue over the weights",
        "generalisation gap",
        series,
        layout={"height": 440},
    )


def forgetting_section(comparison: Comparison, rows: Sequence[Row]) -> Section | None:
    """Show what training did to unrelated text."""
    found = {
        recipe: items
        for recipe, runs in runs_behind(comparison, rows).items()
        if (items := [run.forgetting for run in runs if run.forgetting])
    }
    if not found:
        return None
    means = {
        header: lambda item, part=part: _forgetting_cell(item[1], part) for header, part in _FORGOTTEN.items()
    }
    table = Table.of(
        "forgetting",
        "Loss per token, in nats, on text unrelated to the task.",
        found.items(),
        {"recipe": lambda item: item[0], **means, "seeds": lambda item: number(len(item[1]), str)},
    )
    texts = sorted({formats.plural(item.num_texts, "text") for items in found.values() for item in items})
    notes = [
        f"Over {formats.listing(texts)}. Beneath a number: 95 % interval of the mean, Student's over the seeds."
    ]
    return Section("forgetting", "Forgetting", table=table, notes=notes)


def _forgetting_cell(items: Sequence[Forgetting], part: Callable[[Forgetting], float]) -> Cell:
    mean, noise = _mean([part(item) for item in items])
    return number(mean, formats.metric, formats.interval(noise))

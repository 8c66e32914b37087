"""Where the methods of a comparison ended: how flat the loss is there, next to the generalisation gap."""

from collections.abc import Callable, Sequence
from statistics import fmean

import numpy as np
import plotly.graph_objects as go
from rich import box
from rich.table import Table
from rich.text import Text

from tangora.report import formats
from tangora.report.drawing.plots import empty_figure, label_text
from tangora.report.drawing.styles import recipe_styles
from tangora.report.records import Comparison, Flatness, Record
from tangora.report.statistics.intervals import estimate
from tangora.report.statistics.selection import judged_runs
from tangora.report.statistics.summary import Row, group_by_recipe

Cells = list[list[list[str]]]
"""Rows of cells of lines."""

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
# headers in a terminal, which has no room for all
_SHORT = {
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


def has_flatness(comparison: Comparison) -> bool:
    """Tell whether a comparison was run with ``--curvature``."""
    return any(record.flatness is not None for record in comparison.records)


def flatness_table(comparison: Comparison, rows: Sequence[Row]) -> tuple[list[str], Cells]:
    """Make the table of end points."""
    measured = _measured(comparison, rows)
    shown = {
        header: value
        for header, value in _MEASURES.items()
        if any(value(flat) is not None for flats in measured.values() for flat in flats)
    }
    cells = [
        [[recipe], *(_cell(flats, value) for value in shown.values())] for recipe, flats in measured.items()
    ]
    return ["recipe", *shown], cells


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


def _measured(comparison: Comparison, rows: Sequence[Row]) -> dict[str, list[Flatness]]:
    return {
        recipe: flats
        for recipe, runs in _runs(comparison, rows).items()
        if (flats := [run.flatness for run in runs if run.flatness is not None])
    }


def _runs(comparison: Comparison, rows: Sequence[Row]) -> dict[str, list[Record]]:
    groups = group_by_recipe(comparison)
    return {row.recipe: judged_runs(groups[row.recipe], row.learning_rate) for row in rows}


def _of(flat: Flatness, space: str, measure: str) -> float | None:
    found = flat.spaces.get(space)  # pyright: ignore[reportArgumentType, reportCallIssue]
    return None if found is None else getattr(found, measure)


def _cell(flats: Sequence[Flatness], value: Callable[[Flatness], float | None]) -> list[str]:
    values = [number for flat in flats if (number := value(flat)) is not None]
    if not values:
        return [formats.MISSING]
    estimated = estimate(np.array(values)[:, None])
    lines = [formats.significant(fmean(values))]
    if estimated is not None:
        lines.append(" to ".join(formats.significant(end) for end in estimated.interval))
    return lines


def flatness_notes(comparison: Comparison) -> list[str]:
    """Say what the table of end points shows."""
    flats = [record.flatness for record in comparison.records if record.flatness is not None]
    with_factors = any("factors" in flat.spaces for flat in flats)
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
    if with_factors:
        notes.append(_FACTORS)
    notes += [
        f"Not measured: {reason}." for reason in sorted({flat.missing for flat in flats if flat.missing})
    ]
    return notes


def flatness_figure(comparison: Comparison, rows: Sequence[Row]) -> go.Figure:
    """Draw the generalisation gap against the largest curvature over the weights."""
    runs = _runs(comparison, rows)
    styles = recipe_styles(runs)
    figure = empty_figure("largest eigenvalue over the weights", "generalisation gap")
    for recipe, judged in runs.items():
        points = [
            (top, run.flatness.gap, run.seed)
            for run in judged
            if run.flatness is not None and (top := _of(run.flatness, "weights", "largest")) is not None
        ]
        name = label_text(recipe)
        figure.add_trace(
            go.Scatter(
                x=[x for x, _, _ in points],
                y=[y for _, y, _ in points],
                customdata=[seed for _, _, seed in points],
                name=name,
                meta=recipe,
                mode="markers",
                marker={"symbol": styles[recipe].marker, "size": 10, "color": styles[recipe].color},
                hovertemplate=f"{name}, seed %{{customdata}}<br>λ max %{{x:.3g}}, gap %{{y:.4f}}<extra></extra>",
            )
        )
    return figure


def rich_flatness(comparison: Comparison, rows: Sequence[Row]) -> Table:
    """Make the table of end points for a terminal: what can be compared, and no factors."""
    headers, cells = flatness_table(comparison, rows)
    shown = [0, *(headers.index(name) for name in _SHORT if name in headers)]
    table = Table(title="End points", title_justify="left", box=box.SIMPLE_HEAD, padding=0, pad_edge=False)
    for number, index in enumerate(shown):
        table.add_column(
            Text(_SHORT.get(headers[index], headers[index])),
            justify="right" if number else "left",
            overflow="fold",
            no_wrap=number > 0,
        )
    for row in cells:
        table.add_row(*(Text("\n".join(row[index])) for index in shown))
    return table

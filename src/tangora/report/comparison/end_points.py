"""Where the runs ended: how flat the loss is there, next to the generalisation gap, and what was forgotten."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from statistics import fmean
from typing import TypeVar

import numpy as np

from tangora.report import formats
from tangora.report.drawing.charts import panel_chart
from tangora.report.drawing.panels import Panel, Series, recipe_styles
from tangora.report.layout import Section
from tangora.report.report_table import Cell, Table, cell, number
from tangora.report.run_records import Comparison, Flatness, Forgetting, Record
from tangora.report.statistics.intervals import estimate
from tangora.report.statistics.judgement import Judgement
from tangora.report.terminal_table import TerminalTable

_Item = TypeVar("_Item")

_MEASURES: dict[str, Callable[[Flatness], float | None]] = {
    "train loss": lambda flat: flat.train_loss,
    "test loss": lambda flat: flat.test_loss,
    "generalisation gap": lambda flat: flat.gap,
    "λ max, weights": lambda flat: _of(flat, "weights", "top_eigenvalue"),
    "trace, weights": lambda flat: _of(flat, "weights", "trace"),
    "rise in the ball": lambda flat: flat.rise,
    "λ max, tangent": lambda flat: _of(flat, "tangent", "top_eigenvalue"),
    "trace, tangent": lambda flat: _of(flat, "tangent", "trace"),
    "λ max, factors": lambda flat: _of(flat, "factors", "top_eigenvalue"),
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
    "Factors: do not compare these figures between rows. They belong to the final pair (A, B) of a "
    "run, and change under (B, A) → (BR, R⁻¹A), which changes neither the weights nor the outputs nor "
    "any other column. They are shown only next to the comparable figures."
)
_BELOW = "Below a number: 95 % interval of the mean, Student's t over the seeds."
_SPACES = (
    "Weights: all entries of the adapted layers' weights, the same space for every method. Tangent: "
    "the directions in which an adapter of that rank can change them at the end point; full "
    "fine-tuning has no such space."
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
        f"{names[space]} the largest curvature is {formats.significant(found.top_eigenvalue)} and the trace "
        f"{formats.significant(found.trace)}."
        for space, found in flat.spaces.items()
        if space in names
    ]


def flatness_section(judged: Judgement) -> Section | None:
    """Show how flat the loss is where the runs ended."""
    if not has_flatness(judged.comparison):
        return None
    chart = panel_chart(
        "flatness-gap",
        _gap_panel(judged),
        "Each run behind the results. Runs of one recipe differ only in their seeds; a trend over so "
        "few recipes does not show a cause.",
    )
    notes = _flatness_notes([run.flatness for run in judged.comparison.records if run.flatness is not None])
    table = flatness_table(judged)
    return Section("flatness", "End points", table=table, notes=notes, charts=[chart], keyed=True)


def rich_flatness(judged: Judgement) -> TerminalTable:
    """Make the table of end points for a terminal."""
    table = flatness_table(judged)
    shown = table.only(_SHORT)
    more = (
        "The page's table of end points has more columns."
        if len(shown.headers) < len(table.headers)
        else None
    )
    return shown.rich("End points", caption=more, wrapped=range(len(shown.headers)), tight=True)


def flatness_table(judged: Judgement) -> Table:
    """Make the table of end points."""
    measured = _by_recipe(judged, lambda run: run.flatness)
    shown = {
        header: value
        for header, value in _MEASURES.items()
        if any(value(flat) is not None for flats in measured.values() for flat in flats)
    }
    caption = "Curvature of the loss at the end of the runs behind the results, and the generalisation gap."
    columns = {"recipe": lambda item: item[0], **_means(shown, formats.significant)}
    return Table.of("flatness", caption, measured.items(), columns)


def _by_recipe(judged: Judgement, read: Callable[[Record], _Item | None]) -> dict[str, list[_Item]]:
    # what was measured at the ends of the runs behind the results
    found = {
        recipe: [item for run in runs if (item := read(run)) is not None]
        for recipe, runs in judged.runs.items()
    }
    return {recipe: items for recipe, items in found.items() if items}


def _means(
    measures: Mapping[str, Callable[[_Item], float | None]], write: Callable[[float], str]
) -> dict[str, Callable[[tuple[str, list[_Item]]], Cell]]:
    # columns of means, with their intervals beneath
    def mean(row: tuple[str, list[_Item]], measure: Callable[[_Item], float | None]) -> Cell:
        values = [value for item in row[1] if (value := measure(item)) is not None]
        if not values:
            return cell(formats.MISSING)
        estimated = estimate(np.array(values)[:, None])
        beneath = " to ".join(map(write, estimated.interval)) if estimated else formats.MISSING
        return number(fmean(values), write, beneath)

    return {header: partial(mean, measure=measure) for header, measure in measures.items()}


def _flatness_notes(flats: Sequence[Flatness]) -> list[str]:
    examples = sorted({formats.plural(flat.num_examples, "example") for flat in flats})
    radii = sorted({formats.significant(flat.radius) for flat in flats if flat.radius is not None})
    read = (
        f"Curvature of the training loss on the first {formats.listing(examples)}, the same for all runs; the gap is "
        "the test loss minus the loss on the same number of training examples. Below a number: 95 % "
        "interval of the mean, Student's t over the seeds."
    )
    notes = [read, _SPACES]
    if patterns := sorted({flat.weight_layers for flat in flats if flat.weight_layers}):
        notes.append(f"Weights: only those of the layers {formats.listing(patterns)}.")
    if radii:
        notes.append(
            "Rise in the ball: the largest increase of that loss found by gradient ascent within a "
            "distance of "
            f"{formats.listing(radii)} over the weights (Frobenius norm)."
        )
    if any("factors" in flat.spaces for flat in flats):
        notes.append(_FACTORS)
    reasons = sorted({flat.missing for flat in flats if flat.missing})
    return [*notes, *(f"Not measured: {reason}." for reason in reasons)]


def _gap_panel(judged: Judgement) -> Panel:
    styles = recipe_styles(judged.recorded)
    series = []
    for recipe, runs in judged.runs.items():
        points = [
            (top, run.flatness.gap, run.seed)
            for run in runs
            if run.flatness is not None
            and (top := _of(run.flatness, "weights", "top_eigenvalue")) is not None
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


def forgetting_section(judged: Judgement) -> Section | None:
    """Show what training did to unrelated text."""
    found = _by_recipe(judged, lambda run: run.forgetting)
    if not found:
        return None
    table = _seeds_table(
        "forgetting", "Loss per token, in nats, on text unrelated to the task.", found, _FORGOTTEN
    )
    texts = sorted({formats.plural(item.num_texts, "text") for items in found.values() for item in items})
    over = formats.listing(texts)
    notes = [f"Over {over}. {_BELOW}"]
    return Section("forgetting", "Forgetting", table=table, notes=notes)


def answers_section(judged: Judgement) -> Section | None:
    """Show what the user's judge made of the answers to prompts."""
    found = _by_recipe(judged, lambda run: run.metrics.get("answers", {}).get("judged"))
    if not found:
        return None
    caption = "Mean score that the judge gave the answers of a run."
    table = _seeds_table("answers", caption, found, {"score": float})
    return Section("answers", "Judged answers", table=table, notes=[_BELOW])


def _seeds_table(
    name: str,
    caption: str,
    found: Mapping[str, list[_Item]],
    measures: Mapping[str, Callable[[_Item], float | None]],
) -> Table:
    columns = {
        "recipe": lambda item: item[0],
        **_means(measures, formats.metric),
        "seeds": lambda item: number(len(item[1]), str),
    }
    return Table.of(name, caption, found.items(), columns)

"""Curves of the runs: training losses, evaluations, and measurements through training."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from tangora.report import formats
from tangora.report.drawing.charts import panel_chart
from tangora.report.drawing.panels import Panel, Series, Style, recipe_styles
from tangora.report.layout import Chart, Section
from tangora.report.run_records import Record
from tangora.report.statistics.judgement import Judgement

# A window of 1/25 of the curve hides the noise of single batches and keeps the shape.
_WINDOWS_PER_CURVE = 25
_MAX_POINTS = 300
_MEAN = "Mean over the seeds at each recipe's best learning rate"
_BAND = "the band reaches from the smallest to the largest"
_ALIGNMENT = {
    "cosine": "Cosine with full fine-tuning’s change",
    "relative_distance": "Distance to full fine-tuning, relative to its change",
    "mean_left_angle": "Mean angle of B to the gradient’s left singular vectors, °",
    "mean_right_angle": "Mean angle of A to the gradient’s right singular vectors, °",
    "effective_rank": "Effective rank of the change",
    "relative_imbalance": "Imbalance of A and B",
}
"""Titles of the figures by what they show."""


def loss_curves(judged: Judgement) -> list[Series]:
    """Average the training losses of each recipe at its best learning rate over its seeds, and smooth them."""
    return _curves(judged, lambda run: {entry.step: entry.loss for entry in run.history}, smoothed=True)


def evaluation_curves(judged: Judgement, metric: str) -> list[Series]:
    """Average the evaluations during training of each recipe over its seeds."""

    def values(run: Record) -> dict[int, float]:
        return {entry.step: entry.metrics[metric] for entry in run.evaluations if metric in entry.metrics}

    return [curve for curve in _curves(judged, values) if len(curve.x) > 1]


def _curves(
    judged: Judgement, values: Callable[[Record], Mapping[int, float]], *, smoothed: bool = False
) -> list[Series]:
    looks = recipe_styles(judged.recorded)
    curves = []
    for recipe, runs in judged.runs.items():
        measured = [values(run) for run in runs]
        curves.append(_curve(recipe, measured, looks[recipe], smoothed=smoothed))
    return [curve for curve in curves if curve.x]


def _curve(recipe: str, by_step: Sequence[Mapping[int, float]], look: Style, *, smoothed: bool) -> Series:
    # Only steps that every seed has: a mean over changing seeds would jump.
    steps = sorted(set.intersection(*(set(values) for values in by_step)))
    # No screen could show all points of a long curve.
    kept = np.linspace(0, len(steps) - 1, min(len(steps), _MAX_POINTS)).round().astype(int)
    values = np.array([[run[step] for step in steps] for run in by_step], dtype=np.float64)
    write = smooth if smoothed else np.asarray
    mean, low, high = values.mean(axis=0), values.min(axis=0), values.max(axis=0)
    single = len(by_step) == 1
    return Series(
        recipe,
        np.array(steps)[kept],
        write(mean)[kept],
        None if single else write(low)[kept],
        None if single else write(high)[kept],
        style="smooth",
        look=look,
        hover="step %{x}: %{y:.4g}" + (", raw %{customdata:.4g}" if smoothed else ""),
        data=mean[kept].tolist() if smoothed else None,
    )


def smooth(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Take a centred moving average whose window shrinks at the ends."""
    width = 2 * (values.size // (2 * _WINDOWS_PER_CURVE)) + 1
    if width == 1:
        return values
    kernel = np.ones(width)
    return np.convolve(values, kernel, "same") / np.convolve(np.ones_like(values), kernel, "same")


def loss_panel(title: str, losses: Sequence[Series]) -> Panel:
    """Draw the training losses."""
    return Panel(title, "optimizer step", "training loss", losses, xwhole=True, layout={"height": 440})


def curve_sections(judged: Judgement) -> list[Section]:
    """Show how the runs went."""
    charts = []
    for metric in dict.fromkeys(("loss", judged.comparison.metric)):
        if curves := evaluation_curves(judged, metric):
            charts.append(_chart(f"evaluation-{len(charts)}", metric, curves))
    sections = []
    if losses := loss_curves(judged):
        panel = loss_panel("Training loss", losses)
        caption = f"{_MEAN}, lightly smoothed; {_BAND} seed. Point at a line for the raw value."
        chart = panel_chart("loss", panel, caption, _last_values(losses))
        sections.append(Section("loss-title", panel.title, charts=[chart], keyed=True))
    if charts:
        notes = [f"{_MEAN}; {_BAND} seed."]
        sections.append(
            Section("evaluations", "Validation during training", charts=charts, notes=notes, keyed=True)
        )
    return sections


def alignment_section(judged: Judgement) -> Section | None:
    """Draw how the adapters moved: alignment with the gradient and with full fine-tuning."""
    runs = {
        recipe: measured
        for recipe, records in judged.runs.items()
        if (measured := [run for run in records if run.trajectory])
    }
    charts = [
        _chart(f"alignment-{key}", what, curves)
        for key, what in _ALIGNMENT.items()
        if (curves := _curves(replace(judged, runs=runs), partial(_points, key=key)))
    ]
    if not charts:
        return None
    return Section(
        "alignment", "Alignment over time", charts=charts, notes=[f"{_MEAN}; {_BAND}."], keyed=True
    )


def _points(run: Record, key: str) -> dict[int, float]:
    return {int(point["step"]): point[key] for point in run.trajectory if key in point}


def _chart(name: str, title: str, curves: Sequence[Series]) -> Chart:
    panel = Panel(title, "optimizer step", "", curves, xwhole=True, layout={"height": 300})
    return panel_chart(name, panel, says=_last_values(curves))


def _last_values(curves: Sequence[Series]) -> str:
    ends = [f"{curve.name} {formats.significant(curve.y[-1])}" for curve in curves]
    return f"At the end: {formats.listing(ends)}"

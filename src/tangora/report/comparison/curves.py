"""How the runs went: training losses, evaluations, and what was measured on the way of the optimizer."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tangora.report import formats
from tangora.report.drawing.charts import panel_chart
from tangora.report.drawing.panels import Panel, Series
from tangora.report.drawing.styles import recipe_styles
from tangora.report.layout import Chart, Section
from tangora.report.records import Comparison, Record
from tangora.report.statistics.judgement import Row, runs_behind

Values = NDArray[np.float64]

# A window of 1/25 of the curve hides the noise of single batches and keeps the shape.
_WINDOWS_PER_CURVE = 25
_MAX_POINTS = 300
_MEAN = "Mean over the seeds at each recipe's best learning rate"
_BAND = "the band reaches from the smallest to the largest"
_ALIGNMENT = {
    "captured_energy": "share of the gradient’s energy that the adapter can follow",
    "cosine": "cosine with full fine-tuning’s change",
    "relative_distance": "distance to full fine-tuning, relative to its change",
    "mean_left_angle": "mean angle of B to the gradient’s left singular vectors, °",
    "mean_right_angle": "mean angle of A to the gradient’s right singular vectors, °",
    "effective_rank": "effective rank of the change",
    "relative_imbalance": "imbalance of A and B",
}
_CURVATURE = {
    "weights_top_eigenvalue": "largest eigenvalue over the weights",
    "tangent_top_eigenvalue": "largest eigenvalue in the tangent space",
    "weights_trace": "trace over the weights",
    "tangent_trace": "trace in the tangent space",
}


@dataclass(frozen=True)
class Curve:
    """A quantity of one recipe at its best learning rate: mean, smallest and largest over the seeds."""

    recipe: str
    num_seeds: int
    steps: Values
    mean: Values
    low: Values
    high: Values

    def smoothed(self) -> "Curve":
        """Take centred moving averages."""
        arrays = (smooth(values) for values in (self.mean, self.low, self.high))
        return Curve(self.recipe, self.num_seeds, self.steps, *arrays)


def loss_curves(comparison: Comparison, rows: Sequence[Row]) -> list[Curve]:
    """Average the training losses of each recipe over its seeds."""
    runs = runs_behind(comparison, rows)
    return _curves(runs, lambda run: {entry.step: entry.loss for entry in run.history})


def evaluation_curves(comparison: Comparison, rows: Sequence[Row], metric: str) -> list[Curve]:
    """Average the evaluations during training of each recipe over its seeds."""
    found = _curves(
        runs_behind(comparison, rows),
        lambda run: {
            entry.step: entry.metrics[metric] for entry in run.evaluations if metric in entry.metrics
        },
    )
    return [curve for curve in found if curve.steps.size > 1]


def _curves(
    runs: Mapping[str, Sequence[Record]], values: Callable[[Record], Mapping[int, float]]
) -> list[Curve]:
    curves = [_curve(recipe, [values(run) for run in records]) for recipe, records in runs.items()]
    return [curve for curve in curves if curve.steps.size]


def _curve(recipe: str, by_step: Sequence[Mapping[int, float]]) -> Curve:
    # Only steps that every seed has: a mean over changing seeds would jump.
    steps = sorted(set.intersection(*(set(values) for values in by_step)))
    values = np.array([[run[step] for step in steps] for run in by_step], dtype=np.float64)
    return Curve(
        recipe,
        len(by_step),
        np.array(steps, dtype=np.float64),
        values.mean(axis=0),
        values.min(axis=0),
        values.max(axis=0),
    )


def smooth(values: Values) -> Values:
    """Take a centred moving average whose window shrinks at the ends."""
    width = 2 * (values.size // (2 * _WINDOWS_PER_CURVE)) + 1
    if width == 1:
        return values
    kernel = np.ones(width)
    return np.convolve(values, kernel, "same") / np.convolve(np.ones_like(values), kernel, "same")


def curves_panel(
    title: str, ylabel: str, curves: Sequence[Curve], rows: Sequence[Row], raw: Sequence[Curve] | None = None
) -> Panel:
    """Draw curves against the optimizer steps; a point of a smooth one tells the raw value."""
    styles = recipe_styles(row.recipe for row in rows)
    series = []
    for index, curve in enumerate(curves):
        kept = _kept(curve.steps.size)
        single = curve.num_seeds == 1
        series.append(
            Series(
                curve.recipe,
                curve.steps[kept].astype(int),
                _short(curve.mean[kept]),
                None if single else _short(curve.low[kept]),
                None if single else _short(curve.high[kept]),
                style="smooth",
                look=styles[curve.recipe],
                hover="step %{x}: %{y:.4g}" + (", raw %{customdata:.4g}" if raw else ""),
                data=_short(raw[index].mean[kept]) if raw else None,
            )
        )
    return Panel(title, "optimizer step", ylabel, series, layout={"height": 440 if raw else 300})


def _kept(size: int) -> NDArray[np.int_]:
    # no screen could show all points of a long curve
    return np.linspace(0, size - 1, min(size, _MAX_POINTS)).round().astype(int)


def _short(values: Values) -> list[float]:
    # Digits that nobody can see are most of a page.
    return [float(f"{value:.5g}") for value in values]


def loss_panel(comparison: Comparison, rows: Sequence[Row], title: str = "Training loss") -> Panel:
    """Draw the training loss of each recipe at its best learning rate."""
    raw = loss_curves(comparison, rows)
    return curves_panel(title, "training loss", [curve.smoothed() for curve in raw], rows, raw)


def curve_sections(comparison: Comparison, rows: Sequence[Row]) -> list[Section]:
    """Show how the runs went."""
    losses = [curve.smoothed() for curve in loss_curves(comparison, rows)]
    charts = []
    for metric in dict.fromkeys(("loss", comparison.metric)):
        if curves := evaluation_curves(comparison, rows, metric):
            charts.append(_chart(f"evaluation-{len(charts)}", metric, curves, rows))
    sections = []
    if losses:
        panel = loss_panel(comparison, rows)
        caption = f"{_MEAN}, lightly smoothed; {_BAND} seed. Point at a line for the raw value."
        chart = panel_chart("loss", panel, caption, _last_values(losses))
        sections.append(Section("loss-title", panel.title, charts=[chart], keyed=True))
    if charts:
        notes = [f"{_MEAN}; {_BAND} seed."]
        sections.append(
            Section("evaluations", "Validation during training", charts=charts, notes=notes, keyed=True)
        )
    return sections


def measured_sections(comparison: Comparison, rows: Sequence[Row]) -> list[Section]:
    """Draw what was measured on the way: alignment with the gradient and with full fine-tuning, and curvature."""
    runs = {
        recipe: measured
        for recipe, records in runs_behind(comparison, rows).items()
        if (measured := [run for run in records if run.trajectory or run.curvature])
    }
    sections = []
    for name, title, wanted in (
        ("alignment", "Alignment over time", _ALIGNMENT),
        ("curvature", "Curvature over time", _CURVATURE),
    ):
        found = {key: _curves(runs, lambda run, key=key: _points(run, key)) for key in wanted}
        charts = [
            _chart(f"{name}-{key}", wanted[key][0].upper() + wanted[key][1:], curves, rows)
            for key, curves in found.items()
            if curves
        ]
        if charts:
            sections.append(Section(name, title, charts=charts, notes=[f"{_MEAN}; {_BAND}."], keyed=True))
    return sections


def _points(run: Record, key: str) -> dict[int, float]:
    return {int(point["step"]): point[key] for point in run.trajectory + run.curvature if key in point}


def _chart(name: str, title: str, curves: Sequence[Curve], rows: Sequence[Row]) -> Chart:
    return panel_chart(name, curves_panel(title, "", curves, rows), says=_last_values(curves))


def _last_values(curves: Sequence[Curve]) -> str:
    ends = [f"{curve.recipe} {formats.significant(float(curve.mean[-1]))}" for curve in curves]
    return f"At the end: {formats.listing(ends)}"

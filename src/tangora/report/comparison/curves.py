"""The numbers behind the figures, for plotly and matplotlib alike."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from tangora.report.records import Comparison, Record
from tangora.report.statistics.selection import SweepPoint, judged_runs, sweep_points
from tangora.report.statistics.summary import Row, group_by_recipe

Values = NDArray[np.float64]

# A window of 1/25 of the curve hides the noise of single batches and keeps the shape.
_WINDOWS_PER_CURVE = 25
_MAX_TICKS = 9
_MAX_POINTS = 300


@dataclass(frozen=True)
class LossCurve:
    """A loss, or another quantity, of one recipe at its best learning rate.

    Attributes:
        recipe: Its name.
        num_seeds: How many runs it is the mean of.
        steps: Optimizer steps.
        mean: Mean over the seeds.
        smooth: `mean`, smoothed where it is noisy.
        low: Smallest over the seeds, smoothed likewise.
        high: Largest over the seeds, smoothed likewise.
    """

    recipe: str
    num_seeds: int
    steps: Values
    mean: Values
    smooth: Values
    low: Values
    high: Values


@dataclass(frozen=True)
class Sweep:
    """Validation metric of one recipe against the learning rate.

    Attributes:
        recipe: Its name.
        points: Ascending in the learning rate.
        chosen: The learning rate chosen.
    """

    recipe: str
    points: Sequence[SweepPoint]
    chosen: float | None


def loss_curves(comparison: Comparison, rows: Sequence[Row]) -> list[LossCurve]:
    """Average the training losses of each recipe over its seeds."""
    return curves_of(
        judged(comparison, rows), lambda run: {entry.step: entry.loss for entry in run.history}, smooth
    )


def evaluation_curves(comparison: Comparison, rows: Sequence[Row], metric: str) -> list[LossCurve]:
    """Average the evaluations during training of each recipe over its seeds."""
    found = curves_of(
        judged(comparison, rows),
        lambda run: {
            entry.step: entry.metrics[metric] for entry in run.evaluations if metric in entry.metrics
        },
    )
    return [curve for curve in found if curve.steps.size > 1]


def judged(comparison: Comparison, rows: Sequence[Row]) -> dict[str, list[Record]]:
    """Gather the runs that the results are computed from."""
    groups = group_by_recipe(comparison)
    runs = {row.recipe: judged_runs(groups[row.recipe], row.learning_rate) for row in rows}
    return {recipe: records for recipe, records in runs.items() if records}


def curves_of(
    runs: Mapping[str, Sequence[Record]],
    values: Callable[[Record], Mapping[int, float]],
    smoothing: Callable[[Values], Values] = lambda values: values,
) -> list[LossCurve]:
    """Average a quantity over the seeds of each recipe."""
    curves = [_curve(recipe, [values(run) for run in records], smoothing) for recipe, records in runs.items()]
    return [curve for curve in curves if curve.steps.size]


def _curve(
    recipe: str, by_step: Sequence[Mapping[int, float]], smoothing: Callable[[Values], Values]
) -> LossCurve:
    # Only steps that every seed has: a mean over changing seeds would jump.
    steps = sorted(set.intersection(*(set(values) for values in by_step)))
    values = np.array([[run[step] for step in steps] for run in by_step], dtype=np.float64)
    return LossCurve(
        recipe=recipe,
        num_seeds=len(by_step),
        steps=np.array(steps, dtype=np.float64),
        mean=values.mean(axis=0),
        smooth=smoothing(values.mean(axis=0)),
        low=smoothing(values.min(axis=0)),
        high=smoothing(values.max(axis=0)),
    )


def thin(curve: LossCurve) -> LossCurve:
    """Leave out points of a long curve that no screen could show."""
    if curve.steps.size <= _MAX_POINTS:
        return curve
    kept = np.linspace(0, curve.steps.size - 1, _MAX_POINTS).round().astype(int)
    arrays = {name: getattr(curve, name)[kept] for name in ("steps", "mean", "smooth", "low", "high")}
    return replace(curve, **arrays)


def smooth(values: Values) -> Values:
    """Take a centred moving average whose window shrinks at the ends."""
    width = 2 * (values.size // (2 * _WINDOWS_PER_CURVE)) + 1
    if width == 1:
        return values
    kernel = np.ones(width)
    return np.convolve(values, kernel, "same") / np.convolve(np.ones_like(values), kernel, "same")


def sweeps(comparison: Comparison, rows: Sequence[Row]) -> list[Sweep]:
    """Gather each recipe's learning-rate sweep."""
    groups = group_by_recipe(comparison)
    return [
        Sweep(row.recipe, sweep_points(groups[row.recipe], comparison.metric), row.learning_rate)
        for row in rows
    ]


def worst_value(shown: Sequence[Sweep], *, higher_is_better: bool) -> float:
    """Find the height at which diverged runs are marked, since they have none of their own."""
    values = [value for sweep in shown for point in sweep.points for value in point.validation]
    return (min if higher_is_better else max)(values, default=0.0)


def rate_ticks(shown: Sequence[Sweep]) -> list[float]:
    """Choose the learning rates to write below the sweep."""
    drawn = [point for sweep in shown for point in sweep.points if point.validation or point.num_diverged]
    rates = sorted({point.learning_rate for point in drawn})
    if len(rates) <= _MAX_TICKS:
        return rates
    exponents = range(math.floor(math.log10(rates[0])), math.ceil(math.log10(rates[-1])) + 1)
    return [10.0**exponent for exponent in exponents]

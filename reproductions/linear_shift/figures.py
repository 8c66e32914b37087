"""The linear model's measurements in figures: means over seeds, bands from the smallest to the largest."""

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from reproductions.linear_shift.dynamics import ENOUGH
from reproductions.linear_shift.measure import Found, step_sizes
from tangora.report.drawing.panels import Figure, Panel, Scale, Series

_NUM_POINTS = 120


def _banded(
    name: str, x: object, values: Float[Tensor, "x s"], style: Literal["line", "points"] = "line"
) -> Series:
    return Series(name, x, values.mean(1), values.amin(1), values.amax(1), style)


def _curves(
    title: str, ylabel: str, names: Sequence[str], curves: Float[Tensor, "t c s"], scale: Scale = "log"
) -> Panel:
    every = max(1, len(curves) // _NUM_POINTS)
    steps, thin = torch.arange(len(curves))[::every], curves[::every]
    series = [_banded(name, steps, thin[:, i]) for i, name in enumerate(names)]
    return Panel(title, "step", ylabel, series, yscale=scale)


def figures_of(found: Found) -> list[Figure]:
    """Draw alignment, linearised dynamics, step sizes, scaling and rates."""
    settings, sizes, by_pair = found.settings, found.sizes, found.step_sizes
    names = [f"size {size:g}" for size in settings.start_sizes]
    conditions = [f"κ = {condition:g}" for condition in settings.conditions]
    pairs = list(step_sizes(settings))
    sine, risk, error = "sine of the angle", "½‖BA − Δ‖²", "‖BA − Δ‖ / ‖Δ‖"
    best = _banded("smallest over time", settings.start_sizes, sizes.sine_A.amin(0), "points")
    times = found.dimension_times
    dimensions, counts = (
        torch.tensor(each, dtype=torch.float64) for each in (settings.dimensions, found.counts)
    )
    theory = times.mean() + 0.5 * (dimensions.log() - dimensions.log().mean())
    to_align = [
        _banded("measured", dimensions, times),
        Series("½ ln n + constant", dimensions, theory, style="dashed"),
    ]
    of_start = [
        _banded("measured", counts, found.start_errors),
        Series("√(n/N)", counts, (settings.n / counts).sqrt(), style="dashed"),
    ]
    plain = found.rates.plain.clamp(min=ENOUGH)
    return [
        Figure(
            "alignment",
            "Small starts align, large ones do not",
            "Size: standard deviation of the entries of A₀, times √n. Left: the risk ½‖BA − Δ‖². Middle: the sine of "
            "the largest angle between the top row space of A and that of the gradient. Right: its smallest value over "
            "time. Means over seeds, bands from the smallest to the largest.",
            (
                _curves("Risk", risk, names, sizes.risk),
                _curves("Rows of A", sine, names, sizes.sine_A),
                Panel(
                    "Best alignment of A",
                    "size of the start",
                    "smallest sine",
                    [best],
                    xscale="log",
                    yscale="log",
                ),
            ),
        ),
        Figure(
            "linearised",
            "Columns of B, and the linearised dynamics",
            "Left: the sine of the largest angle between B's columns and the gradient's top left singular subspace, "
            "zero but for rounding. Middle: the sine between A's top row space and the shift's own, where A goes in "
            "the end. Right: distance of (A, B) from the linearised dynamics, relative to their size.",
            (
                _curves("Columns of B", sine, names, sizes.sine_B),
                _curves("Rows of A and the shift", sine, names, sizes.sine_shift),
                _curves("Off the linear dynamics", "‖Z − Z_lin‖ / ‖Z_lin‖", names, sizes.deviation),
            ),
        ),
        Figure(
            "step-sizes",
            "Equal and unequal step sizes",
            "From the smallest start. The speed depends on the product of the two step sizes alone.",
            (
                _curves("Rows of A", sine, pairs, by_pair.sine_A, "linear"),
                _curves("Risk", risk, pairs, by_pair.risk),
            ),
        ),
        Figure(
            "scaling",
            "More inputs, more examples",
            f"Left: steps until the sine of A's angle is at most {settings.aligned:g}, in units of the time in which "
            "the weakest direction grows by e, against n, with the linear theory's slope of ½ in ln n. Right: relative "
            "error of the spectral start against the number N of examples.",
            (
                Panel("Time to align", "inputs n", "steps × ln(1 + η λ_r*)", to_align, xscale="log"),
                Panel(
                    "Spectral start",
                    "examples N",
                    "‖B₀A₀ − Δ‖₂ / ‖Δ‖₂",
                    of_start,
                    xscale="log",
                    yscale="log",
                ),
            ),
        ),
        Figure(
            "rates",
            "Descent from the spectral start",
            "κ: condition number of the shift. Without preconditioner the weak directions are learned κ times slower; "
            "with it all curves are one. Errors below 1e-12 are drawn there.",
            (
                _curves("Plain, first steps", error, conditions, plain[:400]),
                _curves("Plain, all steps", error, conditions, plain),
                _curves("Preconditioned", error, conditions, found.rates.preconditioned),
            ),
        ),
    ]

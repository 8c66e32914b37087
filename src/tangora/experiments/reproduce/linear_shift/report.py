"""Linear model with a low-rank shift: the measurements in sentences, tables and figures."""

import torch
from jaxtyping import Float
from torch import Tensor

from tangora.experiments.reproduce.linear_shift.dynamics import first_below
from tangora.experiments.reproduce.linear_shift.measure import (
    OFF,
    Found,
    LinearShiftSettings,
    Times,
    preconditioned_rates,
)
from tangora.experiments.reproduce.linear_shift.rates import ENOUGH
from tangora.report import formats
from tangora.report.drawing.panels import Figure, Panel, Series
from tangora.report.reproduction.records import Table

_NUM_POINTS = 120


def findings_of(settings: LinearShiftSettings, found: Found, times: Times) -> tuple[str, ...]:
    """Say what was found.

    Args:
        settings: Sizes, starts and steps.
        found: What was measured.
        times: Predicted and measured times.

    Returns:
        Sentences.
    """
    best = found.sizes.sine_A.amin(0).mean(1)
    end = found.sizes.sine_A[-1].mean(1)
    to_shift = float(found.sizes.sine_shift[-1, -1].mean())
    steps = _steps_to(found.rates.plain, 1e-8), _steps_to(found.rates.preconditioned, 1e-8)
    solved = bool(to_shift < end[-1] / 10)
    unfinished = [
        f"{condition:g}"
        for condition, row in zip(settings.conditions, steps[0], strict=True)
        if row.isnan().any()
    ]
    plain = (
        f"does not get there in {settings.rate_steps} steps at condition number {formats.listing(unfinished)}"
        if unfinished
        else f"needs {steps[0].min():.0f} to {steps[0].max():.0f}"
    )
    passing = (
        f"The alignment passes: at the end the sine is {end[-1]:.2g} to the gradient's row space and {to_shift:.1g} "
        "to the shift's own, which solves the problem and which finite data tell from the gradient's."
    )
    return (
        (
            "From LoRA's start the columns of B lie in the gradient's top singular subspace from the first step on, to "
            "rounding errors."
        ),
        (
            f"The rows of A get there only from small starts: the best sine is {best[0]:.2f} from a start of size "
            f"{settings.start_sizes[0]:g} and {best[-1]:.2g} from {settings.start_sizes[-1]:g}."
        ),
        (
            f"That sine falls like the size to the power {times.size_power:.2f} at the smallest sizes; growth of the "
            f"weakest direction against the cubic error of the strongest gives {times.size_power_expected:.2f}."
        ),
        *([passing] if solved else []),
        (
            f"LoRA+'s ratio of {settings.ratio:g} aligns A {times.speed_up:.2g} times as fast; the linearised dynamics "
            f"predict {times.speed_up_expected:.2g}."
        ),
        (
            f"The linearised dynamics stay within {100 * OFF:.0f} % for {times.left[0]:.0f} steps from a start of size "
            f"{settings.start_sizes[1]:g} and for {times.left[-1]:.0f} from {settings.start_sizes[-1]:g}."
        ),
        (
            f"From the spectral start, preconditioned descent reaches a relative error of 1e-8 in "
            f"{steps[1].min():.0f} to {steps[1].max():.0f} steps at all condition numbers; plain descent {plain}."
        ),
    )


def tables_of(
    settings: LinearShiftSettings, pairs: dict[str, tuple[float, float]], found: Found, times: Times
) -> tuple[Table, ...]:
    """Make the tables.

    Args:
        settings: Sizes, starts and steps.
        pairs: Learning rates of A and B, by name.
        found: What was measured.
        times: Predicted and measured times.

    Returns:
        Starts, step sizes and rates.
    """
    return _size_table(settings, found), _pair_table(pairs, found, times), _rate_table(settings, found)


def figures_of(
    settings: LinearShiftSettings, pairs: dict[str, tuple[float, float]], found: Found
) -> tuple[Figure, ...]:
    """Make the figures.

    Args:
        settings: Sizes, starts and steps.
        pairs: Learning rates of A and B, by name.
        found: What was measured.

    Returns:
        Alignment, linearised dynamics, step sizes, scaling and rates.
    """
    return (
        _size_figure(settings, found),
        _linear_figure(settings, found),
        _pair_figure(pairs, found),
        _growth_figure(settings, found),
        _rate_figure(settings, found),
    )


def _steps_to(errors: Float[Tensor, "t k s"], bound: float) -> Float[Tensor, "k s"]:
    return first_below(errors, bound)


def _curves(names: list[str], curves: Float[Tensor, "t c s"]) -> list[Series]:
    every = max(1, len(curves) // _NUM_POINTS)
    steps = torch.arange(len(curves))[::every]
    thin = curves[::every]
    return [
        Series(name, steps, thin[:, i].mean(-1), thin[:, i].amin(-1), thin[:, i].amax(-1))
        for i, name in enumerate(names)
    ]


def _size_names(settings: LinearShiftSettings) -> list[str]:
    return [f"size {size:g}" for size in settings.start_sizes]


def _size_figure(settings: LinearShiftSettings, found: Found) -> Figure:
    names = _size_names(settings)
    best = found.sizes.sine_A.amin(0)
    return Figure(
        "alignment",
        "Small starts align, large ones do not",
        "Size: standard deviation of the entries of A₀, times √n. Left: the risk ½‖BA − Δ‖². Middle: the sine of the "
        "largest angle between the top row space of A and that of the gradient. Right: its smallest value over time. "
        "Means over seeds, bands from the smallest to the largest.",
        (
            Panel("Risk", "step", "½‖BA − Δ‖²", _curves(names, found.sizes.risk), yscale="log"),
            Panel("Rows of A", "step", "sine of the angle", _curves(names, found.sizes.sine_A), yscale="log"),
            Panel(
                "Best alignment of A",
                "size of the start",
                "smallest sine",
                [
                    Series(
                        "smallest over time",
                        settings.start_sizes,
                        best.mean(1),
                        best.amin(1),
                        best.amax(1),
                        style="points",
                    )
                ],
                xscale="log",
                yscale="log",
            ),
        ),
    )


def _linear_figure(settings: LinearShiftSettings, found: Found) -> Figure:
    names = _size_names(settings)
    sine_B = found.sizes.sine_B.clone()
    sine_B[0] = torch.nan
    return Figure(
        "linearised",
        "Columns of B, and the linearised dynamics",
        "Left: the sine of the largest angle between B's columns and the gradient's top left singular subspace, zero "
        "but for rounding. Middle: the sine between A's top row space and the shift's own, where A goes in the end. "
        "Right: distance of (A, B) from the linearised dynamics, relative to their size.",
        (
            Panel("Columns of B", "step", "sine of the angle", _curves(names, sine_B), yscale="log"),
            Panel(
                "Rows of A and the shift",
                "step",
                "sine of the angle",
                _curves(names, found.sizes.sine_shift),
                yscale="log",
            ),
            Panel(
                "Off the linear dynamics",
                "step",
                "‖Z − Z_lin‖ / ‖Z_lin‖",
                _curves(names, found.sizes.deviation),
                yscale="log",
            ),
        ),
    )


def _pair_figure(pairs: dict[str, tuple[float, float]], found: Found) -> Figure:
    names = list(pairs)
    return Figure(
        "step-sizes",
        "Equal and unequal step sizes",
        "From the smallest start. The speed depends on the product of the two step sizes alone.",
        (
            Panel("Rows of A", "step", "sine of the angle", _curves(names, found.step_sizes.sine_A)),
            Panel("Risk", "step", "½‖BA − Δ‖²", _curves(names, found.step_sizes.risk), yscale="log"),
        ),
    )


def _growth_figure(settings: LinearShiftSettings, found: Found) -> Figure:
    times, errors = found.dimension_times, found.start_errors
    dimensions = torch.tensor(settings.dimensions, dtype=torch.float64)
    theory = times.mean() + 0.5 * (dimensions.log() - dimensions.log().mean())
    counts = torch.tensor(found.counts, dtype=torch.float64)
    return Figure(
        "scaling",
        "More inputs, more examples",
        f"Left: steps until the sine of A's angle is at most {settings.aligned:g}, in units of the time in which the "
        "weakest direction grows by e, against n, with the linear theory's slope of ½ in ln n. Right: relative error "
        "of the spectral start against the number N of examples.",
        (
            Panel(
                "Time to align",
                "inputs n",
                "steps × ln(1 + η λ_r*)",
                [
                    Series("measured", dimensions, times.mean(1), times.amin(1), times.amax(1)),
                    Series("½ ln n + constant", dimensions, theory, style="dashed"),
                ],
                xscale="log",
            ),
            Panel(
                "Spectral start",
                "examples N",
                "‖B₀A₀ − Δ‖₂ / ‖Δ‖₂",
                [
                    Series("measured", counts, errors.mean(1), errors.amin(1), errors.amax(1)),
                    Series("√(n/N)", counts, (settings.n / counts).sqrt(), style="dashed"),
                ],
                xscale="log",
                yscale="log",
            ),
        ),
    )


def _rate_figure(settings: LinearShiftSettings, found: Found) -> Figure:
    names = [f"κ = {condition:g}" for condition in settings.conditions]
    shown = [
        found.rates.plain.clamp(min=ENOUGH)[:400],
        found.rates.plain.clamp(min=ENOUGH),
        found.rates.preconditioned,
    ]
    titles = ("Plain, first steps", "Plain, all steps", "Preconditioned")
    return Figure(
        "rates",
        "Descent from the spectral start",
        "κ: condition number of the shift. Without preconditioner the weak directions are learned κ times slower; with "
        "it all curves are one. Errors below 1e-12 are drawn there.",
        tuple(
            Panel(title, "step", "‖BA − Δ‖ / ‖Δ‖", _curves(names, errors), yscale="log")
            for title, errors in zip(titles, shown, strict=True)
        ),
    )


def _size_table(settings: LinearShiftSettings, found: Found) -> Table:
    dynamics = found.sizes
    columns = {
        "size of A₀": settings.start_sizes,
        "best sine of A": dynamics.sine_A.amin(0).mean(1),
        "at step": dynamics.sine_A.argmin(0).double().mean(1),
        "sine of A at the end": dynamics.sine_A[-1].mean(1),
        "largest sine of B": dynamics.sine_B[1:].amax(0).amax(1),
        "linear until step": first_below(-dynamics.deviation, -OFF).mean(1),
        "risk at the end": dynamics.risk[-1].mean(1),
    }
    return _table(
        "Starts of different size",
        columns,
        "Means over seeds; the largest sine of B is over seeds and steps. Linear until: "
        "the first step at which the linearised dynamics are off by a tenth of their size.",
    )


def _pair_table(pairs: dict[str, tuple[float, float]], found: Found, times: Times) -> Table:
    columns = {
        "step sizes": list(pairs),
        "of A": [pair[0] for pair in pairs.values()],
        "of B": [pair[1] for pair in pairs.values()],
        "steps until A is aligned": times.aligned,
        "best sine of A": found.step_sizes.sine_A.amin(0).mean(1),
        "risk at the end": found.step_sizes.risk[-1].mean(1),
    }
    return _table("Step sizes, from the smallest start", columns, "Means over seeds.")


def _rate_table(settings: LinearShiftSettings, found: Found) -> Table:
    plain, preconditioned = found.rates
    columns = {
        "condition number": settings.conditions,
        "error of the start": plain[0].mean(1),
        "plain: steps to 1e-8": _steps_to(plain, 1e-8).mean(1),
        "plain: error at the end": plain[-1].mean(1),
        "preconditioned: steps to 1e-8": _steps_to(preconditioned, 1e-8).mean(1),
        "preconditioned: factor per step": preconditioned_rates(found.rates).mean(1),
    }
    caption = f"Relative errors ‖BA − Δ‖/‖Δ‖, means over seeds; at most {settings.rate_steps} steps."
    return _table("Descent from the spectral start", columns, caption)


def _table(title: str, columns: dict[str, object], caption: str) -> Table:
    values = [column.tolist() if isinstance(column, Tensor) else column for column in columns.values()]
    return Table(title, tuple(columns), tuple(zip(*values, strict=True)), caption)  # pyright: ignore[reportArgumentType]

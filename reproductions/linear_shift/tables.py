"""The linear model's measurements in sentences and tables."""

from reproductions.linear_shift.dynamics import first_below
from reproductions.linear_shift.measure import OFF, Found, step_sizes
from reproductions.result import Table
from tangora.report import formats


def findings_of(found: Found) -> list[str]:
    """Say what was found."""
    settings = found.settings
    best, end = found.sizes.sine_A.amin(0).mean(1), found.sizes.sine_A[-1].mean(1)
    to_shift = float(found.sizes.sine_shift[-1, -1].mean())
    steps, fast = (first_below(errors, 1e-8) for errors in found.rates)
    unfinished = [
        f"{condition:g}"
        for condition, row in zip(settings.conditions, steps, strict=True)
        if row.isnan().any()
    ]
    plain = (
        f"does not get there in {settings.rate_steps} steps at condition number {formats.listing(unfinished)}"
        if unfinished
        else f"needs {steps.min():.0f} to {steps.max():.0f}"
    )
    passing = (
        f"The alignment passes: at the end the sine is {end[-1]:.2g} to the gradient's row space and {to_shift:.1g} to "
        "the shift's own, which solves the problem and which finite data tell from the gradient's."
    )
    return [
        (
            "From LoRA's start the columns of B lie in the gradient's top singular subspace from the first step on, to "
            "rounding errors."
        ),
        (
            f"The rows of A get there only from small starts: the best sine is {best[0]:.2f} from a start of size "
            f"{settings.start_sizes[0]:g} and {best[-1]:.2g} from {settings.start_sizes[-1]:g}."
        ),
        (
            f"That sine falls like the size to the power {found.size_power:.2f} at the smallest sizes; growth of the "
            f"weakest direction against the cubic error of the strongest gives {found.size_power_expected:.2f}."
        ),
        *([passing] if to_shift < end[-1] / 10 else []),
        (
            f"LoRA+'s ratio of {settings.ratio:g} aligns A {found.speed_up:.2g} times as fast; the linearised dynamics "
            f"predict {found.speed_up_expected:.2g}."
        ),
        (
            f"The linearised dynamics stay within {100 * OFF:.0f} % for {found.left[0]:.0f} steps from a start of size "
            f"{settings.start_sizes[1]:g} and for {found.left[-1]:.0f} from {settings.start_sizes[-1]:g}."
        ),
        (
            f"From the spectral start, preconditioned descent reaches a relative error of 1e-8 in {fast.min():.0f} to "
            f"{fast.max():.0f} steps at all condition numbers; plain descent {plain}."
        ),
    ]


def tables_of(found: Found) -> list[Table]:
    """Tabulate starts, step sizes and rates."""
    settings, sizes, pairs = found.settings, found.sizes, step_sizes(found.settings)
    plain, preconditioned = found.rates
    return [
        Table.of(
            "Starts of different size",
            {
                "size of A₀": settings.start_sizes,
                "best sine of A": sizes.sine_A.amin(0).mean(1),
                "at step": sizes.sine_A.argmin(0).double().mean(1),
                "sine of A at the end": sizes.sine_A[-1].mean(1),
                "largest sine of B": sizes.sine_B[1:].amax(0).amax(1),
                "linear until step": first_below(-sizes.deviation, -OFF).mean(1),
                "risk at the end": sizes.risk[-1].mean(1),
            },
            "Means over seeds; the largest sine of B is over seeds and steps. Linear until: the first step at which "
            "the linearised dynamics are off by a tenth of their size.",
        ),
        Table.of(
            "Step sizes, from the smallest start",
            {
                "step sizes": list(pairs),
                "of A": [pair[0] for pair in pairs.values()],
                "of B": [pair[1] for pair in pairs.values()],
                "steps until A is aligned": found.aligned,
                "best sine of A": found.step_sizes.sine_A.amin(0).mean(1),
                "risk at the end": found.step_sizes.risk[-1].mean(1),
            },
            "Means over seeds.",
        ),
        Table.of(
            "Descent from the spectral start",
            {
                "condition number": settings.conditions,
                "error of the start": plain[0].mean(1),
                "plain: steps to 1e-8": first_below(plain, 1e-8).mean(1),
                "plain: error at the end": plain[-1].mean(1),
                "preconditioned: steps to 1e-8": first_below(preconditioned, 1e-8).mean(1),
                "preconditioned: factor per step": found.factors.mean(1),
            },
            f"Relative errors ‖BA − Δ‖/‖Δ‖, means over seeds; at most {settings.rate_steps} steps.",
        ),
    ]

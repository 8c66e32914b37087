"""LoRA-One's linear model: alignment of the factors, the spectral start, and the rates from it."""

import torch

from tangora.experiments.reproduce.experiment import Progress
from tangora.experiments.reproduce.linear_shift.measure import (
    Found,
    LinearShiftSettings,
    Times,
    measure,
    step_sizes,
)
from tangora.experiments.reproduce.linear_shift.report import (
    figures_of,
    findings_of,
    tables_of,
)
from tangora.report.reproduction.records import Check, Result

_PAPER = "LoRA-One (arXiv:2502.01235)"


def run_linear_shift(settings: LinearShiftSettings, progress: Progress) -> Result:
    """Measure what theorems 3.1 to 3.6 state.

    Args:
        settings: Sizes, starts and steps.
        progress: Hears of parts.

    Returns:
        Alignment, risk, linearised dynamics, errors of the spectral start and rates.
    """
    found = measure(settings, progress)
    times = Times(settings, found)
    pairs = step_sizes(settings)
    return Result(
        findings=findings_of(settings, found, times),
        tables=tables_of(settings, pairs, found, times),
        figures=figures_of(settings, pairs, found),
        checks=_checks(settings, found, times),
        data={
            "dimension_steps": found.dimension_steps,
            "dimension_times": found.dimension_times,
            "start_errors": found.start_errors,
        },
    )


def _checks(settings: LinearShiftSettings, found: Found, times: Times) -> tuple[Check, ...]:
    sine_B = torch.stack([found.sizes.sine_B[1:].max(), found.step_sizes.sine_B[1:].max()]).max()
    return (
        Check(
            "B stays in the top left singular subspace of the gradient from step 1 on: largest sine, all starts, step "
            "sizes and steps.",
            float(sine_B),
            None,
            1e-10,
            f"{_PAPER}, theorem 3.1",
        ),
        Check(
            "A small start aligns A's rows with the gradient's right singular subspace: smallest sine reached from the "
            "smallest start, mean.",
            float(found.sizes.sine_A[:, -1].amin(0).mean()),
            None,
            settings.aligned,
            f"{_PAPER}, theorem 3.2",
        ),
        Check(
            "Steps to alignment grow like ln n: slope against ln n, in growth times (linear theory: ½).",
            times.growth,
            0.25,
            0.75,
            f"{_PAPER}, theorem 3.2",
        ),
        Check(
            "LoRA+'s step sizes align sooner, by the root of the ratio: measured over predicted speed-up.",
            times.speed_up / times.speed_up_expected,
            0.8,
            1.25,
            f"{_PAPER}, figure 1",
        ),
        Check(
            "Unequal step sizes with the same product align as soon as equal ones: ratio of the steps.",
            times.same_product,
            0.9,
            1.1,
            f"{_PAPER}, theorem 3.2",
        ),
        Check(
            "The linearised dynamics hold for a time like ln(‖G‖/‖A₀‖²): measured over predicted slope.",
            times.linear_slope / times.linear_expected,
            0.8,
            1.25,
            f"{_PAPER}, proof of theorem 3.2",
        ),
        Check(
            "The spectral start's relative error falls like one over the root of N: slope in logarithms.",
            times.start_slope,
            -0.65,
            -0.35,
            f"{_PAPER}, theorem 3.3",
        ),
        Check(
            "That error is at most twice the root of n/N, for N of 4 n and more: largest ratio.",
            times.start_constant,
            None,
            2.0,
            f"{_PAPER}, theorem 3.3",
        ),
        Check(
            "The preconditioned rate does not depend on the condition number: largest over smallest logarithmic rate.",
            times.spread,
            None,
            1.1,
            f"{_PAPER}, theorem 3.6",
        ),
    )

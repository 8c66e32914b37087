"""LoRA-One's linear model: alignment of the factors, the spectral start, and the rates from it."""

from reproductions.linear_shift.figures import figures_of
from reproductions.linear_shift.measure import Found, measure
from reproductions.linear_shift.settings import QUICK as QUICK
from reproductions.linear_shift.settings import STAND_INS as STAND_INS
from reproductions.linear_shift.settings import Settings
from reproductions.linear_shift.tables import findings_of, tables_of
from reproductions.result import Check, Interval, Progress, Result, at_most, near, outcomes
from reproductions.shift import LORA_ONE

_THEOREM_2 = f"{LORA_ONE}, theorem 3.2"


def checks(settings: Settings) -> list[Check[Found]]:
    """Declare what theorems 3.1 to 3.6 state."""
    return [
        Check(
            "B stays in the top left singular subspace of the gradient from step 1 on: largest sine, all starts, step "
            "sizes and steps.",
            at_most(1e-10),
            lambda found: found.sine_B,
            f"{LORA_ONE}, theorem 3.1",
        ),
        Check(
            "A small start aligns A's rows with the gradient's right singular subspace: smallest sine reached from the "
            "smallest start, mean.",
            at_most(settings.aligned),
            lambda found: float(found.sizes.sine_A[:, -1].amin(0).mean()),
            _THEOREM_2,
        ),
        Check(
            "Steps to alignment grow like ln n: slope against ln n, in growth times (linear theory: ½).",
            near(0.5, tolerance=0.25),
            lambda found: found.growth,
            _THEOREM_2,
        ),
        Check(
            "LoRA+'s step sizes align sooner, by the root of the ratio: measured over predicted speed-up.",
            Interval(0.8, 1.25),
            lambda found: found.speed_up / found.speed_up_expected,
            f"{LORA_ONE}, figure 1",
        ),
        Check(
            "Unequal step sizes with the same product align as soon as equal ones: ratio of the steps.",
            near(1.0, tolerance=0.1),
            lambda found: found.same_product,
            _THEOREM_2,
        ),
        Check(
            "The linearised dynamics hold for a time like ln(‖G‖/‖A₀‖²): measured over predicted slope.",
            Interval(0.8, 1.25),
            lambda found: found.linear_ratio,
            f"{LORA_ONE}, proof of theorem 3.2",
        ),
        Check(
            "The spectral start's relative error falls like one over the root of N: slope in logarithms.",
            near(-0.5, tolerance=0.15),
            lambda found: found.start_slope,
            f"{LORA_ONE}, theorem 3.3",
        ),
        Check(
            "That error is at most twice the root of n/N, for N of 4 n and more: largest ratio.",
            at_most(2.0),
            lambda found: found.start_constant,
            f"{LORA_ONE}, theorem 3.3",
        ),
        Check(
            "The preconditioned rate does not depend on the condition number: largest over smallest logarithmic rate.",
            at_most(1.1),
            lambda found: found.spread,
            f"{LORA_ONE}, theorem 3.6",
        ),
    ]


def run(settings: Settings, progress: Progress) -> Result:
    """Measure what theorems 3.1 to 3.6 state: alignment, linearised dynamics, spectral start and rates."""
    found = measure(settings, progress)
    return Result(
        findings=findings_of(found),
        tables=tables_of(found),
        figures=figures_of(found),
        checks=outcomes(checks(settings), found),
        data={
            "dimension_steps": found.dimension_steps,
            "dimension_times": found.dimension_times,
            "start_errors": found.start_errors,
        },
    )

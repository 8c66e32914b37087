"""Linear model with a low-rank shift: all measurements of the experiment, and what theory makes of them."""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from tangora.experiments.reproduce.experiment import Progress
from tangora.experiments.reproduce.linear_shift.dynamics import (
    Dynamics,
    Problems,
    alignment_steps,
    draw_problems,
    first_below,
    follow,
    lora_starts,
)
from tangora.experiments.reproduce.linear_shift.rates import Rates, follow_rates, start_errors
from tangora.experiments.reproduce.parts.linear_shift import LinearShiftSettings
from tangora.experiments.reproduce.shift import contraction, slope

OFF = 0.1
"""Share of their size by which the linearised dynamics are off when they count as left behind."""


class Found(NamedTuple):
    """Everything measured."""

    sizes: Dynamics
    """From starts of different size."""
    step_sizes: Dynamics
    """From the smallest start with different step sizes."""
    weakest: float
    """Mean over the seeds of the gradient's smallest singular value that is not zero."""
    strongest: float
    """Mean over the seeds of its largest one."""
    dimension_steps: Float[Tensor, "d s"]
    """Steps to alignment, by dimension and seed."""
    dimension_times: Float[Tensor, "d s"]
    """The same in units of the weakest direction's growth time."""
    counts: tuple[int, ...]
    """Numbers of examples of the spectral starts."""
    start_errors: Float[Tensor, "k s"]
    """Relative errors of the spectral starts."""
    rates: Rates


def measure(settings: LinearShiftSettings, progress: Progress) -> Found:
    """Run everything.

    Args:
        settings: Sizes, starts and steps.
        progress: Hears of parts.

    Returns:
        What was measured.
    """
    total = 4 + len(settings.dimensions)
    seeds = range(settings.seed, settings.seed + settings.num_seeds)
    problems = _draw(
        settings, settings.m, settings.n, settings.condition, settings.examples_per_dimension, seeds
    )
    sizes = torch.tensor(settings.start_sizes, dtype=torch.float64)
    eta = torch.full_like(sizes, settings.learning_rate)
    starts = lora_starts(problems, settings.rank, sizes, seeds)
    by_size = follow(problems, starts, settings.rank_star, (eta, eta), settings.steps)
    progress(1, total)
    pairs = torch.tensor(list(step_sizes(settings).values()), dtype=torch.float64)
    starts = lora_starts(problems, settings.rank, sizes[-1].expand(len(pairs)), seeds)
    by_pair = follow(problems, starts, settings.rank_star, (pairs[:, 0], pairs[:, 1]), settings.steps)
    progress(2, total)
    steps, times = [], []
    for done, n in enumerate(settings.dimensions, start=3):
        count, time = _time_to_align(settings, n)
        steps.append(count)
        times.append(time)
        progress(done, total)
    counts = tuple(settings.n * 2**power for power in range(1, settings.doublings + 1))
    common = (settings.m, settings.n, settings.rank_star, settings.condition)
    errors = [start_errors(*common, counts, settings.inputs, seed) for seed in seeds]
    progress(total - 1, total)
    each = [
        _draw(settings, settings.m, settings.n, condition, settings.rate_examples_per_dimension, seeds)
        for condition in settings.conditions
    ]
    stacked = Problems(*(torch.stack(parts) for parts in zip(*each, strict=True)))
    eta = settings.rate_learning_rate
    rates = follow_rates(stacked, settings.rank_star, (eta, eta), settings.rate_steps, settings.damping)
    progress(total, total)
    singular = torch.linalg.svdvals(problems.start_gradient).mean(0)
    return Found(
        by_size,
        by_pair,
        float(singular[settings.rank_star - 1]),
        float(singular[0]),
        torch.stack(steps),
        torch.stack(times),
        counts,
        torch.tensor(errors, dtype=torch.float64).T,
        rates,
    )


def _draw(
    settings: LinearShiftSettings, m: int, n: int, condition: float, per_dimension: int, seeds: range
) -> Problems:
    return draw_problems(m, n, settings.rank_star, condition, per_dimension * n, settings.inputs, seeds)


def step_sizes(settings: LinearShiftSettings) -> dict[str, tuple[float, float]]:
    """List the pairs of learning rates to compare.

    Args:
        settings: Learning rate and LoRA+'s ratio.

    Returns:
        Of A and of B, by name.
    """
    eta, root = settings.learning_rate, math.sqrt(settings.ratio)
    return {
        "equal": (eta, eta),
        "LoRA+ (B faster)": (eta, settings.ratio * eta),
        "unequal, same product": (eta / root, eta * root),
    }


def _time_to_align(settings: LinearShiftSettings, n: int) -> tuple[Tensor, Tensor]:
    seeds = range(settings.seed, settings.seed + settings.dimension_seeds)
    problems = _draw(
        settings,
        settings.dimension_outputs,
        n,
        settings.condition,
        settings.examples_per_dimension,
        seeds,
    )
    size = torch.tensor([settings.dimension_size], dtype=torch.float64)
    start = lora_starts(problems, settings.rank, size, seeds)
    eta = settings.learning_rate
    steps = alignment_steps(problems, start, settings.rank_star, eta, settings.aligned, settings.steps)
    weakest = torch.linalg.svdvals(problems.start_gradient)[:, settings.rank_star - 1]
    return steps, steps * torch.log1p(eta * weakest)


class Times:
    """Times that the linearised dynamics predict, and the measured ones.

    Args:
        settings: Sizes, starts and steps.
        found: What was measured.
    """

    def __init__(self, settings: LinearShiftSettings, found: Found):
        log_dimensions = torch.tensor(settings.dimensions, dtype=torch.float64).log()
        self.growth = float(slope(log_dimensions, found.dimension_times.mean(1)))
        counts = torch.tensor(found.counts, dtype=torch.float64)
        self.start_slope = float(slope(counts.log(), found.start_errors.mean(1).log()))
        self.start_constant = float(
            (found.start_errors * (counts / settings.n).sqrt()[:, None])[counts >= 4 * settings.n].max()
        )
        # the first start is too large for the theory, which is about small ones
        left = first_below(-found.sizes.deviation, -OFF).mean(1)[1:]
        smallness = (found.strongest / found.sizes.first_norm.square()).log().mean(1)[1:]
        self.left = left
        self.linear_slope = float(slope(smallness, left))
        self.linear_expected = 1 / (2 * math.log1p(settings.learning_rate * found.strongest))
        aligned = first_below(found.step_sizes.sine_A, settings.aligned).mean(1)
        self.aligned = aligned
        self.speed_up = float(aligned[0] / aligned[1])
        self.same_product = float(aligned[0] / aligned[2])
        eta, root = settings.learning_rate, math.sqrt(settings.ratio)
        self.speed_up_expected = math.log1p(root * eta * found.weakest) / math.log1p(eta * found.weakest)
        self.spread = _rate_spread(found.rates)
        best, sizes = found.sizes.sine_A.amin(0).mean(1), settings.start_sizes
        self.size_power = math.log(best[-2] / best[-1]) / math.log(sizes[-2] / sizes[-1])
        # e^(-λ_r τ) of the alignment and (α e^(λ_1 τ))² of the error meet where both are α to this power
        self.size_power_expected = 2 * found.weakest / (found.weakest + 2 * found.strongest)


def preconditioned_rates(rates: Rates) -> Float[Tensor, "k s"]:
    """Fit the factor by which preconditioned descent shrinks the error in each step.

    Args:
        rates: Errors by step.

    Returns:
        Factors by condition number and seed.
    """
    _, num_conditions, num_seeds = rates.preconditioned.shape
    return torch.tensor(
        [
            [contraction(rates.preconditioned[:, k, s], 1e-10, 0.1) for s in range(num_seeds)]
            for k in range(num_conditions)
        ]
    )


def _rate_spread(rates: Rates) -> float:
    speed = -preconditioned_rates(rates).log()
    return float((speed.amax(0) / speed.amin(0)).max())

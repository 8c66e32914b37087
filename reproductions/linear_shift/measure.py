"""All measurements of the linear model, and what the linearised dynamics predict of them."""

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from reproductions.linear_shift.dynamics import (
    Dynamics,
    Problems,
    Rates,
    alignment_steps,
    draw_problems,
    first_below,
    follow,
    follow_rates,
    lora_starts,
    start_errors,
)
from reproductions.linear_shift.settings import Settings
from reproductions.result import Progress
from reproductions.shift import contraction, slope

OFF = 0.1
"""Share of their size by which the linearised dynamics are off when they count as left behind."""


def step_sizes(settings: Settings) -> dict[str, tuple[float, float]]:
    """Return the learning rates of A and of B that are compared, by name."""
    eta, root = settings.learning_rate, math.sqrt(settings.ratio)
    return {
        "equal": (eta, eta),
        "LoRA+ (B faster)": (eta, settings.ratio * eta),
        "unequal, same product": (eta / root, eta * root),
    }


@dataclass(frozen=True)
class Found:
    """Everything measured."""

    settings: Settings
    sizes: Dynamics
    """From starts of different size."""
    step_sizes: Dynamics
    """From the smallest start with different step sizes."""
    singular: Float[Tensor, " v"]
    """Singular values of the gradient at the start, mean over the seeds."""
    dimension_steps: Float[Tensor, "d q"]
    """Steps to alignment, by dimension and seed."""
    dimension_times: Float[Tensor, "d q"]
    """The same in units of the weakest direction's growth time."""
    counts: tuple[int, ...]
    """Numbers of examples of the spectral starts."""
    start_errors: Float[Tensor, "N s"]
    """Relative errors of the spectral starts."""
    rates: Rates

    @property
    def weakest(self) -> float:
        """The gradient's smallest singular value that is not zero."""
        return float(self.singular[self.settings.rank_star - 1])

    @property
    def strongest(self) -> float:
        """The gradient's largest singular value."""
        return float(self.singular[0])

    @property
    def sine_B(self) -> float:
        """Largest sine of B's angle from step 1 on: all starts, step sizes and steps."""
        return float(torch.stack([self.sizes.sine_B[1:].max(), self.step_sizes.sine_B[1:].max()]).max())

    @property
    def growth(self) -> float:
        """Slope of the time to alignment against ln n."""
        logs = torch.tensor(self.settings.dimensions, dtype=torch.float64).log()
        return float(slope(logs, self.dimension_times.mean(1)))

    @cached_property
    def aligned(self) -> Float[Tensor, " p"]:
        """Steps to alignment with each pair of step sizes, mean over the seeds."""
        return first_below(self.step_sizes.sine_A, self.settings.aligned).mean(1)

    @property
    def speed_up(self) -> float:
        """Factor by which LoRA+'s step sizes align A faster."""
        return float(self.aligned[0] / self.aligned[1])

    @property
    def speed_up_expected(self) -> float:
        """The same by the linearised dynamics."""
        eta, root = self.settings.learning_rate, math.sqrt(self.settings.ratio)
        return math.log1p(root * eta * self.weakest) / math.log1p(eta * self.weakest)

    @property
    def same_product(self) -> float:
        """The same for unequal step sizes with the product of equal ones."""
        return float(self.aligned[0] / self.aligned[2])

    @cached_property
    def left(self) -> Float[Tensor, " c"]:
        """Steps until the linearised dynamics are left behind, mean over the seeds.

        The first start is too large for the theory, which is about small ones, and is left out.
        """
        return first_below(-self.sizes.deviation, -OFF).mean(1)[1:]

    @property
    def linear_ratio(self) -> float:
        """Slope of those steps against ln(‖G‖/‖A₀‖²), over the predicted one."""
        smallness = (self.strongest / self.sizes.first_norm.square()).log().mean(1)[1:]
        expected = 1 / (2 * math.log1p(self.settings.learning_rate * self.strongest))
        return float(slope(smallness, self.left)) / expected

    @property
    def start_slope(self) -> float:
        """Exponent of the number of examples in the spectral start's error."""
        counts = torch.tensor(self.counts, dtype=torch.float64)
        return float(slope(counts.log(), self.start_errors.mean(1).log()))

    @property
    def start_constant(self) -> float:
        """Largest ratio of that error to the root of n/N, for N of 4 n and more."""
        counts, n = torch.tensor(self.counts, dtype=torch.float64), self.settings.n
        return float((self.start_errors * (counts / n).sqrt()[:, None])[counts >= 4 * n].max())

    @cached_property
    def factors(self) -> Float[Tensor, "k s"]:
        """Factors by which preconditioned descent shrinks the error in each step, by condition number and seed."""
        errors = self.rates.preconditioned.permute(1, 2, 0)
        return torch.tensor([[contraction(each, 1e-10, 0.1) for each in by_seed] for by_seed in errors])

    @property
    def spread(self) -> float:
        """Largest over smallest logarithmic rate of the condition numbers."""
        speed = -self.factors.log()
        return float((speed.amax(0) / speed.amin(0)).max())

    @property
    def size_power(self) -> float:
        """Power of the start's size in the best sine of A, at the two smallest sizes."""
        best, sizes = self.sizes.sine_A.amin(0).mean(1), self.settings.start_sizes
        return math.log(best[-2] / best[-1]) / math.log(sizes[-2] / sizes[-1])

    @property
    def size_power_expected(self) -> float:
        """Where e^(-λ_r τ) of the alignment and (α e^(λ_1 τ))² of the error meet, both are α to this power."""
        return 2 * self.weakest / (self.weakest + 2 * self.strongest)


def measure(settings: Settings, progress: Progress) -> Found:
    """Run everything."""
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
    rates = follow_rates(stacked, settings.rank_star, eta, settings.rate_steps, settings.damping)
    progress(total, total)
    return Found(
        settings,
        by_size,
        by_pair,
        torch.linalg.svdvals(problems.start_gradient).mean(0),
        torch.stack(steps),
        torch.stack(times),
        counts,
        torch.tensor(errors, dtype=torch.float64).T,
        rates,
    )


def _draw(settings: Settings, m: int, n: int, condition: float, per_dimension: int, seeds: range) -> Problems:
    return draw_problems(m, n, settings.rank_star, condition, per_dimension * n, settings.inputs, seeds)


def _time_to_align(settings: Settings, n: int) -> tuple[Tensor, Tensor]:
    seeds = range(settings.seed, settings.seed + settings.dimension_seeds)
    outputs, per_dimension = settings.dimension_outputs, settings.examples_per_dimension
    problems = _draw(settings, outputs, n, settings.condition, per_dimension, seeds)
    size = torch.tensor([settings.dimension_size], dtype=torch.float64)
    start = lora_starts(problems, settings.rank, size, seeds)
    eta = settings.learning_rate
    steps = alignment_steps(problems, start, settings.rank_star, eta, settings.aligned, settings.steps)
    weakest = torch.linalg.svdvals(problems.start_gradient)[:, settings.rank_star - 1]
    return steps, steps * torch.log1p(eta * weakest)

"""ReLU model with a low-rank shift: the problem, two kinds of gradient, and descents from the spectral start."""

from typing import Literal, NamedTuple, TypeAlias, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from tangora._types import Weight
from tangora.experiments.reproduce.parts.relu_shift import ReluShiftSettings
from tangora.experiments.reproduce.shift import (
    Factors,
    contraction,
    descend,
    draw_inputs,
    draw_shift,
    preconditioned_step,
    spectral_start,
)

GradientKind: TypeAlias = Literal["GLM-tron", "true"]
KINDS: tuple[GradientKind, ...] = get_args(GradientKind)

START_STEP = 2.0
"""The expected GLM-tron gradient is half the error, so two of it make the shift."""

NEAR = 1 / 20
"""The theorem's largest start error, in units of the smallest singular value of the shift."""

_ENOUGH = 1e-9


class ReluProblem(NamedTuple):
    """One seed's problems, which differ in the shift."""

    inputs: Float[Tensor, "N n"]
    outputs: Float[Tensor, "k N m"]
    weight: Float[Tensor, "m n"]
    shift: Float[Tensor, "k m n"]

    def gradient(self, update: Weight, kind: GradientKind) -> Weight:
        r"""Return a full gradient at an update.

        The true one is that of $\frac{1}{2N}\|\sigma(X W^\top) - \sigma(X W_*^\top)\|_F^2$; GLM-tron's leaves out the
        factor $\sigma'(X W^\top)$ and is no gradient of it.

        Args:
            update: $Y$, one for each shift.
            kind: Which one.

        Returns:
            A matrix of the shape of the update.
        """
        X = self.inputs
        before = X @ (self.weight + update).mT
        residual = before.relu() - self.outputs
        if kind == "true":
            residual = residual * (before > 0)
        return residual.mT @ X / len(X)

    def first(self, count: int) -> "ReluProblem":
        """Keep the first examples.

        Args:
            count: How many.

        Returns:
            The smaller problem.
        """
        return self._replace(inputs=self.inputs[:count], outputs=self.outputs[:, :count])


class Descent(NamedTuple):
    """Descents with one kind of gradient and one step size, on one seed's problems."""

    kind: GradientKind
    learning_rate: float
    errors: Float[Tensor, "t k"]
    r"""$\|B A - \Delta\|_F / \lambda_r(\Delta)$ after each step, for each condition number."""


def draw_problem(settings: ReluShiftSettings, seed: int) -> ReluProblem:
    """Draw weights, shifts and inputs.

    Args:
        settings: Sizes.
        seed: The seed.

    Returns:
        One problem for each condition number, with the same singular spaces.
    """
    shifts = []
    for condition in settings.conditions:
        generator = torch.Generator().manual_seed(seed)
        shift = draw_shift(settings.m, settings.n, settings.rank, condition, generator)
        shifts.append(settings.shift_size * shift)
    generator = torch.Generator().manual_seed(10_000 + seed)
    weight = torch.randn(settings.m, settings.n, generator=generator, dtype=torch.float64)
    inputs = draw_inputs(settings.examples, settings.n, "gaussian", generator)
    weight = weight / weight.norm(dim=1, keepdim=True)
    shift = torch.stack(shifts)
    return ReluProblem(inputs, (inputs @ (weight + shift).mT).relu(), weight, shift)


def relative_errors(problem: ReluProblem, update: Weight, rank: int) -> Float[Tensor, " k"]:
    r"""Measure $\|Y - \Delta\|_F / \lambda_r(\Delta)$.

    Args:
        problem: The problem.
        update: $Y$.
        rank: $r$.

    Returns:
        One number for each shift.
    """
    smallest = torch.linalg.svdvals(problem.shift)[:, rank - 1]
    return torch.linalg.matrix_norm(update - problem.shift) / smallest


def start_of(problem: ReluProblem, kind: GradientKind, rank: int) -> Factors:
    """Build the spectral start.

    Args:
        problem: The problem.
        kind: Gradient to read.
        rank: Of the adapter.

    Returns:
        Factors for each shift.
    """
    gradient = problem.gradient(torch.zeros_like(problem.shift), kind)
    return spectral_start(gradient, rank, step=START_STEP)


def run_descent(
    problem: ReluProblem, kind: GradientKind, learning_rate: float, settings: ReluShiftSettings
) -> Descent:
    """Run preconditioned descent from the spectral start.

    Args:
        problem: The problem.
        kind: Gradient of start and descent.
        learning_rate: Step size.
        settings: Rank, steps and damping.

    Returns:
        Errors; it ends early when all are tiny.
    """
    errors: list[Tensor] = []

    def watch(_: int, at: Factors, __: Weight) -> bool:
        errors.append(relative_errors(problem, at.product, settings.rank))
        return bool((errors[-1] <= _ENOUGH).all())

    descend(
        start_of(problem, kind, settings.rank),
        lambda update: problem.gradient(update, kind),
        preconditioned_step(settings.damping),
        (learning_rate, learning_rate),
        settings.steps,
        watch,
    )
    return Descent(kind, learning_rate, torch.stack(errors))


class Summary(NamedTuple):
    """What the descents of one kind and step size have in common, over all seeds."""

    kind: GradientKind
    learning_rate: float
    errors: Float[Tensor, "t k s"]
    """Padded with NaN."""
    factors: Float[Tensor, "k s"]
    """By which the error shrinks in each step."""

    @property
    def bound(self) -> float:
        """The theorem's factor."""
        return 1 - self.learning_rate / 4

    @property
    def expected(self) -> float:
        """The factor of the expected GLM-tron gradient, half the error."""
        return 1 - self.learning_rate / 2

    def over_bound(self, *, near_only: bool) -> float:
        """Return the largest error over the bound.

        Args:
            near_only: Only starts within the theorem's condition, with its bound on the start; else each start
                with its own error.

        Returns:
            Over all steps but the start itself: at most 1 where the theorem holds; NaN without a start.
        """
        decay = self.bound ** torch.arange(len(self.errors), dtype=torch.float64)[:, None, None]
        first = self.errors[0]
        over = self.errors / decay / (NEAR if near_only else first)
        kept = over[1:, first <= NEAR] if near_only else over[1:]
        kept = kept[~kept.isnan()]
        return float(kept.max()) if kept.numel() else float("nan")


def start_errors(
    problem: ReluProblem, kind: GradientKind, counts: list[int], rank: int
) -> Float[Tensor, "N k"]:
    """Measure the spectral start's error with the first examples.

    Args:
        problem: The problem.
        kind: Gradient to read.
        counts: Numbers of examples.
        rank: Of the adapter.

    Returns:
        Errors by count and condition number.
    """
    return torch.stack(
        [
            relative_errors(problem, start_of(problem.first(count), kind, rank).product, rank)
            for count in counts
        ]
    )


def summarize(descents: list[Descent]) -> Summary:
    """Gather the descents of all seeds.

    Args:
        descents: Of one kind and step size.

    Returns:
        Errors and fitted factors.
    """
    longest = max(len(descent.errors) for descent in descents)
    num_conditions = descents[0].errors.shape[1]
    errors = torch.full((longest, num_conditions, len(descents)), torch.nan, dtype=torch.float64)
    for i, descent in enumerate(descents):
        errors[: len(descent.errors), :, i] = descent.errors
    factors = [
        [contraction(errors[:, k, i], 1e-8, 1.0) for i in range(len(descents))] for k in range(num_conditions)
    ]
    return Summary(descents[0].kind, descents[0].learning_rate, errors, torch.tensor(factors))

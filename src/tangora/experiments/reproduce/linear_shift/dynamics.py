"""Linear model with a low-rank shift: how LoRA's factors turn into the gradient's singular subspaces."""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from tangora._types import Weight
from tangora.experiments.reproduce.shift import (
    Factors,
    Inputs,
    descend,
    draw_inputs,
    draw_shift,
    leading_left,
    plain_step,
    sine_of_angle,
)

_Curves = Float[Tensor, "t c s"]


class Problems(NamedTuple):
    """Linear problems, one for each seed, or for each of several and each seed."""

    shift: Float[Tensor, "*s m n"]
    """$\\Delta$."""
    covariance: Float[Tensor, "*s n n"]
    """$X^\\top X / N$."""

    def gradient(self, update: Weight) -> Weight:
        r"""Return the gradient of $\frac{1}{2N}\|X (Y - \Delta)^\top\|_F^2$.

        Args:
            update: $Y$.

        Returns:
            $(Y - \Delta)\, X^\top X / N$.
        """
        return (update - self.shift) @ self.covariance

    @property
    def start_gradient(self) -> Float[Tensor, "*s m n"]:
        """The gradient at no update."""
        return self.gradient(torch.zeros_like(self.shift))


class Dynamics(NamedTuple):
    """What was seen after each step, for each condition and seed."""

    risk: _Curves
    r"""$\frac12\|B A - \Delta\|_F^2$."""
    sine_A: _Curves
    """Angle between the top rows' subspaces of A and of the gradient."""
    sine_shift: _Curves
    """Angle between the top rows' subspaces of A and of the shift."""
    sine_B: _Curves
    """Angle between the top columns' subspaces of B and of the gradient; NaN where B = 0."""
    deviation: _Curves
    """Distance from the linearised dynamics, relative to their size."""
    first_norm: Float[Tensor, "c s"]
    """Spectral norm of A at the start."""


def draw_problems(
    m: int,
    n: int,
    rank: int,
    condition: float,
    num_inputs: int,
    inputs: Inputs,
    seeds: range,
) -> Problems:
    """Draw one problem for each seed.

    Args:
        m: Outputs.
        n: Inputs.
        rank: Of the shift.
        condition: Of the shift.
        num_inputs: Number of examples.
        inputs: Distribution of the examples.
        seeds: The seeds.

    Returns:
        The problems.
    """
    shifts, covariances = [], []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        shifts.append(draw_shift(m, n, rank, condition, generator))
        X = draw_inputs(num_inputs, n, inputs, generator)
        covariances.append(X.T @ X / num_inputs)
    return Problems(torch.stack(shifts), torch.stack(covariances))


def lora_starts(problems: Problems, rank: int, sizes: Float[Tensor, " c"], seeds: range) -> Factors:
    r"""Draw LoRA's starts: $B = 0$, Gaussian $A$; the same directions for all sizes.

    Args:
        problems: The problems.
        rank: $r$.
        sizes: Standard deviation of the entries of $\sqrt n\,A$, for each condition.
        seeds: The problems' seeds.

    Returns:
        A stack, conditions first, then seeds.
    """
    _, m, n = problems.shift.shape
    drawn = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(10_000 + seed)
        drawn.append(torch.randn(rank, n, generator=generator, dtype=torch.float64))
    A = sizes[:, None, None, None] * torch.stack(drawn) / math.sqrt(n)
    return Factors(A, torch.zeros(*A.shape[:2], m, rank, dtype=torch.float64))


def follow(
    problems: Problems,
    start: Factors,
    rank_star: int,
    learning_rate: tuple[Float[Tensor, " c"], Float[Tensor, " c"]],
    steps: int,
) -> Dynamics:
    r"""Run gradient descent and its linearisation $Z_{t+1} = H Z_t$ side by side.

    $Z = (A^\top, B)$ stacked, and $H = \begin{pmatrix} I & -\eta_A G^\top \\ -\eta_B G & I \end{pmatrix}$ with the
    gradient $G$ at no update.

    Args:
        problems: The problems.
        start: Conditions first, then seeds.
        rank_star: Rank of the shift.
        learning_rate: $\eta_A$ and $\eta_B$ of each condition.
        steps: How many.

    Returns:
        Curves of ``steps + 1`` points.
    """
    eta_A, eta_B = (eta[:, None, None, None] for eta in learning_rate)
    G = problems.start_gradient
    left, right = leading_left(G, rank_star), leading_left(G.mT, rank_star)
    goal = leading_left(problems.shift.mT, rank_star)
    linear = start
    rows: list[tuple[Tensor, ...]] = []

    def watch(step: int, at: Factors, _: Weight) -> None:
        nonlocal linear
        if step:
            linear = Factors(linear.A - eta_A * linear.B.mT @ G, linear.B - eta_B * G @ linear.A.mT)
        rows_A = leading_left(at.A.mT, rank_star)
        Z, Z_linear = (torch.cat([each.A.mT, each.B], dim=-2) for each in (at, linear))
        rows.append(
            (
                0.5 * (at.product - problems.shift).square().sum((-2, -1)),
                sine_of_angle(right, rows_A),
                sine_of_angle(goal, rows_A),
                sine_of_angle(left, leading_left(at.B, rank_star))
                if step
                else torch.full(at.A.shape[:2], torch.nan, dtype=torch.float64),
                _norm(Z - Z_linear) / _norm(Z_linear),
            )
        )

    descend(start, problems.gradient, plain_step, (eta_A, eta_B), steps, watch)
    return Dynamics(*(torch.stack(column) for column in zip(*rows, strict=True)), first_norm=_norm(start.A))


def _norm(matrix: Tensor) -> Tensor:
    return torch.linalg.matrix_norm(matrix, ord=2)


def first_below(curves: Float[Tensor, "t ..."], bound: float) -> Float[Tensor, "..."]:
    """Find the first step at which a curve is at most a bound.

    Args:
        curves: By step.
        bound: The bound.

    Returns:
        The step; NaN where it never happens.
    """
    reached = curves <= bound
    first = reached.to(torch.int8).argmax(0).double()
    return first.where(reached.any(0), torch.nan)


def alignment_steps(
    problems: Problems, start: Factors, rank_star: int, learning_rate: float, bound: float, limit: int
) -> Float[Tensor, " s"]:
    """Count the steps until A's rows are aligned, without looking at anything else.

    Args:
        problems: The problems.
        start: One condition, then seeds.
        rank_star: Rank of the shift.
        learning_rate: Of both factors.
        bound: On the sine of the angle.
        limit: Largest number of steps.

    Returns:
        Steps by seed; NaN where the limit was too small.
    """
    right = leading_left(problems.start_gradient.mT, rank_star)
    found = torch.full(start.A.shape[1:2], torch.nan, dtype=torch.float64)

    def watch(step: int, at: Factors, _: Weight) -> bool:
        sines = sine_of_angle(right, leading_left(at.A.mT, rank_star))[0]
        found[(sines <= bound) & found.isnan()] = step
        return not found.isnan().any()

    descend(start, problems.gradient, plain_step, (learning_rate, learning_rate), limit, watch)
    return found

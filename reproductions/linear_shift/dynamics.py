"""The linear model with a low-rank shift: problems, starts, and what is seen of gradient descent on them."""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from reproductions.shift import (
    Factors,
    Inputs,
    descend,
    draw_inputs,
    draw_shift,
    errors_of_descent,
    leading_left,
    plain_step,
    preconditioned_step,
    sine_of_angle,
    spectral_start,
)
from tangora._types import Weight

_Curves = Float[Tensor, "t c s"]
ENOUGH = 1e-12
"""Relative error at which descent from the spectral start ends: below it are rounding errors."""


class Problems(NamedTuple):
    """Linear problems, one for each seed, or for each of several conditions and each seed."""

    shift: Float[Tensor, "*s m n"]
    r"""$\Delta$."""
    covariance: Float[Tensor, "*s n n"]
    r"""$X^\top X / N$."""

    def gradient(self, update: Weight) -> Weight:
        r"""Return the gradient of $\frac{1}{2N}\|X (Y - \Delta)^\top\|_F^2$ at an update $Y$."""
        return (update - self.shift) @ self.covariance

    @property
    def start_gradient(self) -> Float[Tensor, "*s m n"]:
        """The gradient at no update."""
        return self.gradient(torch.zeros_like(self.shift))


class Dynamics(NamedTuple):
    """Measurements after each step, for each condition and seed."""

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


class Rates(NamedTuple):
    """Relative errors ‖BA − Δ‖_F / ‖Δ‖_F after each step, by condition number and seed."""

    plain: Float[Tensor, "t k s"]
    preconditioned: Float[Tensor, "t k s"]


def draw_problems(
    m: int, n: int, rank: int, condition: float, num_inputs: int, inputs: Inputs, seeds: range
) -> Problems:
    """Draw one problem for each seed."""
    shifts, covariances = [], []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        shifts.append(draw_shift(m, n, rank, condition, generator))
        X = draw_inputs(num_inputs, n, inputs, generator)
        covariances.append(X.T @ X / num_inputs)
    return Problems(torch.stack(shifts), torch.stack(covariances))


def lora_starts(problems: Problems, rank: int, sizes: Float[Tensor, " c"], seeds: range) -> Factors:
    r"""Draw LoRA's starts, sizes first, then seeds: $B = 0$, Gaussian $A$ with the same directions for all sizes.

    A size is the standard deviation of the entries of $\sqrt n\,A$.
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
    r"""Run gradient descent and its linearisation $Z_{t+1} = H Z_t$ side by side, from starts by condition and seed.

    $Z = (A^\top, B)$ stacked, and $H = \begin{pmatrix} I & -\eta_A G^\top \\ -\eta_B G & I \end{pmatrix}$ with the
    gradient $G$ at no update; ``learning_rate`` holds $\eta_A$ and $\eta_B$ of each condition.
    """
    eta_A, eta_B = (eta[:, None, None, None] for eta in learning_rate)
    G = problems.start_gradient
    left, right = leading_left(G, rank_star), leading_left(G.mT, rank_star)
    goal = leading_left(problems.shift.mT, rank_star)
    linear = start
    rows: list[tuple[Tensor, ...]] = []

    def watch(step: int, at: Factors) -> None:
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
                _spectral(Z - Z_linear) / _spectral(Z_linear),
            )
        )

    descend(start, problems.gradient, plain_step, (eta_A, eta_B), steps, watch)
    return Dynamics(*map(torch.stack, zip(*rows, strict=True)), first_norm=_spectral(start.A))


def alignment_steps(
    problems: Problems, start: Factors, rank_star: int, learning_rate: float, bound: float, limit: int
) -> Float[Tensor, " s"]:
    """Count the steps, of one condition and several seeds, until the sine of A's angle is at most a bound.

    Returns steps by seed; NaN where the limit was too small.
    """
    right = leading_left(problems.start_gradient.mT, rank_star)
    found = torch.full(start.A.shape[1:2], torch.nan, dtype=torch.float64)

    def watch(step: int, at: Factors) -> bool:
        sines = sine_of_angle(right, leading_left(at.A.mT, rank_star))[0]
        found[(sines <= bound) & found.isnan()] = step
        return not found.isnan().any()

    descend(start, problems.gradient, plain_step, (learning_rate, learning_rate), limit, watch)
    return found


def first_below(curves: Float[Tensor, "t ..."], bound: float) -> Float[Tensor, "..."]:
    """Return the first step at which a curve is at most a bound; NaN where it never is."""
    reached = curves <= bound
    return reached.to(torch.int8).argmax(0).double().where(reached.any(0), torch.nan)


def start_errors(
    m: int, n: int, rank: int, condition: float, counts: tuple[int, ...], inputs: Inputs, seed: int
) -> list[float]:
    r"""Measure the relative error $\|B_0 A_0 - \Delta\|_2 / \|\Delta\|_2$ of the spectral start.

    There is one for each of the ascending numbers of examples, which are the first of the same examples.
    """
    generator = torch.Generator().manual_seed(seed)
    shift = draw_shift(m, n, rank, condition, generator)[None]
    total = torch.zeros(n, n, dtype=torch.float64)
    errors, seen = [], 0
    for count in counts:
        X = draw_inputs(count - seen, n, inputs, generator)
        total, seen = total + X.T @ X, count
        gradient = Problems(shift, total[None] / count).start_gradient
        start = spectral_start(gradient, rank, step=1.0).product
        errors.append(float(_spectral(start - shift) / _spectral(shift)))
    return errors


def follow_rates(problems: Problems, rank: int, learning_rate: float, steps: int, damping: float) -> Rates:
    """Run plain and preconditioned descent from the spectral start, each until all its problems are solved."""
    start = spectral_start(problems.start_gradient, rank, step=1.0)
    norm = torch.linalg.matrix_norm

    def error(update: Weight) -> Tensor:
        return norm(update - problems.shift) / norm(problems.shift)

    return Rates(
        *(
            errors_of_descent(start, problems.gradient, directions, learning_rate, steps, error, ENOUGH)
            for directions in (plain_step, preconditioned_step(damping))
        )
    )


def _spectral(matrix: Tensor) -> Tensor:
    return torch.linalg.matrix_norm(matrix, ord=2)

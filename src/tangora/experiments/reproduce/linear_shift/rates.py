"""Linear model with a low-rank shift: how near the spectral start is, and how fast descent from it is."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from tangora._types import Weight
from tangora.experiments.reproduce.linear_shift.dynamics import Problems
from tangora.experiments.reproduce.shift import (
    Factors,
    Inputs,
    descend,
    draw_inputs,
    draw_shift,
    plain_step,
    preconditioned_step,
    spectral_start,
)

ENOUGH = 1e-12
"""Relative error at which descent ends: below, rounding errors are seen."""


def start_errors(
    m: int, n: int, rank: int, condition: float, counts: tuple[int, ...], inputs: Inputs, seed: int
) -> list[float]:
    r"""Measure the relative error $\|B_0 A_0 - \Delta\|_2 / \|\Delta\|_2$ of the spectral start.

    Args:
        m: Outputs.
        n: Inputs.
        rank: Of the shift and of the start.
        condition: Of the shift.
        counts: Numbers of examples, ascending; each takes the first of the same examples.
        inputs: Distribution of the examples.
        seed: Seed of shift and examples.

    Returns:
        One error for each count.
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


class Rates(NamedTuple):
    """Relative errors ‖BA − Δ‖_F / ‖Δ‖_F after each step, by condition number and seed."""

    plain: Float[Tensor, "t k s"]
    preconditioned: Float[Tensor, "t k s"]


def follow_rates(
    problems: Problems, rank: int, learning_rate: tuple[float, float], steps: int, damping: float
) -> Rates:
    """Run plain and preconditioned descent from the spectral start.

    Args:
        problems: Condition numbers first, then seeds.
        rank: Of the shift and of the adapter.
        learning_rate: Of plain and of preconditioned descent.
        steps: How many at most.
        damping: Of the preconditioner.

    Returns:
        Errors; a kind of descent ends when all its problems are solved.
    """
    start = spectral_start(problems.start_gradient, rank, step=1.0)
    ways = (plain_step, preconditioned_step(damping))
    found = []
    for way, eta in zip(ways, learning_rate, strict=True):
        errors: list[Tensor] = []

        def watch(_: int, at: Factors, __: Weight, errors: list[Tensor] = errors) -> bool:
            errors.append(_frobenius(at.product - problems.shift) / _frobenius(problems.shift))
            return bool((errors[-1] <= ENOUGH).all())

        descend(start, problems.gradient, way, (eta, eta), steps, watch)
        found.append(torch.stack(errors))
    return Rates(*found)


def _spectral(matrix: Tensor) -> Tensor:
    return torch.linalg.matrix_norm(matrix, ord=2)


def _frobenius(matrix: Tensor) -> Tensor:
    return torch.linalg.matrix_norm(matrix)

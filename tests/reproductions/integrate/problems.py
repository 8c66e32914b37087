"""Gradient flows to integrate: an anisotropic quadratic in W, seen by factors and by low-rank matrices."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from reproductions.matrix_sensing.low_rank import DenseForce, LowRank, LowRankField
from reproductions.matrix_sensing.schemes import SCHEMES, factor_field
from tangora.integrate import Field

DOUBLE = torch.float64


class Quadratic(NamedTuple):
    """L(W) = 1/2 sum of H (W - W*)^2, entry by entry, with W = s B A from a balanced start."""

    weights: Tensor
    target: Tensor
    A: Tensor
    B: Tensor
    scaling: float

    @property
    def W(self) -> Tensor:
        return self.scaling * self.B @ self.A

    @property
    def rank(self) -> int:
        return len(self.A)

    def loss(self, W: Tensor) -> Tensor:
        return 0.5 * (self.weights * (W - self.target).square()).sum()

    def gradient(self, W: Tensor) -> Tensor:
        return self.weights * (W - self.target)

    def factor_field(self, gauge: str = "sylvester") -> Field:
        def gradients(state):
            A, B = state
            g = self.gradient(self.scaling * B @ A)
            return self.scaling * B.T @ g, self.scaling * g @ A.T

        return factor_field(gradients, gauge, self.scaling)

    def low_rank_field(self) -> LowRankField:
        return for_one(lambda Y: DenseForce(-self.gradient(Y.dense())))

    def start(self) -> LowRank:
        return LowRank.from_factors(self.scaling * self.A, self.B)


def for_one(field) -> LowRankField:
    """Make a field on states of one matrix from a function of that matrix."""

    def on_tuple(state):
        (Y,) = state
        return (field(Y),)

    return on_tuple


def march(name, field, state, step_size, end=1.0, **options):
    """Take equal steps of a scheme from 0 to the end; return all states, the start first."""
    states = [state]
    for _ in range(round(end / step_size)):
        stepped = SCHEMES[name].step(field, states[-1], step_size, **options)
        assert stepped.failure is None
        states.append(stepped.state)
    return states


def orthonormal(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    Q, _ = torch.linalg.qr(torch.randn(rows, columns, dtype=DOUBLE, generator=generator))
    return Q


def quadratic(
    m: int = 12,
    n: int = 10,
    values: tuple[float, ...] = (2.0, 1.5, 1.0),
    *,
    scaling: float = 1.0,
    seed: int = 0,
    distance: float = 0.3,
) -> Quadratic:
    """Draw a problem whose start has these singular values; the target lies around it, at full rank."""
    generator = torch.Generator().manual_seed(seed)
    spread = 0.5 + torch.rand(m, n, dtype=DOUBLE, generator=generator)
    root = torch.tensor(values, dtype=DOUBLE).div(scaling).sqrt()
    B = orthonormal(m, len(values), generator) * root
    A = root[:, None] * orthonormal(n, len(values), generator).T
    target = scaling * B @ A + distance * torch.randn(m, n, dtype=DOUBLE, generator=generator)
    return Quadratic(spread, target, A, B, scaling)


def slope(sizes: list[float], errors: list[float]) -> float:
    """Return the order of convergence, the slope of log error over log step size."""
    return float(np.polyfit(np.log(sizes), np.log(errors), 1)[0])


def nearby(problem: Quadratic, distance: float = 0.3, seed: int = 5) -> Quadratic:
    """Move the target to a matrix of the start's rank: little of the force is normal to the manifold."""
    generator = torch.Generator().manual_seed(seed)
    dA = distance * torch.randn(problem.A.shape, dtype=DOUBLE, generator=generator)
    dB = distance * torch.randn(problem.B.shape, dtype=DOUBLE, generator=generator)
    return problem._replace(target=problem.scaling * (problem.B + dB) @ (problem.A + dA))

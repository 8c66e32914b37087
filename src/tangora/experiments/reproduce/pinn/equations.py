r"""Differential equations in one space dimension with one coefficient, and their residuals.

All are periodic in $x \in [0, 2\pi)$ and run over $t \in [0, 1]$.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

PERIOD = 2 * math.pi
VISCOSITY = 0.05

Points: TypeAlias = Float[Tensor, " p"]
Field: TypeAlias = Callable[[Points, Points], Points]
r"""$u(x, t)$ at points; anything that autograd can differentiate twice, each value depending on its own point only."""


@dataclass(frozen=True)
class Equation:
    r"""A family of equations $u_t = F(u)$ with a coefficient $c$.

    Attributes:
        name: Of the family.
        formula: As text, for reports.
        symbol: Name of the coefficient.
        residual: ``(u, x, t, c)`` -> $u_t - F(u)$ at the points.
        initial: $u(x, 0)$.
    """

    name: str
    formula: str
    symbol: str
    residual: Callable[[Field, Points, Points, float], Points]
    initial: Callable[[Points], Points]


def collocation(num: int, generator: torch.Generator, dtype: torch.dtype) -> tuple[Points, Points]:
    r"""Draw points of $[0, 2\pi) \times [0, 1]$ from a scrambled Sobol sequence.

    Args:
        num: How many.
        generator: Source of randomness.
        dtype: Theirs.

    Returns:
        $x$ and $t$.
    """
    seed = int(torch.randint(2**31, (), generator=generator))
    unit = torch.quasirandom.SobolEngine(2, scramble=True, seed=seed).draw(num, dtype=torch.float64).to(dtype)
    return PERIOD * unit[:, 0], unit[:, 1].clone()


def convection_residual(u: Field, x: Points, t: Points, beta: float) -> Points:
    r"""Return $u_t + \beta u_x$.

    Args:
        u: The field.
        x: Places.
        t: Times.
        beta: Speed.

    Returns:
        One value per point.
    """
    x, t = _leaf(x), _leaf(t)
    u_x, u_t = _gradient(u(x, t), x, t)
    return u_t + beta * u_x


def allen_cahn_residual(u: Field, x: Points, t: Points, rate: float) -> Points:
    r"""Return $u_t - \nu u_{xx} - c (u - u^3)$ with $\nu = 0.05$.

    Args:
        u: The field.
        x: Places.
        t: Times.
        rate: $c$, of the reaction.

    Returns:
        One value per point.
    """
    x, t = _leaf(x), _leaf(t)
    value = u(x, t)
    u_x, u_t = _gradient(value, x, t)
    (u_xx,) = _gradient(u_x, x)
    return u_t - VISCOSITY * u_xx - rate * (value - value**3)


def _leaf(points: Points) -> Points:
    return points.detach().requires_grad_()


def _gradient(values: Points, *by: Points) -> tuple[Tensor, ...]:
    # each value depends on its own point only, so that the gradient of the sum holds all derivatives
    return torch.autograd.grad(values.sum(), by, create_graph=True)


CONVECTION = Equation(
    name="convection",
    formula="u_t + β u_x = 0, u(x, 0) = sin x",
    symbol="β",
    residual=convection_residual,
    initial=torch.sin,
)

ALLEN_CAHN = Equation(
    name="allen-cahn",
    formula=f"u_t = {VISCOSITY} u_xx + c (u − u³), u(x, 0) = 0.5 sin x + 0.3 cos 2x",
    symbol="c",
    residual=allen_cahn_residual,
    initial=lambda x: 0.5 * torch.sin(x) + 0.3 * torch.cos(2 * x),
)

EQUATIONS = {equation.name: equation for equation in (CONVECTION, ALLEN_CAHN)}

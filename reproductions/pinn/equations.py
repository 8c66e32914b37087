r"""Differential equations in one space dimension with one coefficient: residuals and reference solutions.

All are periodic in $x \in [0, 2\pi)$ and run over $t \in [0, 1]$.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import numpy as np
import torch
from jaxtyping import Float
from scipy.integrate import solve_ivp
from torch import Tensor

PERIOD = 2 * math.pi
VISCOSITY = 0.05

Points: TypeAlias = Float[Tensor, " p"]
Field: TypeAlias = Callable[[Points, Points], Points]
r"""$u(x, t)$ at points; anything that autograd can differentiate twice, each value depending on its own point only."""


@dataclass(frozen=True)
class Equation:
    r"""A family of equations $u_t = F(u)$ with a coefficient $c$, named by a symbol.

    Attributes:
        residual: ``(u, x, t, c)`` -> $u_t - F(u)$ at the points.
        initial: $u(x, 0)$.
    """

    name: str
    symbol: str
    residual: Callable[[Field, Points, Points, float], Points]
    initial: Callable[[Points], Points]


def collocation(num: int, generator: torch.Generator, dtype: torch.dtype) -> tuple[Points, Points]:
    r"""Draw x and t of points of $[0, 2\pi) \times [0, 1]$ from a scrambled Sobol sequence."""
    seed = int(torch.randint(2**31, (), generator=generator))
    unit = torch.quasirandom.SobolEngine(2, scramble=True, seed=seed).draw(num, dtype=torch.float64).to(dtype)
    return PERIOD * unit[:, 0], unit[:, 1].clone()


def _convection(u: Field, x: Points, t: Points, beta: float) -> Points:
    x, t = _leaf(x), _leaf(t)
    u_x, u_t = _gradient(u(x, t), x, t)
    return u_t + beta * u_x


def _allen_cahn(u: Field, x: Points, t: Points, rate: float) -> Points:
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


CONVECTION = Equation("convection", "β", _convection, torch.sin)
"""u_t + β u_x = 0, u(x, 0) = sin x."""
ALLEN_CAHN = Equation("allen-cahn", "c", _allen_cahn, lambda x: 0.5 * torch.sin(x) + 0.3 * torch.cos(2 * x))
"""u_t = 0.05 u_xx + c (u − u³), u(x, 0) = 0.5 sin x + 0.3 cos 2x."""

EQUATIONS = {equation.name: equation for equation in (CONVECTION, ALLEN_CAHN)}


class Solution(NamedTuple):
    """A solution on a grid of places and times."""

    x: Points
    t: Points
    u: Float[Tensor, "t x"]

    def error_of(self, other: Float[Tensor, "t x"]) -> float:
        """Return the relative L2 error of another field on the same grid."""
        return float(torch.linalg.norm(other - self.u) / torch.linalg.norm(self.u))


def solve(
    equation: Equation,
    coefficient: float,
    *,
    num_x: int = 64,
    num_t: int = 51,
    num_modes: int = 256,
    tolerance: float = 1e-10,
) -> Solution:
    """Solve an equation in float64: Fourier modes in space, scipy's adaptive Runge-Kutta method in time.

    Args:
        equation: The family.
        coefficient: Its coefficient.
        num_x: Places of the grid that is returned; a divisor of ``num_modes``.
        num_t: Times of that grid, from 0 to 1.
        num_modes: Points of the discretisation in space.
        tolerance: Relative and absolute tolerance of each step in time.

    Raises:
        FloatingPointError: If the solver gives up.
    """
    x = PERIOD * torch.arange(num_modes, dtype=torch.float64) / num_modes
    times = np.linspace(0, 1, num_t)
    # multiplication in Fourier space differentiates; the highest mode has no first derivative on the grid
    waves = np.fft.rfftfreq(num_modes, 1 / num_modes)
    first = 1j * np.where(waves == num_modes // 2, 0, waves)

    def velocity(_: float, u: np.ndarray) -> np.ndarray:
        spectrum = np.fft.rfft(u)
        if equation.name == "convection":
            return -coefficient * np.fft.irfft(first * spectrum, num_modes)
        return VISCOSITY * np.fft.irfft(-(waves**2) * spectrum, num_modes) + coefficient * (u - u**3)

    start = equation.initial(x).numpy()
    done = solve_ivp(velocity, (0, 1), start, method="DOP853", t_eval=times, rtol=tolerance, atol=tolerance)
    if not done.success:
        raise FloatingPointError(
            f"no reference solution of {equation.name} at {coefficient:g}: {done.message}"
        )
    step = num_modes // num_x
    return Solution(x[::step], torch.from_numpy(times), torch.from_numpy(done.y.T)[:, ::step].contiguous())

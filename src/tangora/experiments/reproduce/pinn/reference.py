"""Reference solutions: a Fourier discretisation in space, scipy's adaptive Runge-Kutta method in time."""

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from scipy.integrate import solve_ivp
from torch import Tensor

from tangora.experiments.reproduce.pinn.equations import PERIOD, VISCOSITY, Equation, Points


class Solution(NamedTuple):
    """A solution on a grid.

    Attributes:
        x: Places.
        t: Times.
        u: One row per time.
    """

    x: Points
    t: Points
    u: Float[Tensor, "t x"]

    def error_of(self, other: Float[Tensor, "t x"]) -> float:
        """Return the relative L2 error of another field on the same grid.

        Args:
            other: Its values.

        Returns:
            The norm of the difference over the norm of this solution.
        """
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
    """Solve an equation numerically.

    Args:
        equation: Which.
        coefficient: Its coefficient.
        num_x: Places of the grid that is returned; a divisor of ``num_modes``.
        num_t: Times of that grid, from 0 to 1.
        num_modes: Points of the discretisation in space.
        tolerance: Relative and absolute, of each step in time.

    Returns:
        The solution in float64.

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

    done = solve_ivp(
        velocity,
        (0, 1),
        equation.initial(x).numpy(),
        method="DOP853",
        t_eval=times,
        rtol=tolerance,
        atol=tolerance,
    )
    if not done.success:
        raise FloatingPointError(
            f"no reference solution of {equation.name} at {coefficient:g}: {done.message}"
        )
    step = num_modes // num_x
    return Solution(x[::step], torch.from_numpy(times), torch.from_numpy(done.y.T)[:, ::step].contiguous())
